"""An earlier run against a later one: has anything become slower?

Not by times, since the machine may have been another or busy, but by ratios: rnnkern against a yardstick of the same
rounds. A ratio has changed where the quartiles of before and after do not overlap and the medians differ by more than
5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rnnkern.bench.cells import Cell
from rnnkern.bench.results import UNWATCHED, Row, Run, has_times, is_ours, rows_by_cell
from rnnkern.bench.stats import Spread, ratios, spread

THRESHOLD = 1.05
#: in whose times ours are counted: the first that both runs have
YARDSTICKS = ("nn.RNN", f"nn.RNN{UNWATCHED}", "GEMM")


@dataclass(frozen=True)
class Change:
    """Of one peer in one cell: time over the yardstick's, before and after (of memory: bytes over 1)."""

    cell: Cell
    peer: str
    yardstick: str
    before: Spread
    after: Spread

    @property
    def factor(self) -> float:
        """Above 1: it has become slower, or larger."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        if self.factor > THRESHOLD and self.after.low > self.before.high:
            return "slower" if self.cell.quantity == "time" else "larger"
        if self.factor < 1 / THRESHOLD and self.after.high < self.before.low:
            return "faster" if self.cell.quantity == "time" else "smaller"
        return "same"

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "larger")


def changes(before: Run, after: Run) -> list[Change]:
    """Of every rnnkern peer in every cell that both runs have timed."""
    earlier, found = rows_by_cell(before), []
    for cell, rows in rows_by_cell(after).items():
        for peer, row in rows.items():
            old_rows = earlier.get(cell, {})
            if not is_ours(peer) or peer not in old_rows:
                continue
            old = old_rows[peer]
            if cell.quantity == "memory" and "bytes" in row and "bytes" in old:
                found.append(Change(cell, peer, "", spread([old["bytes"]]), spread([row["bytes"]])))
            elif has_times(row) and has_times(old):
                yardstick = _yardstick(rows, old_rows)
                if yardstick is not None:
                    pair = (spread(ratios(r[peer]["seconds"], r[yardstick]["seconds"])) for r in (old_rows, rows))
                    found.append(Change(cell, peer, yardstick, *pair))
    return found


def _yardstick(rows: dict[str, Row], old: dict[str, Row]) -> str | None:
    """Only one with rounds: of a single call there is no spread."""
    there = (y for y in YARDSTICKS if y in rows and y in old)
    return next((y for y in there if rows[y]["status"] == old[y]["status"] == "timed"), None)


def not_compared(before: Run, after: Run) -> list[str]:
    """What a reader should know: other machines or settings, cells of one run alone."""
    lines = []
    for what, a, b in (
        ("machine", before["machine"]["name"], after["machine"]["name"]),
        ("threads", before["settings"]["threads"], after["settings"]["threads"]),
        ("subnormals", before["settings"]["subnormals"], after["settings"]["subnormals"]),
        ("torch", before["versions"]["torch"], after["versions"]["torch"]),
    ):
        if a != b:
            lines.append(f"{what}: {a} before, {b} after: ratios may differ for that alone")
    compared = {(change.cell, change.peer) for change in changes(before, after)}
    for when, run in (("before", before), ("after", after)):
        alone = [
            f"{peer}, {cell}"
            for cell, rows in rows_by_cell(run).items()
            for peer, row in rows.items()
            if is_ours(peer) and row["status"] in ("timed", "measured") and (cell, peer) not in compared
        ]
        if alone:
            lines.append(f"measured {when} but not comparable: {len(alone)}, the first is {alone[0]}")
    return lines


def table(found: list[Change]) -> Table:
    """Those that changed most come first."""
    table = Table(title="time over the yardstick's, earlier → later", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "cell", "peer", "yardstick", "before", "after", "change"):
        table.add_column(column, justify="right" if column in ("before", "after", "change") else "left")
    for change in sorted(found, key=lambda c: -abs(c.factor - 1)):
        before, after = (
            f"{s.median:.3g} ({s.low:.3g}–{s.high:.3g})" if change.yardstick else f"{s.median / 2**20:.1f} MiB"
            for s in (change.before, change.after)
        )
        style = "bold red" if change.is_regression else None
        row = (
            change.verdict,
            str(change.cell),
            change.peer,
            change.yardstick,
            before,
            after,
            f"{change.factor - 1:+.1%}",
        )
        table.add_row(*row, style=style)
    return table
