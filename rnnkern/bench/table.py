"""A run as tables in the terminal: the fastest peer of a cell first, whoever it is."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rnnkern.bench.cells import MODES, Cell
from rnnkern.bench.results import STATUSES, UNWATCHED, Row, Run, has_times, is_ours, ours, rows_by_cell
from rnnkern.bench.stats import Exponent, Spread, differences, exponent, ratios, spread


class Sheet(NamedTuple):
    """A table, wherever it is shown."""

    title: str
    head: list[str]
    lines: list[list[str]]


#: the modes of a run in one table
GLANCED = ("infer", "train", "last")

COSTS = ["mode", "T, B, H", "rnnkern, whole step", "added (quartiles)", "added, %", "loop, whole step"]
COSTS += ["added to nn.RNN's", "to the loop's own", "the loop's cost over ours", "its step over ours"]


def tables(run: Run) -> RenderableType:
    """Everything: the machine, times by mode, the cost of measuring, scaling, and what was not timed."""
    cells = rows_by_cell(run)
    parts: list[RenderableType] = [Text(headline(run)), *map(_rich, at_a_glance(cells))]
    for mode, dtype in dict.fromkeys((cell.mode, cell.dtype) for cell in cells if not cell.series):
        chosen = {c: rows for c, rows in cells.items() if (c.mode, c.dtype, c.series) == (mode, dtype, "")}
        parts.append(_times(mode, dtype, chosen))
    parts += [_rich(sheet) for sheet in (*scaling(cells), *costs(cells))]
    parts += [Text(line) for line in untimed(run)]
    return Group(*parts)


def headline(run: Run) -> str:
    """What ran, on what."""
    machine, settings = run["machine"], run["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"grid {run['grid']} on {where}: {settings['threads']} of {machine['processors']} processors as threads, "
        f"subnormals {settings['subnormals']}, commit {run['commit']}, {run['started']}, {run['took']:.0f} s",
        versions,
    ]
    load = settings["load_before"]
    if load is not None and load > 0.3 * machine["processors"]:
        lines.append(f"The machine was busy with something else before (load {load}): times wander, ratios less so.")
    return "\n".join(lines)


def at_a_glance(cells: dict[Cell, dict[str, Row]]) -> list[Sheet]:
    """All modes and dtypes in one table: rnnkern's time, and how many times as long each other peer takes; nothing
    where there is one mode alone."""
    chosen = {
        (cell.dtype, size(cell), cell.mode): (cell, rows)
        for cell, rows in cells.items()
        if not cell.series and ours(rows) is not None
    }
    modes = [mode for mode in GLANCED if any(key[2] == mode for key in chosen)]
    if len(modes) < 2:
        return []
    peers: dict[str, list[str]] = {mode: [] for mode in modes}
    for (_, _, mode), (_, rows) in chosen.items():
        for name, row in rows.items() if mode in modes else ():
            other = not is_ours(name) and name != "GEMM" and not name.endswith(UNWATCHED)
            if other and has_times(row) and name not in peers[mode]:
                peers[mode].append(name)
    recorded = any(key[2] == "record" for key in chosen)
    head = ["dtype", "T, B, H"]
    for mode in modes:
        head += [f"{mode}, µs", *peers[mode], "of GEMM"]
    lines = []
    for dtype, sized in dict.fromkeys(key[:2] for key in chosen):
        line = [dtype, sized]
        for mode in modes:
            if (dtype, sized, mode) not in chosen:
                line += [""] * (2 + len(peers[mode]))
                continue
            cell, rows = chosen[dtype, sized, mode]
            mine = rows[str(ours(rows))]
            line.append(_micro(median(mine["seconds"]), cell))
            line += [_times_as_long(rows[p], mine) if p in rows and has_times(rows[p]) else "" for p in peers[mode]]
            line.append(share(cell, mine, rows))
        if recorded:
            _, rows = chosen.get((dtype, sized, "record"), (None, {}))
            cost = cost_of_measuring(rows).get("rnnkern") if rows else None
            plain = rows.get(f"{ours(rows)}{UNWATCHED}") if rows else None
            line.append(f"{cost.median / median(plain['seconds']):+.1%}" if cost is not None and plain else "")
        lines.append(line)
    title = "at a glance: rnnkern's µs a step, and how many times as long the others take"
    return [Sheet(title, [*head, "recording adds"] if recorded else head, lines)]


def _times_as_long(row: Row, mine: Row) -> str:
    """The factor without its quartiles."""
    middle = spread(ratios(row["seconds"], mine["seconds"])).median
    return f"{middle:.2f}" if row["status"] == mine["status"] == "timed" else f"≈ {middle:.2g}"


def _times(mode: str, dtype: str, cells: dict[Cell, dict[str, Row]]) -> Table:
    table = Table(title=f"{mode}, {dtype}: {MODES[mode]}", title_justify="left", box=SIMPLE_HEAD)
    for column in (
        "T, B, H",
        "peer",
        "µs a step",
        "quartiles",
        "rnnkern is … times as fast",
        "of GEMM's rate",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("T, B, H", "peer") else "right")
    for cell, rows in cells.items():
        mine = ours(rows)
        timed = sorted(filter(has_times, rows.values()), key=lambda row: median(row["seconds"]))
        for number, row in enumerate(row for row in timed if row["peer"] != "GEMM"):
            micro = spread([s / cell.T * 1e6 for s in row["seconds"]])
            table.add_row(
                size(cell) if number == 0 else "",
                row["peer"],
                f"{micro.median:.3g}",
                f"{micro.low:.3g}–{micro.high:.3g}" if row["status"] == "timed" else "one call",
                "" if mine in (None, row["peer"]) else factor(row, rows[str(mine)]),
                share(cell, row, rows),
                f"{row['error']:.0e}" if row.get("error") is not None else "",
                style="bold" if is_ours(row["peer"]) else None,
            )
        table.add_section()
    return table


def size(cell: Cell) -> str:
    """What tells cells of a mode apart."""
    text = f"{cell.T}, {cell.B}, {cell.H}"
    extras = {"I": cell.I if cell.I != cell.H else 0, "heads": cell.heads if cell.heads > 1 else 0}
    return text + "".join(f", {name}={value}" for name, value in extras.items() if value)


def factor(row: Row, mine: Row) -> str:
    """How many times the peer's time is ours, with the quartiles of the ratios of the rounds."""
    r = spread(ratios(row["seconds"], mine["seconds"]))
    if row["status"] == "one call" or mine["status"] == "one call":
        return f"≈ {r.median:.3g}"
    return f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})"


def share(cell: Cell, row: Row, rows: dict[str, Row]) -> str:
    """Of the rate of one product over all steps, in the same rounds: the matrix products' operations alone count."""
    gemm = rows.get("GEMM")
    if gemm is None or not has_times(gemm):
        return ""
    rate = 2.0 * cell.T * cell.B * cell.H**2 / median(gemm["seconds"])
    return f"{cell.flop / median(row['seconds']) / rate:.0%}"


def cost_of_measuring(rows: dict[str, Row]) -> dict[str, Spread]:
    """What recording the norms adds to a step, in seconds: by rnnkern, and by the loop that people write.

    "rnnkern": recording, less the same without. "loop": the loop with retain_grad, less nn.RNN, which one would use
    otherwise. "loop alone": less the same loop without. All round by round. Empty where something is missing.
    """
    mine = ours(rows)
    pairs = {
        "rnnkern": (mine, f"{mine}{UNWATCHED}"),
        "loop": ("cell loop", f"nn.RNN{UNWATCHED}"),
        "loop alone": ("cell loop", f"cell loop{UNWATCHED}"),
    }
    found = {}
    for name, (watched, plain) in pairs.items():
        if watched in rows and plain in rows and has_times(rows[watched]) and has_times(rows[plain]):
            found[name] = spread(differences(rows[watched]["seconds"], rows[plain]["seconds"]))
    return found


def times_cheaper(loop: Spread, mine: Spread) -> str:
    """The loop's cost over ours; where ours is lost in the noise, at least so many times."""
    if mine.low > 0:
        return f"{loop.median / mine.median:.0f}"
    return f"> {loop.median / mine.high:.0f}" if mine.high > 0 else "ours is lost in the noise"


def costs(cells: dict[Cell, dict[str, Row]]) -> list[Sheet]:
    """What recording the norms costs, against the loop that people write; nothing where it was not measured."""
    lines = []
    for cell, rows in cells.items():
        cost, mine = cost_of_measuring(rows), ours(rows)
        if mine is None or "rnnkern" not in cost:
            continue
        whole, plain = (median(rows[name]["seconds"]) for name in (mine, mine + UNWATCHED))
        low, middle, high = (_micro(seconds, cell) for seconds in cost["rnnkern"])
        line = [cell.mode, size(cell), _micro(whole, cell), f"{middle} ({low} to {high})"]
        line.append(f"{cost['rnnkern'].median / plain:+.1%}")
        if "loop" in cost:
            loop = median(rows["cell loop"]["seconds"])
            line += [_micro(loop, cell), _micro(cost["loop"].median, cell), _micro(cost["loop alone"].median, cell)]
            line += [times_cheaper(cost["loop"], cost["rnnkern"]), f"{loop / whole:.1f}x"]
        lines.append(line + [""] * (len(COSTS) - len(line)))
    return [Sheet("what measuring the norms costs, µs a step", COSTS, lines)] if lines else []


def _micro(seconds: float, cell: Cell) -> str:
    return f"{seconds / cell.T * 1e6:.3g}"


def curves(cells: dict[Cell, dict[str, Row]]) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """(series, "time" or "memory") -> peer -> points (size, median seconds or bytes)."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for cell, rows in cells.items():
        if not cell.series or cell.series == "net":
            continue
        for peer, row in rows.items():
            value = row.get("bytes") if cell.quantity == "memory" else median(row.get("seconds") or [float("nan")])
            if value is not None and value == value:
                line = found.setdefault((cell.series, cell.quantity), {}).setdefault(peer, [])
                line.append((float(getattr(cell, cell.series)), float(value)))
    return found


def fits(points: Iterable[tuple[float, float]]) -> Exponent | None:
    """The power law of a curve."""
    sizes, values = zip(*points)
    return exponent(sizes, values)


def scaling(cells: dict[Cell, dict[str, Row]]) -> list[Sheet]:
    """A table for each series, with fitted exponents, and one of nets."""
    sheets = []
    for (series, quantity), lines in curves(cells).items():
        scale, unit = (1e3, "ms") if quantity == "time" else (1 / 2**20, "MiB")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        body = []
        for peer, points in lines.items():
            there, fit = dict(points), fits(points)
            values = [f"{there[size] * scale:.3g}" if size in there else "–" for size in sizes]
            body.append([peer, *values, *(["", ""] if fit is None else [f"{e:.2f}" for e in fit])])
        head = ["peer", *(f"{size:g}" for size in sizes), "exponent", "at the end"]
        sheets.append(Sheet(f"{quantity} against {series}, {unit}", head, body))
    nets = {cell: rows for cell, rows in cells.items() if cell.series == "net"}
    if nets:
        peers = list(dict.fromkeys(peer for rows in nets.values() for peer in rows))
        body = []
        for cell, rows in nets.items():
            values = [f"{median(rows[p]['seconds']) * 1e3:.3g}" if has_times(rows[p]) else "–" for p in peers]
            body.append([f"{cell.layers}, {cell.directions}", *values])
        sheets.append(Sheet("layers and directions, ms", ["layers, directions", *peers], body))
    return sheets


def _rich(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(sheet.head):
        table.add_column(column, justify="right" if number else "left")
    for line in sheet.lines:
        table.add_row(*line)
    return table


def untimed(run: Run) -> list[str]:
    """A line for each peer and reason why cells of it were not timed in rounds, and for peers that are not here."""
    lines = []
    absent: dict[str, list[str]] = {}
    for peer, reason in run["missing"].items():
        absent.setdefault(reason, []).append(peer)
    lines += [f"not here: {', '.join(peers)}: {reason}" for reason, peers in absent.items()]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run["rows"]:
        if row["status"] not in ("timed", "measured"):
            groups.setdefault((row["status"], row.get("reason", "")), []).append(row)
    for (status, reason), rows in groups.items():
        peers, cells = (list(dict.fromkeys(values)) for values in zip(*((r["peer"], str(Cell.of(r))) for r in rows)))
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        why = f": {reason}" if reason else ""
        lines.append(f"{status} ({STATUSES[status]}): {', '.join(peers)}{why}: {cells[0]}{more}")
    return lines


def show(run: Run, console: Console) -> None:
    console.print(tables(run), highlight=False)
