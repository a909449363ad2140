"""Both directions of a layer as one node give what the directions give one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from helpers import DTYPES, answers, drawn, make_problem, pack, same_bits, threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import both_directions, ops
from rnnkern.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("cpu_library")
CPU = BACKENDS["cpu"]
CASES = [
    {"T": 7, "B": 1, "H": 9},
    {"T": 30, "B": 1, "H": 288},
    {"T": 5, "B": 33, "H": 48},
    {"lengths": [9, 9, 4, 1], "H": 160},
    {"T": 0, "B": 3, "H": 5},
    {"T": 4, "B": 0, "H": 5},
]


@contextmanager
def one_by_one() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(both_directions, "serves", lambda *_: False)
        yield


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], -1)


def gapped(a: Tensor, b: Tensor) -> Tensor:
    """With something else between the elements of a row, and between the rows."""
    both = side_by_side(a, b)
    wide = both.new_full((*both.shape[:-1], 2 * both.shape[-1] + 3), float("nan"))
    rows = wide[..., : 2 * both.shape[-1] : 2]
    return rows.copy_(both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("joined", [side_by_side, gapped])
def test_operators(case: dict, dtype: torch.dtype, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The bits of two operators, however many threads there are."""
    p = make_problem(**case, dtype=dtype, clip=0.7)
    q = make_problem(**case, dtype=dtype, clip=0.7, reverse=True, seed=1, with_grad_hn=False)
    one, other = answers(CPU, p), answers(CPU, q)
    for n in (1, 2, 5):
        with threads(n):
            h = joined(p.z, q.z)
            ops.bidirectional_(h, (p.h0, q.h0), (p.w_hh, q.w_hh), p.batch_sizes, "tanh")
            assert same_bits([h.clone(memory_format=torch.contiguous_format)], [side_by_side(one.h, other.h)])
            rows = joined(p.grad_h, q.grad_h), (p.grad_hn, None), joined(p.h, q.h)
            arguments = *rows, (p.h0, q.h0), (p.w_hh, q.w_hh), p.batch_sizes
            delta, *grad_h0, stats = ops.bidirectional_backward(*arguments, "tanh", 0.7, True)
            assert same_bits([delta], [side_by_side(one.delta, other.delta)])
            assert same_bits(grad_h0, [one.grad_h0, other.grad_h0])
            assert same_bits(stats, [one.stats, other.stats])
            *same, none = ops.bidirectional_backward(*arguments, "tanh", 0.7, False)
            assert same_bits(same, [delta, *grad_h0]) and none.numel() == 0


def test_opcheck() -> None:
    p, q = (make_problem(4, 3, 6, seed=seed) for seed in range(2))
    h = side_by_side(p.z, q.z)
    arguments = h, None, p.grad_hn, h.clone(), p.h0, q.h0, p.w_hh, q.w_hh, None, "relu", 2.0, True
    torch.library.opcheck(torch.ops.rnnkern.bidirectional_, (h, p.h0, q.h0, p.w_hh, q.w_hh, None, "relu"))
    torch.library.opcheck(torch.ops.rnnkern.bidirectional_backward, arguments)


def test_bad_input() -> None:
    p = make_problem(4, 3, 6)
    odd = torch.zeros(4, 3, 7)
    with pytest.raises(RuntimeError, match=r"z must have the two directions side by side, \(.., 2H\), got \[4, 3, 7\]"):
        ops.bidirectional_(odd, (p.h0, p.h0), (p.w_hh, p.w_hh), None, "tanh")
    with pytest.raises(RuntimeError, match="h0 must have shape"):
        ops.bidirectional_(side_by_side(p.z, p.z), (p.h0, p.h0[1:]), (p.w_hh, p.w_hh), None, "tanh")
    with pytest.raises(RuntimeError, match="expanded"):
        ops.bidirectional_(torch.zeros(12).expand(4, 3, 12), (p.h0, p.h0), (p.w_hh, p.w_hh), None, "tanh")


def everything(module: rnnkern.RNN, x: Any, hx: Tensor) -> list[Tensor]:
    """Output, h_n, all gradients and the statistics of a watched step."""
    module.zero_grad()
    hx = hx.clone().requires_grad_()
    leaf = (x.data if isinstance(x, torch.nn.utils.rnn.PackedSequence) else x).requires_grad_()
    leaf.grad = None
    with rnnkern.watch(module) as flow:
        output, h_n = module(x, hx)
        data = output.data if isinstance(x, torch.nn.utils.rnn.PackedSequence) else output
        ((data * drawn(5, *data.shape, dtype=data.dtype)).sum() + h_n.square().sum()).backward()
        record = flow.read()
    assert record is not None and leaf.grad is not None and hx.grad is not None
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [data, h_n, leaf.grad, hx.grad, *grads, record.norm]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_module(options: dict, packed: bool) -> None:
    module = rnnkern.RNN(5, 6, 2, bidirectional=True, dtype=torch.float64, **options)
    x: Any = drawn(1, 4, 4, 5, dtype=torch.float64)
    if packed:
        x = pack([drawn(i, n, 5, dtype=torch.float64) for i, n in enumerate((6, 3, 3, 1))])
    hx = drawn(2, 4, 4, 6, dtype=torch.float64)
    together = everything(module, x, hx)
    with one_by_one():
        alone = everything(module, x, hx)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_is_taken() -> None:
    """Where gradients of both directions are wanted, or of none; a frozen direction costs no chain of its own."""
    module = rnnkern.RNN(3, 4, bidirectional=True)
    x = torch.randn(5, 2, 3)

    def node() -> str:
        return type(module(x)[0].grad_fn).__name__

    assert node() == "BidirectionalFunctionBackward"
    module.weight_hh_l0_reverse.requires_grad_(False)
    assert node() != "BidirectionalFunctionBackward"
    with torch.no_grad(), rnnkern.backends.use_backend("reference"):
        expected = module(x)[0]
    torch.testing.assert_close(module(x)[0], expected)


def test_double_backward() -> None:
    module = rnnkern.RNN(3, 4, bidirectional=True, dtype=torch.float64)
    names, weights = zip(*module.named_parameters())

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights)), (x,))[0]

    inputs = [drawn(1, 5, 2, 3, dtype=torch.float64).requires_grad_(), *weights]
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)
    assert type(output(*inputs).grad_fn).__name__ == "BidirectionalFunctionBackward"


def test_output_that_was_written_to_is_noticed() -> None:
    output, _ = rnnkern.RNN(3, 4, bidirectional=True)(torch.randn(5, 2, 3))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_modes_see_each_chain_as_an_operator_that_returns_its_states() -> None:
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        rnnkern.RNN(3, 4, bidirectional=True)(torch.randn(5, 2, 3))
    assert seen.names.count("recurrence") == 2
