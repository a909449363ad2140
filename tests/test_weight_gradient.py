"""The gradient of a weight: the operator, its kernel on tiles, and which products of a module it takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import assert_as_good, drawn, pack, same_bits, threads, ulps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import products

pytestmark = pytest.mark.usefixtures("cpu_library")
operator = torch.ops.rnnkern.weight_gradient


@pytest.fixture
def tiles(cpu_library: None) -> None:
    if not products.has_tiles(torch.bfloat16):
        pytest.skip("this processor has no AMX; tests/test_cpu_host.py runs the kernel's source over a twin")


def halves(seed: int, *size: int) -> Tensor:
    return drawn(seed, *size).bfloat16()


VIEWS = {
    "dense": lambda x: x,
    "columns of wider rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("rows", "H", "I"),
    [
        ((1,), 1, 1),
        ((32,), 32, 32),
        ((31, 33), 33, 31),
        ((513, 7), 64, 80),
        ((40,), 20, 530),
        ((1100,), 70, 5),
        ((1500, 700), 40, 36),
    ],
    ids=str,
)
def test_rounded_once(tiles: None, rows: tuple[int, ...], H: int, I: int, view: str) -> None:
    deltas, xs = ([VIEWS[view](halves(i, n, width)) for i, n in enumerate(rows)] for width in (H, I))
    true = sum(d.double().T @ x.double() for d, x in zip(deltas, xs))
    ours = operator(deltas, xs)
    assert ours.dtype == torch.bfloat16 and ours.is_contiguous()
    assert ulps(ours, true, torch.bfloat16) <= 0.5 + sum(rows) * 2.0**-17
    with threads(1):
        assert same_bits([ours], [operator(deltas, xs)])


@pytest.mark.parametrize(("N", "H", "I"), [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_nothing(tiles: None, N: int, H: int, I: int) -> None:
    grad = operator([halves(0, N, H)], [halves(1, N, I)])
    assert grad.shape == (H, I) and not grad.any()


def test_infinite_and_not_a_number(tiles: None) -> None:
    """They stay in their columns: what fills up a block is 0."""
    delta, x = halves(0, 37, 40), halves(1, 37, 35)
    delta[36, 39], x[3, 34] = float("inf"), float("nan")
    grad = operator([delta], [x])
    assert grad[39, :34].isinf().all() and grad[:, 34].isnan().all()
    assert torch.equal(grad[:39, :34], operator([delta[:, :39]], [x[:, :34]]))


@pytest.mark.parametrize(
    ("deltas", "xs", "message"),
    [
        ([(4, 3)], [(4, 2), (4, 2)], "as many tensors each, got 1 and 2"),
        ([(4, 3)], [(5, 2)], r"x must have shape \[4, 2\], got \[5, 2\]"),
        ([(4, 3), (4, 2)], [(4, 2), (4, 2)], r"delta must have shape \[4, 3\], got \[4, 2\]"),
        ([(4, 3)], [(4,)], r"x must have shape \(N, I\), got \[4\]"),
        ([(3,)], [(3, 4)], r"delta must have shape \(N, H\), got \[3\]"),
    ],
)
def test_bad_shapes(tiles: None, deltas: list[tuple[int, ...]], xs: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator([halves(0, *size) for size in deltas], [halves(0, *size) for size in xs])


def test_contract(tiles: None) -> None:
    torch.library.opcheck(operator.default, ([halves(0, 5, 3), halves(1, 2, 3)], [halves(2, 5, 4), halves(3, 2, 4)]))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "H", "I"), [(1, 1, 1), (31, 33, 65), (300, 7, 20), (40, 300, 250)], ids=str)
def test_as_good_as_pytorch(dtype: torch.dtype, N: int, H: int, I: int, view: str) -> None:
    """Where there is no kernel, and where there is one for other sizes or dtypes."""
    delta, x = VIEWS[view](drawn(0, N, H).to(dtype)), VIEWS[view](drawn(1, N, I).to(dtype))
    ours = operator([delta], [x])
    assert ours.dtype == dtype and ours.is_contiguous()
    plain, true = delta.contiguous().T @ x.contiguous(), delta.double().T @ x.double()
    assert_as_good("grad_w", ours, plain, true)
    assert_as_good("twice", operator([delta] * 2, [x] * 2), 2 * plain, 2 * true)


def test_mixed_dtypes() -> None:
    with pytest.raises(RuntimeError, match=r"x must have the dtype of delta \(Float\), got BFloat16"):
        operator([torch.ones(2, 3)] * 2, [torch.ones(2, 3), halves(0, 2, 3)])
    with pytest.raises(RuntimeError, match=r"delta must have the dtype of delta\[0\] \(Float\), got BFloat16"):
        operator([torch.ones(2, 3), halves(0, 2, 3)], [torch.ones(2, 3), halves(0, 2, 3)])
    with pytest.raises(RuntimeError, match="the CPU kernels serve float32, float64, bfloat16 and float16, got Int"):
        operator([torch.ones(2, 3).int()], [torch.ones(2, 3).int()])


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()  # of gradients of weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._opname] += 1
        if func._opname == "weight_gradient":
            self.dtypes.add(args[0][0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["dense", "batch first", "packed", "two layers, both directions", "autocast"])
def test_module(tiles: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights' gradients are the operator's, and as good as those of torch.nn.RNN."""
    monkeypatch.setattr(products, "LEAST_WORK_ON_TILES", 0)
    options: dict[str, Any] = {"batch first": {"batch_first": True}}.get(case, {})
    if case.startswith("two"):
        options = {"num_layers": 2, "bidirectional": True}
    dtype = torch.float32 if case == "autocast" else torch.bfloat16
    truth = nn.RNN(24, 40, **options).bfloat16().double()
    x, lengths = halves(0, 9, 6, 24), (9, 7, 7, 4, 2, 1)

    def run(module: nn.Module, of: torch.dtype) -> dict[str, Tensor]:
        module.load_state_dict(truth.state_dict())
        leaf = x.detach().to(of).requires_grad_()
        given = pack([leaf[:n, b] for b, n in enumerate(lengths)]) if case == "packed" else leaf
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast" and of != torch.float64):
            output, h_n = module(given)
        rows = output.data if case == "packed" else output
        torch.autograd.backward(
            [rows, h_n], [halves(4, *rows.shape).to(rows.dtype), halves(5, *h_n.shape).to(h_n.dtype)]
        )
        return {"x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}

    with Calls() as calls:
        ours = run(rnnkern.RNN(24, 40, **options).to(dtype), dtype)
    layers = options.get("num_layers", 1)
    # of W_ih and W_hh: where somebody looks at the operators, each direction has its own
    assert calls.counts["weight_gradient"] == layers * (4 if options.get("bidirectional") else 2)
    plains, true = (
        run(nn.RNN(24, 40, **options).to(dtype), dtype),
        run(nn.RNN(24, 40, **options).double(), torch.float64),
    )
    for name in true:
        assert_as_good(name, ours[name].bfloat16(), plains[name].bfloat16(), true[name])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("why", ["small", "float32", "reference", "double backward", "oneDNN is off"])
def test_left_to_pytorch(tiles: None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why != "small":
        monkeypatch.setattr(products, "LEAST_WORK_ON_TILES", 0)
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    module, x = rnnkern.RNN(24, 40).to(dtype), drawn(0, 9, 6, 24).to(dtype)
    with (
        Calls() as calls,
        rnnkern.use_backend("reference" if why == "reference" else "auto"),
        torch.backends.mkldnn.flags(enabled=why != "oneDNN is off"),
    ):
        output = module(x)[0]
        torch.autograd.grad(output.sum(), list(module.parameters()), create_graph=why == "double backward")
    assert calls.dtypes == ({torch.float32} if why == "oneDNN is off" else set())
