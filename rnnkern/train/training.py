"""A training run, step by step: what it computes depends on the options and the number of the step alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.gradflow import Flow, Record
from rnnkern.train.model import Model, new_model
from rnnkern.train.options import Options
from rnnkern.train.tasks import Batch, Task
from rnnkern.train.trace import Trace, renamed

TRAINED, HELD_OUT = 0, 1  # two streams of random numbers
EVALUATED = 512  # sequences, at least
LAST_LOSS = " (last loss)"


class Training:
    """A model, its optimizer, and the watching of both; a context manager, as a Flow is.

    Where a task has a loss at many steps, fresh gradient hides how far back it reaches. So at each sampled step a twin
    of the model, with the same weights and batch, sends back the loss of the last step alone, and is watched as well.

    Attributes:
        done: steps that have been trained.
        trace: what was recorded.
        loss: of the newest step; NaN before the first.
    """

    def __init__(self, options: Options, task: Task, state: dict[str, Any] | None = None) -> None:
        """Begin, or go on from ``state``: what :meth:`state_dict` was.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: the state is none, or not of a run with these options.
        """
        self.options, self.task = options, task
        self.model = new_model(task, options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), options.lr)
        self.done, self.loss = 0, math.nan
        self._twin: Model | None = None if task.at_end else copy.deepcopy(self.model)
        names = ["rnn", "rnn.c"] if options.cell == "lstm" else ["rnn"]
        self.trace = Trace([name + ending for ending in ("", LAST_LOSS)[: 2 - task.at_end] for name in names])
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.trace.load_state_dict(state["trace"])
            self.done = state["done"]
        start = self.done
        cells = options.cell == "lstm"
        self._flow = rnnkern.watch(self.model, lambda step: (start + step) % options.every == 0, cell_states=cells)
        self._twin_flow: Flow | None = None
        if self._twin is not None:
            self._twin_flow = rnnkern.watch(self._twin, cell_states=cells)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on. No random state: each step's numbers come from its seed and its number."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trace": self.trace.state_dict(),
            "done": self.done,
        }

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watching."""
        self._flow.close()
        if self._twin_flow is not None:
            self._twin_flow.close()

    def advance(self) -> None:
        """One step of training; at every ``options.every``-th the gradient flow is recorded."""
        batch = self._draw(TRAINED, self.done)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(batch.inputs, last=self.task.at_end), batch.targets)
        loss.backward()
        if self.done % self.options.every == 0:
            self._record(batch)
        if self.options.clip < math.inf:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.loss = loss.item()
        self.done += 1

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The task's figures, over sequences that are never trained on, always the same ones."""
        figures = []
        for number in range(-(-EVALUATED // self.options.batch_size)):
            batch = self._draw(HELD_OUT, number)
            figures.append(self.task.figures(self.model(batch.inputs, last=self.task.at_end), batch.targets))
        return {name: float(np.mean([f[name] for f in figures])) for name in self.task.trivial}

    @property
    def horizon(self) -> float:
        """How far a loss at the end reached back in the newest sampled step, in the last layer; NaN where unknown."""
        if self.trace.newest is None:
            return math.nan
        name = "rnn" if self.task.at_end else "rnn" + LAST_LOSS
        return float(self.trace.newest[name].horizon[-1, 0]) if name in self.trace.newest.modules else math.nan

    def _draw(self, stream: int, number: int) -> Batch:
        rng = np.random.default_rng((self.options.seed, stream, number))
        return self.task.draw(rng, self.options.batch_size, held_out=stream == HELD_OUT)

    def _record(self, batch: Batch) -> None:
        modules = renamed(_read(self._flow))
        if self._twin is not None and self._twin_flow is not None:
            self._twin.load_state_dict(self.model.state_dict())
            self._last_loss(self._twin, batch).backward()
            modules += renamed(_read(self._twin_flow), LAST_LOSS)
            self._twin_flow.step()
            self._twin.zero_grad()  # its own gradients are of no use
        self.trace.add(self.done, modules)

    def _last_loss(self, model: Model, batch: Batch) -> Tensor:
        return self.task.loss(model(batch.inputs, last=True), batch.targets[-1])


def _read(flow: Flow) -> Record:
    record = flow.read(order="lag")
    assert record is not None  # a backward has just been sampled
    return record
