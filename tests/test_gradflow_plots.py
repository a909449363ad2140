"""What the pictures show, read back from the artists; no pixels are compared."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gradflow_helpers import Classifier, read
from matplotlib import pyplot  # only to see that nobody uses it
from matplotlib.figure import Figure
from torch import nn

import rnnkern
from rnnkern.gradflow import Flow, ModuleRecord, Record, plots
from rnnkern.gradflow.history import History

pytestmark = pytest.mark.usefixtures("nothing_stays", "no_figure_stays_open")


@pytest.fixture
def no_figure_stays_open() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert pyplot.get_fignums() == []


def record(norms: np.ndarray, **options: object) -> ModuleRecord:
    """Norms (layers, directions, T, B) in input order."""
    squares = np.broadcast_to(np.square(norms), (3, *norms.shape))
    return ModuleRecord("net.rnn", squares, np.full(norms.shape[3], norms.shape[2]), **options)  # type: ignore[arg-type]


def written(figure: Figure) -> None:
    figure.canvas.draw()  # lays out and draws all


# The curve


@pytest.mark.parametrize("order", ["processing", "input", "lag"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_curve(order: str, per_sample: bool) -> None:
    rec = record(np.exp(np.random.default_rng(0).normal(size=(2, 2, 5, 3))), order=order, per_sample=per_sample)
    ax = rec.plot()
    written(ax.figure)
    expected = record(np.sqrt(rec.squares[0]), order=order).log10_norm.reshape(4, 5)
    assert len(ax.lines) == 4
    for line, y in zip(ax.lines, expected):
        np.testing.assert_array_equal(line.get_ydata(), y)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(5))
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["l0", "l0 reverse", "l1", "l1 reverse"]
    assert ax.get_xlabel() == plots.AXIS[order]
    assert "log10 ‖∂L/∂h‖" in ax.get_ylabel() and "units" in ax.get_ylabel()


def test_zeros_and_what_is_not_finite_are_marked() -> None:
    norms = np.array([1.0, 0.0, np.inf, np.nan, 10.0, 0.0]).reshape(1, 1, 6, 1)
    ax = record(norms).plot()
    written(ax.figure)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0, np.nan, np.nan, np.nan, 1, np.nan])
    marks = {line.get_gid(): line.get_xdata().tolist() for line in ax.lines[1:]}
    assert marks == {"exactly 0": [1, 5], "not finite": [2, 3]}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["l0", "exactly 0", "not finite"]
    low, high = ax.get_ylim()
    assert low < 0 < 1 < high < 2  # the marks stretch no scale


def test_into_the_axes_of_the_caller() -> None:
    figure = Figure()
    ax = figure.subplots()
    assert record(np.ones((1, 1, 4, 1))).plot(ax) is ax
    assert record(np.ones((1, 1, 4, 1))).plot(ax=ax) is ax
    assert len(ax.lines) == 2


@pytest.mark.parametrize("T", [1, 2])
def test_short_sequences(T: int) -> None:
    ax = record(np.ones((1, 1, T, 1))).plot()
    written(ax.figure)
    assert ax.lines[0].get_marker() == ("o" if T == 1 else "None")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("_$a", rnnkern.RNN(3, 8))
        self.b = rnnkern.RNN(8, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.get_submodule("_$a")(x)[0])[1][-1]


def watched(steps: int = 3) -> Flow:
    """Of a model with two RNNs, of which one has a name that is no mathematics."""
    model = Pair()
    with rnnkern.watch(model, keep=steps) as flow:
        for _ in range(steps):
            model(torch.randn(7, 2, 3)).sum().backward()
            flow.step()
    return flow


def test_all_modules_in_one() -> None:
    rec = read(watched(), order="lag")
    ax = rec.plot()
    written(ax.figure)
    names = ["l0 of _$a", "l0 of b", "l1 of b"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert "training step 2" in ax.get_title(loc="left")
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), rec["b"].log10_norm[1, 0])
    assert len(rec["b"].plot().lines) == 2


def test_a_layer_has_a_colour_and_a_direction_a_style() -> None:
    one, both = np.ones((1, 1, 4, 1)), np.ones((2, 2, 4, 1))
    ax = plots.curves([record(one), record(both), record(np.zeros((1, 1, 4, 1)))])
    written(ax.figure)
    seen = [(line.get_color(), line.get_linestyle()) for line in ax.lines[:-1]]  # the last are marks
    a, b, c, d = plots.COLOURS[:4]
    assert seen == [(a, "-"), (b, "-"), (b, "--"), (c, "-"), (c, "--"), (d, "-")]


# The heat map


def run(*columns: list[float], steps: list[int] | None = None) -> History:
    """Norms by lag of one layer and direction, one sample."""
    kept = History()
    for step, column in zip(steps or range(len(columns)), columns):
        rec = record(np.array(column[::-1]).reshape(1, 1, -1, 1))
        kept.add(Record(step, ["net.rnn"], [rec]))
    return kept


def cells(image: object) -> np.ndarray:
    """The array of an image, NaN where it is masked."""
    return np.ma.filled(image.get_array().astype(float), np.nan)  # type: ignore[attr-defined]


def test_heat_map() -> None:
    """Relative to the largest of each step; other colours for 0, for what is not finite and for lags that are not."""
    history = run([1.0, 0.1, 0.0, 1e-20], [2.0, 20.0, np.inf, np.nan], [5.0, 5e-3], steps=[0, 10, 30])
    figure = plots.heat_map(history, ["net.rnn"])
    written(figure)
    ax = figure.axes[0]
    finite, zero, nonfinite = ax.images
    nan = np.nan
    np.testing.assert_allclose(
        cells(finite), [[0, -1, 0], [-1, 0, -3], [nan, nan, nan], [-20, nan, nan]], rtol=1e-6, atol=1e-6
    )
    assert np.argwhere(np.isfinite(cells(zero))).tolist() == [[2, 0]]
    assert np.argwhere(np.isfinite(cells(nonfinite))).tolist() == [[2, 1], [3, 1]]
    colours = {tuple(image.get_cmap()(0.5)) for image in (zero, nonfinite)}
    assert len(colours) == 2
    assert not colours & {tuple(c) for c in finite.get_cmap()(np.linspace(0, 1, 256))}
    assert ax.get_xlim() == (-5, 40)  # a column reaches halfway to the next
    assert ax.get_ylim() == (-0.5, 3.5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "lag (time steps)")
    assert "net.rnn" in figure.get_suptitle()
    assert "log10" in figure.axes[-1].get_xlabel()  # the colour bar's
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["memory horizon", "exactly 0 (1 cells)", "not finite (2 cells)", "no such lag (2 cells)"]


def test_the_scale_is_fixed() -> None:
    for column in ([1.0, 0.9], [1.0, 1e-30], [0.0, 0.0], [np.nan, np.nan]):
        figure = plots.heat_map(run(column), ["net.rnn"])
        written(figure)
        norm = figure.axes[0].images[0].norm
        assert (norm.vmin, norm.vmax) == (-12, 0)


@pytest.mark.parametrize("columns", [[[1.0]], [[1.0], [2.0]], [[0.0]], [[np.nan, 1.0]]], ids=str)
def test_the_smallest_pictures(columns: list[list[float]]) -> None:
    figure = plots.heat_map(run(*columns), ["net.rnn"])
    written(figure)
    assert figure.axes[0].images[0].get_array().shape == (len(columns[0]), len(columns))


def test_horizon_is_that_of_the_record() -> None:
    columns = [
        [1.0, 0.5, 1e-4, 0.1, 1e-5],
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [1.0, 1e-9, 0, 0, 0],
        [0.0, 1, 1, 1, 1],
        [np.nan] * 5,
    ]
    history = run(*columns)
    values = history.curves("net.rnn")[1][0, 0]
    expected = [record(np.array(c[::-1]).reshape(1, 1, -1, 1)).horizon.item() for c in columns]
    np.testing.assert_array_equal(expected, [3, 4, 0, np.nan, np.nan])
    np.testing.assert_array_equal(plots.horizon(values), expected)
    ax = plots.heat_map(history, ["net.rnn"]).axes[0]
    (line,) = ax.patches
    np.testing.assert_array_equal(line.get_data().values, expected)


def test_panels() -> None:
    flow = watched()
    figure = flow.plot()
    written(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes[:-1]] == ["l0 of _$a", "l0 of b", "l1 of b"]
    for ax, layer in zip(flow.plot("b").axes, range(2)):
        assert ax.get_title(loc="left") == f"l{layer}"
        expected = [np.log10(rec["b"].rms_by_lag[layer, 0]) for rec in flow.history()]
        expected = [column - column.max() for column in expected]
        np.testing.assert_allclose(cells(ax.images[0]), np.array(expected).T, atol=1e-5)


def test_panels_of_the_caller() -> None:
    flow = watched()
    figure = Figure()
    axes = figure.subplots(2, 1)
    assert flow.plot("b", axes) is figure
    written(figure)
    single = Figure()
    assert flow.plot("_$a", ax=single.subplots()) is single
    written(single)
    with pytest.raises(ValueError, match="ax must be 2 Axes, one for each of l0, l1; got 1"):
        flow.plot("b", Figure().subplots())


def test_errors() -> None:
    model = Classifier()
    with rnnkern.watch(model) as flow:
        with pytest.raises(RuntimeError, match="nothing has been recorded of 'rnn' yet"):
            flow.plot()
        with pytest.raises(KeyError, match="'x' is not watched; there is 'rnn'"):
            flow.plot("x")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = watched()
    rec = read(flow)
    monkeypatch.delitem(sys.modules, "rnnkern.gradflow.plots")
    monkeypatch.delattr("rnnkern.gradflow.plots")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (rec.plot, rec["b"].plot, flow.plot):
        with pytest.raises(ImportError, match=r"pip install rnnkern\[plot\]"):
            call()
    assert "l1" in repr(rec)  # all else works


def test_pictures_hold_neither_flow_nor_model() -> None:
    flow = watched()
    alive = [weakref.ref(flow), weakref.ref(flow._recorder)]
    pictures = [flow.plot(), read(flow).plot()]
    gc.collect()
    del flow
    assert [ref() for ref in alive] == [None, None]
    del pictures


def test_a_long_run_is_one_image() -> None:
    """Half a million cells are drawn in one piece."""
    kept = History()
    for step in range(500):
        kept.add(Record(step * step, ["net.rnn"], [record(np.full((1, 1, 1000, 1), 0.5))]))
    figure = plots.heat_map(kept, ["net.rnn"])
    written(figure)
    (image,) = figure.axes[0].images
    assert image.get_array().shape == (1000, 500)
