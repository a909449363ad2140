"""Products over all rows of a sequence, where PyTorch's are slow.

In bfloat16 and float16, where the processor has no instructions for them, PyTorch multiplies in plain loops, up to 50
times slower than in float32. Here the rows are widened to float32, some at a time, multiplied and summed in float32,
and rounded once. Each product is our own operator's or has an ``out=``, which autocast leaves alone.

Where it has tiles of bfloat16 (AMX) PyTorch's products are fast, but for the gradient of a weight, which sums over the
rows: for that one there is a kernel (csrc/cpu/weight_gradient_tiles.inc).

In every dtype a chain that vanishes leaves the products after it with zeros, and with what some processors take a
hundred times as long for, subnormal numbers: ``rnnkern::input_gradient`` and ``weight_gradient`` leave out the rows of
zeros, and flush subnormals. For a layer that :mod:`rnnkern.layer_function` serves, its own operator does all of this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern import backends, extension, ops

#: the dtypes, and how oneDNN, which has PyTorch's fast products of them, is asked whether it serves them here
HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

#: Elements of the float32 copies of one chunk of rows: 1 MiB. On an EPYC (Zen 3, 512 KiB of second cache a core), one
#: thread, bfloat16, it was the fastest of 256 KiB to 16 MiB for H = 64 and 256, or within 5 %, and 4 MiB took up to 3
#: times as long (2026-11). At H = 1024 all are alike. To tune it again, time linear() and weight_gradient() for
#: (N, I, H) = (16384, 64, 64) and (8192, 256, 256) on other values.
CHUNK = 1 << 18

#: Below, PyTorch's loops are faster: widening W takes as long as they do, or the calls take longer than the product.
#: Same machine; the break-even lies at 10 to 60 rows for H = 256 and 1024, and at about 64 for H = 64.
LEAST_ROWS, LEAST_WORK = 16, 1 << 18  # N, and N·I·H

#: The same where PyTorch's products are fast: what is to win has to pay for a node of the graph in Python. The kernel
#: on tiles saves about 80 µs at this size, (N, I, H) = (4096, 64, 64), on two threads of a Xeon (an estimate).
LEAST_WORK_ON_TILES = 1 << 24
#: Elsewhere only a chain that vanishes wins; others lose about 130 µs, 2 % of a training step of this size.
LEAST_WORK_THAT_VANISHES = 1 << 27


def takes(dtype: torch.dtype, rows: Tensor, width: int) -> bool:
    """Whether products in ``dtype`` of rows, (N, I) or (T, B, I), with ``width`` numbers for each are for this
    module."""
    return widens(dtype, rows, width) or (
        rows.numel() * width >= (LEAST_WORK_ON_TILES if has_tiles(dtype) else LEAST_WORK_THAT_VANISHES)
        and dtype in (torch.float32, torch.float64, *HALVES)
        and is_plain(rows)
        and not is_batched(rows)
        and not backends.is_named(other_than="cpu")
        and extension.unavailable() is None
    )


def widens(dtype: torch.dtype, rows: Tensor, width: int) -> bool:
    """Whether these products are computed in float32."""
    return (
        dtype in HALVES
        and is_plain(rows)
        and not is_batched(rows)
        and is_slow(dtype)
        and extension.unavailable() is None
        and rows.numel() * width >= LEAST_WORK
        and math.prod(rows.shape[:-1]) >= LEAST_ROWS
    )


def is_plain(x: Tensor) -> bool:
    """On the CPU, and of no class that may have a dispatch of its own."""
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter)


def is_batched(x: Tensor) -> bool:
    """Whether this is a gradient of ``autograd.grad(is_grads_batched=True)``, which stands for many and takes part only
    in what makes new tensors."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of bfloat16 or float16 on the CPU are plain loops: oneDNN does not serve the dtype on
    this processor, is switched off, or was not built in."""
    return dtype in HALVES and not (torch.backends.mkldnn.enabled and _is_served(dtype))


@functools.cache
def _is_served(dtype: torch.dtype) -> bool:
    supported = getattr(torch.ops.mkldnn, HALVES[dtype], None)
    return supported is not None and supported()


@functools.cache
def has_tiles(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for the gradient of a weight."""
    return dtype == torch.bfloat16 and extension.unavailable() is None and torch.ops.rnnkern.cpu_isa() == "amx"


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (N, I) or (T, B, I), w (H, I) and b (H), in the dtype of x. Not differentiable."""
    if not is_slow(x.dtype):
        return F.linear(x, w, b)
    H = w.shape[0]
    z = x.new_empty(*x.shape[:-1], H)
    w_t, bias = w.float().T, None if b is None else b.float()
    for part, into in _chunks(x, z):
        rows = _widened(part)
        product = rows.new_empty(rows.shape[0], H)
        if bias is None:
            torch.mm(rows, w_t, out=product)
        else:
            torch.addmm(bias, rows, w_t, out=product)
        into.copy_(product.view(into.shape))
    return z


def input_gradient(delta: Tensor, w: Tensor) -> Tensor:
    """δ W (.., I) for δ (N, H) or (T, B, H) and w (H, I), in the dtype of δ. Not differentiable."""
    if not is_slow(delta.dtype):
        return ops.input_gradient(delta.flatten(0, -2), w).view(*delta.shape[:-1], w.shape[1])
    grad, w = delta.new_empty(*delta.shape[:-1], w.shape[1]), w.float()
    for part, into in _chunks(delta, grad):
        into.copy_(ops.input_gradient(_widened(part), w).view(into.shape))
    return grad


def weight_gradient(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of δᵀ x (H, I) over pairs of δ (N, H) or (T, B, H) and x of as many rows. Not differentiable."""
    delta, x = pairs[0]
    if not is_slow(x.dtype):
        deltas, xs = ([rows.flatten(0, -2) for rows in side] for side in zip(*pairs))
        return ops.weight_gradient(deltas, xs)
    total = x.new_zeros(delta.shape[-1], x.shape[-1], dtype=torch.float32)
    for pair in pairs:
        for delta, x in _chunks(*pair):
            total += ops.weight_gradient([_widened(delta)], [_widened(x)])
    return total.to(pairs[0][1].dtype)


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a and b (T, B, ·) or (N, ·): whole steps where some fit in, else parts of one. The float32 copies of a
    piece take CHUNK elements, or as many as a float32 (H, I) where that is larger."""
    widths = a.shape[-1], b.shape[-1]
    rows = max(1, max(CHUNK, widths[0] * widths[1]) // max(1, sum(widths)))
    if math.prod(a.shape[:-1]) <= rows:
        yield a, b
        return
    if a.dim() == 2:
        a, b = a[None], b[None]
    steps = max(1, rows // a.shape[1])
    for a_steps, b_steps in zip(a.split(steps), b.split(steps)):
        yield from zip(a_steps.split(rows, 1), b_steps.split(rows, 1))


def _widened(part: Tensor) -> Tensor:
    """The rows of a piece, (n, ·)."""
    return part.flatten(0, -2).float()
