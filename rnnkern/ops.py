"""The operators: their fake implementations for tracing, their rules under vmap, and the one call into a backend.

Schemas stand in csrc/ops.cpp; ``rnnkern::recurrence`` and its backwards dispatch on the device of their tensors.
``rnnkern::triton_recurrence`` and its backwards are the same for the Triton backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnkern import contract, extension
from rnnkern.backends import BACKENDS


def recurrence(
    backend: str,
    z: Tensor,  # (T, B, H), or (N, H) with batch_sizes
    h0: Tensor,  # (B, H)
    w_hh: Tensor,  # (H, H)
    batch_sizes: Tensor | None,  # (T,) int64 on the CPU, non-increasing
    reverse: bool,
    nonlinearity: str,
) -> Tensor:
    """The states h, shaped like z: h_t = f(z_t + h_{t-1} W_hhᵀ)."""
    return BACKENDS[backend].recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)


def recurrence_(
    backend: str,
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
) -> None:
    """As recurrence, with h in z's place."""
    BACKENDS[backend].recurrence_(z, h0, w_hh, batch_sizes, reverse, nonlinearity)


def recurrence_backward(
    backend: str,
    grad_h: Tensor,  # like h
    grad_hn: Tensor | None,  # (B, H)
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """delta = ∂L/∂z like h, and grad_h0 (B, H)."""
    return BACKENDS[backend].recurrence_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)


def recurrence_backward_stats(
    backend: str,
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """delta, grad_h0, and stats (4, T, B) float64 = ‖g_t‖², ‖r_t‖², ‖δ_t‖², ‖e_t‖²; 0 where a sample has no step."""
    return BACKENDS[backend].recurrence_backward_stats(
        grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip
    )


def bidirectional_(
    z: Tensor,  # (T, B, 2H), or (N, 2H) with batch_sizes: the directions side by side
    h0: tuple[Tensor, Tensor],  # (B, H) each
    w_hh: tuple[Tensor, Tensor],  # (H, H) each
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> None:
    """Both directions of a layer at once, on the CPU: h in z's place, its second half walked from the last step."""
    torch.ops.rnnkern.bidirectional_(z, *h0, *w_hh, batch_sizes, nonlinearity)


def bidirectional_backward(
    grad_h: Tensor,  # like h
    grad_hn: tuple[Tensor | None, Tensor | None],  # (B, H) each
    h: Tensor,
    h0: tuple[Tensor, Tensor],
    w_hh: tuple[Tensor, Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    clip: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta like h, grad_h0 (B, H) of each direction, and stats (2, 4, T, B), or (0) without."""
    return torch.ops.rnnkern.bidirectional_backward(
        grad_h, *grad_hn, h, *h0, *w_hh, batch_sizes, nonlinearity, clip, with_stats
    )


def layers(
    input: Tensor,  # (T, B, I), T > 0
    h0: Tensor | None,  # (layers·directions, B, H); None for zeros
    weights: list[Tensor],  # w_ih, w_hh, and if has_biases b_ih, b_hh, of each layer and direction
    has_biases: bool,
    bidirectional: bool,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Output (T, B, directions·H) and h_n like h0 of a whole net, without gradients, on a CPU."""
    return torch.ops.rnnkern.layers.default(input, h0, weights, has_biases, bidirectional, nonlinearity)


def layer_backward(
    grad_h: Tensor,  # like h
    grad_hn: Tensor | None,  # (1, B, H)
    x: Tensor,  # (T, B, I), T > 0
    w_ih: Tensor,  # (H, I)
    h: Tensor,  # (T, B, H)
    h0: Tensor,  # (1, B, H)
    w_hh: Tensor,  # (H, H)
    nonlinearity: str,
    clip: float,
    *wanted: bool,  # the gradients of x, w_ih, b and w_hh, and the statistics
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The gradients of x, w_ih, either bias, w_hh and h0 of a plain layer, and stats as above, on a CPU."""
    return torch.ops.rnnkern.layer_backward.default(grad_h, grad_hn, x, w_ih, h, h0, w_hh, nonlinearity, clip, *wanted)


def weight_gradient(delta: list[Tensor], x: list[Tensor]) -> Tensor:
    """The sum of δᵀ x (H, I) over pairs of δ (N, H) and x (N, I), on a CPU, with subnormals flushed to zero."""
    return torch.ops.rnnkern.weight_gradient.default(delta, x)


def input_gradient(delta: Tensor, w: Tensor) -> Tensor:
    """δ W (N, I) for δ (N, H) and w (H, I), on a CPU, with subnormals flushed to zero."""
    return torch.ops.rnnkern.input_gradient.default(delta, w)


def needed_rows(delta: Tensor, x: Tensor) -> list[int]:
    """begin, end, begin, end, ... of the rows that these two do not leave out: outside of them δ is 0 and x finite."""
    return torch.ops.rnnkern.needed_rows.default(delta, x)


def _fake_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity):  # type: ignore[no-untyped-def]
    contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _fake_recurrence_(z, h0, w_hh, batch_sizes, reverse, nonlinearity):  # type: ignore[no-untyped-def]
    contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip
):
    contract.check_recurrence_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
    )


def _fake_backward_stats(grad_h, grad_hn, h, h0, w_hh, batch_sizes, *rest):  # type: ignore[no-untyped-def]
    steps = h.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    stats = h.new_empty((4, steps, h0.shape[0]), dtype=torch.float64)
    return (*_fake_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, *rest), stats)


def _fold(x: Tensor | None, dim: int | None, n: int) -> Tensor | None:
    """(.., B, H), and a vmap dimension at ``dim`` if it has one -> (.., B·n, H): n samples for each that there was."""
    if x is None:
        return None
    return (x.unsqueeze(-2).expand(*x.shape[:-1], n, -1) if dim is None else x.movedim(dim, -2)).flatten(-3, -2)


def _vmap_rule(operator: Any, rows: int) -> Callable[..., Any]:
    """The rule of an operator whose first ``rows`` arguments are rows of samples, followed by w_hh and batch_sizes.

    Where the weights are shared, what vmap maps over becomes samples of one larger batch. An ensemble, whose members
    have weights of their own, is one call for each.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        n, w_hh, batch_sizes = info.batch_size, args[rows], args[rows + 1]
        if in_dims[rows + 1] is not None:
            raise RuntimeError("batch_sizes must be the same for everything that vmap maps over")
        if in_dims[rows] is not None:
            members = [operator(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims))) for i in range(n)]
            if isinstance(members[0], Tensor):
                return torch.stack(members), 0
            return tuple(map(torch.stack, zip(*members))), (0,) * len(members[0])
        folded = (_fold(x, d, n) for x, d in zip(args[:rows], in_dims))
        larger = None if batch_sizes is None else batch_sizes * n
        result = operator(*folded, w_hh, larger, *args[rows + 2 :])
        if isinstance(result, Tensor):
            return result.unflatten(-2, (-1, n)), result.dim() - 1
        delta, grad_h0, *stats = result
        parts = [x.unflatten(-2, (-1, n)) for x in (delta, grad_h0)] + [s.unflatten(-1, (-1, n)) for s in stats]
        return tuple(parts), (delta.dim() - 1, 1, *(3 for _ in stats))

    return rule


def _fake_bidirectional_(z, h0, h0_reverse, w_hh, w_hh_reverse, batch_sizes, nonlinearity):  # type: ignore[no-untyped-def]
    for half, state, w in zip(z.chunk(2, -1), (h0, h0_reverse), (w_hh, w_hh_reverse)):
        contract.check_recurrence(half, state, w, batch_sizes, False, nonlinearity)


def _fake_bidirectional_backward(  # type: ignore[no-untyped-def]
    grad_h, grad_hn, grad_hn_reverse, h, h0, h0_reverse, w_hh, w_hh_reverse, batch_sizes, nonlinearity, clip, with_stats
):
    _fake_bidirectional_(h, h0, h0_reverse, w_hh, w_hh_reverse, batch_sizes, nonlinearity)
    steps = h.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    stats = (2, 4, steps, h0.shape[0]) if with_stats else (0,)
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, h0, h0_reverse))
    return *gradients, h.new_empty(stats, dtype=torch.float64)


def _fake_layers(input, h0, weights, has_biases, bidirectional, nonlinearity):  # type: ignore[no-untyped-def]
    directions, (T, B, _), H = 2 if bidirectional else 1, input.shape, weights[1].shape[0]
    chains = len(weights) // (4 if has_biases else 2)
    return input.new_empty((T, B, directions * H)), input.new_empty((chains, B, H))


def _fake_layer_backward(  # type: ignore[no-untyped-def]
    grad_h, grad_hn, x, w_ih, h, h0, w_hh, nonlinearity, clip, for_x, for_w_ih, for_b, for_w_hh, with_stats
):
    def empty(like, wanted):  # type: ignore[no-untyped-def]
        return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None

    T, B, H = h.shape
    stats = h.new_empty((4, T, B), dtype=torch.float64) if with_stats else None
    grad_b = h.new_empty(H) if for_b else None
    return empty(x, for_x), empty(w_ih, for_w_ih), grad_b, empty(w_hh, for_w_hh), empty(h0, True), stats


def _fake_weight_gradient(delta, x):  # type: ignore[no-untyped-def]
    return delta[0].new_empty(delta[0].shape[1], x[0].shape[1])


def _fake_input_gradient(delta, w):  # type: ignore[no-untyped-def]
    return delta.new_empty(delta.shape[0], w.shape[1])


if extension.unavailable() is None:
    torch.library.register_fake("rnnkern::weight_gradient")(_fake_weight_gradient)
    torch.library.register_fake("rnnkern::input_gradient")(_fake_input_gradient)
    torch.library.register_fake("rnnkern::layer_backward")(_fake_layer_backward)
    torch.library.register_fake("rnnkern::layers")(_fake_layers)
    torch.library.register_fake("rnnkern::bidirectional_")(_fake_bidirectional_)
    torch.library.register_fake("rnnkern::bidirectional_backward")(_fake_bidirectional_backward)

#: Of the operators that the C++ library registers, and of those that backends/triton.py registers.
for _prefix in ["triton_", *([""] if extension.unavailable() is None else [])]:
    for _name, _fake, _rows in (
        ("recurrence", _fake_recurrence, 2),  # z, h0
        ("recurrence_", _fake_recurrence_, 0),
        ("recurrence_backward", _fake_backward, 4),  # grad_h, grad_hn, h, h0
        ("recurrence_backward_stats", _fake_backward_stats, 4),
    ):
        torch.library.register_fake(f"rnnkern::{_prefix}{_name}")(_fake)
        if _rows:
            _operator = getattr(torch.ops.rnnkern, _prefix + _name).default
            torch.library.register_vmap(f"rnnkern::{_prefix}{_name}", _vmap_rule(_operator, _rows))
