"""The numbers that all peers get, and the truth that their answers are compared with."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from rnnkern.bench.cells import RECORDING, Cell

#: What a call has computed, in float64: "output" (T, B, width), "grad x", "grad weight_hh_l0", ..., "norms" (T,).
Answers = dict[str, Tensor]

#: Inputs in turn on a GPU: together larger than the second cache, up to so many of them.
MOST_INPUTS = 256
SMALLEST_NORM = 1e-30  # far above float32's subnormals: below it nothing is asked of a norm


class Problem:
    """Weights, inputs and the gradient from above of one cell: same seed, same numbers, rounded to the cell's dtype.

    ``weights`` holds for each head the state dict of an nn.RNN. What backward begins with is standard normal.
    """

    def __init__(self, cell: Cell, threads: int, device: str = "cpu", seed: int = 0) -> None:
        self.cell, self.device, self.threads = cell, device, cell.threads or threads
        dtype = cell.precision.dtype
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(device, dtype)

        self.weights: list[dict[str, Tensor]] = []
        for _ in range(cell.heads):
            shapes = {name: p.shape for name, p in nn.RNN(**self.options, device="meta").named_parameters()}
            self.weights.append(  # nn.RNN's own initialisation
                {
                    n: ((2 * torch.rand(s, generator=rng) - 1) * cell.H**-0.5).to(device, dtype)
                    for n, s in shapes.items()
                }
            )
        self.inputs = [normal(cell.T, cell.B, cell.heads * cell.I) for _ in range(self._how_many())]
        self.gradient = normal(*(() if cell.mode == "last" else (cell.T,)), cell.B, cell.width)

    @property
    def options(self) -> dict[str, int | bool]:
        """Arguments of nn.RNN, and of rnnkern.RNN."""
        cell = self.cell
        return {
            "input_size": cell.I,
            "hidden_size": cell.H,
            "num_layers": cell.layers,
            "bidirectional": cell.directions == 2,
        }

    def _how_many(self) -> int:
        if self.device == "cpu":
            return 1
        each = self.cell.T * self.cell.B * self.cell.heads * self.cell.I * self.cell.precision.dtype.itemsize
        cache: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(max(2 * cache // each + 1, 2), MOST_INPUTS)

    @cached_property
    def truth(self) -> Answers:
        """torch.nn's modules in float64, with the same numbers; no code of rnnkern takes part."""
        cell, x, gradient = self.cell, self.inputs[0].double(), self.gradient.double()
        parts, slices = [], cell.width // cell.heads
        for k, weights in enumerate(self.weights):
            model = nn.RNN(**self.options, dtype=torch.float64, device=self.device)
            model.load_state_dict(weights)
            one = x[..., k * cell.I : (k + 1) * cell.I]
            part = _true_answers(cell, model, one, gradient[..., k * slices : (k + 1) * slices])
            parts.append(part)
        return join(parts)

    def error(self, answers: Answers) -> float:
        """The largest relative error: of every tensor by its norm, of the recorded norms one by one.

        Raises:
            ValueError: an answer is missing, has another shape or is not finite.
        """
        worst = 0.0
        for name, true in self.truth.items():
            if name not in answers:
                raise ValueError(f"returns no {name}")
            found = answers[name].to(true.device)
            if found.shape != true.shape:
                raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(true.shape)}")
            if not found.isfinite().all():
                raise ValueError(f"{name} is not finite")
            if name == "norms":
                error = float(((found - true).abs() / true.clamp(min=SMALLEST_NORM)).max())
            else:
                error = float((found - true).norm() / true.norm().clamp(min=SMALLEST_NORM))
            worst = worst if error <= worst else error  # a NaN stays
        return worst


def join(heads: list[Answers]) -> Answers:
    """The answers of all heads as one: outputs beside each other, weights by number; of one head its own."""
    if len(heads) == 1:
        return heads[0]
    joined: Answers = {}
    for name in heads[0]:
        if name in ("output", "grad x"):
            joined[name] = torch.cat([head[name] for head in heads], -1)
        elif name == "norms":
            joined[name] = torch.stack([head[name] for head in heads]).norm(dim=0)
        else:
            joined.update({f"{name} {k}": head[name] for k, head in enumerate(heads)})
    return joined


def _true_answers(cell: Cell, model: nn.RNN, x: Tensor, gradient: Tensor) -> Answers:
    if cell.mode == "infer":
        with torch.no_grad():
            return {"output": model(x)[0]}
    if cell.mode in RECORDING:
        return _true_norms(model, x, gradient)
    if cell.mode == "bptt":
        hx = None
        for x_chunk, gradient_chunk in zip(x.split(cell.chunk), gradient.split(cell.chunk)):
            y, hx = model(x_chunk, None if hx is None else hx.detach())
            y.backward(gradient_chunk)
        answers: Answers = {}
    else:
        x = x.clone().requires_grad_()
        y, _ = model(x)
        torch.autograd.backward(y[-1] if cell.mode == "last" else y, gradient)
        assert x.grad is not None
        answers = {"output": y.detach(), "grad x": x.grad}
    return answers | {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def _true_norms(model: nn.RNN, x: Tensor, gradient: Tensor) -> Answers:
    """The loop that nn.RNN is, with every state at hand."""
    weights = dict(model.named_parameters())
    x = x.clone().requires_grad_()
    h, states = x.new_zeros(x.shape[1], model.hidden_size), []
    for x_t in x:
        a = x_t @ weights["weight_ih_l0"].T + weights["bias_ih_l0"] + h @ weights["weight_hh_l0"].T
        h = torch.tanh(a + weights["bias_hh_l0"])
        h.retain_grad()
        states.append(h)
    y = torch.stack(states)
    y.backward(gradient)
    assert x.grad is not None
    norms = torch.stack([state.grad.norm() for state in states if state.grad is not None])
    grads = {f"grad {name}": p.grad for name, p in weights.items() if p.grad is not None}
    return {"output": y.detach(), "grad x": x.grad, "norms": norms} | grads
