"""Layers, directions, dropout and packing around the recurrence; the input projection is one GEMM over all steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern.autograd import INF, recurrence

#: w_ih (H, I), w_hh (H, H), b_ih (H), b_hh (H); the biases may be None
LayerWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
#: (layer, direction) -> the tap of that recurrence in one forward: a (3, T, B) float64 leaf that requires grad
Taps = Callable[[int, int], Tensor]
#: (T, B, batch_sizes, unsorted_indices, device) -> the taps of one forward, or None: nobody wants its statistics
TapFactory = Callable[[int, int, Tensor | None, Tensor | None, torch.device], Taps | None]


def rnn(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[LayerWeights],
    *,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    clip: float = INF,
    taps: Taps | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of tanh or ReLU RNN layers.

    Args:
        input: (T, B, I), or with ``batch_sizes`` the packed rows (N, I) of a PackedSequence.
        h0: (layers·directions, B, H), the initial states.
        weights: one entry per layer and direction, the directions of a layer side by side.
        dropout: probability of zeroing an element of a layer's output, all layers but the last, while ``training``.
        batch_sizes: (T,) int64 on the CPU, non-increasing: rows at each step.
        clip: clamp every element of ∂L/∂h_t to ±clip on its way back through time; inf for none.
        taps: makes the taps whose gradients are the statistics of the backward chain, see RNNFunction.

    Returns:
        output (T, B, directions·H) or (N, directions·H), and h_n (layers·directions, B, H).

    Raises:
        RuntimeError: naming the argument whose shape, dtype or device does not fit.
    """
    directions = 2 if bidirectional else 1
    if len(weights) % directions or h0.dim() != 3 or h0.shape[0] != len(weights):
        raise RuntimeError(
            f"h0 must have shape (layers*directions, B, H) with one entry for each of the {len(weights)} weights, "
            f"got {list(h0.shape)}"
        )
    if autocast_enabled(input.device):
        dtype = torch.get_autocast_dtype(input.device.type)
        h0 = h0.to(dtype)
        weights = [(w_ih, w_hh.to(dtype), b_ih, b_hh) for w_ih, w_hh, b_ih, b_hh in weights]
    final_states = []
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, b_ih, b_hh = weights[index]
            z, state = F.linear(input, w_ih, _sum(b_ih, b_hh)), h0[index]
            # A tap requires grad: alone it would make the output of a frozen net require grad too.
            tapped = taps is not None and (z.requires_grad or state.requires_grad or w_hh.requires_grad)
            h, h_n = recurrence(
                z,
                state,
                w_hh,
                batch_sizes=batch_sizes,
                reverse=direction == 1,
                nonlinearity=nonlinearity,
                clip=clip,
                tap=taps(layer, direction) if taps is not None and tapped else None,
            )
            outputs.append(h)
            final_states.append(h_n)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout > 0 and training and layer < len(weights) // directions - 1:
            input = F.dropout(input, dropout)
    return input, final_states[0][None] if len(final_states) == 1 else torch.stack(final_states)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device; on some it does not exist, and asking raises."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _sum(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    if b_ih is None or b_hh is None:
        return b_ih if b_hh is None else b_hh
    return b_ih + b_hh
