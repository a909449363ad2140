"""The ring of steps on the device, and the curves of all steps that were read."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from gradflow_helpers import Classifier, read
from torch import Tensor

import rnnkern
from rnnkern.gradflow import Flow, ModuleRecord, Record, history, recorder
from rnnkern.gradflow.history import History

pytestmark = pytest.mark.usefixtures("nothing_stays")


def train(model: Classifier, flow: Flow, inputs: list[Tensor]) -> list[np.ndarray]:
    """A step for each input; the norms that a read() after each would have given."""
    norms = []
    for x in inputs:
        model(x).sum().backward()
        norms.append(flow._recorder._kept[-1].squares(flow._recorder.modules)["rnn"][0][0].sum(-1) ** 0.5)
        flow.step()
    return norms


def inputs(steps: int, T: int = 6) -> list[Tensor]:
    return list(torch.randn(steps, T, 2, 3))


# The ring


def test_keeps_the_newest_sampled_steps() -> None:
    model = Classifier()
    with rnnkern.watch(model, every=2, keep=3) as flow:
        assert flow.history() == []
        norms = train(model, flow, inputs(11))
        records = flow.history()
    assert [rec.step for rec in records] == [6, 8, 10]
    for rec in records:
        np.testing.assert_array_equal(rec.norm, norms[rec.step])
    assert read(flow).step == 10
    np.testing.assert_array_equal(read(flow).norm, records[-1].norm)


def test_one_is_kept_unless_asked() -> None:
    model = Classifier()
    with rnnkern.watch(model) as flow:
        train(model, flow, inputs(3))
        assert [rec.step for rec in flow.history()] == [2]


def test_orders_and_samples() -> None:
    model = Classifier()
    with rnnkern.watch(model, keep=2) as flow:
        train(model, flow, inputs(2))
        for plain, lag, apart in zip(flow.history(), flow.history(order="lag"), flow.history(per_sample=True)):
            np.testing.assert_array_equal(lag.norm, plain.norm[:, :, ::-1])
            np.testing.assert_allclose(np.sqrt(np.square(apart.norm).sum(-1)), plain.norm)
        with pytest.raises(ValueError, match="order must be one of"):
            flow.history(order="time")  # type: ignore[arg-type]


def test_nothing_is_copied_before_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring holds the tensors that backward brought; what leaves it is free at once."""
    model, refs = Classifier(), []
    monkeypatch.setattr(Tensor, "cpu", None)  # to the host: not before it is read
    gc.disable()
    try:
        with rnnkern.watch(model, keep=2) as flow:
            for x in inputs(4):
                model(x).sum().backward()
                (stats,) = (s for f in flow._recorder._kept[-1].received for s in f.stats.values())
                refs.append(weakref.ref(stats))
                flow.step()
                del stats
            assert [ref() is None for ref in refs] == [True, True, False, False]
            monkeypatch.undo()
            assert len(flow.history()) == 2
    finally:
        gc.enable()


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps that take more than the limit the oldest go; the newest stays whatever it takes."""
    model, one = Classifier(), 4 * 6 * 2 * 8
    monkeypatch.setattr(recorder, "MAX_BYTES", 2 * one + 1)
    with rnnkern.watch(model, keep=100) as flow:
        train(model, flow, inputs(5))
        assert [rec.step for rec in flow.history()] == [3, 4]
        train(model, flow, inputs(1, T=40))
        assert [rec.step for rec in flow.history()] == [5]


@pytest.mark.parametrize(("keep", "expected"), [(2, [2, 3]), (3, [0, 2, 3]), (9, [0, 2, 3])])
def test_a_late_backward_belongs_to_its_step(keep: int, expected: list[int]) -> None:
    model = Classifier()
    with rnnkern.watch(model, every=lambda step: step != 1, keep=keep) as flow:
        late = model(inputs(1)[0]).sum()
        flow.step()
        train(model, flow, []), model(inputs(1)[0]).sum().backward()
        flow.step()
        train(model, flow, inputs(2))
        late.backward()
        assert [rec.step for rec in flow.history()] == expected


def test_accumulation_and_sequences() -> None:
    model = Classifier()
    with rnnkern.watch(model, keep=4) as flow:
        for _ in range(2):
            for x in inputs(3):
                model(x).sum().backward()
            flow.step()
        with flow.sequence() as next_chunk:
            for x in inputs(2):
                next_chunk()
                model(x).sum().backward()
        records = flow.history()
        assert [(rec.samples, rec.norm.shape[2]) for rec in records] == [(6, 6), (6, 6), (2, 12)]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_wrong_keep(keep: object) -> None:
    with pytest.raises(ValueError, match=f"keep must be a positive int, got {keep}"):
        rnnkern.watch(Classifier(), keep=keep)  # type: ignore[arg-type]


# The curves


def record(step: int, *columns: np.ndarray, names: str = "a") -> Record:
    """One layer and direction, one sample, norms by time step."""
    modules = [
        ModuleRecord(
            name, np.broadcast_to(np.square(c)[None, None, None, :, None], (3, 1, 1, len(c), 1)), np.array([len(c)])
        )
        for name, c in zip(names, columns)
    ]
    return Record(step, list("ab"), modules)


def test_curves_are_by_lag_with_what_is_wrong() -> None:
    kept = History()
    kept.add(record(0, np.array([0.0, 1e-200, 1.0])))
    kept.add(record(7, np.array([np.nan, np.inf, 10.0, 100.0])))
    kept.add(record(8, np.array([1.0]), names="b"))
    steps, values, exists = kept.curves("a")
    assert steps.tolist() == [0, 7]
    assert values.shape == (1, 1, 4, 2)
    # 1e-200 squared is 0 in float64
    np.testing.assert_array_equal(values[0, 0], [[0, 2], [-np.inf, 1], [-np.inf, np.inf], [np.nan, np.nan]])
    np.testing.assert_array_equal(exists, [[True, True]] * 3 + [[False, True]])
    assert kept.curves("b")[0].tolist() == [8]
    assert len(kept.curves("c")[0]) == 0


def test_the_flow_collects_what_is_read() -> None:
    """Once a step, whatever the order and however often; a step that goes on replaces what it was."""
    model, (x, y, z) = Classifier(), inputs(3)
    with rnnkern.watch(model) as flow:
        model(x).sum().backward()
        first = read(flow, order="lag", per_sample=True)
        flow.read()
        flow.step()
        model(y).sum().backward()
        flow.read()
        model(z).sum().backward()
        second = read(flow)
    steps, values, _ = flow._curves.curves("rnn")
    assert steps.tolist() == [0, 1]
    for i, rec in enumerate([dataclasses.replace(first["rnn"], per_sample=False), second]):
        np.testing.assert_array_equal(values[..., i], np.log10(rec.rms_by_lag).astype(np.float32))


def test_older_steps_of_a_ring_take_their_place() -> None:
    model = Classifier()
    with rnnkern.watch(model, keep=3) as flow:
        train(model, flow, inputs(3))
        flow.read()
        assert flow._curves.steps == [2]
        flow.history()
        assert flow._curves.steps == [0, 1, 2]


@pytest.mark.parametrize("limit", ["columns", "bytes"])
def test_long_runs_are_thinned_evenly(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit == "columns":
        monkeypatch.setattr(history, "MAX_COLUMNS", 20)
    else:
        monkeypatch.setattr(history, "MAX_BYTES", 20 * 4 * 3)
    kept = History()
    for step in range(0, 5000, 10):
        kept.add(record(step, np.ones(3)))
        assert len(kept.steps) <= 20
        assert kept.steps[0] == 0
        assert kept.steps[-1] == step
    first = {step // kept.gap: step for step in reversed(range(0, 5000, 10))}  # of each gap
    assert kept.steps == sorted({*first.values(), 4990})
    assert len(kept.steps) > 10


def test_one_enormous_curve_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_BYTES", 1)
    kept = History()
    for step in range(4):
        kept.add(record(step, np.ones(3)))
    assert kept.steps == [0, 3]


def test_a_history_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Written, read with weights_only, and thinned as if nothing had been."""
    monkeypatch.setattr(history, "MAX_COLUMNS", 10)
    whole, part = History(), History()
    for step in range(40):
        if step == 25:
            torch.save(part.state_dict(), tmp_path / "state.pt")
            part = History()
            part.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for kept in (whole, part):
            kept.add(record(step, np.array([0.0, step, np.inf, 1.0]), np.ones(2), names="ab"))
    assert part.gap == whole.gap > 1
    for name in "ab":
        for values, expected in zip(part.curves(name), whole.curves(name)):
            np.testing.assert_array_equal(values, expected)
