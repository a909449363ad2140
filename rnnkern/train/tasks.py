"""The tasks that ask for a long memory, generated as the literature has them.

Every batch is drawn from a generator of its own, so that a run can go on anywhere without the batches before.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rnnkern.train.options import InputError


@dataclass(frozen=True)
class Batch:
    """Inputs (T, B, inputs), or numbers of symbols (T, B) int64; targets (B,), or (T, B) with a loss at all steps."""

    inputs: Tensor
    targets: Tensor


class Task(ABC):
    """A supply of batches, a loss, and figures that say how well it is solved.

    Attributes:
        title: what it is, with its size.
        inputs: numbers at a step, or of symbols where ``embedded``.
        outputs: numbers that the model gives for a step.
        embedded: whether inputs are the numbers of symbols.
        at_end: whether the loss is at the last step alone.
        needs: how many steps back it asks for; None where that is not known.
        trivial: what each figure would be for an answer that takes nothing from the past.
        digest: of the data; None where they are generated.
    """

    title: str
    inputs: int
    outputs: int
    embedded = False
    at_end = True
    needs: int | None
    trivial: dict[str, float]
    digest: str | None = None

    @abstractmethod
    def draw(self, rng: np.random.Generator, B: int, held_out: bool = False) -> Batch:
        """B sequences; ``held_out`` for those that are never trained on, where data are not drawn afresh."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats; ``outputs`` are shaped like ``targets``, with logits as the last axis."""
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    @abstractmethod
    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The task's own figures for one batch, under the names that ``trivial`` has."""


class Adding(Task):
    """The sum of two marked numbers (Hochreiter & Schmidhuber 1997), as Arjovsky, Shah & Bengio (2016) set it.

    At each step a number from [0, 1) and a mark, which is 1 at one step of the first half and at one of the second.
    To answer 1 whatever comes has the mean squared error 1/6, the variance of the sum (Le, Jaitly & Hinton 2015).
    """

    inputs, outputs = 2, 1

    def __init__(self, T: int) -> None:
        self.T = _at_least(2, T, "adding")
        self.title = f"adding, T={T}"
        self.needs = T - 1
        self.trivial = {"mean squared error": 1 / 6}

    def draw(self, rng: np.random.Generator, B: int, held_out: bool = False) -> Batch:
        numbers = rng.random((self.T, B))
        marks = np.zeros_like(numbers)
        half, columns = self.T // 2, np.arange(B)
        marks[rng.integers(0, half, B), columns] = 1
        marks[rng.integers(half, self.T, B), columns] = 1
        return Batch(_floats(np.stack([numbers, marks], -1)), _floats((numbers * marks).sum(0)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs.squeeze(-1), targets)

    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"mean squared error": self.loss(outputs, targets).item()}


class Copying(Task):
    """Ten symbols to be remembered over T steps (Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016).

    Ten symbols of eight, T-1 blanks, a mark, ten blanks; to answer: T+10 blanks, then the ten symbols. The loss is the
    mean over all T+20 steps. To answer blanks and then any of the eight symbols has 10 ln 8 / (T+20).
    """

    SYMBOLS, BLANK, MARK, COPIED = 8, 8, 9, 10
    inputs, outputs = 10, 9
    at_end = False

    def __init__(self, T: int) -> None:
        self.T = T
        self.title = f"copying, T={T} ({T + 20} steps)"
        self.needs = T + self.COPIED
        self.trivial = {"cross-entropy": 10 * math.log(8) / (T + 20), "accuracy of the copied": 1 / 8}

    def draw(self, rng: np.random.Generator, B: int, held_out: bool = False) -> Batch:
        copied = rng.integers(0, self.SYMBOLS, (self.COPIED, B))
        inputs = np.full((self.T + 20, B), self.BLANK)
        inputs[: self.COPIED] = copied
        inputs[self.COPIED + self.T - 1] = self.MARK
        targets = np.full_like(inputs, self.BLANK)
        targets[-self.COPIED :] = copied
        return Batch(_one_hot(inputs, self.inputs), torch.from_numpy(targets))

    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        right = outputs[-self.COPIED :].argmax(-1) == targets[-self.COPIED :]
        return {
            "cross-entropy": self.loss(outputs, targets).item(),
            "accuracy of the copied": right.double().mean().item(),
        }


class TemporalOrder(Task):
    """Which of two symbols came first (Hochreiter & Schmidhuber 1997), as Pascanu, Mikolov & Bengio (2013) set it.

    Among four symbols that mean nothing there are two that are A or B, one in the second tenth of the sequence and one
    in the fifth; at the end one of AA, AB, BA, BB is to be answered. To answer any has the cross-entropy ln 4.
    """

    DISTRACTORS = 4
    inputs, outputs = 6, 4

    def __init__(self, T: int) -> None:
        self.T = _at_least(10, T, "temporal-order")
        self.title = f"temporal order, T={T}"
        self.needs = T - 1 - T // 10
        self.trivial = {"cross-entropy": math.log(4), "accuracy": 1 / 4}

    def draw(self, rng: np.random.Generator, B: int, held_out: bool = False) -> Batch:
        symbols = rng.integers(0, self.DISTRACTORS, (self.T, B))
        first, second = rng.integers(0, 2, (2, B))
        columns = np.arange(B)
        symbols[rng.integers(self.T // 10, 2 * self.T // 10, B), columns] = self.DISTRACTORS + first
        symbols[rng.integers(4 * self.T // 10, self.T // 2, B), columns] = self.DISTRACTORS + second
        return Batch(_one_hot(symbols, self.inputs), torch.from_numpy(2 * first + second))

    def figures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        right = (outputs.argmax(-1) == targets).double().mean().item()
        return {"cross-entropy": self.loss(outputs, targets).item(), "accuracy": right}


def _at_least(least: int, T: int, task: str) -> int:
    if least > T:
        raise InputError(f"--length must be at least {least} for --task {task}, got {T}")
    return T


def _floats(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _one_hot(symbols: np.ndarray, count: int) -> Tensor:
    return nn.functional.one_hot(torch.from_numpy(symbols), count).float()
