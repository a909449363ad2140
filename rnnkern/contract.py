"""What every operator expects of its arguments, and the words in which it refuses the rest.

The C++ bindings check the same (csrc/checks.h); these serve the reference and the operators' fake implementations.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from rnnkern.reference import NONLINEARITIES


def check_recurrence(
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> None:
    """Raise RuntimeError naming the argument, what came and what was expected."""
    _check_chain("z", z, h0, w_hh, batch_sizes, nonlinearity)


def check_recurrence_backward(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    clip: float = float("inf"),
) -> None:
    """Raise RuntimeError naming the argument, what came and what was expected."""
    _check_chain("h", h, h0, w_hh, batch_sizes, nonlinearity)
    _check_shape("grad_h", grad_h, tuple(h.shape))
    _check_same("grad_h", grad_h, "h", h)
    if grad_hn is not None:
        _check_shape("grad_hn", grad_hn, tuple(h0.shape))
        _check_same("grad_hn", grad_hn, "h", h)
    if not clip > 0:
        raise RuntimeError(f"clip must be positive (inf for none), got {clip}")


def check_writable(name: str, value: Tensor) -> None:
    """Raise RuntimeError where two elements of a tensor to be written could lie at the same address."""
    if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride())):
        raise RuntimeError(
            f"{name} must have an address of its own for every element to be written, got an expanded tensor"
        )


def _check_chain(
    name: str, rows: Tensor, h0: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, nonlinearity: str
) -> None:
    """``rows``: z or h, whichever the operator takes."""
    expected = "(T, B, H)" if batch_sizes is None else "(N, H), packed by batch_sizes"
    if rows.dim() != (3 if batch_sizes is None else 2):
        raise RuntimeError(f"{name} must have shape {expected}, got {list(rows.shape)}")
    if nonlinearity not in NONLINEARITIES:
        raise RuntimeError(f"nonlinearity must be 'tanh' or 'relu', got '{nonlinearity}'")
    _check_same("h0", h0, name, rows)
    _check_same("w_hh", w_hh, name, rows)
    H = rows.shape[-1]
    _check_shape("w_hh", w_hh, (H, H))
    if h0.dim() != 2:
        raise RuntimeError(f"h0 must have shape (B, H), got {list(h0.shape)}")
    _check_batch(name, rows, h0.shape[0], batch_sizes)
    _check_shape("h0", h0, (h0.shape[0], H))


def _check_batch(name: str, rows: Tensor, B: int, batch_sizes: Tensor | None) -> None:
    if batch_sizes is None:
        if rows.shape[1] != B:
            raise RuntimeError(f"h0 must have shape (B, H) = {[*rows.shape[1:]]}, got {[B, rows.shape[2]]}")
        return
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if isinstance(batch_sizes, FakeTensor):
        return  # its values are not known while a graph is traced
    sizes = batch_sizes.tolist()
    if any(n <= 0 for n in sizes) or any(a < b for a, b in pairwise(sizes)):
        raise RuntimeError(f"batch_sizes must be positive and non-increasing, got {sizes}")
    if sum(sizes) != rows.shape[0]:
        raise RuntimeError(f"batch_sizes must add up to {name}.size(0) = {rows.shape[0]}, got a sum of {sum(sizes)}")
    if sizes and sizes[0] != B:
        raise RuntimeError(f"h0 must have batch_sizes[0] = {sizes[0]} rows, got {B}")


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise RuntimeError(f"{name} must have shape {list(expected)}, got {list(value.shape)}")


def _check_same(name: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise RuntimeError(f"{name} must have the dtype of {other} ({like.dtype}), got {value.dtype}")
    if value.device != like.device:
        raise RuntimeError(f"{name} must be on the device of {other} ({like.device}), got {value.device}")
