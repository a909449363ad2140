"""The recurrence as a loop that autograd sees through, for what no kernel computes.

    h_t = f(LN(z_t + (h_{t-1} ⊙ m) W_hhᵀ))        m: recurrent dropout's mask, one per sequence; LN: layer normalisation

Either part may be missing. Statistics and clipping mean what they mean in the kernels: g_t, r_t and δ_t = ∂L/∂z_t are
observed where they pass, and g_t is clamped after it has been.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern import backends, contract
from rnnkern.reference import activation, join_steps, split_steps, with_rows

INF = float("inf")


def recurrence(
    z: Tensor,  # (T, B, H), or (N, H) with batch_sizes
    h0: Tensor,  # (B, H)
    w_hh: Tensor,  # (H, H)
    *,
    mask: Tensor | None = None,  # (B, H)
    norm: tuple[Tensor, Tensor] | None = None,  # weight (H), bias (H)
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    clip: float = INF,
    tap: Tensor | None = None,  # (4, T, B)
) -> tuple[Tensor, Tensor]:
    """h like ``z`` and h_n (B, H), differentiable to any order. Arguments as of :func:`rnnkern.autograd.recurrence`.

    Forward-mode AD passes through as long as there is neither a tap nor clipping.

    Raises:
        RuntimeError: an argument that does not fit, or a backend named by the caller that is not the reference.
    """
    features = [name for name, given in (("recurrent_dropout", mask), ("layer_norm", norm)) if given is not None]
    backends.require_reference(" and ".join(features))
    contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
    steps = split_steps(z, batch_sizes)
    T, H = len(steps), h0.shape[1]
    taps = (None,) * T if tap is None else tap.unbind(1)
    h: list[Tensor] = [z] * T
    state = h0  # of every sample, as the next step sees it
    for t in reversed(range(T)) if reverse else range(T):
        z_t, tap_t = steps[t], taps[t]
        earlier = state if mask is None else state * mask
        a = _observed(z_t, tap_t, DELTA) + earlier[: z_t.shape[0]] @ w_hh.T
        if norm is not None:
            a = F.layer_norm(a, (H,), *norm).to(z.dtype)  # autocast normalises in float32
        h_t = _observed(activation(nonlinearity, a), tap_t, TOTAL, clip)
        h[t] = _observed(h_t, tap_t, DIRECT)
        state = with_rows(state, _observed(h_t, tap_t, RECURRENT))
    return join_steps(h, z), state.clone()


#: the rows of the statistics
TOTAL, RECURRENT, DELTA, DIRECT = range(4)


def _observed(x: Tensor, tap: Tensor | None, kind: int, clip: float = INF) -> Tensor:
    """x, whose gradient is clamped to ±clip, and before that leaves its squared norms in the tap's gradient."""
    return x if tap is None and clip == INF else Observed.apply(x, tap, kind, clip)


class Observed(torch.autograd.Function):
    """``apply(x (n, H), tap (4, B) or (3, B), kind, clip)`` returns x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tap: Tensor | None, kind: int, clip: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tap, ctx.kind, ctx.clip = inputs
        ctx.shape = None if tap is None else tap.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stats = None
        if ctx.shape is not None and ctx.needs_input_grad[1]:
            kinds, B = ctx.shape
            with torch.no_grad():
                squares = F.pad(grad.double().square().sum(-1), (0, B - grad.shape[0]))
                stats = torch.stack(
                    [squares if kind == ctx.kind else torch.zeros_like(squares) for kind in range(kinds)]
                )
        return grad if ctx.clip == INF else grad.clamp(-ctx.clip, ctx.clip), stats, None, None
