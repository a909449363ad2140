"""Both directions of a layer as one node: one projection, one output, and on few rows a thread for each.

The directions lie side by side in z and h, (T, B, 2H), where the kernels walk one half each: nothing is copied to join
them, and one product serves both on the way in and on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import backends, ops, projection, reference
from rnnkern.autograd import RNNBackwardFunction, grad_w_hh_of, is_eager, is_observed, is_wanted, wants_gradient

Pair = tuple[Tensor, Tensor]  # of the forward direction, and of the reverse one


def serves(input: Tensor, h0: Pair, weights: Sequence[tuple[Tensor | None, ...]], batch_sizes: Tensor | None) -> bool:
    """Whether :func:`layer` computes this layer: that takes the CPU kernels, and eager autograd. A single step is no
    chain, and goes its own way; so do directions of which one has gradients that nobody asks for."""
    if not (h0[0].is_cpu and is_eager()) or is_observed() or (batch_sizes is None and input.shape[0] == 1):
        return False
    if torch.is_grad_enabled() and any(
        x.requires_grad != y.requires_grad for x, y in zip(*weights) if x is not None and y is not None
    ):
        return False
    return backends.select(h0[0]) is backends.BACKENDS["cpu"]


def layer(
    input: Tensor,
    h0: Pair,
    w_ih: Pair,
    w_hh: Pair,
    b: tuple[Tensor | None, Tensor | None],
    *,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    clip: float,
    autocast: torch.dtype | None,
    taps: Callable[[int], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (T, B, 2H), or packed (N, 2H), of a layer over ``input`` (.., I), and h_n (B, H) of either direction.

    ``w_ih`` (H, I), ``w_hh`` (H, H) and ``b`` (H), the sum of both biases; ``taps`` makes the tap of a direction;
    ``autocast`` is the dtype of autocast where that is on.
    """
    biases = None if b[0] is None or b[1] is None else torch.cat([b[0], b[1]])
    # F.linear takes other products for rows with gaps, and which ones depends on whether gradients are wanted.
    z = projection.linear(input.contiguous(), torch.cat(w_ih), biases, autocast)
    if not wants_gradient(z, *h0, *w_hh):
        ops.bidirectional_(z, h0, w_hh, batch_sizes, nonlinearity)
        return z, *_last_states(z, h0, batch_sizes)
    # A tap requires grad: alone it would make the output of a frozen net require grad too.
    tapped = [taps is not None and any(x.requires_grad for x in (z, h0[i], w_hh[i])) for i in range(2)]
    tap, tap_reverse = (taps(i) if taps is not None and tapped[i] else None for i in range(2))
    return BidirectionalFunction.apply(z, *h0, *w_hh, tap, tap_reverse, batch_sizes, nonlinearity, clip)


class BidirectionalFunction(torch.autograd.Function):
    """:class:`rnnkern.autograd.RNNFunction` for both directions of a layer; ``z`` is consumed."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        h0: Tensor,
        h0_reverse: Tensor,
        w_hh: Tensor,
        w_hh_reverse: Tensor,
        tap: Tensor | None,
        tap_reverse: Tensor | None,
        batch_sizes: Tensor | None,
        nonlinearity: str,
        clip: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = z.detach()
        ops.bidirectional_(h, (h0, h0_reverse), (w_hh, w_hh_reverse), batch_sizes, nonlinearity)
        ctx.nonlinearity, ctx.clip = nonlinearity, clip
        ctx.tapped = tap is not None, tap_reverse is not None
        ctx.save_for_backward(h, h0, h0_reverse, w_hh, w_hh_reverse, batch_sizes)
        ctx.set_materialize_grads(False)
        return h, *_last_states(h, (h0, h0_reverse), batch_sizes)

    @staticmethod
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_hn: Tensor | None, grad_hn_reverse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        h, *pairs, batch_sizes = ctx.saved_tensors
        h0, w_hh = pairs[:2], pairs[2:]
        grads_hn = grad_hn, grad_hn_reverse
        if grad_h is None:
            grad_h = h.new_zeros(()).expand_as(h)
        counts = [ctx.tapped[i] and is_wanted(ctx, 5 + i) for i in range(2)]
        if torch.is_grad_enabled() or not is_eager():  # this backward may be differentiated itself, or mapped over
            chains = [
                RNNBackwardFunction.apply(
                    e, grads_hn[i], s, h0[i], w_hh[i], batch_sizes, i == 1, ctx.nonlinearity, ctx.clip, "cpu", counts[i]
                )
                for i, (e, s) in enumerate(zip(_halves(grad_h), _halves(h)))
            ]
            delta, grad_h0 = torch.cat([chain[0] for chain in chains], -1), [chain[1] for chain in chains]
            stats: Any = [chain[2] for chain in chains]
        else:
            delta, *grad_h0, stats = ops.bidirectional_backward(
                grad_h, grads_hn, h, tuple(h0), tuple(w_hh), batch_sizes, ctx.nonlinearity, ctx.clip, any(counts)
            )
        grad_w_hh = [
            grad_w_hh_of(d, s, h0[i], batch_sizes, i == 1) if is_wanted(ctx, 3 + i, d.numel() * s.shape[-1]) else None
            for i, (d, s) in enumerate(zip(_halves(delta), _halves(h)))
        ]
        return delta, *grad_h0, *grad_w_hh, *(stats[i] if counts[i] else None for i in range(2)), None, None, None


def _halves(rows: Tensor) -> Pair:
    forward, reverse = rows.chunk(2, -1)
    return forward, reverse


def _last_states(h: Tensor, h0: Pair, batch_sizes: Tensor | None) -> Pair:
    forward, reverse = _halves(h)
    return (
        reference.last_states(forward, h0[0], batch_sizes, False),
        reference.last_states(reverse, h0[1], batch_sizes, True),
    )
