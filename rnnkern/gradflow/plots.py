"""Pictures of a record and of a run. Figures are made without pyplot: nothing stays open, no display is needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.markers import CARETDOWN
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("pictures of gradient flow need matplotlib: pip install rnnkern[plot]") from error

from rnnkern.gradflow.record import HORIZON_EPS

if TYPE_CHECKING:
    from rnnkern.gradflow.history import History
    from rnnkern.gradflow.record import Floats, ModuleRecord

#: The colour scale of every heat map: log10 of the norm relative to the largest of the step. Below it, its darkest.
SCALE = (-12.0, 0.0)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito: for every colour vision
ZERO, NONFINITE = "#9a9a9a", "#e0218a"  # neither is on the scale, which goes from dark violet to yellow
SKIPPED: dict[str, Any] = dict(linestyle="", marker=CARETDOWN, markersize=5, color=COLOURS[4])  # points at its column
MARKS = {"exactly 0": "|", "not finite": "x"}
AXIS = {
    "processing": "time step, in the order of processing",
    "input": "time step of the input",
    "lag": "lag: time steps back from the last",
}


def curves(records: Sequence[ModuleRecord], ax: Axes | None = None) -> Axes:
    """log10 ‖∂L/∂h_t‖ of records in one order; see :meth:`ModuleRecord.plot`."""
    if ax is None:
        ax = _figure(6.4, 4.0).add_subplot()
    handles: list[Line2D] = []
    labels: list[str] = []
    marks: dict[str, Line2D] = {}
    colour = COLOURS[0]
    colours = itertools.cycle(COLOURS)  # one for both directions of a layer
    for record in records:
        logs = dataclasses.replace(record, per_sample=False).log10_norm
        for layer, direction in np.ndindex(logs.shape[:2]):
            y = logs[layer, direction]
            colour = colour if direction else next(colours)
            (line,) = ax.plot(
                np.where(np.isfinite(y), y, np.nan), "--" if direction else "-", color=colour, linewidth=1.8
            )
            if np.isfinite(y).sum() == 1:
                line.set_marker("o")  # a line of one point shows nothing
            handles.append(line)
            labels.append(_label(layer, direction, record.name if len(records) > 1 else None))
            offset = 0.018 * ((len(handles) - 1) % 12)  # lines that are 0 at the same steps stay apart
            for what, rows, height in (
                ("exactly 0", np.isneginf(y), 0.02 + offset),
                ("not finite", np.isnan(y) | np.isposinf(y), 0.98 - offset),
            ):
                if rows.any():
                    marks[what] = Line2D([], [], linestyle="", marker=MARKS[what], color="0.5")
                    at = np.flatnonzero(rows)
                    bound = ax.get_xaxis_transform()  # x in steps, y in shares of the height
                    ax.plot(
                        at, np.full(len(at), height), MARKS[what], color=colour, markersize=4, transform=bound, gid=what
                    )
    if marks:
        ax.margins(y=0.05 + 0.018 * min(len(handles), 12))
    ax.set_xlabel(AXIS[records[0].order])
    ax.set_ylabel("log10 ‖∂L/∂h‖ over the batch\n(units of the loss / units of h)")
    ax.set_title("Gradient at each time step", loc="left")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(
        [*handles, *marks.values()], [*labels, *marks], frameon=False, fontsize="small", ncols=1 + len(labels) // 7
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a module may be called "$"
    return ax


def heat_map(history: History, modules: Sequence[str], ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """Lag against training step, a panel for each layer and direction; see :meth:`Flow.plot`."""
    panels = [
        (_label(layer, direction, name if len(modules) > 1 else None), steps, values[layer, direction], exists)
        for name in modules
        for steps, values, exists in [history.curves(name)]
        if len(steps)
        for layer, direction in np.ndindex(values.shape[:2])
    ]
    if not panels:
        raise RuntimeError(f"nothing has been recorded of {', '.join(map(repr, modules))} yet: no backward was sampled")
    is_ours = ax is None
    given: Any = ax
    if is_ours:
        given = _figure(6.4, 2.2 + 1.9 * len(panels)).subplots(len(panels), 1, sharex=True, squeeze=False)
    axes: list[Axes] = list(np.ravel(np.asarray(given, dtype=object)))
    if len(axes) != len(panels):
        names = ", ".join(label for label, *_ in panels)
        raise ValueError(f"ax must be {len(panels)} Axes, one for each of {names}; got {len(axes)}")
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    counts = {"exactly 0": 0, "not finite": 0, "no such lag": 0}
    skipped = np.array(history.skipped, np.int64)
    for panel, (label, steps, values, exists) in zip(axes, panels):
        image = _draw(panel, steps, values, exists, counts)
        at = np.intersect1d(skipped, steps)
        if at.size:
            top = panel.get_xaxis_transform()
            panel.plot(at, np.ones(len(at)), transform=top, clip_on=False, in_layout=False, gid="skipped", **SKIPPED)
        panel.set_title(label, loc="left", fontsize="medium", parse_math=False)
        panel.set_ylabel("lag (time steps)")
    axes[-1].set_xlabel("training step")
    if is_ours:
        axes[0].set_xlim(min(_edges(steps)[0] for _, steps, *_ in panels), max(_edges(s)[-1] for _, s, *_ in panels))
        of = f": {modules[0]}" if len(modules) == 1 else ""
        figure.suptitle(f"How far back the gradient reaches{of}", ha="left", x=0.02, parse_math=False)
    bar = figure.colorbar(image, ax=axes, location="bottom", extend="min", aspect=40, pad=0.02)
    bar.set_label("log10 of ‖∂L/∂h‖ / the largest of the training step")
    colours: dict[str, Any] = {"exactly 0": ZERO, "not finite": NONFINITE, "no such lag": axes[0].get_facecolor()}
    handles: list[Line2D | Patch] = [Line2D([], [], color="white", linewidth=1.5, label="memory horizon")]
    handles += [
        Patch(facecolor=colours[what], edgecolor="0.7", label=f"{what} ({count} cells)")
        for what, count in counts.items()
        if count
    ]
    if skipped.size:
        steps_of = f"{skipped.size} step{'s' if skipped.size > 1 else ''}"
        handles.append(Line2D([], [], label=f"skipped by the GradScaler ({steps_of})", **SKIPPED))
    style: dict[str, Any] = dict(handles=handles, fontsize="small", facecolor="#404040", labelcolor="white")
    if is_ours:
        figure.legend(loc="outside lower center", ncols=2, **style)
    else:
        axes[0].legend(loc="best", **style)
    return figure


def relative(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns (lags, N) of logarithms less the largest finite one of each."""
    finite = np.isfinite(values)
    largest = np.where(finite, values, -np.inf).max(0)
    return values - np.where(finite.any(0), largest, np.float32(0))


def horizon(values: NDArray[np.float32]) -> Floats:
    """:attr:`ModuleRecord.horizon` of columns (lags, N) of logarithms."""
    known = np.isfinite(values[0])
    reached = values >= np.where(known, values[0], 0) + np.log10(HORIZON_EPS)
    return np.where(known, np.where(reached, np.arange(len(values))[:, None], 0).max(0), np.nan)


def _draw(
    ax: Axes, steps: NDArray[np.int64], values: NDArray[np.float32], exists: NDArray[np.bool_], counts: dict[str, int]
) -> ScalarMappable:
    shown = relative(values)
    finite = np.isfinite(shown)
    where = _edges(steps), np.arange(len(values) + 1) - 0.5
    # pcolorfast: a million cells are one image, not a million polygons.
    image = ax.pcolorfast(*where, np.ma.masked_array(shown, ~finite), cmap="viridis", norm=Normalize(*SCALE))
    for what, cells, colour in (
        ("exactly 0", np.isneginf(values), ZERO),
        ("not finite", exists & (np.isnan(values) | np.isposinf(values)), NONFINITE),
    ):
        counts[what] += int(cells.sum())
        if cells.any():
            ax.pcolorfast(*where, np.ma.masked_array(np.ones(cells.shape), ~cells), cmap=ListedColormap([colour]))
    counts["no such lag"] += int((~exists).sum())
    ax.stairs(horizon(values), where[0], baseline=None, color="white", linewidth=1.5)
    ax.set_xlim(where[0][0], where[0][-1])
    ax.set_ylim(-0.5, len(values) - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return image


def _edges(steps: NDArray[np.int64]) -> Floats:
    """Where columns meet: halfway between two steps; outside as wide as the neighbour."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _label(layer: int, direction: int, module: str | None) -> str:
    # The module stands last: matplotlib leaves labels with a leading underscore out of legends.
    return f"l{layer}" + (" reverse" if direction else "") + (f" of {module}" if module is not None else "")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
