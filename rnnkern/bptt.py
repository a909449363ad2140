"""Truncated backpropagation through time: long sequences in chunks, whose state goes on and whose graph ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from rnnkern.gradflow import Flow


class TruncatedBPTT:
    """Cuts sequences into chunks and carries the state from each to the next, detached (Williams & Peng 1990).

    The state also goes on from one call of :meth:`chunks` to the next, as in a corpus that is read on and on; where a
    new sequence begins, call :meth:`reset`.

    Args:
        steps: length of a chunk; the last one of a sequence may be shorter.
        hx: the state to begin with: a tensor, or tensors in tuples, lists and dicts. None leaves it to the model.
        dim: of time in the tensors that are cut; 1 for ``batch_first``.
        flow: what :func:`rnnkern.watch` returned: the chunks of one call of :meth:`chunks` are then one record, whose
            T is that of the whole sequence.

    Raises:
        ValueError: ``steps`` is not a positive int.

    Example::

        bptt = rnnkern.TruncatedBPTT(35)
        for x, y in bptt.chunks(inputs, targets):  # (T, B, ·) each
            output, bptt.hx = model(x, bptt.hx)
            loss(output, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(self, steps: int, hx: Any = None, *, dim: int = 0, flow: Flow | None = None) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive int, got {steps!r}")
        self.steps, self.dim, self.flow = steps, dim, flow
        self.hx = hx

    @property
    def hx(self) -> Any:
        """The state at the beginning of a chunk, detached; assign the one at its end."""
        return self._hx

    @hx.setter
    def hx(self, hx: Any) -> None:
        self._hx, self._carried = hx, True

    def reset(self, hx: Any = None) -> None:
        """Begin a new sequence."""
        self.hx = hx

    def chunks(self, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The chunks of sequences that run side by side: a tuple with a view of each.

        Raises:
            ValueError: there is no sequence, or they differ in length.
            RuntimeError: ``hx`` was not assigned in the chunk before.
        """
        lengths = [sequence.shape[self.dim] for sequence in sequences]
        if not lengths or min(lengths) != max(lengths):
            raise ValueError(f"sequences must have one length along dim {self.dim}, got {lengths}")
        return self._cut(sequences)

    def _cut(self, sequences: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        with nullcontext() if self.flow is None else self.flow.sequence() as next_chunk:
            for number, parts in enumerate(zip(*(s.split(self.steps, self.dim) for s in sequences))):
                if number and not self._carried:
                    raise RuntimeError(
                        "the state was not carried on: assign hx in every chunk, `_, bptt.hx = model(..)`"
                    )
                self._hx, self._carried = tree_map_only(Tensor, Tensor.detach, self._hx), False
                if next_chunk is not None:
                    next_chunk()
                yield parts
