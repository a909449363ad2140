"""A chain that vanishes: which rows its products need, and that none of them computes with subnormal numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_as_good, drawn, pack, threads
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import rnnkern
from rnnkern import ops, products

pytestmark = [pytest.mark.usefixtures("cpu_library"), pytest.mark.cpu_only("these products are the CPU's")]
BLOCK = 128  # rows that are looked at together
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class TestNeededRows:
    @every_dtype
    @pytest.mark.parametrize(
        ("nonzero", "bounds"),
        [
            ([], []),
            ([0], [0, 128]),
            ([127], [0, 128]),
            ([128], [128, 256]),
            ([899], [896, 900]),
            ([0, 130, 895], [0, 256, 768, 896]),
            (range(900), [0, 900]),
        ],
        ids=str,
    )
    def test_runs(self, dtype: torch.dtype, nonzero: Any, bounds: list[int]) -> None:
        delta, x = torch.zeros(900, 5, dtype=dtype), drawn(0, 900, 3).to(dtype)
        delta[list(nonzero), 4] = torch.finfo(dtype).smallest_normal
        for n in (1, 2, 5):
            with threads(n):
                assert ops.needed_rows(delta, x) == bounds

    @every_dtype
    @pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0, torch.finfo(torch.float32).smallest_normal])
    def test_whatever_is_not_zero(self, dtype: torch.dtype, value: float) -> None:
        delta, x = torch.zeros(1000, 40, dtype=dtype), drawn(0, 1000, 3).to(dtype)
        delta[500, 39] = value
        counts = delta[500, 39] != 0  # float16 has no number as small as the last one
        assert ops.needed_rows(delta, x) == ([384, 512] if counts else [])

    @every_dtype
    def test_negative_zero(self, dtype: torch.dtype) -> None:
        delta = -torch.zeros(300, 7, dtype=dtype)
        assert delta.signbit().all() and ops.needed_rows(delta, drawn(0, 300, 2).to(dtype)) == []

    @every_dtype
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_zero_times_infinity(self, dtype: torch.dtype, value: float) -> None:
        delta, x = torch.zeros(1000, 40, dtype=dtype), drawn(0, 1000, 3).to(dtype)
        x[700, 2] = value
        assert ops.needed_rows(delta, x) == [640, 768]
        x[700, 2] = torch.finfo(dtype).max
        assert ops.needed_rows(delta, x) == []

    def test_views(self) -> None:
        delta, x = torch.zeros(1000, 2, 6), drawn(0, 1000, 2, 6)
        delta[200, 0] = 1
        for layout in (lambda v: v, lambda v: v.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
            assert ops.needed_rows(layout(delta)[:, 0], layout(x)[:, 1]) == [128, 256]
            assert ops.needed_rows(layout(delta)[:, 1], layout(x)[:, 1]) == []
        assert ops.needed_rows(torch.zeros(1, 6).expand(1000, 6), x[:, 0]) == []
        assert ops.needed_rows(torch.ones(1, 6).expand(1000, 6), x[:, 0]) == [0, 1000]

    @pytest.mark.parametrize(("N", "H", "I"), [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
    def test_nothing(self, N: int, H: int, I: int) -> None:
        assert ops.needed_rows(torch.ones(N, H), torch.ones(N, I)) == ([0, N] if N and H else [])

    def test_bad_input(self) -> None:
        for delta, x, message in [
            (torch.ones(4), torch.ones(4, 2), r"delta must have shape \(N, H\), got \[4\]"),
            (torch.ones(4, 2), torch.ones(4), r"x must have shape \(N, I\), got \[4\]"),
            (torch.ones(4, 2), torch.ones(5, 3), r"x must have shape \[4, 3\], got \[5, 3\]"),
            (torch.ones(4, 2), torch.ones(4, 3).double(), "x must have the dtype of delta"),
            (torch.ones(4, 2).int(), torch.ones(4, 3).int(), "the CPU kernels serve float32"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                ops.needed_rows(delta, x)


TINY = torch.finfo(torch.float32).smallest_normal


def keeps_subnormals() -> bool:
    """Of every thread that takes part in a large operator."""
    return bool((torch.full((1 << 20,), TINY) * 0.5 != 0).all())


class TestProducts:
    """δ W and δᵀ x."""

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_flush_in_every_thread_and_put_back(self, n: int) -> None:
        tiny, small = torch.full((4096, 64), TINY), torch.full((64, 64), 2.0**-10)
        with threads(n):
            kept = tiny @ small
            assert keeps_subnormals() and ((kept > 0) & (kept < TINY)).all()
            assert (ops.input_gradient(tiny, small) == 0).all() and keeps_subnormals()
            assert (tiny[:64].T @ small > 0).all()
            assert (ops.weight_gradient([tiny[:64]], [small]) == 0).all() and keeps_subnormals()
            wide = torch.full((64, 4096), TINY)
            assert (ops.weight_gradient([small], [wide]) == 0).all() and keeps_subnormals()

    def test_leave_other_settings_alone(self) -> None:
        can_flush = torch.set_flush_denormal(True)  # else there is nothing that could have been changed
        try:
            ops.input_gradient(torch.ones(2, 2), torch.ones(2, 2))
            assert (torch.tensor([TINY]) * 0.5 == 0) == can_flush  # by this thread
        finally:
            torch.set_flush_denormal(False)
        assert keeps_subnormals()

    @every_dtype
    @pytest.mark.parametrize("nonzero", [(), (0,), (130, 895), (299,)], ids=str)
    def test_are_those_of_all_rows(self, dtype: torch.dtype, nonzero: tuple[int, ...]) -> None:
        delta, x, w = torch.zeros(900, 40), drawn(0, 900, 30), drawn(1, 40, 30)
        for row in nonzero:
            delta[row] = drawn(2 + row, 40)
        delta, x, w = (v.to(dtype) for v in (delta, x, w))
        assert_as_good("δ W", ops.input_gradient(delta, w), delta @ w, delta.double() @ w.double())
        ours, true = ops.weight_gradient([delta, delta], [x, x]), 2 * delta.double().T @ x.double()
        assert_as_good("δᵀ x", ours, 2 * (delta.T @ x), true)

    @every_dtype
    def test_zero_times_infinity(self, dtype: torch.dtype) -> None:
        delta, w = torch.zeros(900, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype)
        delta[700:] = 1
        for value in (INF, -INF, NAN):
            w[1, 2] = value
            assert torch.equal(ops.input_gradient(delta, w).isnan(), (delta @ w).isnan())
            for transposed in (delta @ w, (delta @ w).T.contiguous().T):
                product = ops.weight_gradient([delta], [transposed])
                assert torch.equal(product.isnan(), (delta.T @ transposed).isnan())

    def test_contract(self) -> None:
        torch.library.opcheck(torch.ops.rnnkern.input_gradient.default, (torch.ones(4, 2), torch.ones(2, 3)))
        for delta, w, message in [
            (torch.ones(4), torch.ones(4, 2), r"delta must have shape \(N, H\), got \[4\]"),
            (torch.ones(4, 2), torch.ones(2), r"w must have shape \(H, I\), got \[2\]"),
            (torch.ones(4, 2), torch.ones(3, 2), r"w must have shape \[2, 2\], got \[3, 2\]"),
            (torch.ones(4, 2), torch.ones(2, 2).double(), r"w must have the dtype of delta \(Float\), got Double"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                ops.input_gradient(delta, w)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size are taken, not only large ones."""
    monkeypatch.setattr(products, "LEAST_WORK_THAT_VANISHES", 0)
    monkeypatch.setattr(products, "LEAST_WORK_ON_TILES", 0)


T, B, I, H = 96, 32, 10, 12  # four steps in a block of rows


class Run:
    """The gradients of a forward and backward, and how many rows PyTorch's products of the backward took."""

    def __init__(
        self, module: nn.Module, x: Tensor, upstream: Callable[[Tensor], Tensor], lengths: list[int] | None = None
    ) -> None:
        leaf = x.detach().requires_grad_()
        output = module(leaf if lengths is None else pack([leaf[:n, b] for b, n in enumerate(lengths)]))[0]
        rows = output if lengths is None else output.data
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            rows.backward(upstream(rows))
        self.rows = [max(map(max, e.input_shapes[:2])) for e in seen.events() if e.name == "aten::mm"]
        self.gradients = {"x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


def vanishing(kind: type[nn.RNN] = nn.RNN, w_hh: float = 1e-3, **options: Any) -> nn.RNN:
    """Gradients shrink by a factor of 1e-3 or so at every step: those of float32 are gone after a dozen of steps."""
    torch.manual_seed(0)
    module = kind(I, H, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith("weight_hh"):
                p.mul_(w_hh * H**0.5)
    return module


def at(*steps: int) -> Callable[[Tensor], Tensor]:
    """A loss on these steps alone."""

    def upstream(output: Tensor) -> Tensor:
        grad = torch.zeros_like(output)
        for step in steps:
            grad[step] = drawn(7, *output.shape[1:]).to(output.dtype)
        return grad

    return upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [(T - 1,), (40,), (20, T - 1), (0,)], ids=str)
@pytest.mark.parametrize("case", ["one direction", "relu", "no bias", "two layers", "two layers, both directions"])
def test_only_the_rows_that_count(dtype: torch.dtype, steps: tuple[int, ...], case: str, taken: None) -> None:
    options: dict[str, Any] = {
        "one direction": {},
        "relu": {"nonlinearity": "relu"},
        "no bias": {"bias": False},
        "two layers": {"num_layers": 2},
        "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    }[case]
    rounded = vanishing(**options).to(dtype)
    x = drawn(0, T, B, I).to(dtype)

    def of(kind: type[nn.RNN], dtype: torch.dtype) -> Run:
        module = vanishing(kind, **options).to(dtype)
        module.load_state_dict(rounded.state_dict())
        return Run(module, x.to(dtype), at(*steps))

    ours, plains, true = of(rnnkern.RNN, dtype), of(nn.RNN, dtype), of(nn.RNN, torch.float64)
    if dtype == torch.float32:  # others have a kernel for some products, or widen the rows of all
        assert ours.rows and max(ours.rows) < T * B / 2
    for name, exact in true.gradients.items():
        assert_as_good(name, ours.gradients[name], plains.gradients[name], exact)


def test_packed(taken: None) -> None:
    lengths = [T - b for b in range(B)]
    x = drawn(0, T, B, I)
    ours, plains, true = (
        Run(vanishing(kind).to(dtype), x.to(dtype), at(*range(-B, 0)), lengths)
        for kind, dtype in ((rnnkern.RNN, torch.float32), (nn.RNN, torch.float32), (nn.RNN, torch.float64))
    )
    assert ours.rows and max(ours.rows) < sum(lengths) / 2
    for name, exact in true.gradients.items():
        assert_as_good(name, ours.gradients[name], plains.gradients[name], exact)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_no_gradient_at_all(dtype: torch.dtype) -> None:
    run = Run(vanishing(rnnkern.RNN).to(dtype), drawn(0, T, B, I).to(dtype), torch.zeros_like)
    assert not run.rows and all((g == 0).all() for g in run.gradients.values())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_is_subnormal(bidirectional: bool, taken: None) -> None:
    x = drawn(0, T, B, I)
    ours, plains, true = (
        Run(vanishing(kind, 0.05, bidirectional=bidirectional).to(dtype), x.to(dtype), at(T - 1)).gradients
        for kind, dtype in ((rnnkern.RNN, torch.float32), (nn.RNN, torch.float32), (nn.RNN, torch.float64))
    )

    def subnormal(v: Tensor) -> Tensor:
        return (v != 0) & (v.abs() < TINY)

    assert not any(subnormal(g).any() for g in ours.values())
    assert subnormal(plains["x"]).any()  # so there was something to flush
    for name, exact in true.items():
        assert_as_good(name, ours[name], plains[name], exact)


@pytest.mark.parametrize("what", ["x", "w_ih", "h0"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_times_infinity_is_not_a_number(what: str, bidirectional: bool, dtype: torch.dtype, taken: None) -> None:
    """Where torch.nn.RNN multiplies δ = 0 by an infinite number."""

    def of(kind: type[nn.RNN]) -> Any:
        torch.manual_seed(0)
        module = kind(I, H, nonlinearity="relu", bidirectional=bidirectional).to(dtype)
        x, h0 = drawn(0, T, B, I).to(dtype), torch.zeros(1 + bidirectional, B, H, dtype=dtype)
        with torch.no_grad():
            module.weight_hh_l0.zero_()
            if what == "w_ih":
                module.weight_ih_l0[2, 3] = INF
        if what == "x":
            x[1, 0, 0] = -INF
        if what == "h0":
            h0[0, 5, 6] = INF
        x.requires_grad_()
        output = module(x, h0)[0]
        output.backward(at(T - 1)(output))
        return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}

    ours, plains = of(rnnkern.RNN), of(nn.RNN)
    assert any(g.isnan().any() for g in plains.values())
    for name in plains:
        assert torch.equal(ours[name].isnan(), plains[name].isnan()), name


@every_dtype
def test_which_are_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_slow", lambda dtype: False)
    monkeypatch.setattr(products, "has_tiles", lambda dtype: dtype == torch.bfloat16)
    least = products.LEAST_WORK_ON_TILES if dtype == torch.bfloat16 else products.LEAST_WORK_THAT_VANISHES
    rows, width = least >> 10, 32
    for x in (torch.empty(rows, 32, dtype=dtype), torch.empty(rows // 8, 8, 32, dtype=dtype)):
        assert products.takes(dtype, x, width)
        assert not products.takes(dtype, x[:-1], width)
        assert not products.takes(dtype, x.to("meta"), width)
        assert not products.takes(dtype, x.as_subclass(type("Own", (Tensor,), {})), width)
        with rnnkern.use_backend("reference"):
            assert not products.takes(dtype, x, width)
    assert not products.takes(torch.complex64, torch.empty(rows, 32, dtype=torch.complex64), width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", ["x", "h", "h0"])
def test_infinity_in_a_row_that_is_zero(dtype: torch.dtype, of: str) -> None:
    """It is NaN in its own column of its own weight's gradient, whatever the rows are that the other one needs."""
    sizes = [(T, B, I), (T, B, H), (1, B, H), (T, B, H)]
    x, h, h0, grad_h = (drawn(i, *size).to(dtype) for i, size in enumerate(sizes))
    grad_h[:30] = grad_h[60:] = 0
    w_ih, w_hh = drawn(4, H, I).to(dtype), torch.zeros(H, H, dtype=dtype)
    {"x": x[70], "h": h[80], "h0": h0[0]}[of][5, 3] = INF
    for_x, for_w_ih, for_b, for_w_hh, with_stats = False, True, True, True, False
    grads = ops.layer_backward(
        grad_h, None, x, w_ih, h, h0, w_hh, "relu", INF, for_x, for_w_ih, for_b, for_w_hh, with_stats
    )
    delta = torch.where(h > 0, grad_h, torch.zeros_like(grad_h))
    before = torch.cat([h0, h[:-1]])
    for name, ours, factor in (("w_ih", grads[1], x), ("w_hh", grads[3], before)):
        rows, plain = delta.flatten(0, 1), factor.flatten(0, 1)
        assert_as_good(name, ours, rows.T @ plain, rows.double().T @ plain.double())
        assert bool(ours.isnan().any()) == (name == ("w_ih" if of == "x" else "w_hh"))
    assert_as_good("b", grads[2], rows.sum(0), rows.double().sum(0))
