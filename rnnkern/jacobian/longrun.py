"""Forward in time: Lyapunov exponents, and whether a state is forgotten."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rnnkern.jacobian.chain import gaussian, push_forward, rescaled, segments
from rnnkern.jacobian.results import LN10, Contraction, LyapunovExponents
from rnnkern.jacobian.trajectory import Trajectory, Which, checked, trajectories, undisturbed


def lyapunov_exponents(
    rnn: nn.Module,
    input: Tensor,
    hx: Tensor | None = None,
    *,
    layers: Which = None,
    directions: Which = None,
    k: int | None = None,
    warmup: int | None = None,
    every: int = 4,
    generator: torch.Generator | None = None,
) -> LyapunovExponents:
    """The k largest Lyapunov exponents along each sample's trajectory: Q_t R_t = qr(J_t Q_{t-1}), λ_i = mean ln |R_ii|.

    The method of Benettin et al. (1980), for RNNs see Engelken, Wolf & Abbott (2023). J_t = diag(f'(h_t)) W_hh is
    applied forward in time: transposed Jacobians forward in time make another product, and other numbers. The sum of
    the first j exponents is the rate at which a volume of j dimensions grows. λ_1 < 0: the state forgets, and gradients
    vanish by exp(λ_1) per step in the long run; λ_1 > 0: chaos, and gradients explode.

    Args:
        rnn, layers, directions: as of :func:`frobenius_norms`.
        input: (T, B, I), (B, T, I) with batch_first, or (T, I): an average over a long time wants a long input.
        hx: as for the module's forward.
        k: how many; None for all H.
        warmup: steps that do not count, in which the directions settle; None for T/10.
        every: steps between two decompositions. The k directions must not collapse onto each other in between:
            exp(every·(λ_1 - λ_k)) has to stay far below 1e16, or λ_k is NaN.
        generator: for the first directions; None for one of their own with seed 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: an argument that does not fit; states that are not finite.

    Cost: the chain of B·k rows in float64, and B decompositions of H×k every ``every`` steps.
    """
    module = checked(rnn)
    k = module.hidden_size if k is None else k
    if not 1 <= k <= module.hidden_size:
        raise ValueError(f"k must be in [1, {module.hidden_size}], got {k}")
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    with undisturbed(module):
        selection = trajectories(module, _dense(input), hx, None, layers, directions)
        T = selection.trajectories[0].h.shape[0]
        warmup = T // 10 if warmup is None else warmup
        if not 0 <= warmup < T:
            raise ValueError(f"warmup must be in [0, T) = [0, {T}), got {warmup}")
        sums = [_lyapunov(path, k, warmup, every, generator) for path in selection.trajectories]
        exponents = selection.gather(sums) / (T - warmup)
    return LyapunovExponents(exponents, T - warmup, warmup, *selection[:2])


def _lyapunov(path: Trajectory, k: int, warmup: int, every: int, generator: torch.Generator | None) -> Tensor:
    """Σ ln |R_ii| after the warm-up, (k, B)."""
    T, B, H = path.h.shape
    q = torch.linalg.qr(gaussian((B, H, k), path, generator))[0]
    total = q.new_zeros(B, k)
    for a, b in segments(0, warmup, every) + segments(warmup, T, every):
        q, r = torch.linalg.qr(push_forward(path, q.mT, a, b).mT)
        if a >= warmup:
            left, whole = r.diagonal(dim1=-2, dim2=-1).abs(), torch.linalg.vector_norm(r, dim=-2)
            unresolved = (left < H * torch.finfo(r.dtype).eps * whole) & (whole > 0)  # rounding is all that is left
            total += left.log().masked_fill(unresolved, math.nan)
    return total.T


def contraction(
    rnn: nn.Module,
    input: Tensor,
    hx: Tensor | None = None,
    *,
    other: Tensor | None = None,
    layers: Which = None,
    directions: Which = None,
    distance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Contraction:
    """The distance, step by step, of two trajectories from different initial states under the same input.

    Where it shrinks to nothing the state has forgotten where it came from, which is the forward side of a vanishing
    gradient (memory collapse). The difference itself is iterated, d_t = f(a_t + W_hh d_{t-1}) - f(a_t), by a formula
    in which nothing cancels, and rescaled: 1e-5000 is as exact as 1.

    Args:
        rnn, input, hx, layers, directions: as of :func:`lyapunov_exponents`. Each layer's initial state is changed
            alone: what it gets from the layers below is the same.
        other: the second initial states, like hx; None for hx and a step in a random direction.
        distance: the length of that step.
        generator: for its direction; None for one of its own with seed 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: an argument that does not fit; states that are not finite.

    Cost: T steps of B rows in float64, one by one.
    """
    module = checked(rnn)
    if other is None and not 0 < distance < math.inf:
        raise ValueError(f"distance must be positive and finite, got {distance}")
    with undisturbed(module):
        selection = trajectories(module, _dense(input), hx, None, layers, directions, with_a=True)
        T, B, H = selection.trajectories[0].h.shape
        index = [layer * (2 if module.bidirectional else 1) + d for layer in selection[0] for d in selection[1]]
        if other is None:
            steps = [distance * rescaled(gaussian((B, H), p, generator), (1,))[0] for p in selection.trajectories]
        else:
            steps = list(_difference(module, other, hx, B)[index])
        logs = [_distances(path, step) for path, step in zip(selection.trajectories, steps)]
        rate = selection.gather([_slope(log[T // 2 :]) for log in logs])
        log10 = selection.gather(logs) / LN10
    return Contraction(log10, rate, *selection[:2])


def _difference(rnn: nn.RNNBase, other: Tensor, hx: Tensor | None, B: int) -> Tensor:
    """other - hx, (layers·D, B, H) float64."""
    shape = (rnn.num_layers * (2 if rnn.bidirectional else 1), B, rnn.hidden_size)
    other = other.unsqueeze(1) if other.dim() == 2 else other
    if tuple(other.shape) != shape:
        raise ValueError(f"other must have the shape of hx, {list(shape)}, got {list(other.shape)}")
    if hx is None:
        return other.detach().double()
    return other.detach().double() - (hx.unsqueeze(1) if hx.dim() == 2 else hx).detach().double()


def _distances(path: Trajectory, d: Tensor) -> Tensor:
    """ln ‖h'_t - h_t‖ (T+1, B) from their difference d (B, H) at first."""
    assert path.a is not None
    d, log = rescaled(d, (1,))
    logs = [log]
    for h, a in zip(path.h, path.a):
        # Below 1e-100 the step is linear to all digits of float64, and d may be followed at any scale.
        scale = log.exp().clamp(min=1e-100)[:, None]
        e = scale * (d @ path.w_hh.T)
        if path.nonlinearity == "tanh":  # tanh(a+e) - tanh(a) = tanh e (1 - tanh² a) / (1 + tanh a tanh e)
            e = torch.tanh(e)
            d = e * (1 - h * h) / (1 + h * e).clamp(min=torch.finfo(h.dtype).tiny)
        else:  # the part of [a, a+e] that is positive, with the sign of e
            d = torch.where(e > 0, torch.minimum(e, (a + e).clamp(min=0)), torch.maximum(e, -a.clamp(min=0)))
        d, change = rescaled(d / scale, (1,))
        log = log + change
        logs.append(log)
    return torch.stack(logs)


def _slope(logs: Tensor) -> Tensor:
    """Least-squares slope of each column of (n, B) over what is finite in it; NaN for fewer than two."""
    used = logs.isfinite()
    count = used.sum(0)
    x = torch.arange(len(logs), dtype=logs.dtype, device=logs.device)[:, None]
    x = torch.where(used, x - torch.where(used, x, 0.0).sum(0) / count, 0.0)
    return torch.where(used, x * logs, 0.0).sum(0) / x.square().sum(0)


def _dense(input: Tensor) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor: a mean over time wants one length, got {type(input).__name__}")
    return input
