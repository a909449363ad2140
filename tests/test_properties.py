"""hypothesis over shapes, lengths, memory layouts and flags.

With small whole numbers and ReLU every sum is exact in any order, so that a backend has to give the truth to the bit:
no rounding hides a wrong row, stride or lane. tanh is judged by the rule of helpers.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers import INF, Problem, answers, check, make_problem, same_bits, truth
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnnkern.backends import Backend

anything = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=12).map(lambda n: sorted(n, reverse=True))
hidden_sizes = st.one_of(st.integers(1, 20), st.integers(21, 100))


@st.composite
def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values with other strides."""
    how = draw(st.sampled_from(["contiguous", "transposed", "strided", "shifted"]))
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    if how == "shifted":
        return torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
    return x


@st.composite
def exact_problems(draw: st.DrawFn) -> Problem:
    """Values in -3..3, weights in -1..1 of which few are not zero: at most 2^22 after seven steps."""
    rng = torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**32)))
    H, dtype = draw(hidden_sizes), draw(st.sampled_from([torch.float32, torch.float64]))
    packed = draw(st.booleans())
    if packed:
        n = draw(lengths)
        batch_sizes = torch.tensor([sum(m > t for m in n) for t in range(n[0])], device="cpu")
        shape, B = (sum(n), H), len(n)
    else:
        T, B = draw(st.integers(1, 7)), draw(st.integers(1, 12))
        shape, batch_sizes = (T, B, H), None

    def whole(*size: int) -> Tensor:
        return draw(laid_out(torch.randint(-3, 4, size, generator=rng).to(dtype)))

    sparse = torch.randint(-1, 2, (H, H), generator=rng) * (torch.rand(H, H, generator=rng) < 3 / H)
    z, h0, w_hh, grad_h = whole(*shape), whole(B, H), draw(laid_out(sparse.to(dtype))), whole(*shape)
    grad_hn = whole(B, H) if draw(st.booleans()) else None
    return Problem(
        z, h0, w_hh, grad_h, grad_hn, batch_sizes, draw(st.booleans()), "relu", draw(st.sampled_from([INF, 2.0]))
    )


@settings(anything, max_examples=100)
@given(p=exact_problems())
def test_exact(backend: Backend, device: str, p: Problem) -> None:
    assume(backend.refuses(device, p.z.dtype, p.z.shape[-1]) is None)
    true = truth(p)
    p = p.replace(**{k: v.to(device) for k, v in vars(p).items() if isinstance(v, Tensor) and k != "batch_sizes"})
    h, delta, grad_h0, stats = answers(backend, p)
    assert torch.equal(h.double().cpu(), true.h)
    assert torch.equal(delta.double().cpu(), true.delta)
    assert torch.equal(grad_h0.double().cpu(), true.grad_h0)
    assert torch.equal(stats.cpu(), true.stats)
    assert same_bits([delta, grad_h0], backend.recurrence_backward(*p.backward))


@settings(anything, max_examples=60)
@given(
    n=lengths,
    H=hidden_sizes,
    dense=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    reverse=st.booleans(),
    with_grad_hn=st.booleans(),
    clip=st.sampled_from([INF, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_tanh(
    backend: Backend,
    device: str,
    n: list[int],
    H: int,
    dense: bool,
    dtype: torch.dtype,
    reverse: bool,
    with_grad_hn: bool,
    clip: float,
    seed: int,
) -> None:
    if backend.refuses(device, dtype, H):
        pytest.skip(f"no kernel for {dtype}")
    size = {"T": n[0], "B": len(n)} if dense else {"lengths": n}
    options = dict(reverse=reverse, with_grad_hn=with_grad_hn, clip=clip, device=device)
    problems = [
        make_problem(**size, H=H, dtype=dtype, seed=seed + i, **options) for i in range(2 + 256 // (len(n) * H + 32))
    ]
    check(problems[0], answers(backend, problems[0]), yardsticks=problems)
