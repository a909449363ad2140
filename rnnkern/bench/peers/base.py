"""What a peer is: something that computes the same RNN, prepared outside the timing and called inside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from rnnkern.bench.cells import Cell
from rnnkern.bench.problem import Answers, Problem


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Work:
    """A problem that a peer has made ready.

    ``call(i)`` is what is timed: it computes everything of the problem's ``i``-th input and waits until it is there.
    ``answers`` turns what it returned into float64; outside the timing. ``settings`` says in words what was chosen.
    """

    call: Callable[[int], Any]
    answers: Callable[[Any], Answers]
    settings: str = ""
    close: Callable[[], None] = nothing


class Peer(ABC):
    """A contender. One file ``peers/NAME.py`` has one of these, and one line in the table of ``peers/__init__.py``."""

    #: as in tables
    name: ClassVar[str]
    #: modules to import, and the distributions that bring them
    needs: ClassVar[dict[str, str]] = {}
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    modes: ClassVar[tuple[str, ...]] = ("infer", "train", "last")
    #: whether its number of threads is settled when it is imported
    threads_for_good: ClassVar[bool] = False
    #: False for a yardstick, which computes something else on purpose
    compared: ClassVar[bool] = True
    #: whether a child process may measure its memory
    in_memory: ClassVar[bool] = False

    def unavailable(self, device: str) -> str | None:
        """None where it runs on this machine's ``device``, else why not."""
        if device not in self.devices:
            return f"does not compute on {device}"
        reasons = (_not_importable(module, distribution) for module, distribution in self.needs.items())
        return next(filter(None, reasons), None)

    def refuses(self, problem: Problem) -> str | None:
        """None where it can compute this, else why not. Asked before :meth:`prepare`."""
        cell = problem.cell
        if cell.mode not in self.modes:
            return f"has no {cell.mode}"
        if self.threads_for_good and cell.threads:
            return "cannot change its number of threads once it runs"
        return self.refuses_cell(cell)

    def refuses_cell(self, cell: Cell) -> str | None:
        """What a peer may add to :meth:`refuses`; here: one layer, one direction, one head."""
        for size in ("layers", "directions", "heads"):
            if getattr(cell, size) != 1:
                return f"is written here for one of: {size}"
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Work:
        """Convert weights and inputs, compile, allocate: all that a user does once."""


def _not_importable(module: str, distribution: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # a package may fail in its own ways
        lacks = isinstance(error, ModuleNotFoundError)
        return f"{distribution} is not installed" if lacks else f"import {module}: {error}"
    return None
