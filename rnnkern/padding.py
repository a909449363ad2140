"""Padded input beside the lengths of its samples: packed on the way in, padded with zeros on the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnkern.functional import Output


def run(
    packed: Callable[..., Output],
    input: Tensor,  # (T, B, I)
    hx: Tensor | None,  # (layers·D, B, H)
    lengths: Tensor | Sequence[int],  # (B,)
    allow_empty: bool,
    with_states: bool,
) -> Output:
    """``packed(data, hx, batch_sizes, sorted_indices, unsorted_indices, with_states)`` on what each sample has."""
    T, B = input.shape[:2]
    steps = checked(lengths, T, B, allow_empty)
    present = None if steps.all() else steps.nonzero().flatten()  # of samples that have a step at all
    if present is not None and len(present) == 0:  # none has
        return _padded(packed(input[:0], hx, with_states=with_states), lambda rows: rows.new_zeros(T, *rows.shape[1:]))
    x, h0 = input, hx
    if present is not None:
        on_device = present.to(input.device)
        steps, x = steps[present], input.index_select(1, on_device)
        h0 = None if hx is None else hx.index_select(1, on_device)
    sequence = pack_padded_sequence(x, steps, enforce_sorted=False)
    result = _padded(
        packed(*(sequence.data, h0, *sequence[1:]), with_states=with_states),
        lambda rows: pad_packed_sequence(PackedSequence(rows, *sequence[1:]), total_length=T)[0],
    )
    if present is None:
        return result
    result = _padded(result, lambda rows: rows.new_zeros(T, B, rows.shape[2]).index_copy(1, on_device, rows))
    before = result.h_n.new_zeros(result.h_n.shape[0], B, result.h_n.shape[2]) if hx is None else hx.to(result.h_n)
    return result._replace(h_n=before.index_copy(1, on_device, result.h_n))


def _padded(result: Output, pad: Callable[[Tensor], Tensor]) -> Output:
    return Output(pad(result.output), result.h_n, [pad(rows) for rows in result.states])


def checked(lengths: Tensor | Sequence[int], T: int, B: int, allow_empty: bool) -> Tensor:
    """lengths as (B,) int64 on the CPU.

    Raises:
        ValueError: their number is not B, they are no ints, or one is not in [1, T], or [0, T] where that is allowed.
    """
    steps = torch.as_tensor(lengths, device="cpu")
    if steps.dim() != 1 or len(steps) != B:
        raise ValueError(f"lengths must have shape (B,) = ({B},), got {tuple(steps.shape)}")
    if B and (steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool):
        raise ValueError(f"lengths must be integers, got {steps.dtype}")
    least = 0 if allow_empty else 1
    for b, length in enumerate(steps.tolist()):
        if not least <= length <= T:
            hint = " (allow_empty=True allows 0)" if length == 0 else ""
            raise ValueError(f"lengths must be in [{least}, {T}], got {length} for sample {b}{hint}")
    return steps.long()
