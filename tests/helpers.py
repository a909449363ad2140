"""Problems for the operators, plain PyTorch's answers, the truth, and the one rule that judges a kernel.

The rule has no tolerances. Truth is the reference in float64 from the same inputs (for float64 itself: a loop over the
samples in long double). An answer is right where its error is at most twice the error of plain PyTorch in the same
dtype, plus one ulp; inf and NaN stand exactly where plain PyTorch has them. Errors are counted step by step, in ulps
of the largest value of the step, so that the far end of a vanishing chain counts as much as its beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rnnkern import reference
from rnnkern.backends import Backend

INF = float("inf")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """PyTorch on n threads. Long loops over small steps take one: on a busy machine two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(seed: int, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers, the same on every device, on the one where tensors are made by default."""
    rng = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, dtype=dtype, device="cpu", generator=rng).to(torch.get_default_device())


def pack(sequences: Sequence[Tensor], enforce_sorted: bool = True) -> PackedSequence:
    """torch's pack_sequence, which makes the lengths on the default device and then wants them on the CPU."""
    with torch.device("cpu"):
        return pack_sequence(sequences, enforce_sorted)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of the three operators; ``h`` is what plain PyTorch computes from the others."""

    z: Tensor  # (T, B, H), or packed (N, H)
    h0: Tensor  # (B, H)
    w_hh: Tensor  # (H, H)
    grad_h: Tensor  # like z
    grad_hn: Tensor | None  # (B, H)
    batch_sizes: Tensor | None
    reverse: bool
    nonlinearity: str
    clip: float
    h: Tensor = None  # type: ignore[assignment]  # like z

    def __post_init__(self) -> None:
        if self.h is None:
            with torch.no_grad(), threads(1):
                object.__setattr__(self, "h", _plain_states(self)[0])

    def replace(self, **arguments: Any) -> Problem:
        """Another problem; the states are computed anew unless they are given."""
        return dataclasses.replace(self, **{"h": None, **arguments})

    @property
    def forward(self) -> tuple[Any, ...]:
        return self.z, self.h0, self.w_hh, self.batch_sizes, self.reverse, self.nonlinearity

    @property
    def backward(self) -> tuple[Any, ...]:
        return (self.grad_h, self.grad_hn, self.h, self.h0, self.w_hh, *self.forward[3:], self.clip)

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in vars(self).values() if isinstance(v, Tensor)]

    @property
    def sizes(self) -> list[int]:
        """Rows at each step."""
        return [self.z.shape[1]] * self.z.shape[0] if self.batch_sizes is None else self.batch_sizes.tolist()


class Answers(NamedTuple):
    h: Tensor
    delta: Tensor
    grad_h0: Tensor
    stats: Tensor  # (4, T, B)


def make_problem(
    T: int = 0,
    B: int = 0,
    H: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    gain: float = 1.0,
    clip: float = INF,
    with_grad_hn: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random values for (T, B, H), or packed for ``lengths`` (non-increasing); ``gain`` is W_hh's spectral radius."""
    rng = torch.Generator("cpu").manual_seed(seed)
    batch_sizes, shape = None, (T, B, H)
    if lengths is not None:
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])], device="cpu")
        B, shape = len(lengths), (sum(lengths), H)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=rng, dtype=torch.float64, device="cpu")).to(device, dtype)

    z, h0, w_hh = random(*shape, scale=0.7), random(B, H, scale=0.5), random(H, H, scale=gain * max(H, 1) ** -0.5)
    grad_h, grad_hn = random(*shape), random(B, H) if with_grad_hn else None
    return Problem(z, h0, w_hh, grad_h, grad_hn, batch_sizes, reverse, nonlinearity, clip)


def answers(backend: Backend, p: Problem) -> Answers:
    """What a backend's operators return."""
    h = backend.recurrence(*p.forward)
    return Answers(h, *backend.recurrence_backward_stats(*p.backward))


def _plain_states(p: Problem, seen: list[tuple[int, Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
    """The loop that nn.RNN is: h and h_n. ``seen`` collects (t, h_t, h_t as later steps see it)."""
    steps = list(p.z.split(p.sizes) if p.batch_sizes is not None else p.z.unbind(0))
    state = p.h0
    for t in reversed(range(len(steps))) if p.reverse else range(len(steps)):
        n = steps[t].shape[0]
        steps[t] = getattr(torch, p.nonlinearity)(steps[t] + state[:n] @ p.w_hh.T)
        later = steps[t].view_as(steps[t])
        state = torch.cat([later, state[n:]])
        if seen is not None:
            seen.append((t, steps[t], later))
    if not steps:
        return p.z.clone(), state
    return torch.cat(steps) if p.batch_sizes is not None else torch.stack(steps), state


@threads(1)
def plain(p: Problem) -> Answers:
    """Plain PyTorch: a loop in p's own dtype, its backward by autograd, the statistics by hooks on h_t."""
    stats = torch.zeros(4, len(p.sizes), p.h0.shape[0], dtype=torch.float64, device="cpu")

    def record(kind: int, t: int, value: Tensor) -> None:
        stats[kind, t, : value.shape[0]] = value.double().square().sum(-1)

    def total(t: int, g: Tensor) -> Tensor:
        record(0, t, g)
        return g.clamp(-p.clip, p.clip)

    q = p.replace(z=p.z.detach().requires_grad_(), h0=p.h0.detach().requires_grad_(), h=p.h)
    seen: list[tuple[int, Tensor, Tensor]] = []
    h, h_n = _plain_states(q, seen)
    for t, h_t, later in seen:
        h_t.register_hook(lambda g, t=t: total(t, g))
        later.register_hook(lambda g, t=t: record(1, t, g))
    outputs, grads = [h], [p.grad_h]
    if p.grad_hn is not None:
        outputs, grads = [h, h_n], [p.grad_h, p.grad_hn]
    delta, grad_h0 = torch.autograd.grad(outputs, [q.z, q.h0], grads, allow_unused=True, materialize_grads=True)
    for t, delta_t in enumerate(delta.split(p.sizes) if p.batch_sizes is not None else delta):
        record(2, t, delta_t)
    for t, e_t in enumerate(p.grad_h.split(p.sizes) if p.batch_sizes is not None else p.grad_h):
        record(3, t, e_t)
    return Answers(h.detach(), delta, grad_h0, stats)


@threads(1)
def truth(p: Problem) -> Answers:
    """The reference in float64; for a float64 problem the same sums in long double, sample by sample."""
    if p.z.dtype == torch.float64:
        return _long_double(p)
    q = p.replace(**{k: v.double().cpu() for k, v in vars(p).items() if isinstance(v, Tensor) and k != "batch_sizes"})
    return Answers(reference.recurrence(*q.forward), *reference.recurrence_backward_stats(*q.backward))


@np.errstate(invalid="ignore", over="ignore")
def _long_double(p: Problem) -> Answers:
    def rows(x: Tensor) -> np.ndarray:
        return x.double().cpu().reshape(-1, x.shape[-1]).numpy().astype(np.longdouble)

    z, h0, w, e, given_h = map(rows, (p.z, p.h0, p.w_hh, p.grad_h, p.h))
    first = np.cumsum([0, *p.sizes])
    h, delta, grad_h0 = np.zeros_like(z), np.zeros_like(z), np.zeros_like(h0)
    stats = np.zeros((4, len(p.sizes), len(h0)), np.longdouble)
    for b in range(len(h0)):
        steps = [t for t, n in enumerate(p.sizes) if n > b]
        order = steps[::-1] if p.reverse else steps
        state = h0[b]
        for t in order:
            a = z[first[t] + b] + w @ state
            state = h[first[t] + b] = np.tanh(a) if p.nonlinearity == "tanh" else np.maximum(a, 0)
        r = np.zeros_like(h0[b]) if p.grad_hn is None else rows(p.grad_hn)[b]
        for t in reversed(order):
            e_t, y = e[first[t] + b], given_h[first[t] + b]
            g = e_t + r
            d = np.clip(g, -p.clip, p.clip) * ((1 - y * y) if p.nonlinearity == "tanh" else (y > 0))
            stats[:, t, b] = [(x * x).sum() for x in (g, r, d, e_t)]
            delta[first[t] + b], r = d, d @ w
        grad_h0[b] = r
    return Answers(*(torch.from_numpy(a.astype(np.float64)).view(s) for a, s in (
        (h, p.z.shape), (delta, p.z.shape), (grad_h0, p.h0.shape), (stats, stats.shape))))  # fmt: skip


def step_of_row(p: Problem) -> Tensor:
    """For each row of z, flattened to (N, H): its step."""
    sizes = torch.tensor(p.sizes, dtype=torch.int64, device="cpu")
    return torch.arange(len(p.sizes), device="cpu").repeat_interleave(sizes)


def ulps(x: Tensor, true: Tensor, dtype: torch.dtype, step: Tensor | None = None, floor: float = 0.0) -> float:
    """The largest error of x (.., H), in ulps of dtype at the largest finite value of its step.

    ``step`` (N,) cuts the rows into steps; None makes one of all. An ulp is never smaller than what a dot product loses
    where each of its terms is flushed to zero: H smallest normal numbers (for float16, which is computed in float32,
    the spacing of its subnormals), and never than ``floor``.
    """
    info = torch.finfo(dtype)
    floor = max(floor, info.tiny * info.eps if dtype == torch.float16 else info.tiny * true.shape[-1])
    x, true = (v.detach().double().cpu().reshape(-1, v.shape[-1]) for v in (x, true))
    if x.numel() == 0:
        return 0.0
    finite = x.isfinite() & true.isfinite()
    error = torch.where(finite, (x - true).abs(), 0.0).amax(1)
    scale = torch.where(true.isfinite(), true.abs(), 0.0).amax(1)
    step = torch.zeros(len(x), dtype=torch.int64, device="cpu") if step is None else step
    per_step = torch.zeros(2, int(step.max()) + 1, dtype=torch.float64, device="cpu")
    error, scale = per_step.scatter_reduce(1, step.expand(2, -1), torch.stack([error, scale]), "amax")
    return (error / (info.eps * scale).clamp(min=floor)).max().item()


def assert_same_nonfinite(name: str, ours: Tensor, plains: Tensor) -> None:
    assert ours.shape == plains.shape, f"{name} has shape {list(ours.shape)}, not {list(plains.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(ours).cpu() != kind(plains).cpu()
        assert not wrong.any(), f"{name}: {kind.__name__} differs from plain PyTorch at {wrong.nonzero()[:5].tolist()}"


def assert_as_good(
    name: str, ours: Tensor, plains: Tensor, true: Tensor, yardsticks: Iterable[tuple[Tensor, Tensor]] = ()
) -> None:
    """The rule for one tensor. ``yardsticks`` are plain PyTorch's answer and the truth for more inputs of its size:
    where there are few numbers, PyTorch may be lucky with all of them."""
    assert_same_nonfinite(name, ours, plains)
    by_plain = [ulps(x, v, plains.dtype) for x, v in ((plains, true), *yardsticks)]
    error, allowed = ulps(ours, true, plains.dtype), 2 * max(by_plain) + 1
    assert error <= allowed, f"{name}: {error:.3g} ulp from the truth, where {allowed:.3g} is allowed"


def assert_same_but_for_rounding(found: Iterable[Tensor], expected: Iterable[Tensor], ulp: float = 8) -> None:
    """For two ways to the same sums, which add in another order. An ulp is that of the largest value of a tensor."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_same_nonfinite("a tensor", a, b)
        assert ulps(a, b, b.dtype) <= ulp


def _errors(p: Problem, a: Answers, true: Answers) -> list[float]:
    """In ulps, of each answer; the statistics as norms."""
    dtype, norms, true_norms = p.z.dtype, a.stats.sqrt(), true.stats.sqrt()
    smallest_norm = (torch.finfo(torch.float64).tiny * p.z.shape[-1]) ** 0.5  # as its square is a float64
    return [
        ulps(a.h, true.h, dtype, step_of_row(p)),
        ulps(a.delta, true.delta, dtype, step_of_row(p)),
        ulps(a.grad_h0, true.grad_h0, dtype),
        ulps(norms, true_norms, dtype, torch.arange(norms[..., 0].numel(), device="cpu"), smallest_norm),
    ]


def check(p: Problem, ours: Answers, yardsticks: Sequence[Problem] = ()) -> None:
    """The rule for every answer. One yardstick serves the states, another the whole backward chain: that plain PyTorch
    is lucky at one of its steps is no reason for a kernel to fail there. Where a problem has so few numbers that plain
    PyTorch may be lucky with all of them, ``yardsticks`` are more problems of its size for it to err on."""
    plains, true, dtype = plain(p), truth(p), p.z.dtype
    ours, plains = (Answers(*(x.cpu() for x in answers)) for answers in (ours, plains))
    assert [x.dtype for x in ours] == [dtype, dtype, dtype, torch.float64]
    for name, x, y, v in zip(Answers._fields, ours, plains, true, strict=True):
        # Statistics are sums from before the rounding to float16: they may be right where plain PyTorch has overflown.
        better = x.isfinite() & v.isfinite() & (name == "stats" and dtype == torch.float16)
        assert_same_nonfinite(name, x, torch.where(better, x, y))
    by_plain = [_errors(p, plains, true), *(_errors(q, plain(q), truth(q)) for q in yardsticks)]
    forward = 2 * max(e[0] for e in by_plain) + 1
    backward = 2 * max(max(e[1:]) for e in by_plain) + 1
    for name, error, allowed in zip(Answers._fields, _errors(p, ours, true), [forward] + [backward] * 3, strict=True):
        assert error <= allowed, f"{name}: {error:.3g} ulp from the truth, allowed is {allowed:.3g}"


def same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(
        x.shape == y.shape and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )
