"""The operators of every backend against the truth, under the rule of helpers.py, and their promises beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, Answers, Problem, answers, check, make_problem, plain, same_bits, threads
from torch import Tensor

from rnnkern.backends import Backend

DENSE = [
    (1, 1, 1), (1, 4, 3), (6, 1, 17), (5, 7, 13), (9, 3, 1), (3, 2, 31), (7, 2, 64), (3, 5, 67), (2, 65, 32),
    (2, 3, 131), (4, 33, 96), (3, 16, 256),
]  # fmt: skip
PACKED = [
    ([1], 5), ([1, 1, 1], 8), ([4, 4, 4], 13), ([6, 5, 4, 2, 1], 31), ([5, 5, 3, 3, 1], 67), ([7, 1, 1, 1], 13),
    ([3] * 9 + [2] * 20 + [1] * 4, 48),
]  # fmt: skip
CASES = [{"T": T, "B": B, "H": H} for T, B, H in DENSE] + [{"lengths": lengths, "H": H} for lengths, H in PACKED]

sizes = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
nonlinearities = pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
packings = pytest.mark.parametrize(
    "case", [{"T": 6, "B": 5, "H": 37}, {"lengths": [6, 6, 3, 1, 1], "H": 37}], ids=["dense", "packed"]
)


def serve(backend: Backend, dtype: torch.dtype, H: int = 64, device: str = "cpu") -> None:
    """Skip where the backend has no kernel for the dtype; the CPU must have them all."""
    reason = backend.refuses(device, dtype, H)
    if reason is not None:
        assert backend.name != "cpu", reason
        pytest.skip(reason)


@sizes
@dtypes
@directions
@nonlinearities
def test_against_truth(
    backend: Backend, device: str, case: dict, dtype: torch.dtype, reverse: bool, nonlinearity: str
) -> None:
    serve(backend, dtype, case["H"], device)
    p = make_problem(**case, dtype=dtype, reverse=reverse, nonlinearity=nonlinearity, device=device)
    ours = answers(backend, p)
    check(p, ours)
    assert all(x.is_contiguous() for x in ours)
    for t, n in enumerate(p.sizes):
        assert not ours.stats[:, t, n:].any(), "rows that a sample does not have are exactly 0"


@packings
@dtypes
@directions
def test_no_final_gradient(backend: Backend, device: str, case: dict, dtype: torch.dtype, reverse: bool) -> None:
    serve(backend, dtype, case["H"], device)
    p = make_problem(**case, dtype=dtype, reverse=reverse, with_grad_hn=False, device=device)
    ours = answers(backend, p)
    check(p, ours)
    last = 0 if reverse else -1
    assert not ours.stats[1, last, : p.sizes[last]].any()
    zeros = backend.recurrence_backward(*p.replace(grad_hn=torch.zeros_like(p.h0), h=p.h).backward)
    assert same_bits(ours[1:3], zeros)


@packings
@dtypes
@nonlinearities
@pytest.mark.parametrize("clip", [0.25, 1.5])
def test_clip(backend: Backend, device: str, case: dict, dtype: torch.dtype, nonlinearity: str, clip: float) -> None:
    serve(backend, dtype, case["H"], device)
    p = make_problem(**case, dtype=dtype, nonlinearity=nonlinearity, clip=clip, device=device)
    ours = answers(backend, p)
    check(p, ours)
    assert ours.delta.abs().max() <= clip


@packings
@dtypes
@directions
@nonlinearities
@pytest.mark.parametrize("clip", [float("inf"), 0.5], ids=["", "clip"])
def test_variants_agree_bit_for_bit(
    backend: Backend, device: str, case: dict, dtype: torch.dtype, reverse: bool, nonlinearity: str, clip: float
) -> None:
    """In place or not, with statistics or without, once or twice, on one thread or two."""
    serve(backend, dtype, case["H"], device)
    p = make_problem(**case, dtype=dtype, reverse=reverse, nonlinearity=nonlinearity, clip=clip, device=device)
    before = [x.clone() for x in p.tensors]
    ours = answers(backend, p)
    assert same_bits(ours, answers(backend, p))
    assert same_bits(ours[1:3], backend.recurrence_backward(*p.backward))
    assert same_bits(p.tensors, before), "inputs are not written to"
    z = p.z.clone()
    assert backend.recurrence_(z, *p.forward[1:]) is None
    assert same_bits([z], [ours.h])


@dtypes
@pytest.mark.parametrize("case", [{"T": 5, "B": 67, "H": 48}, {"lengths": [5] * 9 + [4] * 30 + [1] * 28, "H": 48}])
def test_threads_do_not_change_bits(backend: Backend, device: str, case: dict, dtype: torch.dtype) -> None:
    serve(backend, dtype, case["H"], device)
    if backend.name != "cpu":
        pytest.skip("PyTorch's matrix product makes no such promise, and the other kernels run on no such thread")
    p = make_problem(**case, dtype=dtype, device=device)
    ours = []
    for n in (1, 2, 5):
        with threads(n):
            ours.append(answers(backend, p))
    for name, one, two, five in zip(Answers._fields, *ours, strict=True):
        assert torch.equal(one, two) and torch.equal(one, five), name


def test_samples_do_not_change_each_other(backend: Backend, device: str) -> None:
    """A sample's states don't depend on who stands beside it in the batch, beyond rounding: NaN in one stays there."""
    p = make_problem(6, 9, 21, device=device)
    z = p.z.clone()
    z[:, 4] = float("nan")
    h = backend.recurrence(z, *p.forward[1:])
    assert h[:, 4].isnan().all() and not h[:, [0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


def sliced(x: Tensor) -> Tensor:
    wide = x.new_full([n + 3 for n in x.shape], float("nan"))
    view = wide[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def constant(x: Tensor) -> Tensor:
    return x[(slice(1),) * x.dim()].expand_as(x)


LAYOUTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    *((name, layout) for layout in (batch_first, every_other, sliced) for name in
      ("z", "h0", "w_hh", "h", "grad_h", "grad_hn")),
    *((name, layout) for layout in (expanded, constant) for name in ("z", "h0", "grad_h", "grad_hn")),
]  # fmt: skip


@packings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda x: getattr(x, "__name__", x))
def test_layouts(
    backend: Backend, device: str, case: dict, dtype: torch.dtype, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    p = make_problem(**case, dtype=dtype, device=device)
    p = p.replace(**{name: layout(getattr(p, name))})
    assert not getattr(p, name).is_contiguous()
    ours = answers(backend, p)
    check(p, ours)
    assert all(x.is_contiguous() for x in ours)


@pytest.mark.parametrize("layout", [batch_first, every_other, sliced])
def test_in_place_writes_through_strides(backend: Backend, device: str, layout: Callable[[Tensor], Tensor]) -> None:
    p = make_problem(5, 4, 19, device=device)
    z = layout(p.z)
    whole = z if z._base is None else z._base
    outside = whole.isnan().sum()
    backend.recurrence_(z, *p.forward[1:])
    check(p, answers(backend, p)._replace(h=z))
    assert whole.isnan().sum() == outside, "what lies between the elements stays"


@pytest.mark.parametrize("shape", [(4, 0, 5), (0, 3, 5), (0, 0, 5), (4, 3, 0)], ids=str)
@dtypes
@directions
def test_empty(backend: Backend, device: str, shape: tuple[int, int, int], dtype: torch.dtype, reverse: bool) -> None:
    serve(backend, dtype, device=device)
    T, B, _ = shape
    p = make_problem(*shape, dtype=dtype, reverse=reverse, device=device)
    h, delta, grad_h0, stats = answers(backend, p)
    assert h.shape == delta.shape == shape and stats.shape == (4, T, B) and stats.dtype == torch.float64
    assert not stats.any()
    assert torch.equal(grad_h0, p.grad_hn if T == 0 else torch.zeros_like(p.h0))
    backend.recurrence_(p.z, *p.forward[1:])
    assert not backend.recurrence_backward(*p.replace(grad_hn=None).backward)[1].any()


@directions
def test_empty_packed(backend: Backend, device: str, reverse: bool) -> None:
    rows, states = torch.empty(0, 5, device=device), torch.empty(0, 5, device=device)
    batch_sizes = torch.empty(0, dtype=torch.int64)
    p = Problem(rows, states, torch.eye(5, device=device), rows, None, batch_sizes, reverse, "tanh", 1.0, h=rows)
    assert [x.shape for x in answers(backend, p)] == [(0, 5), (0, 5), (0, 5), (4, 0, 0)]


@packings
@directions
def test_statistics_keep_their_range(backend: Backend, device: str, case: dict, reverse: bool) -> None:
    """Squares of 1e-30 are no float32 numbers: the norms must be right all the same."""
    p = make_problem(**case, reverse=reverse, device=device)
    small = p.replace(grad_h=p.grad_h * 1e-30, grad_hn=p.grad_hn * 1e-30, h=p.h)
    ours = answers(backend, small)
    check(small, ours)
    present = ours.stats[0] > 0
    assert present.sum() == sum(p.sizes) and (ours.stats[0][present] < 1e-56).all()


@pytest.mark.parametrize("lengths", [[12] * 5, [12, 12, 9, 2, 1]], ids=["dense", "packed"])
@pytest.mark.parametrize("powers", [(-33, 1), (1, 30)], ids=["small", "large"])
def test_statistics_of_gradients_of_all_sizes(
    backend: Backend, device: str, powers: tuple[int, int], lengths: list[int]
) -> None:
    """Squares leave float32's range at some steps of some samples: for one step, for a while, and come back."""

    def problem(seed: int) -> Problem:
        dense = lengths[0] == lengths[-1]
        size = dict(T=lengths[0], B=len(lengths)) if dense else dict(lengths=lengths)
        p = make_problem(**size, H=37, gain=1e-25, seed=seed, device=device)
        rng = torch.Generator("cpu").manual_seed(seed)
        runs = torch.randint(*powers, (len(p.z) // 3 + 1, *p.z.shape[1:-1], 1), generator=rng, device="cpu")
        sizes = 10.0 ** runs.repeat_interleave(3, 0)[: len(p.z)]
        sizes[::5] = 0
        return p.replace(grad_h=p.grad_h * sizes.to(device, p.z.dtype))

    p = problem(0)
    ours = answers(backend, p)
    check(p, ours, yardsticks=[problem(1), problem(2)])
    norms = ours.stats[0][ours.stats[0] > 0].sqrt()
    assert norms.min() < 1e-24 if powers[0] < 0 else norms.max() > 1e20, "squares that no float32 can hold"


@dtypes
@nonlinearities
def test_gradient_at_one_step(backend: Backend, device: str, dtype: torch.dtype, nonlinearity: str) -> None:
    """The chain begins in the middle: nothing after it, everything before it."""
    serve(backend, dtype, device=device)
    T, middle = 40, 20

    def problem(seed: int, reverse: bool) -> Problem:
        options = dict(nonlinearity=nonlinearity, reverse=reverse, with_grad_hn=False, seed=seed, device=device)
        p = make_problem(T, 24, 24, dtype, **options)
        grad_h = torch.zeros_like(p.grad_h)
        grad_h[middle] = p.grad_h[middle]
        return p.replace(grad_h=grad_h)

    for reverse in (False, True):
        p = problem(0, reverse)
        ours = answers(backend, p)
        check(p, ours, yardsticks=[problem(1, reverse), problem(2, reverse)])
        without = slice(middle) if reverse else slice(middle + 1, None)
        assert not ours.delta[without].any() and not ours.stats[:, without].any()
        assert ours.grad_h0.any()


def test_gradient_at_two_steps_far_apart(backend: Backend, device: str) -> None:
    """A chain that has died begins anew where a gradient arrives."""
    T = 300
    p = make_problem(T, 8, 16, gain=0.1, with_grad_hn=False, device=device)
    grad_h = torch.zeros_like(p.grad_h)
    grad_h[T - 1], grad_h[100] = p.grad_h[T - 1], p.grad_h[100]
    p = p.replace(grad_h=grad_h)
    ours = answers(backend, p)
    check(p, ours)
    assert not ours.delta[101:240].any() and ours.delta[100].any() and ours.delta[99].any()
    assert not ours.delta[:20].any() and not ours.grad_h0.any()


def test_no_gradient_at_all(backend: Backend, device: str) -> None:
    p = make_problem(7, 3, 20, with_grad_hn=False, device=device)
    p = p.replace(grad_h=torch.zeros_like(p.z))
    _, delta, grad_h0, stats = answers(backend, p)
    assert not delta.any() and not grad_h0.any() and not stats.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_vanishing(backend: Backend, device: str, dtype: torch.dtype) -> None:
    """T = 2000 and gain 0.3, a loss on the last step: right as far as numbers reach, then exactly zero."""
    serve(backend, dtype, device=device)
    T, H = many(backend, device), 32

    def problem(seed: int) -> Problem:
        p = make_problem(T, 8, H, dtype, with_grad_hn=False, seed=seed, device=device)
        grad_h = torch.zeros_like(p.z)
        grad_h[-1] = p.grad_h[-1]
        orthogonal = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64)).Q
        return p.replace(grad_h=grad_h, w_hh=(0.3 * orthogonal).to(device, dtype))

    p = problem(0)
    ours = answers(backend, p)
    check(p, ours, yardsticks=[problem(1)] if dtype == torch.float64 else [])  # alive for 600 steps
    assert not ours.delta[: T // 2].any() and not ours.stats[:, : T // 2].any() and not ours.grad_h0.any()
    assert all(x.isfinite().all() for x in ours)
    alive = ours.stats[0].sum(1).sqrt()[-50:].log10().cpu()
    assert (alive[1:] > alive[:-1]).all(), "the norm falls step by step on its way back"


def long_enough(dtype: torch.dtype) -> int:
    """Steps after which 1.5 to that power has left the dtype's range."""
    return 2000 if dtype in (torch.float32, torch.float64) else 300


def many(backend: Backend, device: str) -> int:
    """2000 steps; 260 where Triton's interpreter walks them: 1.5 to that power has left float32's range, and so has
    0.3, in half as many."""
    return 260 if (backend.name, device) == ("triton", "cpu") else 2000


@dtypes
@directions
def test_exploding_to_infinity(backend: Backend, device: str, dtype: torch.dtype, reverse: bool) -> None:
    """Equal weights, gain 2: infinite exactly where plain PyTorch is, as the sums are exact in any order."""
    serve(backend, dtype, device=device)
    steps = min(long_enough(dtype), many(backend, device))
    p = make_problem(steps, 2, 8, dtype, nonlinearity="relu", reverse=reverse, device=device)
    start = torch.tensor([[0.75], [1.25]], dtype=dtype, device=device).expand(2, 8)
    p = p.replace(
        z=torch.zeros_like(p.z),
        h0=start,
        w_hh=torch.full_like(p.w_hh, 2 / 8),
        grad_h=torch.zeros_like(p.z),
        grad_hn=start,
    )
    ours = answers(backend, p)
    check(p, ours)
    assert not ours.h.isnan().any() and not ours.delta.isnan().any()
    for x in (ours.h, ours.delta):
        assert x.isinf().any() and x.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@nonlinearities
@directions
def test_exploding_to_nan(backend: Backend, device: str, dtype: torch.dtype, nonlinearity: str, reverse: bool) -> None:
    """1.5 times a permutation: no sum has two terms, so overflow, then inf·0, come at the same step for everyone."""
    serve(backend, dtype, device=device)
    steps = many(backend, device)
    options = dict(nonlinearity=nonlinearity, reverse=reverse, with_grad_hn=False, device=device)
    p = make_problem(steps, 2, 13, dtype, **options)
    grad_h = torch.zeros_like(p.z)
    last = 0 if reverse else -1
    grad_h[last] = p.grad_h[last]
    p = p.replace(
        z=torch.zeros_like(p.z),
        h0=torch.full_like(p.h0, 0.5 if nonlinearity == "relu" else 0.0),
        w_hh=1.5 * torch.eye(13, dtype=dtype, device=device).roll(1, 0),
        grad_h=grad_h,
    )
    ours = answers(backend, p)
    check(p, ours)
    assert ours.delta.isnan().any() and ours.delta.isfinite().any() and ours.grad_h0.isnan().all()
    assert ours.h.isnan().any() == (nonlinearity == "relu")


PLACES = ["z", "h0", "w_hh", "grad_h", "grad_hn", "h"]


@packings
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@nonlinearities
def test_nonfinite_travels_as_in_plain_pytorch(
    backend: Backend, device: str, case: dict, value: float, name: str, dtype: torch.dtype, nonlinearity: str
) -> None:
    """One inf or NaN reaches the outputs that depend on it and no others: check compares the masks."""
    serve(backend, dtype, case["H"], device)
    p = make_problem(**case, dtype=dtype, nonlinearity=nonlinearity, device=device)
    if name == "h":  # a state can only be made non-finite by what it is made of
        z = p.z.clone()
        z[(2,) * z.dim()] = value
        h = plain(p.replace(z=z)).h
        ours = backend.recurrence_backward_stats(*p.replace(z=z, h=h).backward)
        return check(p.replace(z=z), Answers(h, *ours))
    spoiled = getattr(p, name).clone()
    spoiled[(2,) * spoiled.dim()] = value
    p = p.replace(**{name: spoiled})
    check(p, answers(backend, p))


@dtypes
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_nonfinite_weight_meets_zero_gradient(backend: Backend, device: str, dtype: torch.dtype, value: float) -> None:
    """0·inf is NaN: a chain of zeros must not be cut short where the weights are not finite."""
    serve(backend, dtype, device=device)
    p = make_problem(9, 3, 21, dtype, with_grad_hn=False, device=device)
    w_hh, grad_h = p.w_hh.clone(), torch.zeros_like(p.grad_h)
    w_hh[3, 4], grad_h[4] = value, p.grad_h[4]
    p = p.replace(w_hh=w_hh, grad_h=grad_h)
    check(p, answers(backend, p))


def flushes() -> bool:
    """Does any thread of this process flush subnormals? Large enough for every thread to take a part."""
    tiny = torch.full((1 << 20,), 1e-40)
    return bool((tiny * 1.0 == 0).any()) or bool((tiny[:1] * 1.0 == 0).any())


def test_subnormals_live_on_after_a_call(backend: Backend, device: str) -> None:
    """The kernels flush subnormals for themselves alone, on whatever thread they ran, also where they raise."""
    assert not flushes()
    for n in (1, 2):
        with threads(n):
            p = make_problem(8, 40, 64, device=device)
            answers(backend, p)
            backend.recurrence_(p.z.clone(), *p.forward[1:])
            assert not flushes()
            with pytest.raises(RuntimeError):
                backend.recurrence(p.z, p.h0, p.w_hh[1:], None, False, "tanh")
            assert not flushes()


def test_flushing_goes_on_where_the_caller_wants_it(backend: Backend, device: str) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        answers(backend, make_problem(4, 3, 16, device=device))
        assert (torch.tensor([1e-40]) * 1.0 == 0).all()
    finally:
        torch.set_flush_denormal(False)
