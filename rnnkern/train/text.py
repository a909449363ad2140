"""The next character of a text, from a file or from the sources of Python's own library."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnnkern.train.options import InputError
from rnnkern.train.tasks import Batch, Task

HELD_OUT = 10  # of so many characters one is not trained on: the last tenth


class Text(Task):
    """A model of characters: at each of T steps the next one is to be answered. Sequences are cut out anywhere.

    The trivial level is that of the characters' frequencies, in bits.
    """

    embedded = True
    at_end = False
    needs = None

    def __init__(self, text: str, name: str, T: int) -> None:
        """
        Raises:
            InputError: the text is empty, or too short for sequences of T characters and the one that follows.
        """
        if not text:
            raise InputError(f"the text: {name} is empty, expected characters to learn from")
        least = HELD_OUT * (T + 1)
        if len(text) < least:
            raise InputError(
                f"the text: {name} has {len(text)} characters, expected at least {least} for --length {T} "
                "(the last tenth is not trained on)"
            )
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        vocabulary, characters, counts = np.unique(codes, return_inverse=True, return_counts=True)
        self.T = T
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.title = f"{name}: {len(text):,} characters, {len(vocabulary)} different ones; T={T}"
        self.inputs = self.outputs = len(vocabulary)
        frequencies = counts / len(text)
        self.trivial = {"bits per character": float(-(frequencies * np.log2(frequencies)).sum())}
        held_out = len(text) // HELD_OUT
        self._train, self._held_out = characters[:-held_out], characters[-held_out:]

    def draw(self, rng: np.random.Generator, B: int, held_out: bool = False) -> Batch:
        characters = self._held_out if held_out else self._train
        starts = rng.integers(0, len(characters) - self.T, B)
        cut = torch.from_numpy(characters[starts + np.arange(self.T + 1)[:, None]])
        return Batch(cut[:-1], cut[1:])

    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"bits per character": self.loss(outputs, targets).item() / math.log(2)}


def read(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: there is none, it cannot be read, or it is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the text: {str(path)!r} cannot be read: {error.strerror}; expected a text file") from None
    if 0 in content:
        raise InputError(f"the text: {str(path)!r} is binary (a NUL at byte {content.index(0)}), expected a text file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text: {str(path)!r} is not UTF-8 (0x{content[error.start]:02x} at byte {error.start}), expected a "
            "text file in UTF-8"
        ) from None


def library_sources() -> str:
    """The modules at the top of Python's own library, one behind the other.

    Raises:
        InputError: this Python came without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(read(path) for path in sorted(folder.glob("*.py")))
    if not text:
        raise InputError(f"the text: there are no sources of Python's library in {str(folder)!r}: name a text file")
    return text
