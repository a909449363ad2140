"""What vmap maps over goes to the kernel as a larger batch, and the result is that of a loop."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import INF, Problem, make_problem
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import backends
from rnnkern.autograd import RNNBackwardFunction, recurrence
from rnnkern.backends import Backend


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """PyTorch warns where it loops because an operator has no rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*batching rule")
        yield


class Calls(TorchDispatchMode):
    """Counts the calls of our operators, and the samples that each of them gets."""

    def __enter__(self) -> Calls:
        self.count: Counter[str] = Counter()
        self.samples: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rnnkern":
            name = func._schema.name.removeprefix("rnnkern::").removeprefix("triton_")
            self.count[name] += 1
            self.samples.add(args[1 if name == "recurrence" else 3].shape[0])
        return func(*args, **(kwargs or {}))

    def of_a_kernel(self, backend: Backend, **expected: int) -> bool:
        return self.count == ({} if backend.name == "reference" else expected)


def module_and_loss(device: str, **options: Any) -> tuple[rnnkern.RNN, dict[str, Tensor], Callable[..., Tensor]]:
    module = rnnkern.RNN(2, 3, 2, device=device, **options)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x[:, None],))[0].square().sum()

    return module, weights, loss


@pytest.mark.parametrize("options", [{}, dict(nonlinearity="relu", bidirectional=True)], ids=["tanh", "relu-both"])
def test_gradients_per_sample(backend: Backend, device: str, options: dict[str, Any]) -> None:
    module, weights, loss = module_and_loss(device, **options)
    x = torch.randn(4, 5, 2, device=device)
    with Calls() as calls:
        grads = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    recurrences = 2 * (2 if module.bidirectional else 1)
    assert calls.of_a_kernel(backend, recurrence=recurrences, recurrence_backward=recurrences)
    assert calls.samples <= {5}
    for b in range(5):
        for name, expected in grad(loss)(weights, x[:, b]).items():
            torch.testing.assert_close(grads[name][b], expected)


def test_gradients_per_sample_of_packed_input(backend: Backend, device: str) -> None:
    """Each element of the mapped dimension is a whole packed batch."""
    module, weights, _ = module_and_loss(device)
    batch_sizes = torch.tensor([3, 2, 2, 1], device="cpu")
    data = torch.randn(6, 8, 2, device=device)

    def loss(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        output, h_n = functional_call(module, weights, (PackedSequence(rows, batch_sizes),))
        return output.data.square().sum() + h_n.sum()

    with Calls() as calls:
        grads = vmap(grad(loss), in_dims=(None, 0))(weights, data)
    assert calls.of_a_kernel(backend, recurrence=2, recurrence_backward=2)
    assert calls.samples <= {18}
    for i in range(6):
        for name, expected in grad(loss)(weights, data[i]).items():
            torch.testing.assert_close(grads[name][i], expected)


@pytest.mark.parametrize("shared_input", [True, False])
def test_ensemble(backend: Backend, device: str, shared_input: bool) -> None:
    modules = [rnnkern.RNN(2, 3, 2, device=device) for _ in range(4)]
    weights, _ = stack_module_state(modules)
    x = torch.randn(4, 4, 5, 2, device=device)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(modules[0], weights, (x,))[0].square().sum()

    inputs, dim = (x[0], None) if shared_input else (x, 0)
    with Calls() as calls:
        grads = vmap(grad(loss), in_dims=(0, dim))(weights, inputs)
    assert calls.of_a_kernel(backend, recurrence=8, recurrence_backward=8)  # a call for each member
    for i, module in enumerate(modules):
        module(x[0 if shared_input else i])[0].square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(grads[name][i], p.grad)


def test_jacobian_rows_are_samples(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(2, 3, device=device)
    x = torch.randn(4, 2, 2, device=device)
    with Calls() as calls:
        jacobian = jacrev(lambda x: module(x)[0][-1])(x)
    assert calls.of_a_kernel(backend, recurrence=1, recurrence_backward=1)
    assert calls.samples <= {2, 12}
    expected = torch.autograd.functional.jacobian(lambda x: module(x)[0][-1], x)
    torch.testing.assert_close(jacobian, expected)


def test_nested(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(2, 3, bidirectional=True, device=device)
    x, hx = torch.randn(4, 5, 3, 2, 2, device=device), torch.randn(2, 2, 3, device=device)
    output, h_n = vmap(vmap(lambda x: module(x, hx), in_dims=1, out_dims=1), in_dims=1, out_dims=1)(x)
    for i in range(5):
        for j in range(3):
            expected = module(x[:, i, j], hx)
            torch.testing.assert_close((output[:, i, j], h_n[:, i, j]), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("shared", ["w_hh", "w_hh and h0", "nothing"])
def test_operators(backend: Backend, device: str, packed: bool, shared: str) -> None:
    """All results of the operators, the statistics too, whichever arguments are mapped over."""
    size = dict(lengths=[3, 2, 2]) if packed else dict(T=4, B=3)
    problems = [make_problem(**size, H=5, seed=i, device=device, clip=0.7) for i in range(3)]
    if shared != "nothing":
        problems = [p.replace(w_hh=problems[0].w_hh) for p in problems]
    if shared == "w_hh and h0":
        problems = [p.replace(h0=problems[0].h0) for p in problems]
    dims = {"w_hh": None if "w_hh" in shared else 0, "h0": None if "h0" in shared else 0}

    def stacked(name: str) -> Tensor:
        tensors = [getattr(p, name) for p in problems]
        return torch.stack(tensors) if dims.get(name, 0) == 0 else tensors[0]

    p = problems[0]
    forward = vmap(
        lambda z, h0, w_hh: backend.recurrence(z, h0, w_hh, *p.forward[3:]), in_dims=(0, dims["h0"], dims["w_hh"])
    )(stacked("z"), stacked("h0"), stacked("w_hh"))
    backward = vmap(
        lambda grad_h, grad_hn, h, h0, w_hh: backend.recurrence_backward_stats(
            grad_h, grad_hn, h, h0, w_hh, *p.backward[5:]
        ),
        in_dims=(0, 0, 0, dims["h0"], dims["w_hh"]),
    )(*map(stacked, ("grad_h", "grad_hn", "h", "h0", "w_hh")))
    for i, q in enumerate(problems):
        torch.testing.assert_close(forward[i], backend.recurrence(*q.forward))
        for got, expected in zip(backward, backend.recurrence_backward_stats(*q.backward), strict=True):
            torch.testing.assert_close(got[i], expected)


def test_without_gradients(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(2, 3, device=device)
    x = torch.randn(6, 4, 5, 2, device=device)
    before = x.clone()
    with torch.no_grad():
        output, _ = vmap(module)(x)
    torch.testing.assert_close(output[2], module(x[2])[0])
    assert torch.equal(x, before)


# The backward chain as a node of the graph


@pytest.mark.unnamed
@pytest.mark.float64
@pytest.mark.parametrize("options", [{}, dict(clip=0.4), dict(nonlinearity="relu", reverse=True)], ids=str)
@pytest.mark.parametrize("shape", [dict(T=3, B=2, H=3), dict(lengths=[3, 2, 2], H=2)], ids=["dense", "packed"])
def test_a_differentiable_backward_is_the_kernel(
    backend: Backend, device: str, shape: dict[str, Any], options: dict[str, Any]
) -> None:
    """create_graph=True calls the operator, with the same gradients; its own derivatives are right."""
    p = make_problem(**shape, dtype=torch.float64, device=device, **options)
    arguments = dict(batch_sizes=p.batch_sizes, reverse=p.reverse, nonlinearity=p.nonlinearity, clip=p.clip)

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (p.z, p.h0, p.w_hh)]
        outputs = recurrence(*inputs, **arguments)
        return torch.autograd.grad(outputs, inputs, [p.grad_h, p.grad_hn], create_graph=create_graph)

    with Calls() as calls:
        differentiable = gradients(True)
    assert calls.of_a_kernel(backend, recurrence=1, recurrence_backward=1)
    for a, b in zip(differentiable, gradients(False), strict=True):
        assert torch.equal(a, b)

    def first(z: Tensor, h0: Tensor, w_hh: Tensor, grad_h: Tensor, grad_hn: Tensor) -> tuple[Tensor, ...]:
        outputs = recurrence(z, h0, w_hh, **arguments)
        return torch.autograd.grad(outputs, (z, h0, w_hh), (grad_h, grad_hn), create_graph=True)

    exact = p.clip == INF  # a clipped gradient is nobody's derivative, but it has one with respect to what arrives
    leaves = [x.clone().requires_grad_(exact) for x in (p.z, p.h0, p.w_hh)]
    arriving = [x.clone().requires_grad_() for x in (p.grad_h, p.grad_hn)]
    if exact:
        assert torch.autograd.gradcheck(first, (*leaves, *arriving))
    else:
        with torch.no_grad():
            h = recurrence(*leaves, **arguments)[0]
        chain = (h, p.h0, p.w_hh, p.batch_sizes, p.reverse, p.nonlinearity, p.clip, backend.name, False)
        assert torch.autograd.gradcheck(lambda *e: RNNBackwardFunction.apply(*e, *chain)[:2], arriving)


@pytest.mark.everywhere
def test_what_no_kernel_computes(caplog: pytest.LogCaptureFixture) -> None:
    """Forward-mode AD and double backward run on the reference, and the log says so once; a named backend refuses."""
    rnn, x = rnnkern.RNN(2, 3), torch.randn(4, 2, 2, requires_grad=True)

    def tangent() -> None:
        torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,))

    def penalty() -> None:
        (grad,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    for run, feature in ((tangent, "forward-mode AD"), (penalty, "double backward")):
        message = f"{feature}: no kernel computes this; the plain PyTorch reference runs instead"
        backends._told.discard(message)
        caplog.clear()
        with caplog.at_level(logging.INFO, "rnnkern"):
            run()
            run()
        assert [r.message for r in caplog.records] == [message]
        kernels = backends.select(x).name
        with rnnkern.use_backend(kernels), pytest.raises(RuntimeError, match=f"'{kernels}' was asked.*{feature}"):
            run()
        with rnnkern.use_backend("reference"):
            run()


@pytest.mark.unnamed
@pytest.mark.float64
def test_hessian_of_the_initial_state(backend: Backend, device: str) -> None:
    """Forward over reverse, with no gradient for h_n."""
    p: Problem = make_problem(3, 2, 3, dtype=torch.float64, device=device)

    def loss(h0: Tensor) -> Tensor:
        return recurrence(p.z.clone(), h0, p.w_hh)[0].sin().sum()

    expected = torch.autograd.functional.hessian(loss, p.h0)
    torch.testing.assert_close(torch.func.hessian(loss)(p.h0), expected)
