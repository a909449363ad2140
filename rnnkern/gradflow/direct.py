"""‖e_t‖: the norm of the gradient that arrives at an RNN's output, by a hook on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern.gradflow.analysis import ROUNDING, Floats, Ints
from rnnkern.modules import RNN
from rnnkern.padding import checked


class OutputGradient:
    """‖e_t‖² of the last layer, for ``record.with_direct``: the direct part of the gradient, which the statistics lack.

    Make one after each forward and before its backward. It costs one pass over the gradient of the output, and keeps
    8·D·T·B bytes on its device. Lower layers have no output that a user holds: theirs stays unknown.

    Args:
        rnn: the module.
        output: what it returned first, as it returned it: (T, B, D·H), (B, T, D·H), (T, D·H) or a PackedSequence.
        lengths: what the forward was given as ``lengths``.

    Raises:
        ValueError: ``output`` needs no gradient, is not the module's, or lengths that do not fit.

    Example::

        output, _ = rnn(x)
        arriving = rnnkern.gradflow.OutputGradient(rnn, output)
        loss(output).backward()
        record = flow.read()["rnn"].with_direct(arriving)
        record.direct_share, record.cosine
    """

    def __init__(
        self, rnn: RNN, output: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
    ) -> None:
        rows = output.data if isinstance(output, PackedSequence) else output
        self.layers, self.directions = rnn.num_layers, 2 if rnn.bidirectional else 1
        if not rows.requires_grad:
            raise ValueError("output must require grad: no gradient arrives at it")
        if rows.shape[-1] != self.directions * rnn.hidden_size:
            raise ValueError(f"output must have {self.directions * rnn.hidden_size} features, got {rows.shape[-1]}")
        self._packed = output if isinstance(output, PackedSequence) else None
        if self._packed is not None:
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which has its own")
            sizes = self._packed.batch_sizes
            sorted_lengths = (sizes[:, None] > torch.arange(int(sizes[0]), device="cpu")).sum(0)
            unsorted = self._packed.unsorted_indices
            self._lengths = sorted_lengths if unsorted is None else sorted_lengths[unsorted.cpu()]
            self._packed = PackedSequence(rows[:0].detach(), *self._packed[1:])  # its rows would keep the graph
        else:
            self._batch_first = rnn.batch_first and rows.dim() == 3
            T, B = (rows.shape[0], 1) if rows.dim() == 2 else rows.shape[:2]
            T, B = (B, T) if self._batch_first else (T, B)
            full = torch.full((B,), T, device="cpu")
            self._lengths = full if lengths is None else checked(lengths, T, B, rnn.allow_empty)
            self._T = T
        self.rounding = ROUNDING if rows.dtype != torch.float64 else float(torch.finfo(torch.float64).eps)
        self._squares: Tensor | None = None
        rows.register_hook(self._receive)

    def _receive(self, grad: Tensor | None) -> None:
        if grad is None:  # the loss used h_n alone
            return
        by_direction = grad.detach().unflatten(-1, (self.directions, -1))
        squares = torch.linalg.vector_norm(by_direction, dim=-1, dtype=torch.float64).square()
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def lengths(self) -> Ints:
        """(B,) steps of each sample."""
        return self._lengths.numpy().astype(np.int64)

    def squares(self) -> Floats:
        """(layers, directions, T, B) in input order, NaN for all layers but the last; waits for the device."""
        T, B = (self._T if self._packed is None else len(self._packed.batch_sizes)), len(self._lengths)
        rows = np.zeros((T, B, self.directions))
        if self._squares is not None:
            if self._packed is not None:
                padded, _ = torch.nn.utils.rnn.pad_packed_sequence(PackedSequence(self._squares, *self._packed[1:]))
                rows = padded.cpu().numpy()
            else:
                dense = self._squares.transpose(0, 1) if self._batch_first else self._squares
                rows = dense.cpu().numpy().reshape(T, B, self.directions)
        result = np.full((self.layers, self.directions, T, B), np.nan)
        result[-1] = rows.transpose(2, 0, 1)
        return result
