"""Peers that are modules: rnnkern.RNN on each of its backends, and torch.nn.RNN."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.backends import BACKENDS
from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem
from rnnkern.gradflow.record import Record


class Heads(nn.Module):
    """RNNs side by side, each on its own part of the input; one is called as it is."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.models) == 1:
            return self.models[0](x)[0]
        return torch.cat([model(part)[0] for model, part in zip(self.models, x.chunk(len(self.models), -1))], -1)


class TorchModule(Peer):
    devices = ("cpu", "cuda")
    modes: ClassVar[tuple[str, ...]] = ("infer", "train", "last", "bptt")
    in_memory = True

    def module(self, options: dict[str, Any]) -> nn.Module:
        return nn.RNN(**options)

    def context(self) -> AbstractContextManager[object]:
        """What holds while it computes."""
        return nullcontext()

    def refuses_cell(self, cell: Cell) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Work:
        cell = problem.cell
        model = Heads(self.models(problem))
        inputs = [x.clone().requires_grad_(cell.mode not in ("infer", "bptt")) for x in problem.inputs]
        run = {"infer": self._infer, "bptt": self._chunks}.get(cell.mode, self._step)
        compute = run(model, problem)

        def call(i: int) -> Tensor | None:
            with self.context():
                return compute(inputs[i % len(inputs)])

        return Work(call, lambda y: step_answers(model, inputs[0], y))

    def models(self, problem: Problem) -> list[nn.Module]:
        models = []
        for weights in problem.weights:
            model = self.module({**problem.options, "device": problem.device, "dtype": problem.cell.precision.dtype})
            model.load_state_dict(weights)
            models.append(model)
        return models

    @staticmethod
    def _infer(model: nn.Module, problem: Problem) -> Callable[[Tensor], Tensor]:
        def infer(x: Tensor) -> Tensor:
            with torch.no_grad():
                return model(x)

        return infer

    @staticmethod
    def _step(model: nn.Module, problem: Problem) -> Callable[[Tensor], Tensor]:
        gradient, last = problem.gradient, problem.cell.mode == "last"

        def step(x: Tensor) -> Tensor:
            model.zero_grad()
            x.grad = None
            y = model(x)
            torch.autograd.backward(y[-1] if last else y, gradient)
            return y

        return step

    @staticmethod
    def _chunks(model: Heads, problem: Problem) -> Callable[[Tensor], None]:
        rnn, gradient, steps = model.models[0], problem.gradient, problem.cell.chunk

        def chunks(x: Tensor) -> None:
            model.zero_grad()
            bptt = rnnkern.TruncatedBPTT(steps)
            for x_chunk, gradient_chunk in bptt.chunks(x, gradient):
                y, bptt.hx = rnn(x_chunk, bptt.hx)
                torch.autograd.backward(y, gradient_chunk)

        return chunks


def step_answers(model: Heads, x: Tensor, y: Tensor | None) -> Answers:
    """Of a step that left its gradients where PyTorch puts them."""
    answers: Answers = {} if y is None else {"output": y.detach().double()}
    if x.grad is not None:
        answers["grad x"] = x.grad.double()
    for k, head in enumerate(model.models):
        number = f" {k}" if len(model.models) > 1 else ""
        grads = {f"grad {n}{number}": p.grad.double() for n, p in head.named_parameters() if p.grad is not None}
        answers.update(grads)
    return answers


class TorchRNN(TorchModule):
    name = "nn.RNN"


class Rnnkern(TorchModule):
    """rnnkern.RNN on one backend."""

    modes = ("infer", "train", "last", "bptt", "watch", "record")

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

    def context(self) -> AbstractContextManager[object]:
        return rnnkern.use_backend(self.backend)

    def prepare(self, problem: Problem) -> Work:
        return self._watched(problem) if problem.cell.mode in ("watch", "record") else super().prepare(problem)

    def _watched(self, problem: Problem) -> Work:
        model, reads = Heads(self.models(problem)), problem.cell.mode == "watch"
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        step = self._step(model, problem)
        flow = rnnkern.watch(model)

        def call(i: int) -> tuple[Tensor, Record | None]:
            with self.context():
                y = step(inputs[i % len(inputs)])
                flow.step()
            return y, flow.read() if reads else None

        def answers(result: tuple[Tensor, Record | None]) -> Answers:
            y, record = result
            record = record or flow.read()
            assert record is not None
            norms = np.stack([record[name].norm[0, 0] for name in record.modules])
            return step_answers(model, inputs[0], y) | {"norms": torch.from_numpy(norms).norm(dim=0)}

        return Work(call, answers, "rnnkern.watch at every step", flow.close)
