"""Norms and singular values of ∂h_t/∂h_{t-lag}, as many lags back as there are steps; W_hh's spectral radius."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnnkern.jacobian.chain import gaussian, pull_back, push_forward, rescaled, segments, walk_back
from rnnkern.jacobian.results import LN10, ProductNorms, SingularValues
from rnnkern.jacobian.trajectory import Input, Trajectory, Which, checked, trajectories, undisturbed, weights_of


def frobenius_norms(
    rnn: nn.Module,
    input: Input,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    layers: Which = None,
    directions: Which = None,
    end: int | None = None,
    lags: Sequence[int] | None = None,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> ProductNorms:
    """‖∂h_t/∂h_{t-lag}‖_F from k random probes, which are k more rows of the backward chain.

    For orthonormal u_1 … u_k, uniformly distributed, E[(H/k) Σ ‖Jᵀ u_i‖²] = ‖J‖_F². Its relative standard deviation is
    at most √(2/k · (H-k)/(H+2)), which is reached where J has rank 1, as after many steps; Gaussian probes have √(2/k).
    With k = H or more it is 0: the probes are the H unit vectors. All lags of a sample share their probes.

    Args:
        rnn: an :class:`rnnkern.RNN` or :class:`torch.nn.RNN`, without ``layer_norm="preactivation"``.
        input, hx, lengths: as for its forward: dense, unbatched, padded with lengths, or a PackedSequence.
        layers, directions: an index or several; None for all. A layer's Jacobians are taken with respect to its own
            states, which is all there is: what it gets from the layers below does not depend on them.
        end: t, counted from 0 in the order in which the direction takes its steps; None for each sample's last.
        lags: None for 0 … T. Lag t+1 leads to the initial state.
        probes: k.
        generator: for the probes; None for one of their own with seed 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: an argument that does not fit; states that are not finite.

    Cost: the backward chain of B·k rows in float64, without anything kept but T·B·H states.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a positive int, got {probes!r}")
    module = checked(rnn)
    with undisturbed(module):
        selection = trajectories(module, input, hx, lengths, layers, directions)
        H, paths = module.hidden_size, [path.until(end) for path in selection.trajectories]
        wanted = _lags(lags, paths[0])
        logs = [_frobenius(path, wanted, _probes(path, probes, generator)) for path in paths]
        log10 = selection.gather(logs) / LN10
    error = math.sqrt(2 / probes * max(0, H - probes) / (H + 2))
    return ProductNorms("Frobenius", np.array(wanted), log10, np.full_like(log10, error), *selection[:2])


def _frobenius(path: Trajectory, lags: Sequence[int], rows: Tensor) -> Tensor:
    """ln ‖J‖_F (lags, B)."""
    k, H = rows.shape[1:]
    T, logs, last = path.h.shape[0], [], (rows.new_zeros(rows.shape[0]), rows)
    for _, _, log, pulled in walk_back(path, rows, min(max(lags) + 1, T)):
        logs.append(pulled.squares.sum(-1).log().flip(0) / 2 + log)
        last = log, pulled.rows
    logs.append((last[0] + rescaled(last[1], (1, 2))[1])[None])  # at the initial state, if the walk led to it
    by_lag = torch.cat(logs) + math.log(H / k) / 2
    return _masked(by_lag[list(lags)], path, lags)


def singular_values(
    rnn: nn.Module,
    input: Input,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    layers: Which = None,
    directions: Which = None,
    end: int | None = None,
    lags: Sequence[int] | None = None,
) -> SingularValues:
    """All singular values of ∂h_t/∂h_{t-lag}, from the full product: all H unit vectors are probes. For small H.

    Arguments and errors as of :func:`frobenius_norms`. The first value is the spectral norm. What lies so far below it
    that float64 does not resolve it (H·2e-16 of it) is NaN; for the long run of those see :func:`lyapunov_exponents`.

    Cost: a backward chain of B·H rows in float64, and for each lag B decompositions of H×H.
    """
    module = checked(rnn)
    with undisturbed(module):
        selection = trajectories(module, input, hx, lengths, layers, directions)
        paths = [path.until(end) for path in selection.trajectories]
        wanted = _lags(lags, paths[0])
        log10 = selection.gather([_singular(path, wanted) for path in paths]) / LN10
    return SingularValues(np.array(wanted), log10, *selection[:2])


def _singular(path: Trajectory, lags: Sequence[int]) -> Tensor:
    """ln σ (lags, B, H), descending."""
    T, B, H = path.h.shape
    rows = _probes(path, H, None)
    by_lag = {0: rows.new_zeros(B, H)}
    for a, b, log, pulled in walk_back(path, rows, max(lags)):
        here = [lag for lag in lags if a <= T - lag < b]
        if here:
            products = pulled.delta[[T - lag - a for lag in here]] @ path.w_hh
            values = torch.linalg.svdvals(products)
            largest = values[..., :1]
            unresolved = (values < H * torch.finfo(values.dtype).eps * largest) & (largest > 0)
            logs = values.log().masked_fill(unresolved, math.nan) + log[:, None]
            by_lag.update(zip(here, logs))
    return _masked(torch.stack([by_lag[lag] for lag in lags]), path, lags)


def spectral_norms(
    rnn: nn.Module,
    input: Input,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    layers: Which = None,
    directions: Which = None,
    end: int | None = None,
    lags: Sequence[int] | None = None,
    iterations: int = 30,
    generator: torch.Generator | None = None,
) -> ProductNorms:
    """‖∂h_t/∂h_{t-lag}‖₂ by power iteration: u ← J Jᵀ u, Jᵀ by the backward chain and J by the same with W_hhᵀ.

    Arguments and errors as of :func:`frobenius_norms`, but each lag is a row of its own, and with ``lags=None`` they
    are 1, 2, 4, 8, … and the longest. What it returns is never above the norm. It converges as (σ₂/σ₁)^(2·iterations):
    at once after many steps, slowly where the largest singular values are close to each other;
    ``relative_error`` is the change that the last half of the last iteration made. :func:`singular_values` is exact.

    Args:
        iterations: of the power method.
        generator: for the vectors to begin with; None for one of their own with seed 0.

    Cost: per iteration two chains over B·len(lags) rows.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a positive int, got {iterations!r}")
    module = checked(rnn)
    with undisturbed(module):
        selection = trajectories(module, input, hx, lengths, layers, directions)
        paths = [path.until(end) for path in selection.trajectories]
        T = paths[0].h.shape[0]
        wanted = _lags([*(1 << i for i in range(T.bit_length()) if 1 << i < T), T] if lags is None else lags, paths[0])
        results = [_spectral(path, wanted, iterations, generator) for path in paths]
        log10 = selection.gather([log for log, _ in results]) / LN10
        change = selection.gather([change for _, change in results])
    return ProductNorms("spectral", np.array(wanted), log10, change, *selection[:2])


def _spectral(
    path: Trajectory, lags: Sequence[int], iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """ln ‖J‖₂ (lags, B), and its relative change in the last half iteration."""
    ascending = sorted(set(lags))
    B, H = path.h.shape[1:]
    u, _ = rescaled(gaussian((B, len(ascending), H), path, generator), (2,))
    log = log_back = u.new_zeros(u.shape[:2])
    for _ in range(iterations):
        v, log_back = _transposed_products(path, u, ascending)
        u, log = _products(path, v, ascending)
    change = torch.where(log == log_back, 0.0, (log - log_back).expm1().abs())
    index = [ascending.index(lag) for lag in lags]
    return _masked(log.T[index], path, lags), _masked(change.T[index], path, lags)


def _transposed_products(path: Trajectory, rows: Tensor, ascending: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Jᵀ u for row r over the last ``ascending[r]`` steps: normalised (B, rows, H), and the logarithm (B, rows)."""
    T = path.h.shape[0]
    zero = [lag for lag in ascending if lag == 0]
    log = rows.new_zeros(rows.shape[:2])
    results, logs = [rows[:, : len(zero)]], [log[:, : len(zero)]]
    rows, log, left = rows[:, len(zero) :], log[:, len(zero) :], list(ascending[len(zero) :])
    for a, b in segments(0, max(ascending)):
        pulled = pull_back(path, rows, T - b, T - a)
        here = [lag for lag in left if lag <= b]
        if here:
            delta = torch.stack([pulled.delta[b - lag, :, i] for i, lag in enumerate(here)], 1)
            result, scale = rescaled(delta @ path.w_hh, (2,))
            results.append(result)
            logs.append(log[:, : len(here)] + scale)
        left = left[len(here) :]
        rows, scale = rescaled(pulled.rows[:, len(here) :], (2,))
        log = log[:, len(here) :] + scale
    return torch.cat(results, 1), torch.cat(logs, 1)


def _products(path: Trajectory, rows: Tensor, ascending: Sequence[int]) -> tuple[Tensor, Tensor]:
    """J v likewise. A row enters the chain where its lag begins; the longest are the first on the way."""
    T, B, H = path.h.shape
    zero = sum(lag == 0 for lag in ascending)
    waiting = [(T - lag, rows[:, i]) for i, lag in enumerate(ascending) if lag]
    results, log = rows[:, :0], rows.new_zeros(B, 0)
    for a, b in segments(T - max(ascending), T):
        new = []
        while waiting and waiting[-1][0] < b:
            new.append(waiting.pop())
        entering = None
        if new:
            before = results.shape[1]
            results = torch.cat([results, rows.new_zeros(B, len(new), H)], 1)
            log = torch.cat([log, rows.new_zeros(B, len(new))], 1)
            entering = rows.new_zeros(b - a, *results.shape)
            for i, (first, row) in enumerate(new):
                entering[first - a, :, before + i] = row
        results, scale = rescaled(push_forward(path, results, a, b, entering), (2,))
        log = log + scale
    return (
        torch.cat([rows[:, :zero], results.flip(1)], 1),
        torch.cat([rows.new_zeros(B, zero), log.flip(1)], 1),
    )


def spectral_radius(rnn: nn.Module) -> NDArray[np.float64]:
    """The largest modulus of W_hh's eigenvalues, (layers, directions), exact and in float64.

    Where the state is small and f' therefore 1, a gradient changes by this factor per step in the long run; saturation
    only makes it smaller. Default initialisation has about 1/√3 = 0.58, for H from some hundreds on.

    Raises:
        TypeError: ``rnn`` is neither an rnnkern.RNN nor a torch.nn.RNN.
    """
    module = checked(rnn)
    D = 2 if module.bidirectional else 1
    with undisturbed(module):
        radii = [
            torch.linalg.eigvals(weights_of(module, layer, d)[1]).abs().max()
            for layer in range(module.num_layers)
            for d in range(D)
        ]
    return torch.stack(radii).cpu().numpy().reshape(module.num_layers, D)


def _lags(lags: Sequence[int] | None, path: Trajectory) -> list[int]:
    T = path.h.shape[0]
    wanted = list(range(T + 1)) if lags is None else [int(lag) for lag in lags]
    if not wanted or not all(0 <= lag <= T for lag in wanted):
        raise IndexError(f"lags must be in [0, {T}], where {T} leads to the initial state, got {lags!r}")
    return wanted


def _masked(by_lag: Tensor, path: Trajectory, lags: Sequence[int]) -> Tensor:
    """(lags, B, ...), NaN where a sample does not have so many steps."""
    missing = torch.tensor(lags, device=by_lag.device)[:, None] > path.lengths
    return by_lag.masked_fill(missing.reshape(*missing.shape, *[1] * (by_lag.dim() - 2)), math.nan)


def _probes(path: Trajectory, k: int, generator: torch.Generator | None) -> Tensor:
    """(B, min(k, H), H): orthonormal rows, uniformly distributed, of each sample; or all unit vectors."""
    B, H = path.h.shape[1:]
    if k >= H:
        return torch.eye(H, dtype=torch.float64, device=path.h.device).expand(B, -1, -1)
    return torch.linalg.qr(gaussian((B, H, k), path, generator))[0].mT
