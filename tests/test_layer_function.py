"""A plain layer as one node of the graph gives what the way through functional.rnn gives, operator by operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_as_good, assert_same_but_for_rounding, drawn, same_bits, threads
from torch import Tensor, nn

import rnnkern
from rnnkern import layer_function, modules, products

pytestmark = [pytest.mark.usefixtures("cpu_library"), pytest.mark.cpu_only("the operators are the CPU's")]
I, H, T, B = 5, 9, 6, 4
FAST = [d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if not products.is_slow(d)]


@contextmanager
def the_long_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "at_once", lambda *_: None)
        patch.setattr(layer_function, "serves", lambda given: False)
        yield


def nodes(output: Tensor) -> set[str]:
    """The names of all nodes of the graph behind a tensor."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [v.detach().clone().requires_grad_() for v in tensors]


def gradients(module: nn.Module, x: Tensor, hx: Tensor | None, outputs: str) -> dict[str, Tensor]:
    """Of everything, from a loss on the output, the last states, or both."""
    x, *state = leaves(x) if hx is None else leaves(x, hx)
    module.zero_grad()
    output, h_n = module(x, *state)
    values = [v for v, name in ((output, "output"), (h_n, "h_n")) if name in outputs]
    torch.autograd.backward(values, [drawn(8 + i, *v.shape).to(v.dtype) for i, v in enumerate(values)])
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"output": output, "h_n": h_n, "x": x.grad, **grads, **({"hx": state[0].grad} if state else {})}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"nonlinearity": "relu", "clip": 0.3},
    {"num_layers": 3, "batch_first": True},
]


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("outputs", ["output", "h_n", "output and h_n"])
def test_same_as_the_long_way(dtype: torch.dtype, options: dict[str, Any], outputs: str) -> None:
    for batch, hidden in ((1, H), (7, 33), (0, H)):
        module = rnnkern.RNN(I, hidden, **options).to(dtype)
        exact = rnnkern.RNN(I, hidden, **options).double()
        exact.load_state_dict(module.state_dict())
        size = (batch, T) if module.batch_first else (T, batch)
        x, hx = drawn(1, *size, I).to(dtype), drawn(2, module.num_layers, batch, hidden).to(dtype)
        for state in (None, hx):
            for n in (1, 2):
                with threads(n):
                    found = gradients(module, x, state, outputs)
                    with the_long_way():
                        expected = gradients(module, x, state, outputs)
                        true = gradients(exact, x.double(), None if state is None else state.double(), outputs)
                assert "LayerFunctionBackward" in nodes(found["output"])
                assert "LayerFunctionBackward" not in nodes(expected["output"])
                for name, value in expected.items():
                    assert found[name].shape == value.shape and found[name].dtype == value.dtype
                    if dtype == torch.float64:
                        assert_same_but_for_rounding([found[name]], [value])
                    elif batch:
                        assert_as_good(name, found[name], value, true[name])
                    else:
                        assert torch.equal(found[name], value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_statistics(layers: int, bias: bool) -> None:
    """Watching changes no gradient, to the bit."""
    module, x = rnnkern.RNN(I, H, layers, bias=bias), drawn(1, T, B, I)

    def watched() -> tuple[Any, dict[str, Tensor]]:
        with rnnkern.watch(module) as flow:
            grads = gradients(module, x, None, "output and h_n")
            return flow.read(), grads

    unwatched = gradients(module, x, None, "output and h_n")
    record, grads = watched()
    with the_long_way():
        expected, plainly = watched()
    assert "LayerFunctionBackward" in nodes(grads["output"]) and "LayerFunctionBackward" not in nodes(plainly["output"])
    assert same_bits(grads.values(), unwatched.values())
    assert record.norm.shape == (layers, 1, T) and record.norm.all()
    np.testing.assert_allclose(record["rnn"].squares, expected["rnn"].squares, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projected_by_pytorch(dtype: torch.dtype) -> None:
    """To the bit, where W_ih is too large for its only row of a step."""
    module, x = rnnkern.RNN(64, 64, dtype=dtype), drawn(1, T, 1, 64, dtype=dtype)
    found = module(x)
    with the_long_way():
        assert same_bits(found, module(x))


@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_same_bits_without_gradients(dtype: torch.dtype) -> None:
    """However the input is projected: B decides, and W_ih's size."""
    for batch, inputs, hidden in ((1, I, H), (1, 64, 64), (9, 33, 40), (33, 64, 65), (70, 130, 100)):
        module, x = rnnkern.RNN(inputs, hidden, dtype=dtype), drawn(1, T, batch, inputs).to(dtype)
        with torch.no_grad():
            found = module(x)
        assert same_bits(found, module(x))


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 2, 512), (2, 4, 600), (1, 1, 1024)])
def test_threads_that_share_units_project_on_the_way(dtype: torch.dtype, B: int, I: int, H: int) -> None:
    """They have the same bits as one."""
    module, x = rnnkern.RNN(I, H, dtype=dtype), drawn(1, 12, B, I).to(dtype)
    found = []
    for n in (1, 2, 5):
        with threads(n), torch.no_grad():
            found.append(module(x))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    exact = rnnkern.RNN(I, H, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    with the_long_way():
        plain, true = module(x)[0], exact(x.double())[0]
    if dtype == torch.float64:
        assert_same_but_for_rounding([found[0][0]], [plain])
    else:
        assert_as_good("output", found[0][0], plain, true)


def second(module: nn.Module, x: Tensor, hx: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of a function of the gradients."""
    given = [*leaves(x, hx), *module.parameters()]
    output, h_n = module(*given[:2])
    assert ("LayerFunctionBackward" in nodes(output)) == isinstance(module, rnnkern.RNN)
    first = torch.autograd.grad(output.square().sum() + h_n.sum(), given, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), given)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_double_backward(layers: int, bias: bool) -> None:
    module = rnnkern.RNN(I, H, layers, bias=bias, dtype=torch.float64)
    x, hx = drawn(1, T, B, I).double(), drawn(2, layers, B, H).double()
    for ours, plain in zip(second(module, x, hx), second(module.to_torch(), x, hx)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(how: str) -> None:
    module, x = rnnkern.RNN(I, H), drawn(1, T, B, I).requires_grad_()
    given = [x, *module.parameters()]
    output, upstream = module(x)[0], drawn(2, 3, T, B, H)

    def of(v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, given, v, retain_graph=True, **options)

    batched = of(upstream, is_grads_batched=True) if how == "is_grads_batched" else torch.vmap(of)(upstream)
    for found, *expected in zip(batched, *map(of, upstream)):
        torch.testing.assert_close(found, torch.stack(expected))


def test_every_gradient_is_a_tensor_of_its_own() -> None:
    """Whoever writes into one changes nothing else."""
    module, x, hx = rnnkern.RNN(I, H), *leaves(drawn(1, T, B, I), drawn(2, 1, B, H))
    output, h_n = module(x, hx)
    (output.sum() + h_n.sum()).backward()
    grads = [x.grad, hx.grad, *(p.grad for p in module.parameters())]
    assert not any(g is None or g._is_view() for g in [output, h_n, *grads])
    assert len({v.untyped_storage().data_ptr() for v in [output, h_n, x, hx, *grads]}) == len(grads) + 4


def test_saved_tensors_are_checked() -> None:
    module, x = rnnkern.RNN(I, H), drawn(1, T, B, I)
    for changed in ("output", "x", "weight_hh_l0"):
        leaf = x.clone()
        output = module(leaf)[0]
        with torch.no_grad():
            {"output": output, "x": leaf, "weight_hh_l0": module.weight_hh_l0}[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def arguments(**changed: Any) -> list[Any]:
    given: dict[str, Any] = {
        "grad_h": torch.ones(T, B, H),
        "grad_hn": torch.ones(1, B, H),
        "x": torch.ones(T, B, I),
        "w_ih": torch.ones(H, I),
        "h": torch.ones(T, B, H),
        "h0": torch.ones(1, B, H),
        "w_hh": torch.ones(H, H),
        "nonlinearity": "tanh",
        "clip": 1.0,
    }
    return [*(given | changed).values(), True, True, True, True, True]


def test_contract() -> None:
    operator = torch.ops.rnnkern.layer_backward.default
    torch.library.opcheck(operator, arguments())
    torch.library.opcheck(operator, arguments(grad_hn=None)[:-5] + [False] * 5)
    assert [v is None for v in operator(*arguments()[:-5], *[False] * 5)] == [True, True, True, True, False, True]
    changes: dict[str, tuple[Any, str]] = {
        "x": (torch.ones(T, B, I + 1), r"x must have shape \[6, 4, 5\], got \[6, 4, 6\]"),
        "w_ih": (torch.ones(H + 1, I), r"w_ih must have shape \[9, 5\], got \[10, 5\]"),
        "h": (torch.ones(0, B, H), r"h must have shape \(T, B, H\) with T > 0, got \[0, 4, 9\]"),
        "h0": (torch.ones(B, H), r"h0 must have shape \[1, 4, 9\], got \[4, 9\]"),
        "grad_hn": (torch.ones(B, H), r"grad_hn must have shape \[1, 4, 9\], got \[4, 9\]"),
        "grad_h": (torch.ones(T, B, H + 1), r"grad_h must have shape \[6, 4, 9\], got \[6, 4, 10\]"),
        "w_hh": (torch.ones(H, H).double(), "w_hh must have the dtype of h"),
        "nonlinearity": ("gelu", "nonlinearity must be 'tanh' or 'relu', got 'gelu'"),
        "clip": (-1.0, "clip must be positive"),
    }
    for name, (value, message) in changes.items():
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments(**{name: value}))
    with pytest.raises(RuntimeError, match=r"w_ih must have shape \(H, I\), got \[9\]"):
        operator(*arguments(w_ih=torch.ones(H)))
    with pytest.raises(RuntimeError, match="x must have the dtype of h"):
        operator(*arguments(x=torch.ones(T, B, I).double()))


@pytest.mark.parametrize("special", ["", "zeros", "not finite"])
@pytest.mark.parametrize(
    ("T", "B", "H", "I"), [(150, 8, 40, 33), (17, 64, 64, 64), (70, 64, 130, 40), (64, 65, 65, 97), (33, 250, 33, 9)]
)
@pytest.mark.parametrize("dtype", [d for d in FAST if d != torch.float64], ids=str)
def test_gradients_of_many_rows(dtype: torch.dtype, T: int, B: int, H: int, I: int, special: str) -> None:
    """Of both weights and the bias, in one pass over δ where there is a kernel for that; whatever the number of
    threads, the bits are the same."""
    sizes = (T, B, H), (T, B, I), (T, B, H), (1, B, H)
    grad_h, x, h, h0 = (drawn(i, *size).to(dtype) for i, size in enumerate(sizes))
    w_ih, w_hh = (drawn(4, H, I) / I**0.5).to(dtype), (drawn(5, H, H) / H**0.5).to(dtype)
    h, h0 = h.tanh(), h0.tanh()
    if special == "zeros":  # a loss on some steps alone, and W so small that nothing is left of it soon
        grad_h[: T // 2], grad_h[T // 2 + 2 : -1] = 0, 0
        w_hh *= 1e-9
    elif special == "not finite":
        x[T // 3, 1, I // 2] = float("inf")
        h[T // 2, 0, 3] = float("nan")
    given = (grad_h, None, x, w_ih, h, h0, w_hh, "relu", float("inf"))
    delta = torch.ops.rnnkern.recurrence_backward(grad_h, None, h, h0[0], w_hh, None, False, "relu", float("inf"))[0]
    found = {}
    for n in (1, 2, 5):
        with threads(n):
            _, grad_w_ih, grad_b, grad_w_hh, *_ = torch.ops.rnnkern.layer_backward(*given, *[True] * 5)
        found[n] = grad_w_ih, grad_b, grad_w_hh
    before = torch.cat([h0, h[:-1]])

    def by(kind: torch.dtype) -> tuple[Tensor, ...]:
        d, of_x, of_h = (v.flatten(0, 1).to(kind) for v in (delta, x, before))
        return d.T @ of_x, d.sum(0), d.T @ of_h

    for ours, plain, true in zip(found[1], by(dtype), by(torch.float64)):
        assert_as_good("a gradient", ours, plain, true)
    if dtype in (torch.float32, torch.bfloat16) and torch.ops.rnnkern.cpu_isa() == "amx":
        assert same_bits(found[1], found[2]) and same_bits(found[1], found[5])
