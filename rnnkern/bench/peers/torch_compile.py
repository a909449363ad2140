"""torch.compile of a loop over cells: the input projection as one product, then pieces of unrolled steps."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor, nn

from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem

#: Steps that are compiled as one piece: compiling takes time in proportion, and the whole loop would take minutes.
UNROLLED = 8
MOST_SHAPES = 10_000


class TorchCompile(Peer):
    name = "torch.compile"
    devices = ("cpu", "cuda")

    def unavailable(self, device: str) -> str | None:
        if device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            return "needs a C++ compiler"
        return super().unavailable(device)

    def prepare(self, problem: Problem) -> Work:
        cell = problem.cell
        weights = {n: w.clone().requires_grad_(cell.mode != "infer") for n, w in problem.weights[0].items()}
        inputs = [x.clone().requires_grad_(cell.mode != "infer") for x in problem.inputs]
        # The first piece gets a state that has a gradient too, as the others: so one graph serves all of them.
        h0 = torch.zeros(cell.B, cell.H, device=problem.device, dtype=cell.precision.dtype)
        h0.requires_grad_(cell.mode != "infer")
        # Each shape is compiled for itself; as many as a grid has, where Dynamo would give up after 8.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
        piece = torch.compile(_steps, dynamic=False, fullgraph=True)

        def forward(x: Tensor) -> Tensor:
            z = nn.functional.linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"] + weights["bias_hh_l0"])
            h, outputs = h0, []
            for z_piece in z.split(UNROLLED):
                y, h = piece(z_piece, h, weights["weight_hh_l0"])
                outputs.append(y)
            return torch.cat(outputs)

        def infer(i: int) -> Tensor:
            with torch.no_grad():
                return forward(inputs[i % len(inputs)])

        def step(i: int) -> Tensor:
            x = inputs[i % len(inputs)]
            x.grad = None
            for leaf in (h0, *weights.values()):
                leaf.grad = None
            y = forward(x)
            torch.autograd.backward(y[-1] if cell.mode == "last" else y, problem.gradient)
            return y

        def answers(y: Tensor) -> Answers:
            found = {"output": y.detach().double()}
            named = {"x": inputs[0], **weights}
            return found | {f"grad {n}": v.grad.double() for n, v in named.items() if v.grad is not None}

        return Work(infer if cell.mode == "infer" else step, answers, f"pieces of {UNROLLED} steps, static shapes")


def _steps(z: Tensor, h: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for z_t in z.unbind():
        h = torch.tanh(z_t + nn.functional.linear(h, w_hh))
        outputs.append(h)
    return torch.stack(outputs), h
