"""How saturated the states are: what the nonlinearity alone does to a gradient, from the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern.padding import checked

#: |h| above this counts as saturated: f' = 1 - h² is below 0.02 there.
SATURATED_STATE = 0.99


class Saturation(NamedTuple):
    """Float64 tensors on the device of the states: () for the states of one layer, (layers,) for a tuple of them."""

    mean_derivative: Tensor  # mean of f'(h): 1 - h² for tanh; for ReLU the share of units with h > 0
    share: Tensor  # of the states with |h| > 0.99; for ReLU of those with h = 0


@torch.no_grad()
def saturation(
    states: Tensor | PackedSequence | Sequence[Tensor | PackedSequence],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
    nonlinearity: str = "tanh",
) -> Saturation:
    """mean(1 - h²) and the share of |h| > 0.99, over all steps, samples, directions and units.

    It does not wait for the device. The mean of f' weighs all units alike; ``record.saturation_factor`` weighs them by
    the gradient that passes through them, and is what the chain meets.

    Args:
        states: of one layer, (T, B, D·H), (B, T, D·H), (T, D·H) or a PackedSequence: the output of an RNN with one
            layer; or those of every layer, ``rnn(x, return_states=True)[2]``. The output of a deeper RNN with
            ``residual`` is not its states.
        lengths: (B,) steps of each sample of padded states; the others don't count.
        batch_first: padded states are (B, T, D·H); needed with ``lengths`` only.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError: an unknown nonlinearity, or lengths that do not fit, or with a PackedSequence.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    if not isinstance(states, (Tensor, PackedSequence)):
        each = [saturation(s, lengths=lengths, batch_first=batch_first, nonlinearity=nonlinearity) for s in states]
        return Saturation(torch.stack([s.mean_derivative for s in each]), torch.stack([s.share for s in each]))
    h = _present(states, lengths, batch_first)
    if nonlinearity == "relu":
        return Saturation((h > 0).double().mean(), (h == 0).double().mean())
    return Saturation(1 - h.double().square().mean(), (h.abs() > SATURATED_STATE).double().mean())


def _present(states: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None, batch_first: bool) -> Tensor:
    """The states of the steps that there are."""
    if isinstance(states, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths must be None for a PackedSequence, which has its own")
        return states.data
    if lengths is None:
        return states
    if states.dim() != 3:
        raise ValueError(f"lengths must be None for unbatched states, got {lengths}")
    rows = states.transpose(0, 1) if batch_first else states
    steps = checked(lengths, rows.shape[0], rows.shape[1], allow_empty=True)
    there = torch.arange(rows.shape[0], device="cpu")[:, None] < steps
    return rows[there.to(rows.device)]
