"""What follows from ‖g_t‖², ‖r_t‖², ‖δ_t‖² and ‖e_t‖²: gain, direct and recurrent part, Ω, first failures.

    R_t / G_{t+1} = (Δ_{t+1} / G_{t+1}) · (R_t / Δ_{t+1})        gain = saturation factor · weight factor
    G² = E² + R² + 2 E R cos(e, r)                               direct and recurrent part

t + 1 is the step after t in processing order, so the gradient flows from t + 1 to t in either direction. Where a number
is not determined it is NaN: no such step in the sample, a norm that divides and is 0, a norm that is not finite.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Order = Literal["processing", "input", "lag"]
OmegaVariant = Literal["paper", "code"]

#: Rows with ‖g‖² below this are left out of Ω as the code of Pascanu, Mikolov & Bengio computes it: its own default.
OMEGA_BOUND = 1e-20
#: Relative error of a recorded ‖g‖²: an element of g is rounded to float32, of half precision too, and kernels
#: that sum squares in float32 add some roundings, which mostly cancel.
ROUNDING = 5 * float(np.finfo(np.float32).eps)
#: A cosine is NaN where the rounding of the gradient could move it by more than this: two decimals are shown.
COSINE_ERROR = 0.01


class Analysis:
    """Quantities of one RNN's record. Shapes are (layers, directions, T), without T where a number is of all steps.

    ``per_sample`` adds B as the last axis. What is of a step has the record's ``order`` on its T axis. What is of a
    step back stands at the step t where the gradient arrives: at a sample's last step none does, and there is NaN.
    """

    squares: Floats
    lengths: Ints
    order: Order
    per_sample: bool
    is_gated: bool

    # One step back

    @cached_property
    def gain(self) -> Floats:
        """R_t / G_{t+1}: the factor by which one step back changes the gradient's norm.

        Over the batch, the norms are those over the samples that have both steps. Exactly 0 where nothing passes, as
        between the chunks of truncated BPTT.
        """
        return self._ratio(RECURRENT, TOTAL, self.order)

    @cached_property
    def saturation_factor(self) -> Floats:
        """Δ_{t+1} / G_{t+1}: what f' leaves of the gradient, at most 1. It includes ``clip`` and the normalisation of
        ``layer_norm="preactivation"`` where an RNN has them. NaN for gated modules, which have no one f'."""
        return self._factor(DELTA, TOTAL)

    @cached_property
    def weight_factor(self) -> Floats:
        """R_t / Δ_{t+1}: what W_hh makes of it, between its smallest and its largest singular value; exactly 1 for an
        orthogonal one. It includes recurrent dropout where an RNN has it. NaN for gated modules."""
        return self._factor(RECURRENT, DELTA)

    def _factor(self, above: int, below: int) -> Floats:
        return np.full_like(self.gain, np.nan) if self.is_gated else self._ratio(above, below, self.order)

    @property
    def mean_gain(self) -> Floats:
        """Geometric mean of the gain over the steps where both of its factors are positive and finite.

        With a loss at the end, mean_gain to the power of T-1 is G_1 / G_T.
        """
        return self._means[0]

    @property
    def mean_saturation_factor(self) -> Floats:
        """Geometric mean over the same steps: mean_gain = mean_saturation_factor · mean_weight_factor."""
        return self._means[1]

    @property
    def mean_weight_factor(self) -> Floats:
        """Geometric mean over the same steps."""
        return self._means[2]

    @property
    def weight_share(self) -> Floats:
        """ln(mean_weight_factor) / ln(mean_gain): the weights' share in the decay or growth; the rest is saturation's.

        Above 1 where saturation works against it, below 0 where the weights do. NaN where nothing changes.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return _finite(np.log(self.mean_weight_factor) / np.log(self.mean_gain))

    @cached_property
    def _means(self) -> tuple[Floats, Floats, Floats]:
        gain, saturation, weights = (
            self._ratio(*of, "lag") for of in ((RECURRENT, TOTAL), (DELTA, TOTAL), (RECURRENT, DELTA))
        )
        if self.is_gated:
            used = np.isfinite(gain) & (gain > 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = np.exp(np.where(used, np.log(gain), 0).sum(2) / used.sum(2))
            return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        used = np.isfinite(gain) & (gain > 0) & np.isfinite(weights)  # then the third is, too
        count = used.sum(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [np.where(used, np.log(x), 0).sum(2) / count for x in (saturation, weights)]
        return np.exp(logs[0] + logs[1]), np.exp(logs[0]), np.exp(logs[1])

    # Direct and recurrent part

    @cached_property
    def recurrent(self) -> Floats:
        """R_t = ‖r_t‖: the part of the gradient that came from later steps; 0 at a sample's last step."""
        return self._norm(np.where(self._is_last, 0, self.squares[RECURRENT]))

    @cached_property
    def direct(self) -> Floats:
        """E_t = ‖e_t‖: the part that enters at step t, from its own loss or from the layer above.

        At a sample's last step all of the gradient enters, also what arrives at h_n. Of a cell, which returns output
        and state at once, three cases are known: that one; G = R to the last bit, where nothing enters; R = 0. There
        E is NaN elsewhere, and :attr:`direct_bounds` is all that is known.
        """
        return self._norm(self._direct_squares)

    @cached_property
    def direct_bounds(self) -> tuple[Floats, Floats]:
        """|G_t - R_t| <= E_t <= G_t + R_t: all that ‖g_t‖ and ‖r_t‖ say of the direct part."""
        total = self._norm(self.squares[TOTAL])
        with np.errstate(invalid="ignore"):
            return np.abs(total - self.recurrent), total + self.recurrent

    @cached_property
    def direct_share(self) -> Floats:
        """E / (E + R): 1 where a step learns from its own loss alone, 0 where it learns from later steps alone."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _finite(self.direct / (self.direct + self.recurrent))

    @cached_property
    def cosine(self) -> Floats:
        """cos(e_t, r_t) = (G² - E² - R²) / (2 E R): 1 where both parts pull together, -1 where they cancel.

        Over the batch the angle is that of the vectors of all samples end to end. NaN where E is not known, where E or
        R is 0, and where one is so small beside the other that rounding could move the cosine by COSINE_ERROR.
        """
        e, r, g = self.direct, self.recurrent, self._norm(self.squares[TOTAL])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            cosine = ((g / e) * (g / r) - e / r - r / e) / 2
            error = ROUNDING * ((g / e) * (g / r) + e / r + r / e) / 2
            return np.where((error <= COSINE_ERROR) & np.isfinite(cosine), np.clip(cosine, -1, 1), np.nan)

    @property
    def loss_at_end(self) -> Bools:
        """Whether gradient enters at the last step of each sample only: then horizon and slope mean something."""
        return self._over_steps(((self._direct_squares == 0) | self._is_last) | ~self._is_there, np.logical_and)

    @cached_property
    def _direct_squares(self) -> Floats:
        """‖e_t‖² (layers, directions, T, B) in input order; NaN where it is not known."""
        total, recurrent = self.squares[TOTAL], self.squares[RECURRENT]
        if len(self.squares) > DIRECT:
            direct = self.squares[DIRECT]
        else:
            direct = np.where(total == recurrent, 0.0, np.where(recurrent == 0, total, np.nan))
        direct = np.where(self._is_last, total, direct)
        return np.where(self._is_there, np.where(np.isfinite(total + recurrent), direct, np.nan), 0.0)

    # Norm preservation

    @property
    def omega(self) -> Floats:
        """:meth:`omega_by` "paper"."""
        return self.omega_by("paper")

    def omega_by(self, variant: OmegaVariant) -> Floats:
        """Ω of Pascanu, Mikolov & Bengio (2013), how far the chain is from keeping the gradient's norm; 0 is best.

        =======  ======================================================================================================
        "paper"  Σ_t (R_t / G_{t+1} - 1)² of a sample, and its mean over the samples. NaN where a ratio is undefined.
        "code"   what their published code computes: the mean of (R_t² / G_{t+1}² - 1)² over the steps of all samples,
                 those with G_{t+1}² < 1e-20 left out.
        =======  ======================================================================================================

        Both are summed over the steps back between states h_1 .. h_T, of which there are T-1; the step to the initial
        state, which their code also counts, is not recorded. NaN where there is no step back.

        Raises:
            ValueError: an unknown variant.
        """
        if variant not in get_args(OmegaVariant):
            raise ValueError(f"variant must be 'paper' or 'code', got {variant!r}")
        (total, _, recurrent), exists = self._steps_back
        ratio = _root_ratio(recurrent, total)
        if variant == "code":
            used = exists & ~(total < OMEGA_BOUND)
            terms = np.square(np.square(ratio) - 1)
        else:
            used, terms = exists, np.square(ratio - 1)
        terms = np.where(used, terms, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            if variant == "code":
                axes = 2 if self.per_sample else (2, 3)
                return _finite(terms.sum(axes) / used.sum(axes))
            per_sample = np.where(exists.any(2), terms.sum(2), 0)
            if self.per_sample:
                return np.where(exists.any(2), per_sample, np.nan)
            return _finite(per_sample.sum(2) / exists.any(2).sum(2))

    # Where the gradient ends

    @property
    def first_zero(self) -> Floats:
        """The smallest lag, counted back from each sample's last step, at which ‖g‖² is exactly 0; NaN for none."""
        return self._first(self.squares[TOTAL] == 0)

    @property
    def first_nonfinite(self) -> Floats:
        """The smallest lag, counted back from each sample's last step, at which ‖g‖² is not finite; NaN for none."""
        return self._first(~np.isfinite(self.squares[TOTAL]))

    def _first(self, rows: Bools) -> Floats:
        rows = reordered(rows & self._is_there, self.lengths, "lag")
        found: Bools = rows if self.per_sample else np.any(rows, -1)
        return np.where(found.any(2), found.argmax(2) if found.shape[2] else 0, np.nan)

    # Steps and samples

    @cached_property
    def _is_there(self) -> Bools:
        """(T, B): whether the sample has the step."""
        return np.arange(self.squares.shape[3])[:, None] < self.lengths

    @cached_property
    def _is_last(self) -> Bools:
        """(directions, T, B) in input order: whether it is the last step that the direction takes."""
        steps = np.arange(self.squares.shape[3])[:, None]
        ends = np.stack([steps == self.lengths - 1, steps == np.zeros_like(self.lengths)])
        return ends[: self.squares.shape[2]] & self._is_there

    @cached_property
    def _steps_back(self) -> tuple[Floats, Bools]:
        """G²_{t+1}, Δ²_{t+1}, R²_t at t, (3, layers, directions, T, B) in input order, and whether there is t + 1."""
        rows = reordered(self.squares, self.lengths, "processing")
        exists = np.broadcast_to(np.arange(rows.shape[3])[:, None] < self.lengths - 1, rows.shape[1:])
        later = np.concatenate([rows[:, :, :, 1:], np.zeros_like(rows[:, :, :, :1])], 3)
        values = np.where(exists, np.stack([later[TOTAL], later[DELTA], rows[RECURRENT]]), 0)
        return tuple(reordered(x, self.lengths, "processing") for x in (values, exists))  # type: ignore[return-value]

    def _steps_back_in(self, order: Order) -> tuple[Floats, Bools]:
        """:attr:`_steps_back` in that order, over the batch unless ``per_sample``; kept, as every factor needs it."""
        kept: dict[Order, tuple[Floats, Bools]] = vars(self).setdefault("_kept_steps_back", {})
        if order not in kept:
            values, exists = (reordered(x, self.lengths, order) for x in self._steps_back)
            kept[order] = (values, exists) if self.per_sample else (values.sum(-1), np.any(exists, -1))
        return kept[order]

    def _ratio(self, numerator: int, denominator: int, order: Order) -> Floats:
        values, exists = self._steps_back_in(order)
        total, delta, recurrent = values
        by_kind = {TOTAL: total, DELTA: delta, RECURRENT: recurrent}
        return np.where(exists, _root_ratio(by_kind[numerator], by_kind[denominator]), np.nan)

    def _norm(self, squares: Floats) -> Floats:
        """The norm (layers, directions, T[, B]) in the record's order, from squares in input order."""
        squares = reordered(squares, self.lengths, self.order)
        return np.sqrt(np.where(self._is_there, squares, np.nan) if self.per_sample else squares.sum(-1))

    def _over_steps(self, rows: Bools, combine: np.ufunc) -> Bools:
        return combine.reduce(rows, axis=2 if self.per_sample else (2, 3))


#: the rows of ``squares``
TOTAL, RECURRENT, DELTA, DIRECT = range(4)


def reordered(rows: NDArray, lengths: Ints, order: Order) -> NDArray:
    """rows (..., directions, T, B) from input order to another; "processing" and "lag" are their own inverses."""
    direction = {"processing": 1, "input": None, "lag": 0}[order]
    if direction is None or direction >= rows.shape[-3]:
        return rows
    part, result = rows[..., direction, :, :], rows.copy()
    T = rows.shape[-2]
    if (lengths == T).all():  # no index array, which would take several times as long
        result[..., direction, :, :] = part[..., ::-1, :]
        return result
    steps = np.arange(T)[:, None]
    index = np.where(steps < lengths, lengths - 1 - steps, steps)
    result[..., direction, :, :] = np.take_along_axis(part, np.broadcast_to(index, part.shape), -2)
    return result


def _root_ratio(numerator: Floats, denominator: Floats) -> Floats:
    """sqrt(numerator / denominator); NaN where either is not finite, or the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(numerator) / np.sqrt(denominator)
    return np.where(np.isfinite(numerator) & np.isfinite(denominator) & (denominator > 0), ratio, np.nan)


def _finite(x: Floats) -> Floats:
    return np.where(np.isfinite(x), x, np.nan)
