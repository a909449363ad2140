"""A plain layer of one direction on a CPU: one node of the autograd graph, and one operator each way.

Where a sequence is short, the way through PyTorch's operators and nodes takes longer than what they compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import backends, extension, ops, products
from rnnkern.autograd import backward_chain, grad_w_hh_of, is_eager, is_observed, is_wanted

#: w_ih (H, I), w_hh (H, H), b_ih (H), b_hh (H); the biases may be None
LayerWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

#: Multiply-adds that take as long as reading a number from memory.
_WORK_OF_READING = 8


class ReceivingTaps(ABC):
    """Taps of one forward (:data:`rnnkern.functional.Taps`) that tell who receives the statistics. A backward that
    hands them over itself needs no tap, which is a tensor and a node of the graph more.

    Attributes:
        anchor: a leaf of the graph that nobody else knows: ``backward()`` has a use for its gradient, and
            ``autograd.grad`` has none.
    """

    __slots__ = ("anchor",)
    anchor: Tensor

    @abstractmethod
    def __call__(self, layer: int, direction: int) -> Tensor:
        """A tap: (4, T, B) float64, requires grad."""

    @abstractmethod
    def receiver(self, layer: int, direction: int) -> Callable[[Tensor], None]:
        """Who receives the statistics (4, T, B) of one backward instead."""


def serves(given: Sequence[Tensor]) -> bool:
    """Whether the operators for whole layers take these: the input (T, B, I), T > 0, states and weights."""
    input, dtype = given[0], given[0].dtype
    return (
        is_eager()
        and not backends.is_named(other_than="cpu")
        and not is_observed()
        and not torch._C._is_any_autocast_enabled()
        and not torch.jit.is_tracing()
        and all(products.is_plain(x) and x.dtype is dtype for x in given)
        and input.dim() == 3
        and input.shape[0] > 0
        and (dtype in (torch.float32, torch.float64) or (dtype in products.HALVES and not products.is_slow(dtype)))
        and extension.unavailable() is None
    )


def layers(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[LayerWeights],
    nonlinearity: str,
    clip: float,
    taps: Callable[[int, int], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Output (T, B, H) and h_n (layers, B, H) of a net over ``input`` (T, B, I) from h0 (layers, B, H)."""
    h_n = []
    for i in range(len(weights)):
        input, last = layer(i, input, h0, weights, nonlinearity, clip, taps)
        h_n.append(last)
    return input, h_n[0] if len(weights) == 1 else torch.cat(h_n)


def layer(
    i: int,
    input: Tensor,
    h0: Tensor,
    weights: Sequence[LayerWeights],
    nonlinearity: str,
    clip: float,
    taps: Callable[[int, int], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """h (T, B, H) and h_n (1, B, H) of the i-th of these layers, over ``input`` (T, B, I); its ``weights`` with both
    biases or neither."""
    w_ih, w_hh, b_ih, b_hh = weights[i]
    x, state = input.contiguous(), h0 if len(weights) == 1 else h0[i : i + 1]
    # A tap requires grad: alone it would make the output of a frozen net require grad too.
    tapped = taps is not None and any(v is not None and v.requires_grad for v in (x, state, *weights[i]))
    tap, receive = None, None
    if taps is not None and tapped:
        tap, receive = (taps.anchor, taps.receiver(i, 0)) if isinstance(taps, ReceivingTaps) else (taps(i, 0), None)
    return LayerFunction.apply(x, state, w_ih, w_hh, tap, b_ih, b_hh, nonlinearity, clip, receive)


class LayerFunction(torch.autograd.Function):
    """``apply(x, h0, w_ih, w_hh, tap, b_ih, b_hh, nonlinearity, clip, receive)`` returns h (T, B, H) and h_n (1, B, H)
    for a contiguous x (T, B, I) and h0 (1, B, H). For ``tap`` see :class:`rnnkern.autograd.RNNFunction`; where
    ``receive`` is given, it is called with the statistics, and ``tap``, a tensor of any kind, has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        tap: Tensor | None,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        nonlinearity: str,
        clip: float,
        receive: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
        h, h_n = ops.layers(x, h0, weights, len(weights) == 4, False, nonlinearity)
        ctx.options = nonlinearity, clip
        ctx.tapped, ctx.receive = tap is not None, receive
        ctx.save_for_backward(x, h0, w_ih, w_hh, h)
        ctx.set_materialize_grads(False)
        return h, h_n

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_hn: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, w_ih, w_hh, h = ctx.saved_tensors
        if grad_h is None:
            grad_h = h.new_zeros(()).expand_as(h)
        rows, H, I = h.shape[0] * h.shape[1], h.shape[2], x.shape[2]
        for_x, for_w_ih, for_w_hh = (is_wanted(ctx, i, rows * H * k) for i, k in ((0, I), (2, I), (3, H)))
        # What is mapped over, as by autograd.grad(is_grads_batched=True), is of no use outside of its map.
        with_stats = ctx.tapped and (ctx.receive is None or is_eager()) and is_wanted(ctx, 4)
        absent = 0 if ctx.tapped else 1
        for_b_ih, for_b_hh = (is_wanted(ctx, i, rows * H * _WORK_OF_READING, absent) for i in (5, 6))
        for_b = for_b_ih or for_b_hh
        grad_x = grad_w_ih = grad_b = grad_w_hh = None
        if torch.is_grad_enabled() or not is_eager() or products.is_batched(grad_h):
            # This backward may be differentiated itself, or is mapped over.
            last = None if grad_hn is None else grad_hn[0]
            chain = (grad_h, last, h, h0[0], w_hh, None, False, *ctx.options)
            delta, grad_h0, stats = backward_chain("cpu", with_stats, *chain)
            # Not flatten, for which the batches of autograd.grad(is_grads_batched=True) have no rule.
            flat = delta.reshape(rows, H)
            grad_h0 = grad_h0[None]
            if for_x:
                grad_x = delta @ w_ih
            if for_w_ih:
                grad_w_ih = flat.T @ x.reshape(rows, I)
            if for_w_hh:
                grad_w_hh = grad_w_hh_of(delta, h, h0[0], None, False)
            if for_b:
                grad_b = flat.sum(0)
        else:
            grad_x, grad_w_ih, grad_b, grad_w_hh, grad_h0, stats = ops.layer_backward(
                grad_h, grad_hn, x, w_ih, h, h0, w_hh, *ctx.options, for_x, for_w_ih, for_b, for_w_hh, with_stats
            )
        # Parameters that received one tensor would both change with it.
        grad_b_hh = grad_b.clone() if grad_b is not None and for_b_ih and for_b_hh else grad_b
        grads_b = grad_b if for_b_ih else None, grad_b_hh if for_b_hh else None
        if stats is not None and ctx.receive is not None:
            ctx.receive(stats)
            stats = None
        return grad_x, grad_h0, grad_w_ih, grad_w_hh, stats, *grads_b, None, None, None
