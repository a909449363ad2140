"""Products of Jacobians with rows of vectors, through the registered backward operator.

    J_t = ∂h_t/∂h_{t-1} = diag(f'(h_t)) W_hh
    back      u ← J_tᵀ u:  δ = u ⊙ f'(h_t),  u ← δ W_hh                  the backward chain itself
    forward   v ← J_t v:   v ← f'(h_t) ⊙ (v W_hhᵀ)                       the same with W_hhᵀ and time the other way

k vectors for each of B samples are B·k rows of one chain. It runs in segments, between which the rows are rescaled and
the logarithm is kept, so that a product over 10,000 steps neither underflows nor overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern import backends, ops
from rnnkern.autograd import INF
from rnnkern.jacobian.trajectory import Trajectory

#: Steps between rescalings. A saturated tanh makes 1e-16 of a vector per step, and the kernel squares it: 1e-256.
SEGMENT = 8


def segments(start: int, stop: int, length: int = SEGMENT) -> list[tuple[int, int]]:
    """[start, stop) in pieces of ``length`` steps; a remainder comes last."""
    return [(a, min(a + length, stop)) for a in range(start, stop, length)]


class Pulled(NamedTuple):
    """What pull_back returns for a segment of S steps."""

    delta: Tensor  # (S, B, k, H)
    squares: Tensor  # (S, B, k): ‖u‖² of the rows that arrive at each step's state
    rows: Tensor  # (B, k, H) at the state before the segment


def pull_back(path: Trajectory, rows: Tensor, start: int, stop: int) -> Pulled:
    """Carry rows (B, k, H) back through the steps start … stop-1: u ← J_tᵀ u."""
    h, sizes = _expanded(path, rows, start, stop)
    delta, arrived, stats = ops.recurrence_backward_stats(
        backends.select(h).name,
        h.new_zeros(()).expand_as(h),
        rows.flatten(0, 1),
        h,
        h[0],
        path.w_hh,
        None,
        False,
        path.nonlinearity,
        INF,
    )
    return Pulled(delta.unflatten(1, sizes), stats[0].unflatten(1, sizes), arrived.unflatten(0, sizes))


def push_forward(path: Trajectory, rows: Tensor, start: int, stop: int, entering: Tensor | None = None) -> Tensor:
    """Carry rows (B, k, H) forward through the steps start … stop-1: v ← J_t v; the rows after the last.

    ``entering`` (S, B, k, H) is added to the rows before each step.
    """
    h, sizes = _expanded(path, rows, start, stop)
    e = h.new_zeros(()).expand_as(h) if entering is None else (entering @ path.w_hh.T).flatten(1, 2)
    delta, _ = ops.recurrence_backward(
        backends.select(h).name,
        e,
        (rows @ path.w_hh.T).flatten(0, 1),
        h,
        h[0],
        path.w_hh.T.contiguous(),
        None,
        True,
        path.nonlinearity,
        INF,
    )
    return delta[-1].unflatten(0, sizes)


def _expanded(path: Trajectory, rows: Tensor, start: int, stop: int) -> tuple[Tensor, tuple[int, int]]:
    """The states of the steps, (S, B·k, H): each sample's k times."""
    B, k, _ = rows.shape
    return path.h[start:stop, :, None].expand(-1, -1, k, -1).flatten(1, 2), (B, k)


def walk_back(path: Trajectory, rows: Tensor, steps: int) -> Iterator[tuple[int, int, Tensor, Pulled]]:
    """Pull rows back over the last ``steps`` steps: (start, stop, ln of the scale in this segment (B,), Pulled).

    The k rows of a sample keep their proportions. The last rescaling is left to whoever reads the rows.
    """
    T = path.h.shape[0]
    log = rows.new_zeros(rows.shape[0])
    for a, b in segments(0, steps):
        pulled = pull_back(path, rows, T - b, T - a)
        yield T - b, T - a, log, pulled
        rows, scale = rescaled(pulled.rows, (1, 2))
        log = log + scale


def rescaled(rows: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows divided by their norm over ``dims``, and its logarithm without them; rows of zeros keep, with -inf."""
    norm = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1), norm.log().squeeze(dims)


def gaussian(shape: tuple[int, ...], path: Trajectory, generator: torch.Generator | None) -> Tensor:
    """Drawn where the generator is: its own on the CPU gives every device the same, and the global one stays put."""
    generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
    drawn = torch.randn(shape, dtype=torch.float64, device=generator.device, generator=generator)
    return drawn.to(path.h.device)
