"""The recurrence in plain PyTorch: any dtype, any device, differentiable to any order.

This is the truth that every kernel is compared with (run it in float64), and what runs where no kernel serves.

    h_t = f(z_t + h_{t-1} W_hhᵀ)        f = tanh or relu
    g_t = e_t + r_t,  r_t = δ_{t+1} W_hh,  r_T = ∂L/∂h_n        e_t = ∂L/∂y_t, g_t = ∂L/∂h_t
    δ_t = clamp(g_t, ±clip) ⊙ f'(h_t),  ∂L/∂h_0 = δ_1 W_hh

One rule serves dense and packed sequences in both directions. The chain carries one row per sample; step t touches the
first ``batch_sizes[t]`` rows, and the others keep what they hold: their initial value before their sequence begins,
their final value after it has ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONLINEARITIES = ("tanh", "relu")


def activation(nonlinearity: str, a: Tensor) -> Tensor:
    """f(a)."""
    return torch.tanh(a) if nonlinearity == "tanh" else torch.relu(a)


def times_derivative(nonlinearity: str, g: Tensor, h: Tensor) -> Tensor:
    """g ⊙ f'(h), with f' from the state h = f(a) alone."""
    return g * (1 - h * h) if nonlinearity == "tanh" else g.masked_fill(h <= 0, 0)


def split_steps(rows: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
    """The rows of each step: T tensors of shape (n_t, H)."""
    return rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes.tolist())


def join_steps(steps: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of split_steps, shaped like ``like``: (T, B, H) or packed (N, H)."""
    if not steps:
        return torch.empty_like(like)
    return torch.stack(steps) if like.dim() == 3 else torch.cat(steps)


def with_rows(state: Tensor, rows: Tensor) -> Tensor:
    """``state`` (B, H) with its first rows replaced by ``rows`` (n, H)."""
    n = rows.shape[0]
    return rows if n == state.shape[0] else torch.cat([rows, state[n:]])


def recurrence(
    z: Tensor,  # (T, B, H), or (N, H) with batch_sizes
    h0: Tensor,  # (B, H)
    w_hh: Tensor,  # (H, H)
    batch_sizes: Tensor | None = None,  # (T,) int64 on the CPU, non-increasing
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> Tensor:
    """The states h, shaped like z."""
    steps = split_steps(z, batch_sizes)
    h: list[Tensor] = [z] * len(steps)
    state = h0
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = steps[t].shape[0]
        h[t] = activation(nonlinearity, steps[t] + state[:n] @ w_hh.T)
        state = with_rows(state, h[t])
    return join_steps(h, z)


def recurrence_backward_stats(
    grad_h: Tensor,  # like h
    grad_hn: Tensor | None,  # (B, H)
    h: Tensor,  # (T, B, H), or (N, H) with batch_sizes
    h0: Tensor,  # (B, H)
    w_hh: Tensor,  # (H, H)
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    clip: float = float("inf"),
) -> tuple[Tensor, Tensor, Tensor]:
    """delta = ∂L/∂z like h, grad_h0 (B, H), and stats (4, T, B) float64 = ‖g_t‖², ‖r_t‖², ‖δ_t‖², ‖e_t‖²."""
    return _backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, with_stats=True)


def recurrence_backward(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    clip: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """As recurrence_backward_stats, without the statistics."""
    delta, grad_h0, _ = _backward(
        grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, with_stats=False
    )
    return delta, grad_h0


def _backward(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    e_steps, h_steps = split_steps(grad_h, batch_sizes), split_steps(h, batch_sizes)
    T, B = len(h_steps), h0.shape[0]
    delta: list[Tensor] = [h] * T
    stats: list[Tensor] = [h] * T
    carry = torch.zeros_like(h0) if grad_hn is None else grad_hn  # r of every sample's next step to be visited
    for t in range(T) if reverse else reversed(range(T)):
        r = carry[: h_steps[t].shape[0]]
        g = e_steps[t] + r
        clipped = g if clip == float("inf") else g.clamp(-clip, clip)
        delta[t] = times_derivative(nonlinearity, clipped, h_steps[t])
        if with_stats:
            squares = torch.stack([v.double().square().sum(-1) for v in (g, r, delta[t], e_steps[t])])
            stats[t] = torch.nn.functional.pad(squares, (0, B - squares.shape[1]))
        carry = with_rows(carry, delta[t] @ w_hh)
    joined = torch.stack(stats, 1) if with_stats and T else h0.new_zeros((4, T, B), dtype=torch.float64)
    return join_steps(delta, h), carry.clone(), joined


def recurrence_jvp(
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    z_dot: Tensor | None,
    h0_dot: Tensor | None,
    w_hh_dot: Tensor | None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> Tensor:
    """The tangent of h, given the tangents of z, h0 and w_hh: ḣ_t = f'(h_t) ⊙ (ż_t + h_{t-1} Ẇᵀ + ḣ_{t-1} Wᵀ)."""
    a_dot = torch.zeros_like(h) if z_dot is None else z_dot
    if w_hh_dot is not None:
        a_dot = a_dot + previous_states(h, h0, batch_sizes, reverse) @ w_hh_dot.T
    a_steps, h_steps = split_steps(a_dot, batch_sizes), split_steps(h, batch_sizes)
    T = len(h_steps)
    h_dot: list[Tensor] = [h] * T
    state = torch.zeros_like(h0) if h0_dot is None else h0_dot
    for t in reversed(range(T)) if reverse else range(T):
        n = h_steps[t].shape[0]
        h_dot[t] = times_derivative(nonlinearity, a_steps[t] + state[:n] @ w_hh.T, h_steps[t])
        state = with_rows(state, h_dot[t])
    return join_steps(h_dot, h)


def previous_states(h: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """h_{t-1} in processing order beside every row of h, shaped like h."""
    if batch_sizes is None:
        return torch.cat([h[1:], h0[None]]) if reverse else torch.cat([h0[None], h[:-1]])
    N, B = h.shape[0], h0.shape[0]
    row = torch.arange(N, device="cpu")
    step = torch.arange(len(batch_sizes), device="cpu").repeat_interleave(batch_sizes, output_size=N)
    if reverse:
        # The sample's row one step later, or its initial state where the sequence ends.
        sample = row - (batch_sizes.cumsum(0) - batch_sizes)[step]
        later = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
        index = torch.where(sample < later[step], row + batch_sizes[step], N + sample)
        return torch.cat([h, h0]).index_select(0, index.to(h.device))
    # A step's rows lie batch_sizes[t-1] behind those of the step before; the first step's lie B behind in [h0, h].
    earlier = torch.cat([batch_sizes.new_tensor([B]), batch_sizes[:-1]])
    return torch.cat([h0, h]).index_select(0, (B + row - earlier[step]).to(h.device))


def last_states(h: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """h_n (B, H): each sample's state after its last step in processing order; a copy, never a view of h."""
    if h.shape[0] == 0:
        return h0.clone()
    if batch_sizes is None:
        return (h[0] if reverse else h[-1]).clone()
    B = h0.shape[0]
    if reverse:
        return h.narrow(0, 0, B).clone()  # a slice would end where h does, which a compiler cannot rule out
    lengths = (batch_sizes > torch.arange(B, device="cpu")[:, None]).sum(1)
    offsets = batch_sizes.cumsum(0) - batch_sizes
    return h.index_select(0, (offsets[lengths - 1] + torch.arange(B, device="cpu")).to(h.device))
