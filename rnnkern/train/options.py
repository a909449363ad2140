"""What a run of ``rnnkern flow`` was asked to do: all of it goes into the checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

TASKS = ("text", "adding", "copying", "temporal-order")
CELLS = ("tanh", "relu", "lstm", "gru")
INITS = ("default", "orthogonal", "identity")


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says why, and what could."""


@dataclass(frozen=True)
class Options:
    """The options of the command, under their names there, and their defaults.

    Attributes:
        text: a file to learn from; None for the sources of Python's own library.
        init: of W_hh: one of INITS, or the spectral radius that it is scaled to.
        clip: the norm to which the gradient of all weights together is clipped; inf for none.
        steps: of training in all, those before an interruption included.
    """

    text: str | None = None
    task: str = "text"
    cell: str = "tanh"
    init: str | float = "default"
    length: int = 100
    batch_size: int = 64
    hidden_size: int = 128
    layers: int = 1
    lr: float = 1e-3
    clip: float = 1.0
    every: int = 10
    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text is not None and self.task != "text":
            raise InputError(f"--task {self.task} generates its data, and a text was given: {self.text!r}")
        if self.init == "identity" and self.cell not in ("tanh", "relu"):
            raise InputError(f"--init identity must come with --cell tanh or relu, got {self.cell}")

    def resumed(self, given: dict[str, Any]) -> Options:
        """These options of a checkpoint, with more ``steps`` if such are given.

        Raises:
            InputError: what is given contradicts them.
        """
        for name, value in given.items():
            if name != "steps" and value != getattr(self, name):
                option = "the text" if name == "text" else "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} was {_shown(getattr(self, name))} in the run to be resumed, got {_shown(value)}: leave "
                    "it out, or begin anew without --resume"
                )
        return dataclasses.replace(self, steps=given.get("steps", self.steps))


def _shown(value: Any) -> str:
    return "the sources of Python's library" if value is None else str(value)
