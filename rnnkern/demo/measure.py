"""The two checks of the demo: recorded norms against a float64 loop over cells, and the time of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.demo.digits import Reader, Sample, training_step

WARM_UP, ROUNDS = 5, 100
PATIENCE = 15.0  # seconds after which fewer rounds must do, on a machine that is busy otherwise


@contextmanager
def _one_thread() -> Iterator[None]:
    """A second thread gains nothing on matrices this small, and on a busy machine every operator waits for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Deviation:
    """How far the recorded norms are from the truth."""

    largest: float  # relative, over the steps that were compared
    compared: int
    excluded: int


@_one_thread()
def deviation(samples: Sequence[Sample]) -> Deviation:
    """Over the steps whose gradients float32 can hold: at most 1 % of their elements lie below its normal numbers."""
    largest, compared, excluded = 0.0, 0, 0
    for sample in samples:
        gradients = loop_over_cells(sample)
        normal = (gradients.abs() >= torch.finfo(torch.float32).tiny).double().mean((1, 2)).numpy() >= 0.99
        truth = gradients.square().sum((1, 2)).sqrt().numpy()
        if normal.any():
            relative = np.abs(sample.norms / truth - 1)[normal]
            largest = float(np.maximum(largest, relative.max()))  # a NaN stays
        compared += int(normal.sum())
        excluded += int((~normal).sum())
    return Deviation(largest, compared, excluded)


def loop_over_cells(sample: Sample) -> Tensor:
    """∂L/∂h_t by lag, (T, B, H) in float64: torch.nn.RNNCell in a Python loop, every state retaining its gradient."""
    weights = {name: value.double() for name, value in sample.weights.items()}
    cell = nn.RNNCell(1, weights["rnn.weight_hh_l0"].shape[0], dtype=torch.float64)
    cell.load_state_dict({name: weights[f"rnn.{name}_l0"] for name in cell.state_dict()})
    states: list[Tensor] = []
    for pixel in sample.pixels.double():
        states.append(cell(pixel, states[-1] if states else None))
        states[-1].retain_grad()
    logits = nn.functional.linear(states[-1], weights["head.weight"], weights["head.bias"])
    nn.functional.cross_entropy(logits, sample.labels).backward()
    return torch.stack([state.grad for state in reversed(states) if state.grad is not None])


@dataclass(frozen=True)
class StepTimes:
    """Medians over at most ROUNDS training steps each, in seconds."""

    torch: float
    rnnkern: float
    watched: float


def step_times(sample: Sample) -> StepTimes:
    """A training step from the sample's weights, on its batch: torch.nn.RNN, rnnkern.RNN, and that watched.

    They take turns, and begin each round with another one, so that whatever else the machine does falls on all alike.
    """
    hidden_size = sample.weights["rnn.weight_hh_l0"].shape[0]
    contenders = []
    for module, watched in ((nn.RNN, False), (rnnkern.RNN, False), (rnnkern.RNN, True)):
        model = Reader(module(1, hidden_size))
        model.load_state_dict(sample.weights)
        contenders.append((model, torch.optim.Adam(model.parameters()), watched, list[float]()))
    start = perf_counter()
    for turn in range(WARM_UP + ROUNDS):
        if turn > 2 * WARM_UP and perf_counter() - start > PATIENCE:
            break
        for i in range(len(contenders)):
            model, optimizer, watched, seconds = contenders[(turn + i) % len(contenders)]
            # Watched only for its own step: an open Flow hears of every optimizer in the process.
            watching: AbstractContextManager[Any] = rnnkern.watch(model) if watched else nullcontext()
            with watching:
                begin = perf_counter()
                training_step(model, optimizer, sample.pixels, sample.labels)
                seconds.append(perf_counter() - begin)
    return StepTimes(*(median(seconds[WARM_UP:]) for _, _, _, seconds in contenders))
