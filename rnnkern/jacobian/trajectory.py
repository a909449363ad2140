"""The states of single layers and directions, in float64 and in processing order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnkern import functional, padding, reference

Input = Tensor | PackedSequence
Which = int | Sequence[int] | None


class Trajectory(NamedTuple):
    """One layer and direction. The last step that a sample takes is the last on the T axis, whatever its length."""

    h: Tensor  # (T, B, H) float64; 0 before a sample's sequence begins
    w_hh: Tensor  # (H, H) float64
    lengths: Tensor  # (B,) int64 on h's device: steps that each sample has
    nonlinearity: str
    a: Tensor | None = None  # (T, B, H) float64, h = f(a), where asked for

    def until(self, end: int | None) -> Trajectory:
        """Its part up to step ``end``, counted from 0; samples that do not have it get a length of -1."""
        if end is None:
            return self
        T = self.h.shape[0]
        if not 0 <= end < T:
            raise IndexError(f"end must be in [0, {T}), got {end}")
        first = T - self.lengths  # of every sample
        index = (torch.arange(end + 1, device=self.h.device)[:, None] + first).clamp(max=T - 1)
        h = self.h.gather(0, index[..., None].expand(-1, -1, self.h.shape[2]))
        return self._replace(h=h, lengths=torch.where(self.lengths > end, end + 1, -1), a=None)


class Selection(NamedTuple):
    """Which layers and directions were asked for, and their trajectories."""

    layers: tuple[int, ...]
    directions: tuple[int, ...]
    trajectories: list[Trajectory]  # layers × directions, the directions of a layer side by side

    def gather(self, results: Sequence[Tensor]) -> NDArray[np.float64]:
        """One result per trajectory -> (layers, directions, ...). Here the host waits for the device."""
        stacked = torch.stack(list(results)).cpu().numpy()
        return stacked.reshape(len(self.layers), len(self.directions), *stacked.shape[1:])


@contextmanager
def undisturbed(rnn: nn.RNNBase) -> Iterator[None]:
    """Without gradients and autocast, and without parametrizations that update themselves while they train."""
    training = [module for module in rnn.modules() if module.training]
    device = next(rnn.parameters()).device.type
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            if torch.amp.is_autocast_available(device):
                with torch.autocast(device, enabled=False):
                    yield
            else:
                yield
    finally:
        for module in training:
            module.training = True


def checked(rnn: nn.Module) -> nn.RNNBase:
    """Raise where ``rnn`` has no recurrence h_t = f(z_t + W_hh h_{t-1}) in real numbers."""
    if not isinstance(rnn, nn.RNNBase) or rnn.mode not in ("RNN_TANH", "RNN_RELU"):
        raise TypeError(f"rnn must be an rnnkern.RNN or a torch.nn.RNN, got {type(rnn).__name__}")
    if getattr(rnn, "layer_norm", None) == "preactivation":
        raise ValueError("rnn has layer_norm='preactivation', whose Jacobian is not diag(f') W_hh")
    if next(rnn.parameters()).is_complex():
        raise ValueError("rnn must have real weights, got complex ones")
    return rnn


def chosen(name: str, which: Which, count: int) -> tuple[int, ...]:
    """Indices of layers or directions. Negative ones count from the end."""
    if which is None:
        return tuple(range(count))
    indices = (which,) if isinstance(which, int) else tuple(which)
    if not indices or not all(-count <= i < count for i in indices):
        raise IndexError(f"{name} must be in [0, {count}), got {which!r}")
    return tuple(i % count for i in indices)


def weights_of(rnn: nn.RNNBase, layer: int, direction: int) -> functional.LayerWeights:
    """w_ih, w_hh, b_ih, b_hh in float64, as they are at this moment."""
    names = rnn._all_weights[layer * (2 if rnn.bidirectional else 1) + direction]
    w_ih, w_hh, *biases = (getattr(rnn, name).detach().double() for name in names)
    return (w_ih, w_hh, *biases) if biases else (w_ih, w_hh, None, None)


def trajectories(
    rnn: nn.RNNBase,
    input: Input,
    hx: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    layers: Which,
    directions: Which,
    with_a: bool = False,
) -> Selection:
    """Run ``rnn`` on ``input`` in float64, without dropout, up to the last layer that is asked for.

    Raises:
        ValueError, RuntimeError: as the module's own forward; RuntimeError too where a state is not finite.
        IndexError: there is no such layer or direction.
    """
    D = 2 if rnn.bidirectional else 1
    wanted = chosen("layers", layers, rnn.num_layers), chosen("directions", directions, D)
    rows, packing, state, steps = _laid_out(rnn, input, hx, lengths)
    batch_sizes = None if packing is None else packing.batch_sizes
    nonlinearity = str(rnn.mode).removeprefix("RNN_").lower()
    x, found = rows.detach().double(), {}
    for layer in range(max(wanted[0]) + 1):
        weights = [weights_of(rnn, layer, d) for d in range(D)]
        norms = [_norm_of(rnn, layer, d) for d in range(D)] if getattr(rnn, "layer_norm", None) else ()
        h0 = state[layer * D : layer * D + D]
        output = functional.rnn(
            x,
            h0,
            weights,
            nonlinearity=nonlinearity,
            bidirectional=rnn.bidirectional,
            batch_sizes=batch_sizes,
            layer_norm="input" if norms else None,
            norms=norms,
        ).output
        _check_finite(output, layer)
        for d in wanted[1] if layer in wanted[0] else ():
            h = output.unflatten(-1, (D, -1))[..., d, :]
            w_ih, w_hh, b_ih, b_hh = weights[d]
            a = None
            if with_a:
                z = F.linear(x, w_ih, None if b_ih is None or b_hh is None else b_ih + b_hh)
                z = F.layer_norm(z, z.shape[-1:], *norms[d]) if norms else z
                a = z + reference.previous_states(h, h0[d], batch_sizes, bool(d)) @ w_hh.T
                a = _aligned(a, packing, steps, bool(d))
            h = _aligned(h, packing, steps, bool(d))
            found[layer, d] = Trajectory(h, w_hh, steps, nonlinearity, a)
        x = x + output if layer and getattr(rnn, "residual", False) else output
    return Selection(*wanted, [found[layer, d] for layer in wanted[0] for d in wanted[1]])


def _laid_out(
    rnn: nn.RNNBase, input: Any, hx: Tensor | None, lengths: Tensor | Sequence[int] | None
) -> tuple[Tensor, PackedSequence | None, Tensor, Tensor]:
    """Rows (T, B, I) or packed (N, I); the packing; hx (layers·D, B, H) float64 in the rows' order; steps (B,)."""
    packing = input if isinstance(input, PackedSequence) else None
    if packing is not None:
        if lengths is not None:
            raise ValueError("lengths must be None for a PackedSequence, which has its own")
        rows, B = packing.data, int(packing.batch_sizes[0])
    else:
        if input.dim() not in (2, 3):
            raise ValueError(f"input must be 2-D or 3-D, got {input.dim()}-D")
        if input.dim() == 2:
            input, hx = input.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
        elif rnn.batch_first:
            input = input.transpose(0, 1)
        rows, B = input, input.shape[1]
        if lengths is not None:
            each = padding.checked(lengths, input.shape[0], B, allow_empty=False)
            packing = pack_padded_sequence(input, each, enforce_sorted=False)
            rows = packing.data
    rnn.check_input(rows, None if packing is None else packing.batch_sizes)
    if rows.shape[0] == 0 or B == 0:
        raise ValueError(f"input must have at least one step and one sample, got shape {list(rows.shape)}")
    shape = (rnn.num_layers * (2 if rnn.bidirectional else 1), B, rnn.hidden_size)
    if hx is not None:
        rnn.check_hidden_size(hx, shape)
    state = torch.zeros(shape, dtype=torch.float64, device=rows.device) if hx is None else hx.detach().double()
    if packing is None:
        return rows, None, state, torch.full((B,), rows.shape[0], device=rows.device)
    steps = (packing.batch_sizes > torch.arange(B, device="cpu")[:, None]).sum(1).to(rows.device)
    if packing.unsorted_indices is not None:
        steps = steps[packing.unsorted_indices]
    if packing.sorted_indices is not None:
        state = state.index_select(1, packing.sorted_indices)
    return rows, packing, state, steps


def _aligned(rows: Tensor, packing: PackedSequence | None, steps: Tensor, reverse: bool) -> Tensor:
    """Rows in input order -> (T, B, H) in processing order, samples in the user's order, aligned at their last step."""
    if packing is None:
        return rows.flip(0) if reverse else rows
    padded = pad_packed_sequence(PackedSequence(rows, *packing[1:]))[0]
    if reverse:
        return padded.flip(0)
    T = len(padded)
    index = torch.arange(T, device=rows.device)[:, None] - (T - steps)
    shifted = padded.gather(0, index.clamp(min=0)[..., None].expand_as(padded))
    return shifted.masked_fill((index < 0)[..., None], 0)


def _norm_of(rnn: nn.RNNBase, layer: int, direction: int) -> functional.NormWeights:
    end = f"_l{layer}" + ("_reverse" if direction else "")
    return getattr(rnn, "norm_weight" + end).detach().double(), getattr(rnn, "norm_bias" + end).detach().double()


def _check_finite(h: Tensor, layer: int) -> None:
    if not h.isfinite().all():
        raise RuntimeError(f"the states of layer {layer} are not finite: there is no Jacobian at them")
