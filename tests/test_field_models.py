"""Three models from the field: rnnkern.convert leaves the loss curve of their training what it was.

The rule has no tolerances. A converted run may be as far from the unconverted one as twice what another order of its
sums makes of that one, plus one ulp of the loss. Another order comes from numbering the hidden units of an nn.RNN
differently: the same net, and the same losses but for their rounding.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterator

import EduKTM
import pytest
import torch
import torch.nn.functional as F
from helpers import threads
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

STEPS = 40

pytestmark = pytest.mark.everywhere


class CharacterModel(nn.Module):
    """Predicts the next character of a text; backpropagation through 25 of them, the state carried on from there."""

    T, B = 25, 8

    def __init__(self) -> None:
        super().__init__()
        text = inspect.getsource(heapq)
        characters = sorted(set(text))
        self.text = torch.tensor([characters.index(c) for c in text])
        self.embedding = nn.Embedding(len(characters), 16)
        self.rnn = nn.RNN(16, 32, num_layers=2, dropout=0.2)
        self.head = nn.Linear(32, len(characters))
        self.state: Tensor | None = None

    def loss(self, step: int) -> Tensor:
        rows = self.text[: len(self.text) // self.B * self.B].view(self.B, -1).T  # (characters, B)
        x = rows[step * self.T : (step + 1) * self.T + 1]
        output, state = self.rnn(self.embedding(x[:-1]), self.state)
        self.state = state.detach()
        return F.cross_entropy(self.head(output).flatten(0, 1), x[1:].flatten())


class Encoder(nn.Module):
    """Which of three words stands most often in a sentence? Sentences of 1 to 15 words, as they come, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 8)
        self.rnn = nn.RNN(8, 24, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 3)

    def loss(self, step: int) -> Tensor:
        device = torch.get_default_device()
        with torch.device("cpu"):  # the same sentences on every device
            rng = torch.Generator().manual_seed(step)
            lengths = torch.randint(1, 16, (16,), generator=rng)
            words = torch.randint(3, (16, int(lengths.max())), generator=rng).to(device)
            there = (torch.arange(words.shape[1]) < lengths[:, None]).to(device)
        label = (F.one_hot(words) * there[..., None]).sum(1).argmax(1)
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        h_n = self.rnn(packed)[1]
        return F.cross_entropy(self.head(torch.cat([h_n[0], h_n[1]], 1)), label)


def answers(students: int = 24, questions: int = 6, T: int = 20) -> Tensor:
    """(students, T, 2·questions): question q answered right is one-hot at questions + q, answered wrong at q."""
    device = torch.get_default_device()
    with torch.device("cpu"):  # the same answers on every device
        rng = torch.Generator().manual_seed(0)
        question = torch.randint(questions, (students, T), generator=rng)
        skill = torch.randn(students, 1, generator=rng) + torch.linspace(-1, 2, T)
        right = torch.rand(students, T, generator=rng) < torch.sigmoid(skill)
    return F.one_hot(question + questions * right, 2 * questions).to(device, torch.get_default_dtype())


class KnowledgeTracing(nn.Module):
    """Deep knowledge tracing with the net of EduKTM: will a student get the next question right?"""

    def __init__(self) -> None:
        super().__init__()
        self.net = EduKTM.DKT(num_questions=6, hidden_size=20, num_layers=1).dkt_model
        self.rnn, self.head = self.net.rnn, self.net.fc

    def loss(self, step: int) -> Tensor:
        x = answers()[step % 3 :: 3]
        nexts = x[:, 1:].argmax(-1)  # (B, T - 1)
        p = self.net(x)[:, :-1].gather(-1, nexts[..., None] % 6).squeeze(-1)
        return F.binary_cross_entropy(p, (nexts // 6).to(p))


Run = Callable[[int | None, int | None], list[float]]


def train(make: type[nn.Module], convert_at: int | None, numbering: int | None) -> list[float]:
    """The losses of a run; another ``numbering`` is another order of the hidden units."""
    torch.manual_seed(0)
    model = make()
    if numbering is not None:
        renumber(model.rnn, model.head, numbering)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.manual_seed(1)  # for dropout
    losses = []
    for step in range(STEPS):
        if step == convert_at:
            rnnkern.convert(model)
        loss = model.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert type(model.rnn) is (nn.RNN if convert_at is None else rnnkern.RNN)
    return losses


@torch.no_grad()
def renumber(rnn: nn.RNN, head: nn.Linear, seed: int) -> None:
    """Put the units of the last layer, whose output ``head`` takes, into another order."""
    H = rnn.hidden_size
    for direction, names in enumerate(rnn._all_weights[-2:] if rnn.bidirectional else rnn._all_weights[-1:]):
        order = torch.randperm(H, device="cpu", generator=torch.Generator().manual_seed(seed))
        for name in names:
            getattr(rnn, name).copy_(getattr(rnn, name)[order])
        w_hh, columns = getattr(rnn, names[1]), head.weight[:, direction * H : (direction + 1) * H]
        w_hh.copy_(w_hh[:, order])
        columns.copy_(columns[:, order])


def assert_same_curve(run: Run, steps: int) -> None:
    """``run(convert_at, numbering)`` is three runs: unconverted, converted at first, converted half way."""
    dtype = torch.get_default_dtype()
    before = torch.tensor(run(None, None), dtype=dtype)
    assert run(None, None) == before.tolist(), "the training itself is not repeatable"
    assert before[-steps // 10 :].mean() < 0.95 * before[: steps // 10].mean(), "nothing was learnt"
    orders = [torch.tensor(run(None, seed), dtype=dtype) for seed in range(4)]
    noise = max((other - before).abs().max().item() for other in orders)
    assert 0 < noise < torch.finfo(dtype).eps ** 0.5, "rounding has grown so large that the rule would show nothing"
    allowed = 2 * noise + torch.finfo(dtype).eps * before.max().item()
    for convert_at in (0, steps // 2):
        off = (torch.tensor(run(convert_at, None), dtype=dtype) - before).abs().max().item()
        assert off <= allowed, f"converted at step {convert_at}, losses are {off:.3g} off; {allowed:.3g} is allowed"


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Models and data are made in it."""
    torch.set_default_dtype(request.param)
    with threads(1):
        yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [CharacterModel, Encoder, KnowledgeTracing])
def test_same_loss_curve(dtype: torch.dtype, make: type[nn.Module]) -> None:
    assert_same_curve(lambda convert_at, numbering: train(make, convert_at, numbering), STEPS)


@pytest.mark.cpu_only("the package adds its loss up in a torch.Tensor([0.0])")
@threads(1)
def test_package_trains_by_itself() -> None:
    """EduKTM's own training loop, which is float32, and what comes after it."""
    batches = answers().split(8)

    def run(convert_at: int | None, numbering: int | None) -> list[float]:
        torch.manual_seed(0)
        model = EduKTM.DKT(6, 20, 1)
        if numbering is not None:
            renumber(model.dkt_model.rnn, model.dkt_model.fc, numbering)
        losses: list[float] = []

        def see(module: nn.Module, inputs: object, output: Tensor) -> None:
            if isinstance(module, nn.BCELoss):
                losses.append(output.item())

        handle = nn.modules.module.register_module_forward_hook(see)
        for epoch in range(4):
            if convert_at == epoch * 24:
                rnnkern.convert(model.dkt_model)
            model.train(batches, epoch=1, lr=1e-2)
        handle.remove()
        return losses

    assert_same_curve(run, 96)
