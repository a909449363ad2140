"""What a training loop puts around a module: autocast and loss scaling, activation checkpointing, grad modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import read
from helpers import assert_as_good, drawn, same_bits, threads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4

pytestmark = pytest.mark.everywhere

autocast_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):  # small models: more threads only wait for one another
        yield


class Model(nn.Module):
    """A classifier of two classes on top of a stack."""

    def __init__(self, kind: type[nn.RNNBase] = rnnkern.RNN, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(I, H, 2, bidirectional=True, **options)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x: Any, hx: Tensor | None = None) -> Tensor:
        _, h_n = self.rnn(x, hx)
        return self.head(torch.cat([h_n[-2], h_n[-1]], -1))


def random_input(packed: bool = False) -> Any:
    x = drawn(1, T, B, I)
    return pack_padded_sequence(x, torch.tensor([2, 6, 1, 6], device="cpu"), enforce_sorted=False) if packed else x


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    return x._replace(data=x.data.to(dtype)) if isinstance(x, PackedSequence) else x.to(dtype)


# Autocast


@autocast_dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dtypes_under_autocast(backend: Backend, device: str, dtype: torch.dtype, packed: bool) -> None:
    """Outputs in the dtype of autocast, though input, hx and weights are float32; their gradients are float32."""
    module = Model().rnn.to(device)
    x, hx = random_input(packed).to(device), torch.randn(4, B, H, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        output, h_n = module(x, hx)
        with torch.autocast(device, enabled=False):
            assert module(x, hx)[1].dtype == torch.float32
    rows = output.data if packed else output
    assert rows.dtype == h_n.dtype == dtype
    (rows.float().sum() + h_n.float().sum()).backward()
    assert hx.grad.dtype == torch.float32 and hx.grad.any()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def train_with_scaler(model: nn.Module, dtype: torch.dtype, packed: bool) -> tuple[list[Tensor], list[float]]:
    """Seven steps, of which the third has an infinite gradient: losses, and the scale after each step."""
    exact = dtype == torch.float64
    model.to(torch.float64 if exact else torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10, growth_interval=3)
    x, losses, scales = as_dtype(random_input(packed), next(model.parameters()).dtype), [], []
    hx = drawn(2, 4, B, H).to(next(model.parameters()))
    for step in range(7):
        with torch.autocast(torch.get_default_device().type, dtype) if not exact else contextlib.nullcontext():
            logits = model(x, hx)
            loss = nn.functional.cross_entropy(logits.to(hx.dtype), torch.tensor([0, 1, 1, 0]))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same_bits(model.parameters(), before) == (step == 2), "only the step with infinities is left out"
        losses.append(loss.detach())
        scales.append(scaler.get_scale())
    return losses, scales


@autocast_dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_grad_scaler(dtype: torch.dtype, packed: bool) -> None:
    """Losses by the rule, in the dtype of autocast; scales and skipped steps as nn.RNN's."""
    losses, scales = train_with_scaler(Model(), dtype, packed)
    plains, plain_scales = train_with_scaler(Model(nn.RNN), dtype, packed)
    true, _ = train_with_scaler(Model(nn.RNN), torch.float64, packed)
    assert losses[-1] < 0.7 * losses[0]
    assert scales == plain_scales and scales[2] == scales[1] / 2
    results = [torch.stack(values)[:, None] for values in (losses, plains, true)]
    assert_as_good("losses", results[0].to(dtype), results[1].to(dtype), results[2])


@autocast_dtypes
@pytest.mark.usefixtures("nothing_stays")
def test_norms_carry_the_scale(dtype: torch.dtype) -> None:
    """The chain is linear: a loss 2**k times as large has norms exactly 2**k times as large, where float16 has no
    subnormal numbers (hence the 64) and no infinite ones. A step that the scaler leaves out does not end: the next one
    belongs to it."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**7)

    def backward(scale: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast(torch.get_default_device().type, dtype):
            loss = 64 * model(random_input()).square().sum()
        scale(loss).backward()

    with rnnkern.watch(model) as flow:
        backward(lambda loss: loss)
        plain = read(flow).norm
        flow.step()
        backward(scaler.scale)
        scaled = read(flow).norm
        np.testing.assert_array_equal(scaled, 2.0**7 * plain)
        assert plain.all()
        scaler.step(optimizer)
        scaler.update()
        assert flow.steps == 2
        backward(lambda loss: scaler.scale(loss) * float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert flow.steps == 2 and (read(flow).step, read(flow).samples) == (2, B)
        assert read(flow).nonfinite.any()
        backward(scaler.scale)
        scaler.step(optimizer)
        assert flow.steps == 3 and (read(flow).step, read(flow).samples) == (2, 2 * B)


@autocast_dtypes
def test_cell_under_autocast(dtype: torch.dtype) -> None:
    cells = []
    for kind in (rnnkern.RNNCell, nn.RNNCell):
        torch.manual_seed(0)
        cells.append(kind(I, H))
    x, hx = torch.randn(B, I), torch.randn(B, H)
    with torch.autocast(torch.get_default_device().type, dtype):
        outputs = [cell(x, hx) for cell in cells]
    assert outputs[0].dtype == outputs[1].dtype == dtype and same_bits(outputs[:1], outputs[1:])
    outputs[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in cells[0].parameters())


# Activation checkpointing


def gradients(model: nn.Module, run: Callable[..., Any], x: Any) -> list[Tensor]:
    """Outputs, then gradients of input and weights, of two passes with the same seed, whose gradients add up."""
    torch.manual_seed(3)
    model.zero_grad()
    data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    for _ in range(2):
        output, h_n = run(x._replace(data=data) if isinstance(x, PackedSequence) else data)
        rows = output.data if isinstance(output, PackedSequence) else output
        (rows.square().sum() + h_n.sin().sum()).backward()
    return [rows, h_n, data.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_checkpoint(use_reentrant: bool, dropout: float, packed: bool) -> None:
    """What is computed a second time has the same bits, dropped elements included."""
    module, x = Model(dropout=dropout).rnn, random_input(packed)

    def checkpointed(x: Any) -> Any:
        if not packed:
            return checkpoint(module, x, use_reentrant=use_reentrant)
        data, h_n = checkpoint(  # reentrant checkpoints see the tensors among their arguments only
            lambda data: (lambda output, h_n: (output.data, h_n))(*module(x._replace(data=data))),
            x.data,
            use_reentrant=use_reentrant,
        )
        return x._replace(data=data), h_n

    expected = gradients(module, module, x)
    assert same_bits(gradients(module, checkpointed, x), expected)
    if dropout:
        assert not same_bits(gradients(module.eval(), module, x), expected)


class Output(nn.Module):
    def forward(self, answer: tuple[Tensor, Tensor]) -> Tensor:
        return answer[0]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint_sequential(use_reentrant: bool) -> None:
    stack = nn.Sequential(
        rnnkern.RNN(I, H, 2, dropout=0.5), Output(), nn.Dropout(0.5), rnnkern.RNN(H, H), Output(),
        rnnkern.RNN(H, I, bidirectional=True, nonlinearity="relu"), Output(),
    )  # fmt: skip
    run = lambda x: (stack(x), x.new_zeros(1))  # noqa: E731
    segments = lambda x: (checkpoint_sequential(stack, 3, x, use_reentrant=use_reentrant), x.new_zeros(1))  # noqa: E731
    assert same_bits(gradients(stack, segments, random_input()), gradients(stack, run, random_input()))


class Counted(TorchDispatchMode):
    """How often the forward chain runs."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.rnnkern.recurrence.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", [False, True], ids=["recomputed", "saved"])
def test_selective_checkpoint(cpu_library: None, save: bool) -> None:
    """A policy sees the chain as one operator, and may keep its states: then only the GEMMs are done again."""
    module = Model(dropout=0.5).rnn

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = save and operator is torch.ops.rnnkern.recurrence.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(x: Tensor) -> Any:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(module, x, use_reentrant=False, context_fn=contexts)

    with Counted():  # under a mode each direction is an operator of its own
        expected = gradients(module, module, random_input())
    with Counted() as counted:
        found = gradients(module, selective, random_input())
    assert same_bits(found, expected)
    chains = 4 * 2  # layers and directions, passes
    assert counted.calls == (chains if save else 2 * chains)


# Grad modes


def test_states_carried_without_gradients() -> None:
    """A stream in chunks, each with the last one's states, is the whole sequence; no chunk writes to another's."""
    module = rnnkern.RNN(I, H, 2)
    x = random_input()
    with torch.no_grad():
        expected, last = module(x)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        with mode():
            outputs, states = [], [torch.zeros(2, B, H)]
            for chunk in x.split([1, 2, 3]):
                output, hx = module(chunk, states[-1])
                outputs.append(output)
                states.append(hx)
            kept = [s.clone() for s in states]
            torch.testing.assert_close(torch.cat(outputs), expected)
            torch.testing.assert_close(states[-1], last)
            module(x, states[1])
            assert same_bits(states, kept) and not any(t.requires_grad for t in (*outputs, *states))


def test_grad_modes_nest() -> None:
    module = rnnkern.RNN(I, H)
    with torch.no_grad():
        assert not module(random_input())[0].requires_grad
        with torch.enable_grad():
            output, h_n = module(random_input())
        assert output.requires_grad and h_n.requires_grad
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("what", ["weights", "input", "hx"])
def test_inference_tensors(what: str) -> None:
    """They serve without gradients, and are refused, as by nn.RNN, where a graph would have to keep them."""
    for kind in (nn.RNN, rnnkern.RNN):
        torch.manual_seed(0)
        module, x, hx = kind(I, H), random_input(), torch.randn(1, B, H)
        expected = [t.detach() for t in module(x, hx)]
        with torch.inference_mode():
            if what == "weights":
                torch.manual_seed(0)
                module = kind(I, H)
                assert module.weight_hh_l0.is_inference()
            else:
                x, hx = (x.clone(), hx) if what == "input" else (x, hx.clone())
            assert same_bits(module(x, hx), expected)
        with torch.no_grad():
            assert same_bits(module(x, hx), expected)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(x, hx)


def test_eval_backward_equals_training() -> None:
    """Dropout apart, a module in eval mode has the gradients of one that trains; in both, hx and input have theirs."""
    module = Model().rnn
    expected = gradients(module.train(), module, random_input())
    assert same_bits(gradients(module.eval(), module, random_input()), expected)
    with_dropout = Model(dropout=0.5).rnn.eval()
    assert same_bits(gradients(with_dropout, with_dropout, random_input()), expected)
