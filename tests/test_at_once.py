"""A plain net at once gives what the way through functional.rnn gives, layer by layer and operator by operator."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import assert_same_but_for_rounding, drawn, same_bits, threads
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from rnnkern import functional, layer_function, modules, products

pytestmark = [pytest.mark.usefixtures("cpu_library"), pytest.mark.cpu_only("the operator is the CPU's")]
I, H = 5, 9


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call of a module whether it was done at once."""
    calls: list[bool] = []

    def counted(*arguments: Any) -> Any:
        done = functional.at_once(*arguments)
        calls.append(done is not None)
        return done

    monkeypatch.setattr(modules, "at_once", counted)
    return calls


def the_long_way(module: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "at_once", lambda *_: None)
        patch.setattr(layer_function, "serves", lambda given: False)
        return module(*inputs)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_as_the_long_way(
    taken: list[bool], nonlinearity: str, bidirectional: bool, bias: bool, layers: int, dtype: torch.dtype
) -> None:
    options: dict = dict(nonlinearity=nonlinearity, bidirectional=bidirectional, bias=bias, dtype=dtype)
    chains = layers * (2 if bidirectional else 1)
    for B, hidden in ((1, H), (7, 33), (0, H)):
        for batch_first in (False, True):
            module = rnnkern.RNN(I, hidden, layers, batch_first=batch_first, **options)
            x = drawn(1, *((B, 6) if batch_first else (6, B)), I, dtype=dtype)
            gapped = drawn(2, *x.shape[:2], 2 * I, dtype=dtype)[..., ::2]
            hx = drawn(3, chains, hidden, B, dtype=dtype).transpose(1, 2)
            for inputs in ((x,), (x, hx), (gapped, hx.contiguous())):
                for n in (1, 2):
                    with torch.no_grad(), threads(n):
                        found, expected = module(*inputs), the_long_way(module, *inputs)
                    assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
                    # Without biases F.linear chooses by its input's strides which product it takes for one sample.
                    if bidirectional and not (B == 1 and batch_first and not bias):  # PyTorch projects for both
                        assert same_bits([v.contiguous() for v in found], [v.contiguous() for v in expected])
                    else:  # the steps project for themselves
                        assert_same_but_for_rounding(found, expected)
    assert all(taken) and len(taken) == 36


def test_states_are_no_views() -> None:
    x, hx = drawn(1, 4, 3, I), drawn(2, 1, 3, H)
    kept = x.clone(), hx.clone()
    with torch.inference_mode():
        output, h_n = rnnkern.RNN(I, H)(x, hx)
        assert output.untyped_storage().data_ptr() != h_n.untyped_storage().data_ptr()
        output.zero_()
        assert h_n.count_nonzero() > 0
    assert torch.equal(x, kept[0]) and torch.equal(hx, kept[1])


def test_gapped_weights(taken: list[bool]) -> None:
    module = rnnkern.RNN(I, H)
    for name, parameter in list(module.named_parameters()):
        wide = torch.zeros(*parameter.shape, 2)
        wide[..., 0] = parameter.detach()
        setattr(module, name, nn.Parameter(wide[..., 0]))
        assert not getattr(module, name).is_contiguous()
    x = drawn(1, 4, 3, I)
    with torch.no_grad():
        found = module(x)
        assert taken == [True]
        assert_same_but_for_rounding(found, the_long_way(module, x))


def autocast(module: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def named(backend: str) -> Callable[[nn.Module, Tensor], Any]:
    def call(module: nn.Module, x: Tensor) -> Any:
        with rnnkern.use_backend(backend):
            return module(x)

    return call


def watched(module: nn.Module, x: Tensor) -> Any:
    with rnnkern.watch(module):
        return module(x)


def observed(module: nn.Module, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        result = module(x)
    assert counter.get_total_flops() >= 2 * x.numel() * H
    return result


def mapped(module: nn.Module, x: Tensor) -> Any:
    return torch.vmap(lambda v: module(v)[0])(x[None])


def packed(module: nn.Module, x: Tensor) -> Any:
    return module(nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]))


def traced(module: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(module, (x,), check_trace=False)(x)


def single_step(module: nn.Module, x: Tensor) -> Any:
    """By torch.nn.RNN's operator."""
    return module(x[:1])


CALLS: list[tuple[dict, Callable[[nn.Module, Tensor], Any], bool]] = [
    ({}, lambda module, x: module(x), True),
    ({}, lambda module, x: module(x[0]), True),  # unbatched
    ({}, single_step, True),
    ({"num_layers": 2, "dropout": 0.5}, lambda module, x: module.eval()(x), True),
    ({"clip": 0.1}, lambda module, x: module(x), True),
    ({"recurrent_dropout": 0.5}, lambda module, x: module.eval()(x), True),
    ({}, lambda module, x: pickle.loads(pickle.dumps(module))(x), True),
    ({}, lambda module, x: module(x, lengths=[5, 5, 3]), False),
    ({}, lambda module, x: module(x, return_states=True), False),
    ({"num_layers": 2, "dropout": 0.5}, lambda module, x: module(x), False),
    ({"recurrent_dropout": 0.5}, lambda module, x: module(x), False),
    ({"layer_norm": "input"}, lambda module, x: module(x), False),
    ({"num_layers": 2, "residual": True}, lambda module, x: module(x), False),
    ({"dtype": torch.bfloat16}, lambda module, x: module(x.bfloat16()), not products.is_slow(torch.bfloat16)),
    ({"bidirectional": True}, lambda module, x: module(x), True),
    ({"allow_empty": True}, lambda module, x: module(x[:0]), False),
    ({}, autocast, False),
    ({}, named("reference"), False),
    ({}, named("cpu"), True),
    ({}, watched, False),
    ({}, observed, False),
    ({}, mapped, False),
    ({}, packed, False),
    ({}, traced, False),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(("options", "call", "expected"), CALLS)
def test_which_calls(
    taken: list[bool], options: dict, call: Callable[[nn.Module, Tensor], Any], expected: bool, with_gradients: bool
) -> None:
    module = rnnkern.RNN(I, H, **options)
    with nullcontext() if with_gradients else torch.no_grad():
        call(module, drawn(1, 5, 3, I))
    with_gradients_too = {single_step: False, watched: True}.get(call, expected and not module.bidirectional)
    assert any(taken) == (with_gradients_too if with_gradients else expected)
    if not with_gradients:
        return
    taken.clear()
    call(module.requires_grad_(False), drawn(1, 5, 3, I))  # a frozen net has no gradients either
    assert any(taken) == expected


@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.zeros(4, 2, I + 1), None),
        (torch.zeros(4, 2, I, dtype=torch.float64), None),
        (torch.zeros(0, 2, I), None),
        (torch.zeros(4, 2, I), torch.zeros(1, 3, H)),
        (torch.zeros(4, 2, I), torch.zeros(2, 2, H)),
        (torch.zeros(4, 2, I), torch.zeros(1, 2, H, dtype=torch.float64)),
        (torch.zeros(4, 2, I), torch.zeros(1, 2, H, device="meta")),
        (torch.zeros(4, 2, I, device="meta"), None),
        (torch.zeros(4, I), torch.zeros(1, 2, H)),
    ],
)
def test_errors(x: Tensor, hx: Tensor | None) -> None:
    """The same with and without gradients."""
    module = rnnkern.RNN(I, H)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        module(x, hx)
    with torch.no_grad(), pytest.raises(type(expected.value)) as found:
        module(x, hx)
    assert str(found.value) == str(expected.value)


def weights(layers: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [w.detach() for w in rnnkern.RNN(I, H, layers, dtype=dtype).parameters()]


def test_opcheck() -> None:
    module = rnnkern.RNN(I, H, 2, bidirectional=True)
    of_both = [w.detach() for w in module.parameters()]
    x, hx = drawn(1, 4, 3, I), drawn(2, 4, 3, H)
    torch.library.opcheck(torch.ops.rnnkern.layers, (x, hx, of_both, True, True, "tanh"))
    torch.library.opcheck(torch.ops.rnnkern.layers, (x, None, weights(), True, False, "relu"))
    torch.library.opcheck(torch.ops.rnnkern.layers, (x, None, weights()[:2], False, False, "tanh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, r"weights must be 4 for each layer, got 0"),
        ({"weights": weights()[:3]}, r"weights must be 4 for each layer, got 3"),
        ({"bidirectional": True}, r"weights must be 8 for each layer, got 4"),
        ({"input": torch.zeros(4, I)}, r"input must have shape \(T, B, I\) with T > 0, got \[4, 5\]"),
        ({"input": torch.zeros(0, 3, I)}, r"input must have shape \(T, B, I\) with T > 0, got \[0, 3, 5\]"),
        ({"h0": torch.zeros(1, 2, H)}, r"h0 must have shape \[1, 3, 9\], got \[1, 2, 9\]"),
        ({"h0": torch.zeros(1, 3, H).double()}, r"h0 must have the dtype of input \(Float\), got Double"),
        ({"nonlinearity": "gelu"}, r"nonlinearity must be 'tanh' or 'relu', got 'gelu'"),
        ({"weights": [torch.zeros(H, I), torch.zeros(H, H - 1), *weights()[2:]]}, r"w_hh must have shape \[9, 9\]"),
        ({"weights": [torch.zeros(H, I), torch.zeros(H), *weights()[2:]]}, r"w_hh must have shape \(H, H\), got \[9\]"),
        ({"weights": [torch.zeros(2 * H, I), *weights()[1:]]}, r"w_ih must have shape \[9, 5\], got \[18, 5\]"),
        ({"weights": [*weights()[:2], torch.zeros(H + 1), torch.zeros(H)]}, r"b_ih must have shape \[9\], got \[10\]"),
        ({"weights": [*weights()[:3], torch.zeros(1)]}, r"b_hh must have shape \[9\], got \[1\]"),
        ({"weights": [*weights(), torch.zeros(H, H + 1), *weights()[1:]]}, r"w_ih must have shape \[9, 9\]"),
        (
            {"weights": [weights()[0], weights()[1].double(), *weights()[2:]]},
            r"w_hh must have the dtype of input \(Float\), got Double",
        ),
        ({"weights": [w.int() for w in weights()], "input": torch.zeros(4, 3, I).int()}, r"float32, float64"),
    ],
)
def test_bad_input_of_the_operator(change: dict, message: str) -> None:
    arguments: dict = dict(input=torch.zeros(4, 3, I), h0=None, weights=weights(), has_biases=True)
    arguments |= dict(bidirectional=False, nonlinearity="tanh") | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnkern.layers(*arguments.values())
