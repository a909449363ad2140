"""Peers that are modules: rnnkern.RNN on each of its backends, and torch.nn.RNN."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.backends import BACKENDS, select
from rnnkern.bench.cells import RECORDING, Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem
from rnnkern.gradflow.record import Record

#: of a record, what docs/gradient-flow.md lists
FIGURES: tuple[str, ...] = ("log10_norm", "horizon", "slope", "gain", "saturation_factor", "weight_factor", "mean_gain")
FIGURES += ("direct", "recurrent", "direct_share", "cosine", "omega", "zeros", "first_zero")
FIGURES += ("nonfinite", "first_nonfinite")


class TorchModule(Peer):
    devices = ("cpu", "cuda")
    modes: ClassVar[tuple[str, ...]] = ("infer", "train", "last", "bptt")
    in_memory = True

    def module(self, options: dict[str, Any]) -> nn.Module:
        return nn.RNN(**options)

    def context(self, problem: Problem) -> Callable[[], AbstractContextManager[object]] | None:
        """What must hold while it computes; None spares every call its cost."""
        return None

    def refuses_cell(self, cell: Cell) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Work:
        cell, models = problem.cell, self.models(problem)
        inputs = [x.clone().requires_grad_(cell.mode not in ("infer", "bptt")) for x in problem.inputs]
        run = {"infer": _infer, "bptt": _chunks}.get(cell.mode, _step)
        compute = run(models, problem)

        def call(i: int) -> Tensor | None:
            return compute(inputs[i % len(inputs)])

        def answers(y: Tensor | None) -> Answers:
            return step_answers(models, inputs[0], y)

        return Work(self.in_context(call, problem), answers)

    def models(self, problem: Problem) -> nn.ModuleList:
        """One for each head."""
        models = nn.ModuleList()
        for weights in problem.weights:
            model = self.module({**problem.options, "device": problem.device, "dtype": problem.cell.precision.dtype})
            model.load_state_dict(weights)
            models.append(model)
        return models

    def in_context(self, call: Callable[[int], Any], problem: Problem) -> Callable[[int], Any]:
        context = self.context(problem)
        if context is None:
            return call

        def calling(i: int) -> Any:
            with context():
                return call(i)

        return calling


def _forward(models: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """Heads side by side, each on its own part of the input; one is called as it is."""
    if len(models) == 1:
        (model,) = models
        return lambda x: model(x)[0]

    def forward(x: Tensor) -> Tensor:
        return torch.cat([model(part)[0] for model, part in zip(models, x.chunk(len(models), -1))], -1)

    return forward


def _infer(models: nn.ModuleList, problem: Problem) -> Callable[[Tensor], Tensor]:
    forward = _forward(models)

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(x)

    return infer


def _step(models: nn.ModuleList, problem: Problem) -> Callable[[Tensor], Tensor]:
    forward, gradient, last = _forward(models), problem.gradient, problem.cell.mode == "last"

    def step(x: Tensor) -> Tensor:
        models.zero_grad()
        x.grad = None
        y = forward(x)
        torch.autograd.backward(y[-1] if last else y, gradient)
        return y

    return step


def _chunks(models: nn.ModuleList, problem: Problem) -> Callable[[Tensor], None]:
    (model,), gradient, steps = models, problem.gradient, problem.cell.chunk

    def chunks(x: Tensor) -> None:
        models.zero_grad()
        bptt = rnnkern.TruncatedBPTT(steps)
        for x_chunk, gradient_chunk in bptt.chunks(x, gradient):
            y, bptt.hx = model(x_chunk, bptt.hx)
            torch.autograd.backward(y, gradient_chunk)

    return chunks


def step_answers(models: nn.ModuleList, x: Tensor, y: Tensor | None) -> Answers:
    """Of a step that left its gradients where PyTorch puts them."""
    answers: Answers = {} if y is None else {"output": y.detach().double()}
    if x.grad is not None:
        answers["grad x"] = x.grad.double()
    for k, head in enumerate(models):
        number = f" {k}" if len(models) > 1 else ""
        grads = {f"grad {n}{number}": p.grad.double() for n, p in head.named_parameters() if p.grad is not None}
        answers.update(grads)
    return answers


class TorchRNN(TorchModule):
    name = "nn.RNN"


class Rnnkern(TorchModule):
    """rnnkern.RNN on one backend."""

    modes = ("infer", "train", "last", "bptt", *RECORDING)

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"rnnkern {backend}"  # type: ignore[misc]

    def unavailable(self, device: str) -> str | None:
        backend = BACKENDS[self.backend]
        return backend.unavailable() or backend.refuses(device, torch.float32, 64)

    def refuses(self, problem: Problem) -> str | None:
        dtype, H = problem.cell.precision.dtype, problem.cell.H
        return super().refuses(problem) or BACKENDS[self.backend].refuses(problem.device, dtype, H)

    def module(self, options: dict[str, Any]) -> nn.Module:
        return rnnkern.RNN(**options)

    def context(self, problem: Problem) -> Callable[[], AbstractContextManager[object]] | None:
        chosen = select(torch.empty((1, 1, problem.cell.H), dtype=problem.cell.precision.dtype, device=problem.device))
        return None if chosen.name == self.backend else partial(rnnkern.use_backend, self.backend)

    def prepare(self, problem: Problem) -> Work:
        return self._watched(problem) if problem.cell.mode in RECORDING else super().prepare(problem)

    def _watched(self, problem: Problem) -> Work:
        models, mode = self.models(problem), problem.cell.mode
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        step = _step(models, problem)
        flow = rnnkern.watch(models)

        def compute(record: Record) -> None:
            for name in record.modules:
                for figure in FIGURES if mode == "figures" else ("norm",):
                    getattr(record[name], figure)
            if mode == "figures":
                record.verdict()

        def call(i: int) -> tuple[Tensor, Record | None]:
            y = step(inputs[i % len(inputs)])
            flow.step()
            record = None if mode == "record" else flow.read()
            if record is not None:
                compute(record)
            return y, record

        def answers(result: tuple[Tensor, Record | None]) -> Answers:
            y, record = result
            record = record or flow.read()
            assert record is not None
            norms = np.stack([record[name].norm[0, 0] for name in record.modules])
            return step_answers(models, inputs[0], y) | {"norms": torch.from_numpy(norms).norm(dim=0)}

        return Work(self.in_context(call, problem), answers, "rnnkern.watch at every step", flow.close)
