"""RNNFunction under autograd, torch.func and torch.library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import device_of, need
from helpers import INF, Problem, drawn, make_problem, pack, same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import rnnkern
from rnnkern.autograd import RNNFunction, recurrence
from rnnkern.backends import BACKENDS, Backend

PROBLEMS = {
    "dense": dict(T=3, B=2, H=3),
    "one": dict(T=1, B=1, H=1),
    "packed": dict(lengths=[4, 2, 2, 1], H=2),
}
shapes = pytest.mark.parametrize("shape", PROBLEMS)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
nonlinearities = pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])


def leaves(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    z, h0, w_hh = (x.detach().clone().requires_grad_() for x in (p.z, p.h0, p.w_hh))
    return z, h0, w_hh


def function_of(p: Problem) -> Callable[..., tuple[Tensor, Tensor]]:
    """(z, h0, w_hh) -> h, h_n."""
    options = dict(batch_sizes=p.batch_sizes, reverse=p.reverse, nonlinearity=p.nonlinearity)
    return lambda z, h0, w_hh: recurrence(z, h0, w_hh, **options)


def float64_problem(shape: str, device: str, **options: Any) -> Problem:
    return make_problem(**PROBLEMS[shape], dtype=torch.float64, device=device, **options)


def new_tap(p: Problem) -> Tensor:
    return torch.zeros(4, len(p.sizes), len(p.h0), dtype=torch.float64, device=p.z.device, requires_grad=True)


@pytest.mark.unnamed
@pytest.mark.float64
@shapes
@directions
@nonlinearities
def test_gradcheck(backend: Backend, device: str, shape: str, reverse: bool, nonlinearity: str) -> None:
    p = float64_problem(shape, device, reverse=reverse, nonlinearity=nonlinearity)
    assert gradcheck(function_of(p), leaves(p), check_forward_ad=True, check_undefined_grad=True)


@pytest.mark.unnamed
@pytest.mark.float64
@shapes
@directions
@nonlinearities
def test_gradgradcheck(backend: Backend, device: str, shape: str, reverse: bool, nonlinearity: str) -> None:
    p = float64_problem(shape, device, reverse=reverse, nonlinearity=nonlinearity)
    assert gradgradcheck(function_of(p), leaves(p))


@pytest.mark.unnamed
@pytest.mark.float64
def test_gradcheck_module(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(2, 3, 2, bidirectional=True, dtype=torch.float64, device=device)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    hx = torch.randn(4, 2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def call(x: Tensor, hx: Tensor, *weights: Tensor) -> Any:
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, hx))

    assert gradcheck(call, (x, hx, *module.parameters()), fast_mode=True)
    assert gradgradcheck(call, (x, hx, *module.parameters()), fast_mode=True)


@pytest.mark.float64
@shapes
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_wanted(backend: Backend, device: str, shape: str, wanted: tuple[bool, ...]) -> None:
    """Any choice of inputs that require grad gives the same gradients for them, and none for the others."""
    p = float64_problem(shape, device)
    everything = leaves(p)
    h, h_n = function_of(p)(*everything)
    expected = torch.autograd.grad([h, h_n], everything, [p.grad_h, p.grad_hn])
    inputs = [x.requires_grad_(w) for x, w in zip(leaves(p), wanted, strict=True)]
    h, h_n = function_of(p)(*inputs)
    assert h.requires_grad == h_n.requires_grad == any(wanted)
    if any(wanted):
        torch.autograd.backward([h, h_n], [p.grad_h, p.grad_hn])
    for x, w, grad in zip(inputs, wanted, expected, strict=True):
        assert same_bits([x.grad], [grad]) if w else x.grad is None


@pytest.mark.float64
@shapes
@pytest.mark.parametrize("of", ["h", "h_n"])
def test_gradient_of_one_output(backend: Backend, device: str, shape: str, of: str) -> None:
    p = float64_problem(shape, device)
    inputs = leaves(p)
    h, h_n = function_of(p)(*inputs)
    output, grad = (h, p.grad_h) if of == "h" else (h_n, p.grad_hn)
    got = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    zeros = (p.grad_h, 0 * p.grad_hn) if of == "h" else (0 * p.grad_h, p.grad_hn)
    torch.testing.assert_close(got, torch.autograd.grad([h, h_n], inputs, zeros))


@pytest.mark.float64
@shapes
@directions
def test_tap_receives_the_statistics(backend: Backend, device: str, shape: str, reverse: bool) -> None:
    """The tap's gradient is the statistics; it adds over passes, and takes nothing from the other gradients."""
    p = float64_problem(shape, device, reverse=reverse)
    *_, stats = backend.recurrence_backward_stats(*p.replace(h=backend.recurrence(*p.forward)).backward)
    tap, inputs = new_tap(p), leaves(p)

    def loss(tap: Tensor | None) -> Tensor:
        options = dict(batch_sizes=p.batch_sizes, reverse=reverse, tap=tap)
        h, h_n = recurrence(*inputs, **options)
        return (h * p.grad_h).sum() + (h_n * p.grad_hn).sum()

    without = torch.autograd.grad(loss(None), inputs)
    loss(tap).backward()
    assert same_bits([tap.grad], [stats]) and same_bits([x.grad for x in inputs], without)
    loss(tap).backward()
    assert same_bits([tap.grad], [2 * stats])
    (only,) = torch.autograd.grad(loss(tap), [tap])
    assert same_bits([only], [stats])
    *grads, with_others = torch.autograd.grad(loss(tap), [*inputs, tap])
    assert same_bits([with_others, *grads], [stats, *without])


@pytest.mark.float64
def test_tap_alone(backend: Backend, device: str) -> None:
    """Frozen weights and input: the tap makes the backward pass run all the same."""
    p = float64_problem("dense", device)
    tap = new_tap(p)
    h, _ = recurrence(p.z.clone(), p.h0, p.w_hh, tap=tap)
    h.backward(p.grad_h)
    assert tap.grad is not None and tap.grad[0].all()


@pytest.mark.float64
def test_tap_with_clip(backend: Backend, device: str) -> None:
    """Statistics are those before the clip, and the clip acts on the gradients."""
    p = float64_problem("dense", device, clip=0.3)
    *expected, stats = backend.recurrence_backward_stats(*p.replace(h=backend.recurrence(*p.forward)).backward)
    tap, (z, h0, w_hh) = new_tap(p), leaves(p)
    torch.autograd.backward(recurrence(z, h0, w_hh, clip=0.3, tap=tap), [p.grad_h, p.grad_hn])
    assert same_bits([z.grad, h0.grad, tap.grad], [*expected, stats])


@pytest.mark.unnamed
@pytest.mark.float64
@nonlinearities
def test_create_graph_gives_the_same_gradient(backend: Backend, device: str, nonlinearity: str) -> None:
    """The differentiable backward agrees with the kernel's, also for a penalty on the gradient, and with nn.RNN."""
    theirs = nn.RNN(3, 5, 2, nonlinearity, dtype=torch.float64, device=device)
    ours = rnnkern.RNN(3, 5, 2, nonlinearity, dtype=torch.float64, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for module in (ours, theirs):
        output = module(x)[0].square().sum()
        (plain,) = torch.autograd.grad(output, x, retain_graph=True)
        (grad,) = torch.autograd.grad(output, x, create_graph=True)
        torch.testing.assert_close(plain, grad)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *module.parameters()], allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b)


@pytest.mark.float64
def test_inputs_stay_and_backward_twice_is_refused(backend: Backend, device: str) -> None:
    p = float64_problem("dense", device)
    inputs = leaves(p)
    h, _ = function_of(p)(*inputs)
    assert same_bits(inputs, (p.z, p.h0, p.w_hh))
    h.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        h.sum().backward()
    h, _ = function_of(p)(*inputs)
    with torch.no_grad():
        h.add_(1)  # the states are saved for backward: writing to them has to be noticed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.float64
def test_z_is_consumed_only_without_gradients(backend: Backend, device: str) -> None:
    p = float64_problem("dense", device)
    z = p.z.clone()
    h, h_n = recurrence(z, p.h0, p.w_hh)
    assert h.data_ptr() == z.data_ptr() and h_n.data_ptr() != z.data_ptr()
    again, _ = recurrence(p.z.clone().requires_grad_(), p.h0, p.w_hh)
    assert same_bits([h], [again])


def test_anomaly_mode_and_hooks(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(3, 5, device=device)
    seen: list[Tensor] = []
    with torch.autograd.detect_anomaly(check_nan=True):
        output, _ = module(torch.randn(4, 2, 3, device=device))
        output.register_hook(seen.append)
        output.sum().backward()
    assert len(seen) == 1


def test_checkpoint(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(3, 5, 2, device=device)
    x = torch.randn(4, 2, 3, device=device)
    module(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0].square().sum().backward()
    assert same_bits([p.grad for p in module.parameters()], expected)


# torch.func


def small_module(device: str) -> tuple[rnnkern.RNN, dict[str, Tensor], Tensor]:
    module = rnnkern.RNN(2, 3, 2, dtype=torch.float64, device=device)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return module, weights, torch.randn(4, 5, 2, dtype=torch.float64, device=device)


@pytest.mark.float64
def test_func_grad(backend: Backend, device: str) -> None:
    module, weights, x = small_module(device)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(weights, x)
    module(x)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.unnamed
@pytest.mark.float64
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(backend: Backend, device: str, jacobian: Callable[..., Any]) -> None:
    module, _, x = small_module(device)
    theirs = nn.RNN(2, 3, 2, dtype=torch.float64, device=device)
    theirs.load_state_dict(module.state_dict())
    expected = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    torch.testing.assert_close(jacobian(lambda x: module(x)[0])(x), expected)


@pytest.mark.unnamed
@pytest.mark.float64
def test_hessian(backend: Backend, device: str) -> None:
    p = float64_problem("dense", device)

    def loss(w_hh: Tensor) -> Tensor:
        return recurrence(p.z.clone(), p.h0, w_hh)[0].square().sum()

    expected = torch.autograd.functional.hessian(loss, p.w_hh)
    torch.testing.assert_close(torch.func.hessian(loss)(p.w_hh), expected)


@pytest.mark.unnamed
@pytest.mark.float64
def test_jvp(backend: Backend, device: str) -> None:
    module, _, x = small_module(device)
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(lambda x: module(x)[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], x)
    torch.testing.assert_close(got, torch.einsum("tbhsci,sci->tbh", jacobian, tangent))


# torch.library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["dense", "packed"])
@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_opcheck(library: str, dtype: torch.dtype, shape: str) -> None:
    need(library)
    device = device_of(BACKENDS[library])
    for reverse in (False, True):
        p = make_problem(**PROBLEMS[shape], dtype=dtype, reverse=reverse, with_grad_hn=not reverse, device=device)
        operators = torch.ops.rnnkern
        torch.library.opcheck(operators.recurrence.default, p.forward)
        torch.library.opcheck(operators.recurrence_.default, p.forward)
        torch.library.opcheck(operators.recurrence_backward.default, p.backward)
        torch.library.opcheck(operators.recurrence_backward_stats.default, p.backward)
    strided = p.replace(z=p.z.transpose(0, 1).contiguous().transpose(0, 1), w_hh=p.w_hh.T)
    torch.library.opcheck(operators.recurrence.default, strided.forward)
    torch.library.opcheck(operators.recurrence_backward_stats.default, strided.backward)


def test_opcheck_of_triton() -> None:
    """The operators of the Triton backend, where they can run: schemas, fakes, and nothing written that is not said."""
    need("triton")
    device = device_of(BACKENDS["triton"])
    for shape in ("dense", "packed"):
        p = make_problem(**PROBLEMS[shape], device=device)
        for name in ("recurrence", "recurrence_"):
            torch.library.opcheck(getattr(torch.ops.rnnkern, f"triton_{name}").default, p.forward)
        for name in ("recurrence_backward", "recurrence_backward_stats"):
            torch.library.opcheck(getattr(torch.ops.rnnkern, f"triton_{name}").default, p.backward)


def test_opcheck_of_helpers() -> None:
    """What compiled graphs call beside the recurrence."""
    torch.library.opcheck(torch.ops.rnnkern.copied.default, (torch.randn(3),))
    for batch_sizes in (None, torch.tensor([2, 1])):
        arguments = (torch.tensor(-1), batch_sizes, None, -1, "rnn", 2, 2)  # of no Recorder
        torch.library.opcheck(torch.ops.rnnkern.open_taps.default, arguments)
    stats = torch.rand(3, 2, 2, dtype=torch.float64)
    torch.library.opcheck(torch.ops.rnnkern.deliver.default, (stats, torch.tensor(-1), -1, 0, 0))


def test_function_refuses_nothing_it_promises(backend: Backend, device: str) -> None:
    """apply takes its arguments in the order of its docstring, the tap and batch_sizes may be None."""
    p = make_problem(3, 2, 4, device=device)
    z, h0, w_hh = leaves(p)
    h, h_n = RNNFunction.apply(z, h0, w_hh, None, None, False, "tanh", INF, backend.name)
    assert same_bits([h], [backend.recurrence(*p.forward)]) and torch.equal(h_n, h[-1])


@pytest.mark.everywhere
@pytest.mark.filterwarnings("ignore:.*performance drop")  # PyTorch loops over what stands in the batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_batch_of_gradients(dtype: torch.dtype, bidirectional: bool, packed: bool) -> None:
    """autograd.grad(is_grads_batched=True) is a loop over the gradients; in sizes that products.py serves."""
    T, B, H = 17, 4, 64
    module = rnnkern.RNN(H, H, bidirectional=bidirectional, dtype=dtype)
    leaf = drawn(1, T, B, H, dtype=dtype).requires_grad_()
    output = module(pack(list(leaf.unbind(1))))[0].data if packed else module(leaf)[0]
    wanted = [leaf, *module.parameters()]
    given = drawn(2, 3, *output.shape, dtype=dtype)
    found = torch.autograd.grad(output, wanted, given, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, wanted, g, retain_graph=True) for g in given]
    for several, one_by_one in zip(found, zip(*each)):
        torch.testing.assert_close(several, torch.stack(one_by_one))
