"""Makes docs/results.md from the runs that are kept: nothing in that page is typed by hand.

    python benchmarks/page.py [--results benchmarks/results] [--page docs/results.md]

Every MACHINE/GRID.json that `rnnkern bench` wrote is a section, with its picture drawn anew; what lies there in another
form is only named.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from rnnkern.bench import plots, results, table
from rnnkern.bench.cells import MODES, Cell
from rnnkern.bench.grids import GRIDS
from rnnkern.bench.results import Row, Run, has_times, ours, rows_by_cell
from rnnkern.bench.stats import ratios, spread
from rnnkern.bench.table import Sheet

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    runs, others = collect(options.results)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(render(runs, others, options.page))
    for path, run in runs.items():
        plots.write(run, path.with_suffix(".png"))
    print(f"{options.page} written, of {len(runs)} runs")


def collect(folder: Path) -> tuple[dict[Path, Run], list[Path]]:
    """The runs, by file in the order of machines and grids, and the files that are something else."""
    runs, others = {}, []
    order = list(GRIDS)
    for path in sorted(folder.rglob("*"), key=lambda p: (p.parent, order.index(p.stem) if p.stem in order else 99, p)):
        if path.is_dir() or path.suffix == ".png":
            continue
        try:
            runs[path] = results.read(path)
        except ValueError:
            others.append(path)
    return runs, others


def render(runs: dict[Path, Run], others: list[Path], page: Path) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, page.parent)).as_posix()

    sections = [
        {**section(run), "file": link(path), "picture": link(path.with_suffix(".png"))} for path, run in runs.items()
    ]
    return environment.get_template("results.md.j2").render(sections=sections, others=[link(path) for path in others])


def section(run: Run) -> dict[str, Any]:
    """What the template shows of a run."""
    cells = rows_by_cell(run)
    tables = table.at_a_glance(cells)
    for mode, dtype in dict.fromkeys((cell.mode, cell.dtype) for cell in cells if not cell.series):
        chosen = {c: rows for c, rows in cells.items() if (c.mode, c.dtype, c.series) == (mode, dtype, "")}
        tables.append(times(f"{mode}, {dtype}: {MODES[mode]}", chosen))
    tables += [*table.scaling(cells), *table.costs(cells)]
    return {
        "title": f"{run['machine'].get('gpu') or run['machine']['cpu']}: {run['grid']}",
        "about": GRIDS[run["grid"]].about if run["grid"] in GRIDS else "a grid that is not there any more",
        "headline": table.headline(run).splitlines(),
        "tables": tables,
        "untimed": table.untimed(run),
    }


def times(title: str, cells: dict[Cell, dict[str, Row]]) -> Sheet:
    """µs a step of each peer, the fastest of a line in bold, and how many times ours it is, with quartiles."""
    peers = [p for p in dict.fromkeys(p for rows in cells.values() for p in rows) if p != "GEMM"]
    peers = [p for p in peers if any(p in rows and rows[p]["status"] != "refused" for rows in cells.values())]
    lines = []
    for cell, rows in cells.items():
        timed = {p: median(rows[p]["seconds"]) for p in peers if p in rows and has_times(rows[p])}
        best, mine = min(timed, key=lambda p: timed[p], default=None), ours(rows)
        line = [table.size(cell)]
        for peer in peers:
            if peer not in timed:
                line.append(rows[peer]["status"] if peer in rows else "")
                continue
            text = f"{timed[peer] / cell.T * 1e6:.3g}"
            text = f"**{text}**" if peer == best else text
            if mine is not None and peer != mine:
                r = spread(ratios(rows[peer]["seconds"], rows[mine]["seconds"]))
                whole = rows[peer]["status"] == rows[mine]["status"] == "timed"
                text += f"<br>{r.median:.2f}x ({r.low:.2f}–{r.high:.2f})" if whole else f"<br>≈ {r.median:.2g}x"
            line.append(text)
        line.append("" if mine is None else table.share(cell, rows[mine], rows))
        lines.append(line)
    return Sheet(title, ["T, B, H", *peers, "rnnkern, of GEMM's rate"], lines)


if __name__ == "__main__":
    main()
