"""A record in plain words: how far back it learns, what takes the gradient away, which symptoms show, what helps.

Every sentence follows from figures of the record, and says so where they allow none: only a loss at the end shows how
far back a gradient reaches. Absolute sizes mean nothing, as losses may be multiplied by anything; but for one limit,
PLATEAU. Where numbers end, they do so with the GradScaler's scale in them, which the record has divided out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rnnkern.gradflow.analysis import DELTA, TOTAL

if TYPE_CHECKING:
    from rnnkern.gradflow.record import ModuleRecord

#: Growth over the sequence that counts as exploding: what the horizon calls vanished, the other way round.
EXPLODED = 1e3
#: f' <= 1/2 where |h| >= 0.71. To keep a gradient there W_hh would have to double it.
SATURATED = 0.5
#: Share of the gradient of a layer that must reach the layer below: that of the horizon, for depth instead of time.
DEPTH = 1e-3
#: The norms of δ add up to a bound of ‖∂L/∂b_hh‖. Below float32's epsilon a step of rate 1 moves no weight of size 1.
PLATEAU = float(np.finfo(np.float32).eps)
#: A norm that was below this one step before 0 has run out of float32 and bfloat16, whose normal numbers end at 1e-38;
#: it leaves room for many units and for a strong decay in the last step.
FLOAT32_ENDS = 1e-30
#: The same for float16, whose numbers end at 6e-8.
FLOAT16_ENDS = 1e-5
#: A norm above this one step before inf has run out of float32, whose numbers end at 3e38.
FLOAT32_OVERFLOWS = 1e18
#: The gradient is kept where it changes by less than this factor over the whole sequence.
KEPT = 2.0


@dataclass(frozen=True)
class Symptom:
    """One thing that is wrong with one layer and direction.

    Attributes:
        name: "vanishing", "exploding", "saturation", "underflow", "cut", "nonfinite", "plateau" or "depth".
        where: module, layer and direction, as "rnn l0 reverse".
        figures: the numbers of the record that show it.
        says: the same in words.
        remedy: what helps against it.
    """

    name: str
    where: str
    figures: dict[str, float]
    says: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.name}: {self.says} Remedy: {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """What a record says in words; ``print`` shows it.

    Attributes:
        sentences: what the figures say, layer by layer.
        symptoms: what is wrong; empty where nothing is.
    """

    sentences: tuple[str, ...]
    symptoms: tuple[Symptom, ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of the symptoms."""
        return frozenset(symptom.name for symptom in self.symptoms)

    def __str__(self) -> str:
        return "\n".join([*self.sentences, *map(str, self.symptoms)])


def judge(records: Sequence[ModuleRecord], needs: int | None = None) -> Verdict:
    """The verdict on records over the batch, in the order "lag"; ``needs`` as in :meth:`ModuleRecord.verdict`."""
    if needs is not None and (isinstance(needs, bool) or not isinstance(needs, int) or needs < 1):
        raise ValueError(f"needs must be a positive int or None, got {needs!r}")
    sentences: list[str] = []
    symptoms: list[Symptom] = []
    known = True
    sentences += _skipped(records)
    by_state = {f"{record.name}.c": record for record in records}  # an LSTM's c is read through its h at every step
    for record in records:
        layers, directions = record.squares.shape[1:3]
        at_end = by_state.get(record.name, record).loss_at_end
        chains = [Chain.of(record, at_end, layer, d, needs) for layer in range(layers) for d in range(directions)]
        for chain in chains:
            sentences += [f"{chain.where}: {' '.join(_sentences(chain))}"]
            symptoms += _symptoms(chain)
            known &= chain.is_reach and not chain.nonfinite
        symptoms += _depth(record, chains)
    if not symptoms:
        sentences.append("No symptom." if known else "No symptom among those that these figures can show.")
    return Verdict(tuple(sentences), tuple(symptoms))


@dataclass(frozen=True)
class Chain:
    """The figures of one layer and direction that sentences and symptoms are made of."""

    where: str
    rows: int  # (step, sample)
    longest: int  # lag that there is
    needs: int | None
    entering: int  # rows at which gradient enters that is not a sample's last
    is_reach: bool  # whether the horizon says how far back the loss reaches
    is_lower: bool  # it does because of what the last layer gets
    horizon: float
    norms: np.ndarray  # (T,) by lag
    gain: float
    saturation: float
    weights: float
    weight_share: float
    median_saturation: float  # over all steps, also those that let nothing through
    zeros: int
    nonfinite: int
    first_nonfinite: float
    stops: np.ndarray  # norms one step before those at which nothing comes from later steps
    deltas: float  # Σ ‖δ‖
    direct_share: float  # median over the steps at which gradient enters, where it is known
    cosine: float
    is_gated: bool
    scale: float  # that the numbers had while they were computed
    skipped: bool | None

    @property
    def is_overflow(self) -> bool:
        """Whether what is not finite is the work of a loss scale that is still searched."""
        return bool(self.nonfinite) and self.scale > 1 and self.skipped is not False

    @property
    def needed(self) -> int:
        """The lag that a loss at the end must reach, of those that there are."""
        return self.longest if self.needs is None else min(self.needs, self.longest)

    @classmethod
    def of(cls, record: ModuleRecord, at_end: np.ndarray, layer: int, direction: int, needs: int | None) -> Chain:
        """Of a record over the batch in the order "lag"; ``at_end``: whether the loss is at the last step alone."""
        at = layer, direction
        directions = record.squares.shape[2]
        # What reaches a lower layer of one direction at all comes from the loss at the end of the last one.
        is_lower = directions == 1 and bool(at_end[-1, 0]) and not at_end[at]
        (total, _, recurrent), exists = record._steps_back
        stops = exists[at] & (recurrent[at] == 0) & (total[at] > 0) & np.isfinite(total[at])
        direct = record._direct_squares[at]
        shares = np.where(record.recurrent[at] > 0, record.direct_share[at], np.nan)
        return cls(
            where=f"{record.name} l{layer}" + (" reverse" if direction else ""),
            rows=int(record.lengths.sum()),
            longest=max(0, int(record.lengths.max(initial=0)) - 1),
            needs=needs,
            entering=int((record._is_there & ~record._is_last[direction] & (direct != 0)).sum()),
            is_reach=bool(at_end[at]) or is_lower,
            is_lower=is_lower,
            horizon=float(record.horizon[at]),
            norms=record.rms_by_lag[at],
            gain=float(record.mean_gain[at]),
            saturation=float(record.mean_saturation_factor[at]),
            weights=float(record.mean_weight_factor[at]),
            weight_share=float(record.weight_share[at]),
            median_saturation=_median(record.saturation_factor[at]),
            zeros=int(record.zeros[at]),
            nonfinite=int(record.nonfinite[at]),
            first_nonfinite=float(record.first_nonfinite[at]),
            stops=np.sqrt(total[at][stops]),
            deltas=float(np.sqrt(record.squares[DELTA][at]).sum()),
            direct_share=_median(shares[shares > 0]),
            cosine=_median(record.cosine[at]),
            is_gated=record.is_gated,
            scale=record.scale,
            skipped=record.skipped,
        )


def _skipped(records: Sequence[ModuleRecord]) -> Iterator[str]:
    record = next((record for record in records if record.skipped), None)
    if record is None:
        return
    skipped = f"The GradScaler skipped this step: gradients were not finite at a scale of {record.scale:.10g}"
    if record.scale > 1:
        yield f"{skipped}. It goes on with a lower one: while it searches for the highest that fits this is no symptom."
    else:
        yield f"{skipped}, which is not what makes them so."


def _sentences(c: Chain) -> Iterator[str]:
    if c.rows == 0:
        yield "there is no step."
        return
    if c.nonfinite:
        yield f"{c.nonfinite} of {c.rows} norms are not finite, so nothing can be said of how far back it learns."
        if c.is_overflow and not c.skipped:
            yield f"With a loss scale of {c.scale:.10g} that is no symptom: a GradScaler skips the step and lowers it."
    elif c.zeros == c.rows:
        yield "no gradient arrives."
        return
    elif c.longest == 0:
        yield "one step long, so there is nothing to learn across steps."
    elif c.is_reach and not np.isnan(c.horizon):
        yield _reach(c)
    elif c.is_reach:
        yield "the last step gets no gradient, so there is no horizon."
    else:
        yield (
            f"gradient enters at {c.entering} of {c.rows} (step, sample) rows besides the last steps, from a loss or a "
            "layer above, so horizon and slope do not say how far back it learns; a loss at the last step alone would."
        )
    if c.longest and not np.isnan(c.gain):
        yield _one_step_back(c)
    if not np.isnan(c.direct_share):
        angle = "" if np.isnan(c.cosine) else f"; the median cosine between them is {c.cosine:+.2f}"
        share = round(100 * c.direct_share)
        yield (
            "At the median step the norms of what enters and what comes from later are as "
            f"{share} : {100 - share}{angle}."
        )


def _reach(c: Chain) -> str:
    horizon = int(c.horizon)
    left = c.norms[c.needed] / c.norms[0]
    asked = f"the loss needs {c.needs}" if c.needs is not None else f"there are {c.longest}"
    missing = f", more than the {c.longest} that there are" if c.needs is not None and c.needs > c.longest else ""
    steps = f"{horizon} step" + ("" if horizon == 1 else "s")
    through = ", where the loss sees it through the last layer alone" if c.is_lower else ""
    reach = f"learns {steps} back{through}; {asked}{missing}."
    return f"{reach} At lag {c.needed} {_number(left)} of the gradient's norm is left."


def _one_step_back(c: Chain) -> str:
    if c.is_gated:
        return f"One step back multiplies the norm by {c.gain:.3g} in the geometric mean, through gates and weights."
    factors = f"saturation {c.saturation:.3g}, weights {c.weights:.3g}"
    if abs(np.log(c.gain)) * c.longest < np.log(KEPT):
        return f"One step back keeps the norm: times {c.gain:.3g} ({factors})."
    change = "decay" if c.gain < 1 else "growth"
    share = c.weight_share
    percent = round(100 * share)
    if 0 <= percent <= 100:
        cause = f"{percent}% of the {change} comes from the weights, {100 - percent}% from saturation"
    elif percent > 100:
        cause = f"the {change} comes from the weights, and saturation takes part of it away"
    else:
        cause = f"the {change} comes from saturation, which the weights work against"
    return f"One step back multiplies the norm by {c.gain:.3g} in the geometric mean ({factors}): {cause}."


def _symptoms(c: Chain) -> Iterator[Symptom]:
    if c.nonfinite and not c.is_overflow:
        yield _nonfinite(c)
    if c.is_reach and c.horizon < c.needed and not _ends_in_a_cut(c):
        yield _vanishing(c)
    yield from _exploding(c)
    if c.median_saturation < SATURATED:
        yield Symptom(
            "saturation",
            c.where,
            {"saturation_factor": c.median_saturation},
            f"at the median step f' lets {_number(c.median_saturation)} of the gradient's norm through.",
            "layer_norm='input' or 'preactivation', smaller inputs and weights at the start; where clip is set, part "
            "of this is the clipping.",
        )
    yield from _stops(c)
    if c.rows and not c.nonfinite and c.deltas < PLATEAU:
        yield _plateau(c)


def _ends_in_a_cut(c: Chain) -> bool:
    """Whether the horizon is where nothing comes from the next step, and no decay made it so."""
    end = int(c.horizon)
    return bool(c.norms[end + 1 :].size and c.norms[end + 1] == 0 and c.norms[end] >= FLOAT32_ENDS / c.scale)


def _vanishing(c: Chain) -> Symptom:
    advice = []
    if c.is_gated:
        advice.append("gates that keep more at the start: a bias of 1 for the forget gate, or a GRU's update gate")
    elif c.weight_share >= 0.5 and c.gain < 1:
        arrives = c.saturation**c.needed
        advice.append(
            "orthogonal init of W_hh (identity for ReLU): with a weight factor of 1, if saturation stays as it is, "
            f"one step back would keep {c.saturation:.3g} and {_number(arrives)} would arrive at lag {c.needed}"
        )
        if arrives < 1e-3:
            advice.append("that is not enough here: layer norm against the saturation, or gated cells")
    elif c.weight_share < 0.5 and c.gain < 1:
        advice.append("layer norm, or smaller inputs and biases, as most of it is saturation; or gated cells")
    else:
        advice.append("see where the gradient stops: the mean of the steps that let it through does not explain it")
    if c.horizon >= 1:
        advice.append(f"truncated BPTT costs less if {int(c.horizon)} steps are enough for the task")
    return Symptom(
        "vanishing",
        c.where,
        {"horizon": c.horizon, "needs": c.needed, "gain": c.gain, "weight_share": c.weight_share},
        f"forgets distant context: beyond lag {int(c.horizon)} less than 1/1000 of the gradient's norm is left.",
        "; ".join(advice) + ".",
    )


def _exploding(c: Chain) -> Iterator[Symptom]:
    usable = np.flatnonzero(np.isfinite(c.norms) & (c.norms > 0))
    if not usable.size:
        return
    first, top = usable[0], usable[np.argmax(c.norms[usable])]
    growth = c.norms[top] / c.norms[first]
    by_steps = np.exp(np.minimum(np.log(c.gain) * (top - first), 700.0)) if not np.isnan(c.gain) else 0.0
    # Where gradient enters at many steps, norms also grow because one loss has a larger weight than another.
    if growth < EXPLODED or (not c.is_reach and by_steps < EXPLODED):
        return
    yield Symptom(
        "exploding",
        c.where,
        {"growth": float(growth), "gain": c.gain, "weight_factor": c.weights},
        f"from lag {first} to lag {top} the norm grows to {growth:.2g} times itself.",
        "clip the gradient by torch.nn.utils.clip_grad_norm_; truncated BPTT shortens the chain."
        if c.is_gated
        else "clip the gradient (torch.nn.utils.clip_grad_norm_, or clip= in the chain itself); orthogonal init takes "
        f"the weight factor from {c.weights:.3g} to 1; truncated BPTT shortens the chain.",
    )


def _stops(c: Chain) -> Iterator[Symptom]:
    ends = FLOAT32_ENDS / c.scale
    under = c.stops[c.stops < ends]
    if under.size:
        yield Symptom(
            "underflow",
            c.where,
            {"stops": under.size, "norm_before": float(under.max()), "zeros": c.zeros},
            f"{c.zeros} of {c.rows} rows are exactly 0; {under.size} times the norm was {under.max():.1g} or less one "
            "step before, where numbers end.",
            "what helps against vanishing; a larger loss scale only moves the end.",
        )
    cut = c.stops[c.stops >= ends]
    if cut.size:
        half = ", or float16 ends, where gradients have it" if cut.max() < FLOAT16_ENDS / c.scale else ""
        yield Symptom(
            "cut",
            c.where,
            {"stops": cut.size, "norm_before": float(cut.max()), "zeros": c.zeros},
            f"{cut.size} times nothing comes from the next step, whose norm is up to {cut.max():.1g}.",
            f"none if it is meant (truncated BPTT, detach); else no unit passes gradient on{half}: dead ReLU, |h| = 1: "
            "smaller learning rate, layer norm.",
        )


def _nonfinite(c: Chain) -> Symptom:
    lag = int(c.first_nonfinite)
    before = float(c.norms[lag - 1]) if lag else np.nan
    if lag == 0:
        says = "they come with the loss or the forward pass, as the last step has them."
        remedy = "look for a division by 0, log 0, or a loss scale that is too large; clipping does not remove NaN."
    elif before > FLOAT32_OVERFLOWS / c.scale:
        says = f"the norm was {before:.1g} one step before: overflow on the way back."
        remedy = "clip= in the chain itself, orthogonal init, truncated BPTT; clipping after backward comes too late."
    else:
        says = f"the norm was {before:.1g} one step before: they enter at lag {lag}."
        remedy = "look at that step's input and loss; clipping does not remove NaN."
    figures = {"nonfinite": c.nonfinite, "first_nonfinite": c.first_nonfinite, "norm_before": before}
    return Symptom("nonfinite", c.where, figures, f"{c.nonfinite} of {c.rows} norms, from lag {lag} on; {says}", remedy)


def _plateau(c: Chain) -> Symptom:
    if c.deltas == 0 and c.zeros == c.rows:
        says = "no gradient arrives at all."
    else:
        says = f"the loss is flat here: the norms of all δ add up to {c.deltas:.1g}, which bounds the gradient of b_hh."
    return Symptom(
        "plateau",
        c.where,
        {"deltas": c.deltas, "zeros": c.zeros},
        says,
        "see whether the loss depends on this RNN, is scaled down, or is itself saturated; what helps against "
        "vanishing through time does not help where the gradient starts so small.",
    )


def _depth(record: ModuleRecord, chains: Sequence[Chain]) -> Iterator[Symptom]:
    layers = record.squares.shape[1]
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(record.squares[TOTAL].sum((1, 2, 3)))
    for layer in range(layers - 1):
        if not 0 < norms[layer] < DEPTH * norms[layer + 1]:
            continue
        share = float(norms[layer] / norms[layer + 1])
        yield Symptom(
            "depth",
            f"{record.name} l{layer}",
            {"share": share},
            f"{_number(share)} of the gradient's norm in layer {layer + 1} is left in this layer.",
            "residual=True, layer_norm='input', fewer layers.",
        )


def _median(x: np.ndarray) -> float:
    finite = x[np.isfinite(x)]
    return float(np.median(finite)) if finite.size else np.nan


def _number(share: float) -> str:
    return f"{share:.2g}"
