"""No work for gradients that nobody asks for: the operators and GEMMs of a forward and a backward, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import pack, threads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import autograd

I, H, T, B = 5, 13, 6, 4
GEMMS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

#: A GEMM is known by the shape of its result.
PROJECTION = GRAD_HIDDEN = (T * B, H)
GRAD_INPUT = (T * B, I)
GRAD_W_IH, GRAD_W_HH = (H, I), (H, H)

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

pytestmark = [pytest.mark.usefixtures("cpu_library"), pytest.mark.everywhere]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


class Work(TorchDispatchMode):
    """Counts the chains by name, the GEMMs by the shape of their result, and the sums that gradients of biases are."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: Counter[str] = Counter()
        self.gemms: Counter[tuple[int, ...]] = Counter()
        self.sums = 0
        self.wanted: list[tuple[bool, ...]] = []  # of a layer at once: x, w_ih, the biases, w_hh, the statistics

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "rnnkern":
            self.chains[func._opname] += 1
            if func._opname == "layer_backward":
                self.wanted.append(args[-5:])
        elif func in GEMMS:
            self.gemms[tuple(result.shape)] += 1
        self.sums += func is torch.ops.aten.sum.dim_IntList
        return result


def work(module: nn.Module, x: Tensor, hx: Tensor | None = None) -> tuple[Work, Work]:
    """Of a forward, and of the backward of a loss on the output."""
    with Work() as forward:
        output, _ = module(x, hx)
        loss = output.square().mean()
    with Work() as backward:
        if loss.requires_grad:
            loss.backward()
    return forward, backward


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """The parameters whose names begin so do not train."""
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(names))
    return module


#: which is frozen -> its names, the GEMMs of the backward, the sums over steps and samples
WEIGHTS = {
    "nothing": ((), {GRAD_W_HH, GRAD_W_IH}, 1),
    "w_hh": (("weight_hh",), {GRAD_W_IH}, 1),
    "w_ih": (("weight_ih",), {GRAD_W_HH}, 1),
    "both weights": (("weight",), set(), 1),
    "biases": (("bias",), {GRAD_W_HH, GRAD_W_IH}, 0),
    "all but w_ih": (("weight_hh", "bias"), {GRAD_W_IH}, 0),
    "all but w_hh": (("weight_ih", "bias"), {GRAD_W_HH}, 0),
}


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("input_requires_grad", [False, True], ids=["", "input"])
def test_one_layer(what: str, input_requires_grad: bool) -> None:
    names, gemms, sums = WEIGHTS[what]
    module = frozen(rnnkern.RNN(I, H), *names)
    forward, backward = work(module, torch.randn(T, B, I, requires_grad=input_requires_grad))
    assert forward.chains == {"recurrence": 1} and forward.gemms == {PROJECTION: 1}
    assert backward.chains == {"recurrence_backward": 1}
    assert set(backward.gemms) == gemms | ({GRAD_INPUT} if input_requires_grad else set())
    assert backward.sums == sums


def test_packed() -> None:
    module = frozen(rnnkern.RNN(I, H), "weight_hh")
    loss = module(pack([torch.randn(n, I) for n in (6, 3, 1)]))[0].data.sum()
    with Work() as backward:
        loss.backward()
    assert backward.chains == {"recurrence_backward": 1} and backward.gemms == {GRAD_W_IH: 1}


@pytest.mark.parametrize("of", ["input", "hx"])
def test_frozen_module_passes_gradients_on(of: str) -> None:
    """On the way to something that trains: its chain runs, and nothing is computed for its weights."""
    module = frozen(rnnkern.RNN(I, H), "weight", "bias")
    x = torch.randn(T, B, I, requires_grad=of == "input")
    hx = torch.randn(1, B, H, requires_grad=of == "hx")
    forward, backward = work(module, x, hx)
    assert forward.chains == {"recurrence": 1}
    assert backward.chains == {"recurrence_backward": 1} and not backward.sums
    assert backward.gemms == ({GRAD_INPUT: 1} if of == "input" else {})


def test_only_the_head_trains() -> None:
    """No graph reaches into the RNN: no backward runs, and the states are not kept (they take z's memory)."""
    module, head = frozen(rnnkern.RNN(I, H, 2, bidirectional=True), "weight", "bias"), nn.Linear(2 * H, 3)
    with Work() as forward:
        output, h_n = module(torch.randn(T, B, I))
        loss = head(output[-1]).square().mean()
    assert forward.chains == {"recurrence_": 4} and not output.requires_grad and not h_n.requires_grad
    with Work() as backward:
        loss.backward()
    assert not backward.chains and backward.gemms == {(3, 2 * H): 1}


@pytest.mark.parametrize("trained", [2, 1, 0], ids=lambda k: f"l{k}")
def test_frozen_layers_below(trained: int) -> None:
    """Chains run backwards only down to the lowest layer that trains, which has no gradient for its input either."""
    module = frozen(rnnkern.RNN(I, H, 3), *(f"{kind}_l{k}" for kind in NAMES for k in range(trained)))
    forward, backward = work(module, torch.randn(T, B, I))
    assert forward.chains == Counter({"recurrence": 3 - trained, "recurrence_": trained})
    _, expected = work(rnnkern.RNN(H, H, 3 - trained), torch.randn(T, B, H))
    if trained == 0:  # whose lowest layer takes the input
        expected.gemms.update({GRAD_W_IH: 1, (H, H): -1})
    assert backward.chains == expected.chains == {"recurrence_backward": 3 - trained}
    assert backward.gemms == expected.gemms and backward.sums == expected.sums == 3 - trained


def test_frozen_layer_above() -> None:
    """The gradient goes through it, and its weights get none."""
    module = frozen(rnnkern.RNN(I, H, 2), *(f"{kind}_l1" for kind in NAMES))
    _, backward = work(module, torch.randn(T, B, I))
    _, below = work(rnnkern.RNN(I, H), torch.randn(T, B, I))
    assert backward.chains == {"recurrence_backward": 2}
    assert backward.gemms == below.gemms + Counter([GRAD_HIDDEN]) and backward.sums == below.sums == 1


def test_frozen_direction() -> None:
    module = frozen(rnnkern.RNN(I, H, bidirectional=True), *(f"{kind}_l0_reverse" for kind in NAMES))
    forward, backward = work(module, torch.randn(T, B, I))
    assert forward.chains == {"recurrence": 1, "recurrence_": 1}
    assert backward.chains == {"recurrence_backward": 1}
    _, expected = work(rnnkern.RNN(I, H), torch.randn(T, B, I))
    assert backward.gemms == expected.gemms and backward.sums == expected.sums


def test_frozen_and_watched() -> None:
    """Watching adds the statistics to the chains that run, and runs no other."""
    module = frozen(rnnkern.RNN(I, H, 3), *(f"{kind}_l0" for kind in NAMES))
    plain = work(module, torch.randn(T, B, I))
    with rnnkern.watch(module) as flow:
        forward, backward = work(module, torch.randn(T, B, I))
        record = flow.read()
    assert forward.chains == plain[0].chains and forward.gemms == plain[0].gemms
    assert backward.chains == {"recurrence_backward_stats": 2} and plain[1].chains == {"recurrence_backward": 2}
    assert backward.gemms == plain[1].gemms and backward.sums == plain[1].sums
    assert record is not None and record.norm[1:].all() and not record.norm[:1].any()


@pytest.mark.parametrize("run", [torch.no_grad, torch.inference_mode])
def test_no_gradients_at_all(run: Callable[[], Any]) -> None:
    with run():
        forward, backward = work(rnnkern.RNN(I, H, 2, bidirectional=True), torch.randn(T, B, I))
    assert forward.chains == {"recurrence_": 4} and not backward.chains


def test_cell() -> None:
    """PyTorch's own operators: the GEMMs of the gradients that are asked for, and no others."""
    loss = frozen(rnnkern.RNNCell(I, H), "weight_hh")(torch.randn(B, I), torch.randn(B, H)).sum()
    with Work() as backward:
        loss.backward()
    assert backward.gemms == {GRAD_W_IH: 1}


def gradient_of_the_input(how: str, loss: Tensor, x: Tensor) -> Work:
    with Work() as backward:
        if how == "backward":
            loss.backward(inputs=[x])
        else:
            torch.autograd.grad(loss, x)
    return backward


@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize("how", ["autograd.grad", "backward"])
def test_gradients_of_some(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything requires grad, and only the gradients of the input are asked for. Where the product for W_hh takes no
    longer than the question, it is made."""
    monkeypatch.setattr(autograd, "_WORK_OF_ASKING", T * B * H * H + small)
    module, x = rnnkern.RNN(I, H), torch.randn(T, B, I, requires_grad=True)
    with Work():  # who looks at operators sees each of them
        loss = module(x)[0].square().mean()
    backward = gradient_of_the_input(how, loss, x)
    expected = {GRAD_INPUT: 1, GRAD_W_HH: 2} if small else {GRAD_INPUT: 1}  # the first step's and the others'
    assert backward.chains == {"recurrence_backward": 1} and backward.gemms == expected and not backward.sums
    assert all(p.grad is None for p in module.parameters())


def test_statistics_that_nobody_receives() -> None:
    """autograd.grad leaves the taps out: it need not sum for them either."""
    module, x = rnnkern.RNN(I, H), torch.randn(T, B, I, requires_grad=True)
    with rnnkern.watch(module) as flow:
        with Work():
            loss = module(x)[0].square().mean()
        backward = gradient_of_the_input("autograd.grad", loss, x)
        assert flow.read() is None
    assert backward.chains == {"recurrence_backward": 1}


@pytest.mark.cpu_only("the operators for whole layers are the CPU's")
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("input_requires_grad", [False, True], ids=["", "input"])
def test_one_layer_at_once(what: str, input_requires_grad: bool) -> None:
    names, gemms, sums = WEIGHTS[what]
    module = frozen(rnnkern.RNN(I, H), *names)
    loss = module(torch.randn(T, B, I, requires_grad=input_requires_grad))[0].square().mean()
    with Work() as backward:
        loss.backward()
    assert backward.wanted == [(input_requires_grad, GRAD_W_IH in gemms, sums == 1, GRAD_W_HH in gemms, False)]
    for name, p in module.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


@pytest.mark.cpu_only("the operators for whole layers are the CPU's")
@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize("how", ["autograd.grad", "backward"])
def test_gradients_of_some_at_once(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "_WORK_OF_ASKING", T * B * H * H + small)
    module, x = rnnkern.RNN(I, H), torch.randn(T, B, I, requires_grad=True)
    backward = gradient_of_the_input(how, module(x)[0].square().mean(), x)
    # The product for W_ih is smaller, I < H, and so is the sum for the biases.
    assert backward.wanted == [(True, True, True, small, False)]
    monkeypatch.setattr(autograd, "_WORK_OF_ASKING", 0)
    backward = gradient_of_the_input(how, module(x)[0].square().mean(), x)
    assert backward.wanted == [(True, False, False, False, False)]
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.cpu_only("the operators for whole layers are the CPU's")
def test_statistics_that_nobody_receives_at_once() -> None:
    module, x = rnnkern.RNN(I, H), torch.randn(T, B, I, requires_grad=True)
    with rnnkern.watch(module) as flow:
        backward = gradient_of_the_input("autograd.grad", module(x)[0].square().mean(), x)
        assert flow.read() is None
    assert [wanted[-1] for wanted in backward.wanted] == [False]
