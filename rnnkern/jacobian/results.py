"""What the probes return. Every array is float64 and begins with (layers, directions), those that were asked for."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LN10 = math.log(10)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProductNorms:
    """A norm of ∂h_t/∂h_{t-lag} for each lag, layer, direction and sample; its repr shows medians over the samples.

    Attributes:
        kind: ``"Frobenius"`` or ``"spectral"``.
        lags: (lags,). At lag 0 the Jacobian is the identity.
        log10: (layers, directions, lags, B); -inf where it has vanished exactly, NaN where a sample has no such lag.
        relative_error: like log10. Frobenius: the largest relative standard error that the estimate of the *squared*
            norm can have; half of it is the norm's own. Spectral: the relative change that the last half of the last
            iteration made.
        layers, directions: the first two axes' indices in the module.
    """

    kind: str
    lags: Ints
    log10: Floats
    relative_error: Floats
    layers: tuple[int, ...]
    directions: tuple[int, ...]

    def __repr__(self) -> str:
        at = _few(self.lags)
        rows = [(name, self.log10[l, d][at]) for l, d, name in _names(self)]
        with np.errstate(all="ignore"):
            error = np.nanmax(self.relative_error) if np.isfinite(self.relative_error).any() else np.nan
        title = f"{self.kind} norm of ∂h_t/∂h_(t-lag), log10, of {self.log10.shape[3]} samples the median"
        note = "standard error of its square" if self.kind == "Frobenius" else "largest change in the last iteration"
        return _table(f"{title}; {note} {error:.1%}", "lag", self.lags[at], rows)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SingularValues:
    """The singular values of ∂h_t/∂h_{t-lag}; its repr shows the largest, the middle and the smallest.

    Attributes:
        lags: (lags,).
        log10: (layers, directions, lags, B, H), descending; -inf where the whole product has vanished exactly, NaN
            where a sample has no such lag and where float64 does not resolve a value beside the largest.
        layers, directions: the first two axes' indices in the module.
    """

    lags: Ints
    log10: Floats
    layers: tuple[int, ...]
    directions: tuple[int, ...]

    def __repr__(self) -> str:
        at, H = _few(self.lags), self.log10.shape[4]
        shown = sorted({0, (H - 1) // 2, H - 1})
        rows = [(f"{name}, σ{i + 1}", self.log10[l, d][at][..., i]) for l, d, name in _names(self) for i in shown]
        title = f"singular values of ∂h_t/∂h_(t-lag), log10, of {self.log10.shape[3]} samples the median"
        return _table(title, "lag", self.lags[at], rows)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LyapunovExponents:
    """The leading Lyapunov exponents, in natural logarithms per step: exp(λ) is the factor of one step.

    Attributes:
        exponents: (layers, directions, k, B), λ_1 first; -inf where all has vanished exactly, NaN where float64
            does not resolve a direction beside those before it: ``every`` is too large, or ReLU units are off.
        steps: how many steps each is a mean over.
        warmup: steps before them, in which the directions settled.
        layers, directions: the first two axes' indices in the module.
    """

    exponents: Floats
    steps: int
    warmup: int
    layers: tuple[int, ...]
    directions: tuple[int, ...]

    def __repr__(self) -> str:
        k = np.arange(1, self.exponents.shape[2] + 1)
        at = _few(k)
        rows = [(name, self.exponents[l, d][at]) for l, d, name in _names(self)]
        title = f"Lyapunov exponents per step, over {self.steps} steps after {self.warmup}"
        return _table(f"{title}, of {self.exponents.shape[3]} samples the median", "λ", k[at], rows)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Contraction:
    """The distance of two trajectories that differ in their initial state alone.

    Attributes:
        log10: (layers, directions, T+1, B), log10 ‖h'_t - h_t‖; index 0 are the initial states, -inf: they have met.
        rate: (layers, directions, B), natural logarithm per step, fitted over the second half of the steps; NaN where
            fewer than two of them are finite. While the distance is small it is the largest Lyapunov exponent; two
            trajectories of a chaotic net end up at a constant distance, and at a rate of 0.
        layers, directions: the first two axes' indices in the module.
    """

    log10: Floats
    rate: Floats
    layers: tuple[int, ...]
    directions: tuple[int, ...]

    def __repr__(self) -> str:
        steps = np.arange(self.log10.shape[2])
        at = _few(steps)
        rates = [np.median(self.rate[l, d]) for l, d, _ in _names(self)]
        rows = [(f"{name}, rate {r:+.4f}", self.log10[l, d][at]) for (l, d, name), r in zip(_names(self), rates)]
        title = f"distance ‖h'_t - h_t‖, log10, and its rate per step, of {self.log10.shape[3]} samples the median"
        return _table(title, "t", steps[at], rows)


def _few(axis: Ints) -> Ints:
    """Positions of at most nine values: the first, the last, and between them some in even ratios."""
    n = len(axis)
    return np.unique(np.append(0, np.geomspace(1, n, 8).round().astype(np.int64) - 1)) if n else np.arange(0)


def _names(result: ProductNorms | SingularValues | LyapunovExponents | Contraction) -> list[tuple[int, int, str]]:
    """Position of each layer and direction, and how to call it."""
    return [
        (i, j, f"layer {layer}" + (" reverse" if direction else ""))
        for i, layer in enumerate(result.layers)
        for j, direction in enumerate(result.directions)
    ]


def _table(title: str, axis: str, at: Ints, rows: list[tuple[str, Floats]]) -> str:
    """A line for each row: its median over the samples, NaN left out."""
    width = max(len(axis), *(len(name) for name, _ in rows))
    lines = [title, axis.ljust(width) + "".join(f"{value:>10}" for value in at.tolist())]
    for name, values in rows:
        some = ~np.isnan(values).all(1)
        medians = np.full(len(values), np.nan)
        medians[some] = np.nanmedian(values[some], 1)
        lines.append(
            name.ljust(width) + "".join(f"{round(value, 3) + 0.0:>10.3f}" for value in medians.tolist())
        )  # no -0.000
    return "\n".join(lines)
