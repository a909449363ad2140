"""The loop that people write to see ∂L/∂h_t: nn.RNNCell, step by step, every state retaining its gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem


class CellLoop(Peer):
    name = "cell loop"
    devices = ("cpu", "cuda")
    modes = ("infer", "train", "last", "watch", "figures")

    def prepare(self, problem: Problem) -> Work:
        cell = problem.cell
        model = nn.RNNCell(cell.I, cell.H, device=problem.device, dtype=cell.precision.dtype)
        model.load_state_dict({name.removesuffix("_l0"): value for name, value in problem.weights[0].items()})
        inputs = [x.clone().requires_grad_(cell.mode != "infer") for x in problem.inputs]
        watches = cell.mode in ("watch", "figures")

        def forward(x: Tensor) -> list[Tensor]:
            states, h = [], None
            for x_t in x.unbind():
                h = model(x_t, h)
                if watches:
                    h.retain_grad()
                states.append(h)
            return states

        def infer(i: int) -> tuple[Tensor, None]:
            with torch.no_grad():
                return torch.stack(forward(inputs[i % len(inputs)])), None

        def step(i: int) -> tuple[Tensor, Tensor | None]:
            x = inputs[i % len(inputs)]
            model.zero_grad()
            x.grad = None
            states = forward(x)
            y = torch.stack(states)
            torch.autograd.backward(y[-1] if cell.mode == "last" else y, problem.gradient)
            if not watches:
                return y, None
            return y, torch.stack([state.grad for state in states if state.grad is not None]).norm(dim=(1, 2))

        def answers(result: tuple[Tensor, Tensor | None]) -> Answers:
            y, norms = result
            found = {"output": y.detach().double()}
            if inputs[0].grad is not None:
                found["grad x"] = inputs[0].grad.double()
            found.update({f"grad {n}_l0": p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
            return found if norms is None else found | {"norms": norms.double()}

        settings = "retain_grad on every state, all norms at once" if watches else ""
        return Work(infer if cell.mode == "infer" else step, answers, settings)
