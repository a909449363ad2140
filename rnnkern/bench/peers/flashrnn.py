"""FlashRNN's Elman cell on a GPU, its input projection by one linear as in the other peers.

Not yet run: written from its documentation, for the day that there is a GPU. Should it take R the other way round, the
comparison before the timing says so.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem


class FlashRnn(Peer):
    name = "FlashRNN"
    needs: ClassVar[dict[str, str]] = {"flashrnn": "flashrnn"}
    devices = ("cuda",)

    def refuses_cell(self, cell: Cell) -> str | None:
        if cell.heads > 1:
            return None if cell.layers == cell.directions == 1 else "is written here for one layer and direction"
        return super().refuses_cell(cell)

    def prepare(self, problem: Problem) -> Work:
        from flashrnn import flashrnn

        cell, trains = problem.cell, problem.cell.mode != "infer"
        weights = [{n: w.clone().requires_grad_(trains) for n, w in head.items()} for head in problem.weights]
        inputs = [x.clone().requires_grad_(trains) for x in problem.inputs]
        states = torch.zeros(
            1, cell.B, 1, cell.heads, cell.H, device=problem.device, dtype=cell.precision.dtype
        )  # (states, B, 1, heads, H)

        def forward(x: Tensor) -> Tensor:
            z = torch.stack(
                [
                    nn.functional.linear(part, w["weight_ih_l0"], w["bias_ih_l0"] + w["bias_hh_l0"])
                    for part, w in zip(x.chunk(cell.heads, -1), weights)
                ],
                2,
            )  # (T, B, heads, H)
            r = torch.stack([w["weight_hh_l0"] for w in weights])[None]  # (gates, heads, H, H)
            b = torch.zeros(1, cell.heads, cell.H, device=z.device, dtype=z.dtype)
            h, _ = flashrnn(z.transpose(0, 1)[:, :, None], r, b, states=states, function="elman", backend="cuda_fused")
            y: Tensor = h[0].transpose(0, 1).flatten(2)  # (T, B, heads · H) of (B, T, heads, H)
            return y

        def call(i: int) -> Tensor:
            x = inputs[i % len(inputs)]
            if not trains:
                with torch.no_grad():
                    return forward(x)
            for leaf in (x, *(w for head in weights for w in head.values())):
                leaf.grad = None
            y = forward(x)
            torch.autograd.backward(y[-1] if cell.mode == "last" else y, problem.gradient)
            return y

        def answers(y: Tensor) -> Answers:
            found = {"output": y.detach().double()}
            if inputs[0].grad is not None:
                found["grad x"] = inputs[0].grad.double()
            for k, head in enumerate(weights):
                number = f" {k}" if cell.heads > 1 else ""
                found.update({f"grad {n}{number}": w.grad.double() for n, w in head.items() if w.grad is not None})
            return found

        return Work(call, answers, 'backend="cuda_fused"')
