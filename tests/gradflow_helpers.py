"""The truth for gradient flow, a float64 loop over cells, and small models to compare with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.gradflow import Flow, Record

#: outputs of each sample (length, D·H), h_n of each sample (layers·D, H) -> the loss
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def at_the_end(outputs: Sequence[Tensor], h_n: Sequence[Tensor]) -> Tensor:
    """Only the final states, of every layer and direction."""
    return sum((b + 1) * h.sin().sum() for b, h in enumerate(h_n))  # type: ignore[return-value]


def everywhere(outputs: Sequence[Tensor], h_n: Sequence[Tensor]) -> Tensor:
    """Every step's output and every final state."""
    return sum(((b + 1) * y.square().sum() + h.cos().sum()) for b, (y, h) in enumerate(zip(outputs, h_n, strict=True)))  # type: ignore[return-value]


LOSSES = pytest.mark.parametrize("loss", [at_the_end, everywhere])


class Parts(NamedTuple):
    """Of ∂L/∂h_t, (layers, directions, T, B) in input order each; 0 where there is no step, or no cosine."""

    norm: np.ndarray
    recurrent: np.ndarray  # at the last step ‖∂L/∂h_n‖
    delta: np.ndarray
    direct: np.ndarray
    cosine: np.ndarray


def truth(rnn: rnnkern.RNN, samples: Sequence[Tensor], loss: Loss) -> np.ndarray:
    """‖∂L/∂h_t‖ (layers, directions, T, B) in float64 and input order, one cell at a time; 0 where there is no step.

    ``samples`` are (length, I) each.
    """
    return true_parts(rnn, samples, loss).norm


def true_parts(rnn: rnnkern.RNN, samples: Sequence[Tensor], loss: Loss) -> Parts:
    """Norms of g_t, r_t, δ_t and e_t and the cosine of e_t and r_t, as ``truth``."""
    L, D = rnn.num_layers, 2 if rnn.bidirectional else 1
    weights = {name: p.detach().double().cpu() for name, p in rnn.named_parameters()}
    f = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu
    states: dict[tuple[int, int, int, int], tuple[Tensor, ...]] = {}
    outputs, finals = [], []
    for b, sample in enumerate(samples):
        x, last = list(sample.detach().double().cpu()), []
        for layer in range(L):
            y: list[list[Tensor]] = [[] for _ in x]
            for d in range(D):
                end = f"_l{layer}" + ("_reverse" if d else "")
                h = torch.zeros(rnn.hidden_size, dtype=torch.float64)
                for t in reversed(range(len(x))) if d else range(len(x)):
                    a = weights["weight_ih" + end] @ x[t] + weights["weight_hh" + end] @ h
                    if rnn.bias:
                        a = a + weights["bias_ih" + end] + weights["bias_hh" + end]
                    a.requires_grad_()
                    total = f(a)
                    own, h = total.clone(), total.clone()
                    states[layer, d, t, b] = total, h, a, own
                    for part in states[layer, d, t, b]:
                        part.retain_grad()
                    y[t].append(own)
                last.append(h)
            x = [torch.cat(step) for step in y]
        outputs.append(torch.stack(x))
        finals.append(torch.stack(last))
    loss(outputs, finals).backward()
    parts = np.zeros((5, L, D, max(map(len, samples)), len(samples)))
    for index, kinds in states.items():
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in kinds]
        product = grads[1].norm() * grads[3].norm()
        cosine = (grads[1] @ grads[3]) / product if product > 0 else product
        parts[(slice(None), *index)] = [*(g.norm().item() for g in grads), cosine.item()]
    return Parts(*parts)


def dense_loss(rnn: rnnkern.RNN, x: Tensor, loss: Loss) -> Tensor:
    """The loss of a forward on x (T, B, I), or (B, T, I) with batch_first."""
    output, h_n = rnn(x)
    return loss(output.unbind(0 if rnn.batch_first else 1), h_n.unbind(1))


def over_batch(norms: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(norms).sum(-1))


def read(flow: Flow, **options: object) -> Record:
    rec = flow.read(**options)  # type: ignore[arg-type]
    assert rec is not None
    return rec


def chain(gain: float, H: int = 16, nonlinearity: str = "tanh") -> rnnkern.RNN:
    """A float64 RNN whose every Jacobian is gain times an orthogonal matrix, for zero input (and h0 > 0 for relu)."""
    rnn = rnnkern.RNN(3, H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    orthogonal = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0]
    if nonlinearity == "relu":  # keeps positive states positive
        orthogonal = torch.eye(H, dtype=torch.float64)[torch.randperm(H)]
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(gain * orthogonal)
    return rnn


class Classifier(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.rnn = rnnkern.RNN(3, 8, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1]).square()
