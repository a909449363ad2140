"""What one step of a watched model has recorded, and what it says: norms, slope, horizon, counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rnnkern.gradflow import table
from rnnkern.gradflow.analysis import Analysis, reordered
from rnnkern.gradflow.analysis import Floats as Floats
from rnnkern.gradflow.analysis import Ints as Ints
from rnnkern.gradflow.analysis import Order as Order
from rnnkern.gradflow.scalars import scalars
from rnnkern.gradflow.verdict import Verdict, judge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed import ProcessGroup

#: The signal at a step counts as arrived while it is at least this share of that at the last step.
HORIZON_EPS = 1e-3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModuleRecord(Analysis):
    """‖∂L/∂h_t‖ of one RNN in one step of training.

    G_t is the norm over the batch, sqrt(Σ_b ‖g_t‖²), where g_t = ∂L/∂h_t is the total gradient at h_t, from its own
    step's loss and from all later ones. It has the units of L / h. With a loss that is a mean over the batch, g of one
    sample is proportional to 1/B: multiply by ``samples`` to compare batch sizes. Norms are those before any clipping.

    Shapes are (layers, directions, ...). With ``per_sample`` everything keeps the samples as its last axis, in the
    order of the batch (also for packed input, sorted or not), forwards of the step one behind the other. What a sample
    does not have is NaN there; in norms over the batch it doesn't count.

    ``order`` says what the T axis means. Direction 1 is the one that begins at the end of the input.

    ============  ==================================================================================================
    "processing"  index k is the k-th step that the direction takes: samples are aligned where it begins, and for
                  either direction the gradient flows from high k to low k. The default.
    "input"       index t is the t-th step of the input, for both directions. Samples are aligned at t = 0.
    "lag"         index j is j steps before the last that the direction takes: samples are aligned at that step.
    ============  ==================================================================================================

    For samples of one length, direction 0 has "processing" = "input" = "lag" reversed, and direction 1 has
    "processing" = "input" reversed, "lag" = "input".

    Attributes:
        name: of the module in the model.
        squares: (4, layers, directions, T, B) in input order, whatever ``order`` is: ‖g_t‖²; the part of it that came
            from later steps, ‖r_t‖²; ‖δ_t‖², δ_t = g_t ⊙ f'(h_t); and the part that arrived at the output, ‖e_t‖².
            0 where a sample has no step. Of a cell (3, ...): what it returns is output and state at once.
        lengths: (B,) steps of each sample.
        is_gated: whether the module has gates (LSTM, GRU). δ is then the gradient at the arguments of all of them, and
            the two factors of the gain are not defined.
        scale: the loss scale that was divided out of ``squares``, as its square; of several the last.
        skipped: whether the GradScaler skipped the step; None where that is not known.
    """

    name: str
    squares: Floats
    lengths: Ints
    order: Order = "processing"
    per_sample: bool = False
    is_gated: bool = False
    scale: float = 1.0
    skipped: bool | None = None

    @property
    def samples(self) -> int:
        """B: the samples of all forwards in the step."""
        return len(self.lengths)

    @cached_property
    def norm(self) -> Floats:
        """G (layers, directions, T), or with ``per_sample`` ‖g_t‖ (layers, directions, T, B)."""
        squares = self._squares_in(self.order)
        return np.sqrt(np.where(self._is_there, squares, np.nan) if self.per_sample else squares.sum(-1))

    @cached_property
    def log10_norm(self) -> Floats:
        """log10 of :attr:`norm`; -inf where the gradient is exactly 0."""
        return _log10(self.norm)

    @property
    def log10_first(self) -> Floats:
        """log10 G at the first step of every sample in processing order, where the gradient arrives last."""
        return _log10(np.sqrt(self._over_batch(self._squares_in("processing")[:, :, 0])))

    @property
    def log10_last(self) -> Floats:
        """log10 G at the last step of every sample in processing order, where the gradient starts."""
        return _log10(np.sqrt(self._over_batch(self._squares_in("lag")[:, :, 0])))

    @property
    def horizon(self) -> Floats:
        """:meth:`horizon_at` 1e-3: "this net learns 9 steps back"."""
        return self.horizon_at(HORIZON_EPS)

    def horizon_at(self, eps: float) -> Floats:
        """The memory horizon: the largest lag with G_{T-lag} / G_T >= eps.

        It says how far a loss at the end reaches back; with losses elsewhere it means nothing. Of samples of several
        lengths each is counted back from its own last step, and G_{T-lag} is the root mean square over those that
        have the lag. The longest lag there is, T-1, means that the horizon was not reached. NaN where G_T is zero or
        not finite.

        Raises:
            ValueError: eps is not positive.
        """
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        norms = self.rms_by_lag
        last = norms[:, :, :1]
        valid = np.isfinite(last) & (last > 0)
        reached = norms >= eps * np.where(valid, last, 0)
        lags = np.arange(norms.shape[2]).reshape(-1, *[1] * (norms.ndim - 3))
        return np.where(valid[:, :, 0], np.where(reached, lags, 0).max(2), np.nan)

    @property
    def slope(self) -> Floats:
        """Change of log10 G per step back: the least-squares line over the lags whose norm is finite and not zero.

        Negative where the gradient vanishes on its way back, positive where it explodes; 10**slope is the factor of
        one step (Pascanu, Mikolov & Bengio 2013: it is bounded by the largest singular value of W_hh times the
        largest f'). Means something only for a loss at the end, as :meth:`horizon_at`. NaN with fewer than two lags.
        """
        logs = _log10(self.rms_by_lag)
        lags = np.arange(logs.shape[2], dtype=np.float64).reshape(-1, *[1] * (logs.ndim - 3))
        used = np.isfinite(logs)
        with np.errstate(invalid="ignore"):
            count = used.sum(2, keepdims=True)
            x = np.where(used, lags - np.where(used, lags, 0).sum(2, keepdims=True) / count, 0)
            return np.where(used, x * logs, 0).sum(2) / np.square(x).sum(2)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw :attr:`log10_norm`, over the batch, against the T axis in its order: a line a layer and direction.

        Crosses below mark what is exactly 0, crosses above what is not finite.

        Args:
            ax: matplotlib Axes to draw into. None makes a figure, outside of pyplot: ``.figure.savefig("curve.png")``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from rnnkern.gradflow import plots

        return plots.curves([self], ax)

    @property
    def zeros(self) -> Ints:
        """How many (step, sample) rows have ‖g_t‖² exactly 0: underflow, or no way from the loss to there."""
        return self._count(self.squares[0] == 0)

    @property
    def nonfinite(self) -> Ints:
        """How many (step, sample) rows have a ‖g_t‖² that is inf or NaN."""
        return self._count(~np.isfinite(self.squares[0]))

    @cached_property
    def rms_by_lag(self) -> Floats:
        """Root mean square of ‖g‖ over the samples that have the lag, (layers, directions, T): index is the lag."""
        squares = self._squares_in("lag")
        if self.per_sample:
            return np.sqrt(np.where(self._is_there, squares, np.nan))
        return np.sqrt(squares.sum(-1) / np.maximum(self._is_there.sum(-1), 1))

    def _squares_in(self, order: Order) -> Floats:
        """‖g‖² (layers, directions, T, B) with the T axis in that order."""
        return reordered(self.squares[0], self.lengths, order)

    def _over_batch(self, squares: Floats) -> Floats:
        return squares if self.per_sample else squares.sum(-1)

    def _count(self, rows: NDArray[np.bool_]) -> Ints:
        return (rows & self._is_there).sum(2 if self.per_sample else (2, 3), dtype=np.int64)

    def verdict(self, needs: int | None = None) -> Verdict:
        """What the record says in plain words, with the symptoms that its figures show and what helps against them.

        Args:
            needs: how many steps back the task asks for. None takes all there are, T-1.

        Raises:
            ValueError: needs is not a positive int.
        """
        return judge([dataclasses.replace(self, per_sample=False, order="lag")], needs)

    def scalars(self) -> dict[str, float]:
        """As :meth:`Record.scalars`, of this module."""
        return scalars(self)

    def __repr__(self) -> str:
        return "\n".join([table.HEADER, *table.rows(dataclasses.replace(self, per_sample=False))])

    def __str__(self) -> str:
        return f"{self!r}\n{self.verdict()}"


class Record:
    """What one step of a watched model has recorded: a :class:`ModuleRecord` for each RNN that has statistics.

    ``rec["encoder.rnn"]`` is a module's record. Where only one RNN is watched, everything of its record is also an
    attribute here: ``rec.log10_norm``. ``print(rec)`` shows a table and a verdict; its curves run from the first step
    in processing order to the last, on one logarithmic scale, with ``·`` where the gradient is exactly 0 and ``!``
    where it is not finite.

    Attributes:
        step: the number of the step, counted from when the watching began.
        modules: names of the modules that have statistics, in the model's order.
        scale: the loss scale that was divided out of the norms; 1 where ``watch(scaler=)`` was given no GradScaler, or
            one that does not scale. Where it has changed within a step, as from chunk to chunk of a sequence, each
            backward has its own divided out, and this is the last.
        skipped: whether the GradScaler skipped the step, of any optimizer of the model and in any chunk of a sequence.
            None where that is not known: ``scaler.step`` is still to come, or there is no scaler.
    """

    def __init__(self, step: int, watched: Sequence[str], records: Sequence[ModuleRecord]) -> None:
        self.step = step
        self.scale = records[0].scale if records else 1.0
        self.skipped = records[0].skipped if records else None
        self.modules = tuple(record.name for record in records)
        self._watched = tuple(watched)
        self._records = {record.name: record for record in records}

    def plot(self, ax: Axes | None = None) -> Axes:
        """As :meth:`ModuleRecord.plot`, all modules in one."""
        from rnnkern.gradflow import plots

        axes = plots.curves(list(self._records.values()), ax)
        title = f"Gradient at each time step, training step {self.step}"
        axes.set_title(title + (", skipped" if self.skipped else ""), loc="left")
        return axes

    def __getitem__(self, name: str) -> ModuleRecord:
        if name in self._records:
            return self._records[name]
        have = ", ".join(map(repr, self.modules))
        if name in self._watched:
            raise KeyError(f"no gradient has reached {name!r} in step {self.step}; there is {have}")
        raise KeyError(f"{name!r} is not watched; there is {have}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _DELEGATED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if len(self._watched) > 1:
            raise AttributeError(
                f"{len(self._watched)} modules are watched ({', '.join(map(repr, self._watched))}): "
                f"ask the record of one of them, rec[{self.modules[0]!r}].{name}"
            )
        return getattr(self._records[self.modules[0]], name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(_DELEGATED if len(self._watched) == 1 else ())]

    def verdict(self, needs: int | None = None) -> Verdict:
        """As :meth:`ModuleRecord.verdict`, of all modules."""
        return judge([dataclasses.replace(r, per_sample=False, order="lag") for r in self._records.values()], needs)

    def __str__(self) -> str:
        return f"{self!r}\n{self.verdict()}"

    def scalars(self) -> dict[str, float]:
        """At most eight numbers a layer and direction for a logger, over the batch; docs/logging.md explains each.

        They are named ``gradflow/<module>/l0/slope``, and ``l0_reverse`` for the other direction. What has no finite
        number is left out: log10 of a gradient that is exactly 0, the slope of a single step.
        """
        return {name: value for record in self._records.values() for name, value in record.scalars().items()}

    def all_reduce(self, group: ProcessGroup | None = None, averaged: bool = True) -> Record:
        """The record of all ranks, the same on each: :func:`rnnkern.gradflow.all_reduce`, a collective."""
        from rnnkern.gradflow.distributed import all_reduce

        record = all_reduce(self, group, averaged)
        assert record is not None  # this rank's at least
        return record

    def __repr__(self) -> str:
        lines = [", ".join([f"step {self.step}", *table.scaling(self)]), table.HEADER]
        for record in self._records.values():
            lines += table.rows(dataclasses.replace(record, per_sample=False))
        lines += [f"{name}: no gradient has reached it" for name in self._watched if name not in self._records]
        return "\n".join(lines)


_DELEGATED = frozenset(
    [
        *(name for of in (ModuleRecord, Analysis) for name in vars(of) if not name.startswith("_")),
        *(field.name for field in dataclasses.fields(ModuleRecord)),
    ]
)


def _log10(norm: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log10(norm)
