"""How the curves of a run have changed: the norm by lag of every step that was read, on the host."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rnnkern.gradflow.scaling import Outcome

if TYPE_CHECKING:
    from rnnkern.gradflow.record import Ints, Record

Curves = NDArray[np.float32]

#: Steps that are kept, and bytes of their curves. Beyond either every second step goes, all over the run.
MAX_COLUMNS = 2000
MAX_BYTES = 64 << 20


class Column(NamedTuple):
    """One training step."""

    curves: dict[str, Curves]  # module -> (layers, directions, T)
    outcome: Outcome  # it may have been read before the optimizer's step


class History:
    """log10 of the root mean square of ‖∂L/∂h‖ by lag, for the steps that were read.

    A step that is read again, with more micro-batches say, replaces what it was. In a long run steps are thinned out
    evenly: of each ``gap`` training steps the first that was read is kept, and the newest is always there.

    Attributes:
        gap: a power of two, so that what is kept is the same as with that gap from the beginning; 1 keeps all.
    """

    def __init__(self) -> None:
        self._columns: dict[int, Column] = {}  # by step, rising
        self._bytes = 0  # of their curves
        self.gap = 1

    def add(self, record: Record, outcome: Outcome | None = None) -> None:
        """Take the curves of all modules in a record; (step, sample) rows that are exactly 0 give -inf.

        ``outcome`` is that of the step; None takes what the record says.
        """
        curves = {}
        for name in record.modules:
            norms = dataclasses.replace(record[name], per_sample=False).rms_by_lag
            with np.errstate(divide="ignore"):
                curves[name] = np.log10(norms).astype(np.float32)
        is_known, newest = record.step in self._columns, next(reversed(self._columns), record.step)
        self._put(record.step, Column(curves, outcome or Outcome(record.skipped)))
        if not is_known and record.step < newest:  # from a ring: older than what was read before
            self._columns = dict(sorted(self._columns.items()))
            self._thin()
        elif not is_known:  # the one that was the newest may have been there for that alone
            before = list(islice(reversed(self._columns), 1, 3))
            if len(before) == 2 and before[0] // self.gap == before[1] // self.gap:
                self._drop(before[0])
        while len(self._columns) > 2 and (len(self._columns) > MAX_COLUMNS or self._bytes > MAX_BYTES):
            self.gap *= 2
            self._thin()

    @property
    def steps(self) -> list[int]:
        """The numbers of the steps that are kept, rising."""
        return list(self._columns)

    @property
    def skipped(self) -> list[int]:
        """Those of them that a GradScaler has skipped, by what is known now; waits for the device."""
        return [step for step, column in self._columns.items() if column.outcome.skipped()]

    def curves(self, module: str) -> tuple[Ints, Curves, NDArray[np.bool_]]:
        """What is known of a module, as a picture with a column for each of its N steps.

        Returns:
            The steps' numbers (N,); log10 of the root mean square (layers, directions, lags, N), where -inf says that
            the gradient was exactly 0, and inf or NaN that it was not finite; whether the step has the lag (lags, N).
        """
        steps = [step for step, column in self._columns.items() if module in column.curves]
        columns = [self._columns[step].curves[module] for step in steps]
        if not columns:
            return np.zeros(0, np.int64), np.zeros((1, 1, 0, 0), np.float32), np.zeros((0, 0), np.bool_)
        lengths = np.array([c.shape[2] for c in columns])
        values = np.full((*columns[0].shape[:2], lengths.max(), len(columns)), np.nan, np.float32)
        for i, column in enumerate(columns):
            values[:, :, : column.shape[2], i] = column
        return np.array(steps, np.int64), values, np.arange(lengths.max())[:, None] < lengths

    def state_dict(self) -> dict[str, Any]:
        """All of it in tensors and plain values, for ``torch.load(weights_only=True)``; waits for the device."""
        columns = {}
        for step, column in self._columns.items():
            curves = {name: torch.from_numpy(curves) for name, curves in column.curves.items()}
            columns[step] = {"curves": curves, "skipped": column.outcome.skipped()}
        return {"gap": self.gap, "columns": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what the history was that gave this state."""
        self.gap, self._columns, self._bytes = state["gap"], {}, 0
        for step, column in state["columns"].items():
            curves = {name: curves.numpy() for name, curves in column["curves"].items()}
            self._put(step, Column(curves, Outcome(column["skipped"])))

    def _put(self, step: int, column: Column) -> None:
        if step in self._columns:
            self._bytes -= _bytes(self._columns[step])
        self._columns[step] = column
        self._bytes += _bytes(column)

    def _drop(self, step: int) -> None:
        self._bytes -= _bytes(self._columns.pop(step))

    def _thin(self) -> None:
        newest = next(reversed(self._columns))
        taken = set()
        for step in list(self._columns):
            if step // self.gap in taken and step != newest:
                self._drop(step)
            taken.add(step // self.gap)


def _bytes(column: Column) -> int:
    return sum(curves.nbytes for curves in column.curves.values())
