"""Pictures of a run: each peer's time over rnnkern's, or, of a scaling grid, curves with their exponents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rnnkern.bench.cells import Cell
from rnnkern.bench.results import UNWATCHED, Row, Run, has_times, ours, rows_by_cell
from rnnkern.bench.stats import ratios, spread
from rnnkern.bench.table import curves, fits, size

#: of Okabe & Ito: distinct to every kind of colour vision
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8B4513", "#6A3D9A")
MARKERS = "oDsv^P*X<>"


def write(run: Run, path: Path) -> None:
    """Draw a run as PNG; ``path`` holds a whole picture or what it held before.

    Raises:
        ValueError: nothing in the run has a time.
    """
    figure = draw(run)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=130)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def draw(run: Run) -> Figure:
    """The figure, outside of pyplot."""
    cells = rows_by_cell(run)
    if any(cell.series for cell in cells):
        return _scaling(run, cells)
    panels: dict[tuple[str, str], dict[Cell, dict[str, Row]]] = {}
    for cell, rows in cells.items():
        if ours(rows) is not None and cell.mode not in ("record", "figures"):
            panels.setdefault((cell.mode, cell.dtype), {})[cell] = rows
    if not panels:
        raise ValueError("nothing in this run has a time of rnnkern's: there is nothing to draw")
    widest = max(map(len, panels.values()))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, 1.6 + 0.55 * widest) * columns, 3.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    peers = [p for p in dict.fromkeys(row["peer"] for row in run["rows"]) if p != "GEMM"]
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (key, chosen) in zip(grid, panels.items()):
        _ratios(axes, *key, chosen, peers)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    named = dict(pair for axes in grid for pair in zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(named.values(), named, loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    figure.suptitle(
        f"{_title(run)}\nabove the line: slower than rnnkern; bars: quartiles", x=0.01, ha="left", fontsize=10
    )
    return figure


def _title(run: Run) -> str:
    where = run["machine"].get("gpu") or run["machine"]["cpu"]
    return f"{where}, {run['settings']['threads']} threads, commit {run['commit']}, grid {run['grid']}"


def _look(peer: str, peers: list[str]) -> dict[str, Any]:
    number = peers.index(peer.removesuffix(UNWATCHED)) if peer.removesuffix(UNWATCHED) in peers else peers.index(peer)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _ratios(axes: Axes, mode: str, dtype: str, cells: dict[Cell, dict[str, Row]], peers: list[str]) -> None:
    """Above the line rnnkern is faster, below it the peer."""
    axes.axhline(1, color=COLOURS[0], linewidth=2, label="rnnkern")
    drawn = [p for p in peers if any(p in rows and has_times(rows[p]) and p != ours(rows) for rows in cells.values())]
    for number, peer in enumerate(drawn):
        shift = 0.5 * (number + 0.5) / len(drawn) - 0.25
        places, middles, errors = [], [], []
        for place, rows in enumerate(cells.values()):
            mine = ours(rows)
            if mine is None or peer == mine or peer not in rows or not has_times(rows[peer]):
                continue
            r = spread(ratios(rows[peer]["seconds"], rows[mine]["seconds"]))
            places.append(place + shift)
            middles.append(r.median)
            errors.append((r.median - r.low, r.high - r.median))
        look = _look(peer, peers)
        hollow: dict[str, Any] = {"markerfacecolor": "none"} if peer.endswith(UNWATCHED) else {}
        axes.errorbar(places, middles, np.array(errors).T, linestyle="", markersize=6, label=peer, **look, **hollow)
    axes.set_yscale("log")
    lengths = {cell.T for cell in cells}
    labels = [size(c) if len(lengths) > 1 else size(c).partition(", ")[2] for c in cells]
    axes.set_xticks(range(len(cells)), labels, rotation=30, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xlabel("T, B, H" if len(lengths) > 1 else f"B, H (T = {lengths.pop()})")
    axes.set_ylabel("time, rnnkern's = 1")
    _plain_numbers(axes)
    axes.set_title(f"{mode}, {dtype}", loc="left")
    _tidy(axes)


def _scaling(run: Run, cells: dict[Cell, dict[str, Row]]) -> Figure:
    panels = curves(cells)
    if not panels:
        raise ValueError("no series of this run has a point: there is nothing to draw")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    peers = list(dict.fromkeys(row["peer"] for row in run["rows"]))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, ((series, quantity), by_peer) in zip(grid, panels.items()):
        for peer, points in by_peer.items():
            x, y = np.array(sorted(points)).T
            fit = fits(points)
            label = peer if fit is None else f"{peer}: {series}^{fit.overall:.2f}, end {fit.at_the_end:.2f}"
            scale = 1e3 if quantity == "time" else 1 / 2**20
            axes.plot(x, y * scale, label=label, markersize=5, **_look(peer, peers))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(series)
        axes.set_ylabel("training step, ms" if quantity == "time" else "peak memory of a step, MiB")
        axes.set_title(f"{quantity} against {series} ({_others(series, quantity, cells)})", loc="left", fontsize=9)
        _plain_numbers(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.legend(frameon=False, fontsize=7)
        _tidy(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=10)
    return figure


def _others(series: str, quantity: str, cells: dict[Cell, dict[str, Row]]) -> str:
    """The sizes that stay the same along the curve."""
    cell = next(c for c in cells if (c.series, c.quantity) == (series, quantity))
    return ", ".join(f"{name}={getattr(cell, name)}" for name in ("T", "B", "H") if name != series)


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    if high / low > 30:
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        digits = "25" if high / low > 10 else "123456789"  # more would lie on top of each other
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")
        )
        axes.tick_params(axis="y", which="minor", labelsize=7)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
