"""Products of bfloat16 and float16 in float32: rounded once, in chunks, and only where they are wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good, drawn, pack, threads, ulps
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import products, projection

HALVES = list(products.HALVES)
I, H = 5, 7
ROWS = H * I // (H + I)  # of a chunk, at the least

both_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor without these instructions, whatever this one has; small products too, and chunks of a few rows."""
    monkeypatch.setattr(products, "is_slow", lambda dtype: True)
    monkeypatch.setattr(products, "LEAST_ROWS", 0)
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "CHUNK", 1)
    with threads(1):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often a product was computed, by the shape of its result."""
    counted: Counter[tuple[int, ...]] = Counter()

    def count(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*args: Any) -> Any:
            result = function(*args)
            counted.update(
                tuple(v.shape) for v in (result if isinstance(result, tuple) else (result,)) if v is not None
            )
            return result

        return counting

    for name in ("linear", "input_gradient", "weight_gradient"):
        monkeypatch.setattr(products, name, count(getattr(products, name)))
    return counted


def operands(dtype: torch.dtype, *rows: int, width: int = I) -> tuple[Tensor, Tensor, Tensor]:
    """x (.., I), w_ih (H, I) and b (H)."""
    return drawn(0, *rows, width).to(dtype), drawn(1, H, width).to(dtype), drawn(2, H).to(dtype)


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As on a processor that has the instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "is_slow", lambda dtype: False)
        return function(*args, **kwargs)


def assert_rounded_once(ours: Tensor, true: Tensor, terms: int) -> None:
    """Half an ulp, beside what a sum in float32 loses."""
    assert ulps(ours, true, ours.dtype) <= 0.5 + terms * 2.0**-24 / torch.finfo(ours.dtype).eps


@both_halves
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "rows", [(1,), (ROWS - 1,), (ROWS,), (ROWS + 1,), (2 * ROWS,), (6, 1), (5, ROWS), (3, 8)], ids=str
)
def test_linear(dtype: torch.dtype, with_bias: bool, rows: tuple[int, ...]) -> None:
    x, w, b = operands(dtype, *rows)
    bias = b if with_bias else None
    ours, true = products.linear(x, w, bias), F.linear(x.double(), w.double(), b.double() if with_bias else None)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_as_good("z", ours, F.linear(x, w, bias), true)
    assert_rounded_once(ours, true, I)


@both_halves
@pytest.mark.parametrize("rows", [(1,), (ROWS,), (ROWS + 1,), (40,), (5, 2), (3, 8)], ids=str)
def test_weight_gradient(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    x, delta = drawn(0, *rows, I).to(dtype), drawn(1, *rows, H).to(dtype)
    flat, flat_delta = x.flatten(0, -2), delta.flatten(0, -2)
    true = flat_delta.double().T @ flat.double()
    ours = products.weight_gradient((delta, x))
    assert_as_good("grad_w", ours, flat_delta.T @ flat, true)
    assert_rounded_once(ours, true, len(flat))
    assert_rounded_once(products.weight_gradient((delta, x), (delta, x)), 2 * true, 2 * len(flat))


@both_halves
@pytest.mark.parametrize("rows", [(1,), (ROWS,), (ROWS + 1,), (40,), (5, 2), (3, 8)], ids=str)
def test_input_gradient(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    delta, w = drawn(0, *rows, H).to(dtype), drawn(1, H, I).to(dtype)
    ours = products.input_gradient(delta, w)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_as_good("grad_x", ours, delta @ w, delta.double() @ w.double())
    assert_rounded_once(ours, delta.double() @ w.double(), H)


class Made(TorchDispatchMode):
    """The most elements of a float32 result, and the dtypes of GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.gemms: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        if func._opname in ("mm", "addmm", "input_gradient", "weight_gradient"):
            self.gemms.add(result.dtype)
        return result


def _leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in tensors if v is not None]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of a tensor (6, 4, I)
    "dense": lambda x: x,
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other sample": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "packed rows": lambda x: x.flatten(0, 1),
    "one step for all": lambda x: x[:1].expand(6, 4, I),
    "one row for all": lambda x: x[:1, :1].expand(6, 4, I),
}


@both_halves
@pytest.mark.parametrize("view", VIEWS)
def test_gradients(dtype: torch.dtype, view: str) -> None:
    """Of all operands, from a dense gradient and from one that is expanded."""
    x, w, b = operands(dtype, 6, 4)
    x = VIEWS[view](x)
    for upstream in (drawn(3, *x.shape[:-1], H).to(dtype), drawn(3, H).to(dtype).expand(*x.shape[:-1], H)):

        def gradients(
            linear: Callable[..., Tensor], of: torch.dtype, upstream: Tensor = upstream
        ) -> tuple[Tensor, ...]:
            given = [v.detach().to(of).requires_grad_() for v in (x, w, b)]
            return torch.autograd.grad(linear(*given), given, upstream.to(of))

        ours, plains = gradients(projection.linear, dtype), gradients(F.linear, dtype)
        for name, *values in zip("xwb", ours, plains, gradients(F.linear, torch.float64)):
            assert values[0].dtype == dtype
            assert_as_good(f"grad_{name}", *values)


@both_halves
@pytest.mark.parametrize(("rows", "width"), [((0,), I), ((0, 3), I), ((4, 0), I), ((3, 2), 0), ((0, 0), 0)], ids=str)
def test_nothing(dtype: torch.dtype, rows: tuple[int, ...], width: int) -> None:
    """No steps, no samples, no features."""
    given = _leaves(*operands(dtype, *rows, width=width))
    ours, plains = projection.linear(*given), F.linear(*given)
    assert ours.shape == plains.shape and torch.equal(ours, plains)
    for mine, theirs in zip(*(torch.autograd.grad(z.sum(), given) for z in (ours, plains))):
        assert mine.shape == theirs.shape and torch.equal(mine, theirs)


@both_halves
def test_double_backward(dtype: torch.dtype) -> None:
    def second(linear: Callable[..., Tensor], of: torch.dtype) -> tuple[Tensor, ...]:
        *given, upstream = _leaves(*(v.to(of) for v in (*operands(dtype, 6, 4), drawn(3, 6, 4, H).to(dtype))))
        first = torch.autograd.grad(linear(*given), given, upstream, create_graph=True)
        return torch.autograd.grad([g.square().sum() for g in first], [*given[:2], upstream])

    ours, plains = second(projection.linear, dtype), second(F.linear, dtype)
    for name, *values in zip(("x", "w", "upstream"), ours, plains, second(F.linear, torch.float64)):
        assert_as_good(name, *values)


def test_double_backward_of_a_module(calls: Counter[tuple[int, ...]], cpu_library: None) -> None:
    """A backward that may be differentiated is PyTorch's own: autograd would keep the float32 copies of ours."""
    rounded = rnnkern.RNN(I, H).bfloat16()

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        module = rnnkern.RNN(I, H, dtype=dtype)
        module.load_state_dict(rounded.state_dict())
        x = drawn(0, 6, 4, I).bfloat16().to(dtype).requires_grad_()
        given = [x, *module.parameters()]
        first = torch.autograd.grad(module(x)[0].square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    ours = second(torch.bfloat16)
    assert calls == {(6, 4, H): 1, (6, 4, I): 1, (H, I): 1, (H, H): 1}  # of the forward, and of the last backward
    for name, *values in zip(
        ("x", "w_ih", "w_hh", "b_ih"), ours, plainly(second, torch.bfloat16), second(torch.float64)
    ):
        assert_as_good(name, *values)


CASES = {
    "dense": (dict(), None),
    "batch first": (dict(batch_first=True), None),
    "two layers, both directions": (dict(num_layers=2, bidirectional=True), None),
    "no bias": (dict(bias=False), None),
    "packed": (dict(bidirectional=True), (6, 4, 1)),
}


@both_halves
@pytest.mark.parametrize("case", CASES)
def test_module(dtype: torch.dtype, case: str, calls: Counter[tuple[int, ...]], cpu_library: None) -> None:
    """Everything together, against torch.nn.RNN."""
    options, lengths = CASES[case]
    truth = nn.RNN(I, H, **options).to(dtype).double()
    x = drawn(3, 6, 3, I).to(dtype)

    def run(module: nn.Module, of: torch.dtype) -> dict[str, Tensor]:
        module.load_state_dict(truth.state_dict())
        leaf = x.detach().to(of).requires_grad_()
        given = leaf if lengths is None else pack([leaf[:n, b] for b, n in enumerate(lengths)])
        output, h_n = module(given)
        rows = output if lengths is None else output.data
        torch.autograd.backward([rows, h_n], [drawn(4, *rows.shape).to(of), drawn(5, *h_n.shape).to(of)])
        grads = {name: p.grad for name, p in module.named_parameters()}
        return {"output": rows.detach(), "h_n": h_n.detach(), "x": leaf.grad, **grads}

    ours = run(rnnkern.RNN(I, H, **options).to(dtype), dtype)
    # z and the gradients of x and W_ih, of both directions at once, and that of each W_hh
    assert calls.total() == options.get("num_layers", 1) * (3 + (2 if options.get("bidirectional") else 1))
    plains, true = run(nn.RNN(I, H, **options).to(dtype), dtype), run(nn.RNN(I, H, **options).double(), torch.float64)
    for name in true:
        assert_as_good(name, ours[name], plains[name], true[name])


@pytest.mark.parametrize("wanted", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_only_what_requires_grad(wanted: tuple[int, ...], calls: Counter[tuple[int, ...]]) -> None:
    x, w, b = (v.requires_grad_(bool(on)) for v, on in zip(operands(torch.bfloat16, 6, 4), wanted))
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):  # type: ignore[func-returns-value]
        z = projection.linear(x, w, b)
    assert {v.data_ptr() for v in saved} == {v.data_ptr() for v, on in ((w, wanted[0]), (x, wanted[1])) if on}
    calls.clear()
    z.sum().backward()
    assert calls == Counter({(6, 4, I): wanted[0], (H, I): wanted[1]})
    assert [v.grad is not None for v in (x, w, b)] == [bool(on) for on in wanted]


def test_only_what_is_asked_for(calls: Counter[tuple[int, ...]]) -> None:
    x, w, b = _leaves(*operands(torch.bfloat16, 6, 4))
    z = projection.linear(x, w, b)
    calls.clear()
    torch.autograd.grad(z.sum(), x)
    assert calls == {(6, 4, I): 1}


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_memory(batch_first: bool, monkeypatch: pytest.MonkeyPatch, cpu_library: None) -> None:
    """Nothing in float32 is as large as a sequence, and nothing in float32 is kept."""
    T, B, H = 64, 8, 16
    monkeypatch.setattr(products, "CHUNK", T * B * H // 4)
    module = rnnkern.RNN(H, H, bidirectional=True, batch_first=batch_first).bfloat16()
    x = torch.randn((B, T, H) if batch_first else (T, B, H)).bfloat16().requires_grad_()
    kept: list[torch.dtype] = []
    with Made() as made, saved_tensors_hooks(lambda v: kept.append(v.dtype) or v, lambda v: v):  # type: ignore[func-returns-value]
        module(x)[0].sum().backward()
    assert 0 < made.elements <= products.CHUNK // 2
    assert kept and torch.float32 not in kept
    assert made.gemms == {torch.float32}


@both_halves
def test_autocast(dtype: torch.dtype, calls: Counter[tuple[int, ...]]) -> None:
    """The same dtypes as F.linear's; the products stay in float32, in the backward too."""
    given = _leaves(*(v.float() for v in operands(dtype, 6, 4)))  # float32 that bfloat16 and float16 hold exactly
    halves = _leaves(*(v.to(dtype) for v in given))
    upstream = drawn(3, 6, 4, H).to(dtype)
    expected = projection.linear(*halves)
    with torch.autocast("cpu", dtype):
        assert F.linear(*given).dtype == dtype
        with Made() as made:
            z = projection.linear(*given, autocast=dtype)
            grads = torch.autograd.grad(z, given, upstream)
    assert made.gemms == {torch.float32}
    assert calls.total() == 4 and torch.equal(z, expected) and z.dtype == dtype
    for grad, half in zip(grads, torch.autograd.grad(expected, halves, upstream)):
        assert grad.dtype == torch.float32 and torch.equal(grad, half.float())


def test_autocast_leaves_float64_alone() -> None:
    x, w, b = (v.double() for v in operands(torch.bfloat16, 6, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection.linear(x, w, b, torch.bfloat16), F.linear(x, w, b))


@both_halves
def test_module_under_autocast(dtype: torch.dtype, calls: Counter[tuple[int, ...]], cpu_library: None) -> None:
    module, x = rnnkern.RNN(I, H, 2), drawn(0, 6, 4, I)

    def run() -> list[Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", dtype):
            output, h_n = module(x)
        output.float().sum().backward()
        return [output, h_n, *(p.grad for p in module.parameters())]

    ours, plains = run(), plainly(run)
    assert calls.total() == 2 + 3 + 2  # projections, their gradients, and those of w_hh
    truth = rnnkern.RNN(I, H, 2).double()
    truth.load_state_dict(module.state_dict())
    output, h_n = truth(x.double())
    output.sum().backward()
    true = [output, h_n, *(p.grad for p in truth.parameters())]
    assert [v.dtype for v in ours] == [v.dtype for v in plains]
    for k, (mine, theirs, exact) in enumerate(zip(ours, plains, true)):
        assert_as_good(str(k), mine.to(dtype), theirs.to(dtype), exact)


#: computes something of a function of x, w and b that no product of ours may be in
OTHERS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "compile": lambda f, given: torch.compile(f, backend="eager", fullgraph=True)(*given),
    "compile, backward": lambda f, given: torch.autograd.grad(
        torch.compile(f, backend="aot_eager", fullgraph=True)(*given).sum(), given
    ),
    "grad": lambda f, given: torch.func.grad(lambda *v: f(*v).sum(), (0, 1, 2))(*given),
    "vmap": lambda f, given: torch.func.vmap(f, in_dims=(0, None, None))(*given),
    "jvp": lambda f, given: torch.func.jvp(f, given, given),
    "trace": lambda f, given: torch.jit.trace(f, given, check_trace=False)(*given),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("other", OTHERS)
def test_left_to_pytorch(other: str, calls: Counter[tuple[int, ...]]) -> None:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return projection.linear(x, w, b)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b)

    torch._dynamo.reset()
    given = tuple(_leaves(*operands(torch.bfloat16, 6, 4)))
    result, expected = (OTHERS[other](f, given) for f in (ours, plain))
    assert not calls
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_compiled_module(calls: Counter[tuple[int, ...]], cpu_library: None) -> None:
    torch._dynamo.reset()
    module = rnnkern.RNN(I, H).bfloat16()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = drawn(0, 6, 4, I).bfloat16()
    grads = torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters()))
    assert not calls
    for mine, expected in zip(grads, plainly(torch.autograd.grad, module(x)[0].sum(), list(module.parameters()))):
        torch.testing.assert_close(mine, expected)


class TestRule:
    """Which products are taken."""

    @pytest.fixture(autouse=True)
    def as_it_is(self, monkeypatch: pytest.MonkeyPatch, slow: None) -> None:
        monkeypatch.undo()

    @both_halves
    @pytest.mark.filterwarnings("ignore:TF32 acceleration")
    def test_processor(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert products.is_slow(dtype) != getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
        for served in (False, True):
            monkeypatch.setattr(products, "_is_served", lambda dtype, served=served: served)
            assert products.is_slow(dtype) != served
            with torch.backends.mkldnn.flags(enabled=False):
                assert products.is_slow(dtype)

    @pytest.mark.parametrize(
        ("dtype", "rows", "width", "expected"),
        [
            (torch.bfloat16, 256, 256, True),
            (torch.float16, 256, 256, True),
            (torch.float32, 256, 256, False),
            (torch.float64, 256, 256, False),
            (torch.complex64, 256, 256, False),
            (torch.bfloat16, 8, 2048, False),
            (torch.bfloat16, 64, 16, False),
        ],
    )
    def test_sizes(
        self, dtype: torch.dtype, rows: int, width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "is_slow", lambda dtype: True)
        for x in (torch.empty(rows, width, dtype=dtype), torch.empty(rows // 8, 8, width, dtype=dtype)):
            assert products.widens(dtype, x, width) == expected
            assert not products.widens(dtype, x.to("meta"), width)
            assert not products.widens(dtype, x.as_subclass(type("Own", (Tensor,), {})), width)

    def test_fast_processor(self, calls: Counter[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing changes there."""
        monkeypatch.setattr(products, "is_slow", lambda dtype: False)
        given = _leaves(*operands(torch.bfloat16, 6, 4))
        z = projection.linear(*given)
        assert torch.equal(z, F.linear(*given)) and "Projection" not in z.grad_fn.name() and not calls

    def test_mixed_dtypes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "is_slow", lambda dtype: True)
        x, w, b = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64), torch.empty(64)
        with pytest.raises(RuntimeError) as expected:
            F.linear(x, w, b)
        with pytest.raises(RuntimeError) as ours:
            projection.linear(x, w, b)
        assert str(ours.value) == str(expected.value)
