"""Ctrl-C and SIGTERM, heard between two steps of training, so that neither tears one apart."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Whether the run was asked to end.

    Attributes:
        signal: by which of SIGNALS; None while it was not.
    """

    signal: int | None = None

    @property
    def code(self) -> int:
        """The exit code that shells expect: 130 for Ctrl-C, 143 for SIGTERM; 0 where nothing came."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def noticed() -> Iterator[Interrupt]:
    """While the block runs the first signal is only noted; the second does what it always did.

    What is ignored, as under nohup, stays ignored.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    interrupt, before = Interrupt(), {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
