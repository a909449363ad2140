"""What ``rnnkern flow`` trains: tasks, models, and that a run goes on from a checkpoint as if nothing had been."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_helpers import ABC, options, same, task_of

import rnnkern
from rnnkern.train import checkpoint, text
from rnnkern.train.model import new_model
from rnnkern.train.options import InputError
from rnnkern.train.tasks import Adding, Copying, TemporalOrder
from rnnkern.train.text import Text
from rnnkern.train.training import LAST_LOSS, Training

pytestmark = pytest.mark.usefixtures("nothing_stays")

# --- the tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 7, 20])
def test_adding(T: int) -> None:
    task = Adding(T)
    batch = task.draw(np.random.default_rng(0), 500)
    numbers, marks = batch.inputs.unbind(-1)
    assert batch.inputs.shape == (T, 500, 2)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (marks[: T // 2].sum(0) == 1).all()
    assert (marks[T // 2 :].sum(0) == 1).all()
    assert marks.count_nonzero() == 2 * 500
    assert (marks.sum(1) > 0).all()  # each step is marked in some sample, the first one, too: it takes T - 1 steps back
    torch.testing.assert_close(batch.targets, (numbers * marks).sum(0))
    assert task.needs == T - 1


def test_adding_has_its_trivial_level() -> None:
    """The mean squared error of the answer 1: within 5 standard errors, those of a triangular distribution."""
    task, N = Adding(5), 20000
    batch = task.draw(np.random.default_rng(0), N)
    error = task.figures(torch.ones(N, 1), batch.targets)["mean squared error"]
    assert abs(error - task.trivial["mean squared error"]) < 5 * math.sqrt((1 / 15 - 1 / 36) / N)


@pytest.mark.parametrize("T", [1, 13])
def test_copying(T: int) -> None:
    task = Copying(T)
    batch = task.draw(np.random.default_rng(0), 50)
    symbols = batch.inputs.argmax(-1)
    assert batch.inputs.shape == (T + 20, 50, 10)
    assert (batch.inputs.sum(-1) == 1).all()
    assert (symbols[:10] < 8).all()
    assert set(symbols[:10].unique().tolist()) == set(range(8))
    assert (symbols[10 : 9 + T] == 8).all()
    assert (symbols[9 + T] == 9).all()
    assert (symbols[10 + T :] == 8).all()
    assert (batch.targets[: T + 10] == 8).all()
    assert batch.targets[T + 10 :].equal(symbols[:10])
    assert batch.targets[task.needs :].equal(
        symbols[: len(symbols) - task.needs].where(batch.targets[task.needs :] < 8, 8)
    )

    memoryless = torch.full((T + 20, 50, 9), -torch.inf)  # blanks, and then any of the eight
    memoryless[: T + 10, :, 8] = memoryless[T + 10 :, :, :8] = 0
    assert task.figures(memoryless, batch.targets)["cross-entropy"] == pytest.approx(task.trivial["cross-entropy"])
    perfect = nn.functional.one_hot(batch.targets, 9) * 1e3
    assert task.figures(perfect, batch.targets) == {"cross-entropy": 0, "accuracy of the copied": 1}


@pytest.mark.parametrize("T", [10, 37, 100])
def test_temporal_order(T: int) -> None:
    task = TemporalOrder(T)
    batch = task.draw(np.random.default_rng(0), 400)
    symbols = batch.inputs.argmax(-1)
    assert batch.inputs.shape == (T, 400, 6)
    relevant = symbols >= 4
    assert (relevant.sum(0) == 2).all()
    first = relevant.int().argmax(0)
    second = T - 1 - relevant.flip(0).int().argmax(0)
    assert first.min() == T // 10
    assert first.max() < T / 5
    assert second.min() >= int(0.4 * T)
    assert second.max() < T / 2
    assert task.needs == T - 1 - first.min()
    columns = torch.arange(400)
    answers = 2 * (symbols[first, columns] - 4) + symbols[second, columns] - 4
    assert batch.targets.equal(answers)
    assert set(answers.tolist()) == {0, 1, 2, 3}
    figures = task.figures(torch.zeros(400, 4), batch.targets)
    assert figures["cross-entropy"] == pytest.approx(task.trivial["cross-entropy"])


def test_text() -> None:
    task = Text("a" * 900 + "b" * 100, "name", 9)
    assert task.inputs == task.outputs == 2
    assert task.trivial["bits per character"] == pytest.approx(-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1))
    assert (task.draw(np.random.default_rng(0), 50).inputs == 0).all()
    assert (task.draw(np.random.default_rng(0), 50, held_out=True).inputs == 1).all()

    task = Text(ABC, "name", 9)
    batch = task.draw(np.random.default_rng(0), 50)
    assert batch.inputs.shape == batch.targets.shape == (9, 50)
    assert batch.inputs[1:].equal(batch.targets[:-1])
    assert batch.targets.equal((batch.inputs + 1) % 10)
    assert task.figures(torch.zeros(9, 50, 10), batch.targets)["bits per character"] == pytest.approx(math.log2(10))


def test_texts_that_just_fit() -> None:
    task = Text("x" * 49 + "y", "name", 4)
    for held_out in (False, True):
        assert task.draw(np.random.default_rng(0), 99, held_out).targets.shape == (4, 99)
    with pytest.raises(InputError, match="has 49 characters, expected at least 50 for --length 4"):
        Text("x" * 49, "name", 4)


def test_library_sources() -> None:
    assert "def namedtuple(" not in (sources := text.library_sources())  # a package's, not a module's
    assert "class Thread:" in sources


def test_data_depend_on_seed_and_step_alone() -> None:
    def inputs(seed: int, stream: int, number: int) -> Tensor:
        with Training(options(task="adding", seed=seed), Adding(10)) as training:
            return training._draw(stream, number).inputs

    known = [inputs(0, 0, 0), inputs(0, 0, 1), inputs(0, 1, 0), inputs(1, 0, 0)]
    assert not any(a.equal(b) for i, a in enumerate(known) for b in known[:i])
    assert inputs(0, 0, 1).equal(known[1])


# --- model and training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["tanh", "relu", "lstm", "gru"])
def test_cells(cell: str) -> None:
    rnn = new_model(Adding(10), options(cell=cell, layers=2, task="adding")).rnn
    assert type(rnn) is {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, rnnkern.RNN)
    assert rnn.mode == {"tanh": "RNN_TANH", "relu": "RNN_RELU"}.get(cell, cell.upper())
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (2, 8, 2)


def test_inits_set_w_hh_and_leave_the_rest() -> None:
    task = Copying(10)
    of = {init: new_model(task, options(init=init)).state_dict() for init in ("default", "orthogonal", "identity", 0.7)}
    for init, changed in (("orthogonal", 1), ("identity", 3), (0.7, 1)):
        names = [name for name, value in of[init].items() if not value.equal(of["default"][name])]
        assert names == ["rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"][:changed]
    w_hh = {init: values["rnn.weight_hh_l0"].double() for init, values in of.items()}
    torch.testing.assert_close(w_hh["orthogonal"] @ w_hh["orthogonal"].T, torch.eye(8).double(), atol=1e-6, rtol=0)
    assert w_hh["identity"].equal(torch.eye(8).double())
    assert torch.linalg.eigvals(w_hh[0.7]).abs().max().item() == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("task", ["copying", "adding"])
def test_watching_does_not_disturb(task: str) -> None:
    """The weights are those of the loop that anyone would write, to the last bit."""
    asked = options(task=task, clip=0.1)
    with Training(asked, task_of(asked)) as training:
        for _ in range(5):
            training.advance()
    model, data = new_model(task_of(asked), asked), task_of(asked)
    optimizer = torch.optim.Adam(model.parameters(), asked.lr)
    for step in range(5):
        batch = data.draw(np.random.default_rng((asked.seed, 0, step)), asked.batch_size)
        outputs = model(batch.inputs)
        outputs = outputs if batch.targets.dim() == 2 else outputs[-1]
        loss = data.loss(outputs, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), asked.clip)
        optimizer.step()
    assert training.loss == loss.item()
    assert same(dict(training.model.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize("task", ["text", "copying", "adding", "temporal-order"])
def test_what_is_recorded(task: str, cell: str) -> None:
    asked = options(task=task, cell=cell)
    with Training(asked, task_of(asked)) as training:
        assert math.isnan(training.horizon)
        for _ in range(4):
            training.advance()
        figures = training.evaluate()
    record = training.trace.newest
    assert record is not None
    assert (record.step, training.done, training.trace.history.steps) == (2, 4, [0, 2])
    modules = ["rnn", "rnn.c"] if cell == "lstm" else ["rnn"]
    many = task in ("text", "copying")
    assert list(record.modules) == modules + [name + LAST_LOSS for name in modules if many]
    assert record["rnn"].loss_at_end.item() is not many
    if many:
        assert record["rnn" + LAST_LOSS].loss_at_end.item()
        at_last = [record[name].norm[0, 0, 0] for name in ("rnn", "rnn" + LAST_LOSS)]
        T = training.task.draw(np.random.default_rng(0), 1).targets.shape[0]
        assert at_last[0] * T == pytest.approx(at_last[1], rel=1e-5)  # the mean over T steps has 1/T of that loss in it
    assert training.horizon == record["rnn" + LAST_LOSS * many].horizon.item()
    assert figures.keys() == training.task.trivial.keys()
    assert all(0 <= value < 20 for value in figures.values())


@pytest.mark.parametrize(
    ("cell", "task"), [("tanh", "copying"), ("relu", "temporal-order"), ("lstm", "adding"), ("gru", "text")]
)
@pytest.mark.parametrize("after", [0, 3, 4])
def test_resumed_equals_uninterrupted(cell: str, task: str, after: int, tmp_path: Path) -> None:
    asked, path = options(task=task, cell=cell, lr=0.05), tmp_path / "flow.pt"

    def advanced(training: Training, steps: int) -> dict[str, Any]:
        with training:
            for _ in range(steps):
                training.advance()
            return training.state_dict()

    whole = advanced(Training(asked, task_of(asked)), 7)
    checkpoint.Checkpoint(asked, None, advanced(Training(asked, task_of(asked)), after)).write(path)
    torch.manual_seed(99)  # what other parts of a process draw is nothing to it
    read = checkpoint.Checkpoint.read(path)
    assert read.options == asked
    resumed = advanced(Training(asked, task_of(asked), read.state), 7 - after)
    assert resumed["done"] == 7
    assert same(resumed, whole)
