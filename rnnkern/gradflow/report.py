"""The report: one HTML page that holds its own pictures and asks no network."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rnnkern.gradflow import plots, table  # plots says what to install, where matplotlib is missing
from rnnkern.gradflow.history import History
from rnnkern.gradflow.record import ModuleRecord, Record

try:
    from jinja2 import Environment, StrictUndefined
except ImportError as error:
    raise ImportError("the report needs jinja2: pip install rnnkern[plot]") from error

import matplotlib
from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.j2")
PAPER = {"light": "#ffffff", "dark": "#15171a"}
INK = {"light": "#1c1e21", "dark": "#e6e8eb"}
DPI = 200


@dataclass(frozen=True)
class Image:
    """A picture on light and on dark paper, PNG in base64; width and height in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int
    alt: str
    caption: str


def page(
    model: str,
    watched: Sequence[str],
    every: int | Callable[[int], bool],
    steps: int,
    history: History,
    records: Sequence[Record],
    needs: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        model: what the watched model is called.
        watched: names of the watched modules.
        every: as in :func:`rnnkern.watch`.
        steps: how many training steps have ended.
        history: the curves of the steps that were read.
        records: of which the last is shown, in the order "lag".
        needs: as in :meth:`Record.verdict`.
        notes: what else is to be said of the run; a paragraph each.

    Raises:
        RuntimeError: there is no record.
    """
    if not records:
        raise RuntimeError("nothing has been recorded yet, so there is nothing to report: no backward was sampled")
    record = records[-1]
    modules = [record[name] for name in record.modules]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=model,
        step=record.step,
        watched=[_described(name, record) for name in watched],
        sampled=_sampled(every, steps, history.steps),
        scaling=", ".join(table.scaling(record)),
        paper=PAPER,
        notes=notes,
        verdict=[_split(line) for line in str(record.verdict(needs)).splitlines()],
        modules=[{"name": m.name, "T": m.squares.shape[3], "samples": m.samples, "rows": _rows(m)} for m in modules],
        silent=[name for name in watched if name not in record.modules],
        curve=_image(
            lambda: _curves(record),
            f"Lines of log10 norm against the lag, in training step {record.step}",
            "Read from left to right as the gradient travels: lag 0 is the last time step. A straight fall loses the "
            "same factor at each step; a flat line reaches all of the sequence.",
        ),
        maps=[
            _image(
                lambda name=name: plots.heat_map(history, [name]),  # type: ignore[misc]
                f"Heat map of {name}: log10 norm by lag and training step",
                f"{name}: each column is the curve of one training step, seen from above. The brightest is the largest "
                "norm of its step, the darkest at most a trillionth of it; the scale is the same in every report. "
                "Up to the white line, the memory horizon, at least 1/1000 of the norm at lag 0 arrives."
                + (" A mark on top says that the GradScaler skipped the step." if history.skipped else ""),
            )
            for name in watched
            if len(history.curves(name)[0])
        ],
        versions=_versions(),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def write(page: str, path: str | os.PathLike[str]) -> None:
    """``path`` holds the whole page, or what it held before.

    Raises:
        OSError: it cannot be written; the error names the path.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, f"the report cannot be written: {error.strerror}", str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sampled(every: int | Callable[[int], bool], steps: int, shown: Sequence[int]) -> str:
    chosen = "steps that the caller chose" if callable(every) else "each step" if every == 1 else f"every {every} steps"
    which = f"{len(shown)} of them, from step {shown[0]} to step {shown[-1]}" if len(shown) > 1 else f"step {shown[0]}"
    return f"Sampled: {chosen}. {steps} step{'s have' if steps != 1 else ' has'} ended; this page shows {which}."


def _split(sentence: str) -> tuple[str, str]:
    """What a sentence is about, which stands before a colon, and the rest."""
    where, colon, says = sentence.partition(": ")
    return (where + ":", says) if colon else ("", sentence)


def _described(name: str, record: Record) -> str:
    if name not in record.modules:
        return name
    layers, directions = record[name].squares.shape[1:3]
    return f"{name} ({layers} layer{'s' * (layers > 1)}{', both directions' if directions > 1 else ''})"


def _rows(record: ModuleRecord) -> list[dict[str, Any]]:
    columns: list[tuple[NDArray[Any], str]] = [
        (record.log10_first, ".2f"),
        (record.log10_last, ".2f"),
        (record.slope, "+.3f"),
        (record.horizon, ".0f"),
        (record.zeros, "d"),
        (record.nonfinite, "d"),
    ]
    return [
        {
            "label": f"l{layer}" + (" reverse" if direction else ""),
            "numbers": [_number(values[layer, direction], form) for values, form in columns],
        }
        for layer, direction in np.ndindex(columns[0][0].shape)
    ]


def _number(value: Any, form: str) -> str:
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, form).replace("-", "−")


def _curves(record: Record) -> Figure:
    axes = record.plot()
    axes.set_title("", loc="left")  # the page has one
    assert isinstance(axes.figure, Figure)
    return axes.figure


def _image(draw: Callable[[], Figure], alt: str, caption: str) -> Image:
    encoded = {}
    for theme in ("light", "dark"):
        with matplotlib.rc_context(_style(theme)):
            figure = draw()
            # Half of a desktop window's width, so that letters are large enough where the page is as wide as a phone.
            width, height = figure.get_size_inches() * (5.0 / 6.4)
            figure.set_size_inches(width, height)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            encoded[theme] = base64.b64encode(file.getvalue()).decode()
    return Image(encoded["light"], encoded["dark"], int(width * 100), int(height * 100), alt, caption)


def _style(theme: str) -> Any:
    ink, paper = INK[theme], PAPER[theme]
    of_ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    of_paper = ("figure.facecolor", "savefig.facecolor", "axes.facecolor")
    return {**dict.fromkeys(of_ink, ink), **dict.fromkeys(of_paper, paper), "font.size": 10, "text.usetex": False}


def _versions() -> str:
    import rnnkern

    packages = {
        "rnnkern": rnnkern.__version__,
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }
    return ", ".join(f"{name} {version}" for name, version in packages.items())
