"""rec.scalars() and flow.log(): the names, what is left out, and every kind of logger."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import Classifier, chain, read
from torch import nn

import rnnkern
from rnnkern.gradflow import ModuleRecord
from rnnkern.gradflow.scalars import ATTRIBUTES


class Run:
    """Takes what wandb.Run.log takes."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int | None]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append((data, step))


class Logger:
    """Takes what Lightning's Logger.log_metrics takes; has a log() of another kind beside it."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((metrics, step))

    def log(self, name: str, value: float) -> None:
        raise AssertionError


def test_values() -> None:
    """G_{T-k} = 0.5^k G_T in a scaled orthogonal chain."""
    rnn = chain(0.5)
    with rnnkern.watch(rnn) as flow:
        rnn(torch.zeros(20, 1, 3, dtype=torch.float64))[1].sum().backward()
    found = read(flow).scalars()
    assert {name: found[f"gradflow/rnn/l0/{name}"] for name in ("horizon", "zeros", "nonfinite")} == {
        "horizon": 9, "zeros": 0, "nonfinite": 0
    }  # fmt: skip
    assert found["gradflow/rnn/l0/log10_last"] == pytest.approx(math.log10(4), abs=1e-12)
    assert found["gradflow/rnn/l0/log10_first"] == pytest.approx(math.log10(4) - 19 * math.log10(2), abs=1e-12)
    assert found["gradflow/rnn/l0/slope"] == pytest.approx(-math.log10(2), abs=1e-12)


def test_names() -> None:
    rnn = rnnkern.RNN(3, 8, 2, bidirectional=True)
    with rnnkern.watch(rnn) as flow:
        rnn(torch.randn(6, 2, 3))[0].square().sum().backward()
    record = read(flow)
    there = [name for name, attribute in ATTRIBUTES.items() if hasattr(record["rnn"], attribute)]
    layers = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert sorted(record.scalars()) == sorted(f"gradflow/rnn/{layer}/{name}" for layer in layers for name in there)
    assert 6 <= len(there) <= 8
    assert all(type(value) is float for value in record.scalars().values())
    assert record["rnn"].scalars() == record.scalars()


def test_is_over_the_batch() -> None:
    model = Classifier()
    with rnnkern.watch(model) as flow:
        model(torch.randn(6, 2, 3)).mean().backward()
    assert read(flow, per_sample=True, order="lag").scalars() == read(flow).scalars()


def test_what_is_no_number_is_left_out() -> None:
    squares = np.zeros((3, 2, 1, 4, 1))
    squares[:, 1] = np.inf
    found = ModuleRecord("a.b", squares, np.array([4])).scalars()
    assert found == {
        "gradflow/a.b/l0/zeros": 4, "gradflow/a.b/l1/zeros": 0,
        "gradflow/a.b/l0/nonfinite": 0, "gradflow/a.b/l1/nonfinite": 4,
    }  # fmt: skip


def test_attributes_that_are_there() -> None:
    """saturation and gain come from the attributes that have one value a layer and direction."""

    class More(ModuleRecord):
        mean_gain = np.array([[0.5]])
        mean_saturation_factor = np.array([[np.nan]])

    found = More("rnn", np.ones((3, 1, 1, 4, 1)), np.array([4])).scalars()
    assert found["gradflow/rnn/l0/gain"] == 0.5 and "gradflow/rnn/l0/saturation" not in found


@pytest.mark.parametrize("writer", [Run(), Logger()], ids=["run", "logger"])
def test_logs_each_record_once(writer: Run | Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model, every=2) as flow:
        reads, log = [], flow.log
        inner = flow.read
        monkeypatch.setattr(flow, "read", lambda: reads.append(1) or inner())
        assert not log(writer, 0) and not writer.logged
        answers = []
        for i in range(5):
            model(torch.randn(6, 2, 3)).mean().backward()
            optimizer.step()
            answers += [log(writer, 10 * i), log(writer, 10 * i)]
        expected = read(flow).scalars()
    assert answers == [True, False, False, False, True, False, False, False, True, False]
    assert len(reads) == 4  # three records, and the one here: nothing new is nothing waited for
    assert [step for _, step in writer.logged] == [0, 20, 40]
    assert writer.logged[-1][0] == expected and expected


def test_loops_without_an_optimizer_go_on() -> None:
    """A log() that has nothing new ends the step all the same, as read() does."""
    model, run = Classifier(), Run()
    with rnnkern.watch(model, every=3) as flow:
        answers = []
        for i in range(7):
            model(torch.randn(6, 2, 3)).mean().backward()
            answers.append(flow.log(run, i))
    assert answers == [True, False, False, True, False, False, True]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = Classifier()
    with SummaryWriter(tmp_path) as writer, rnnkern.watch(model) as flow:
        model(torch.randn(6, 2, 3)).mean().backward()
        assert flow.log(writer, 7)
        expected = read(flow).scalars()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert event.step == 7 and event.value == np.float32(value)


@pytest.mark.parametrize(
    "writer",
    [None, {}, math, logging.getLogger(), Run, nn.Linear(1, 1), SimpleNamespace(log_metrics=3)],
    ids=["None", "dict", "math", "logging", "class", "module", "not callable"],
)
def test_unknown_writer(writer: Any) -> None:
    with (
        rnnkern.watch(Classifier()) as flow,
        pytest.raises(TypeError, match=r"SummaryWriter.*W&B run.*Lightning logger.*got \w+"),
    ):
        flow.log(writer, 0)
