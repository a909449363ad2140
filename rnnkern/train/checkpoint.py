"""The checkpoint of a run: all that it takes to go on as if nothing had been."""

from __future__ import annotations

import dataclasses
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnnkern.train.options import InputError, Options

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was after one of its steps.

    Attributes:
        options: what it was asked to do.
        digest: of the text that it learns from; None for data that are generated.
        state: of its :class:`rnnkern.train.training.Training`.
    """

    options: Options
    digest: str | None
    state: dict[str, Any]

    def write(self, path: Path) -> None:
        """``path`` holds the whole checkpoint or what it held before, also where the power fails.

        Raises:
            OSError: it cannot be written; the error names the path.
        """
        content = {
            "rnnkern flow": FORMAT,
            "options": dataclasses.asdict(self.options),
            "digest": self.digest,
            "state": self.state,
        }
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(unfinished, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise OSError(error.errno, f"the checkpoint cannot be written: {error.strerror}", str(path)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """What :meth:`write` wrote; nothing in the file is run.

        Raises:
            InputError: there is none, or it is something else, or broken.
        """
        try:
            file = io.BytesIO(path.read_bytes())
        except OSError as error:
            raise InputError(f"--resume: the checkpoint {str(path)!r} cannot be read: {error.strerror}") from None
        try:
            content = torch.load(file, weights_only=True)
        except Exception:  # bytes that are no checkpoint make torch.load raise whatever they happen to meet
            raise InputError(broken(path)) from None
        if not isinstance(content, dict) or "rnnkern flow" not in content:
            raise InputError(broken(path))
        if content["rnnkern flow"] != FORMAT:
            raise InputError(
                f"--resume: the checkpoint {str(path)!r} has format {content['rnnkern flow']}, expected {FORMAT}, that "
                "of this version of rnnkern"
            )
        try:
            return cls(Options(**content["options"]), content["digest"], content["state"])
        except (KeyError, TypeError, ValueError):
            raise InputError(broken(path)) from None


def beside(report: Path) -> Path:
    """Where the checkpoint of a run with that report lies."""
    return report.with_suffix(".pt")


def broken(path: Path) -> str:
    """What is said of such a file."""
    return f"--resume: {str(path)!r} is broken or something else, expected a checkpoint that `rnnkern flow` wrote"


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
