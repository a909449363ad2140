"""The demo's picture: the norm against the lag, and the test accuracy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rnnkern.demo.digits import Run, Sample, T

COLOURS = ("#D55E00", "#0072B2")  # vermilion and blue of Okabe & Ito: distinct to every kind of colour vision


def write(runs: Sequence[Run], path: Path) -> None:
    """Draw the runs; ``path`` holds a whole picture or what it held before."""
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    flow, accuracy = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_flow(flow, runs)
    _draw_accuracy(accuracy, runs)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=180)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_flow(axes: Axes, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS):
        for sample, style, when in (
            (run.first, "-", "training step 0"),
            (run.last, "--", f"training step {run.last.step}"),
        ):
            norms = np.where(sample.norms > 0, sample.norms, np.nan)  # an exact 0 has no logarithm
            axes.plot(norms, style, color=colour, linewidth=2, label=f"{run.name} init, {when}")
        _mark_horizon(axes, run.first, colour)
    axes.set_yscale("log")
    axes.set_xlim(0, T - 1)
    axes.set_xlabel("lag: steps back from the loss")
    axes.set_ylabel("‖∂L/∂h‖ over the batch")
    axes.set_title("How much gradient reaches each step", loc="left")
    axes.legend(frameon=False, loc="lower left")  # every curve begins above it
    _tidy(axes)


def _mark_horizon(axes: Axes, sample: Sample, colour: str) -> None:
    if sample.horizon >= T - 1:
        return
    point = (sample.horizon, sample.norms[sample.horizon])
    text = f"horizon: {sample.horizon} steps back,\nthen less than 1/1000 is left"
    axes.plot(*point, "o", color=colour, markersize=7)
    axes.annotate(text, point, (12, 7), textcoords="offset points", color=colour, verticalalignment="center")


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    epochs = len(runs[0].accuracies) - 1
    best = max(runs, key=lambda run: run.accuracies[-1])
    for run, colour in zip(runs, COLOURS):
        axes.plot(run.accuracies, color=colour, linewidth=2)
        # Clear of the curve's right half, where the label stands: the better run's above, the other's below.
        beside, offset, anchor = (max, 5, "bottom") if run is best else (min, -5, "top")
        axes.annotate(
            f"{run.name} init: {run.accuracies[-1]:.1%}",
            (epochs, beside(run.accuracies[epochs // 2 :])),
            (0, offset),
            textcoords="offset points",
            color=colour,
            horizontalalignment="right",
            verticalalignment=anchor,
        )
    axes.set_xlim(0, epochs)
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.arange(0, 1.1, 0.2))
    axes.set_xlabel("epoch")
    axes.set_title("Test accuracy", loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
