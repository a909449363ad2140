"""RNNFunction ties the operators to autograd: forward, backward, forward-mode, and backward of backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import backends, ops, reference

INF = float("inf")


class RNNFunction(torch.autograd.Function):
    """The recurrence as one node of the autograd graph.

    ``apply(z, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)`` returns ``h`` like ``z`` and
    ``h_n (B, H)``. Where ``tap``, a (3, T, B) float64 tensor that requires grad, is given, its value is ignored and its
    "gradient" is the statistics of the backward chain: ``tap.grad[0] = ‖∂L/∂h_t‖²`` per step and sample, ``[1]`` the
    part that came from later steps, ``[2]`` ``‖δ_t‖²``. Statistics of several passes add up, as squares should.

    The first backward runs the kernel. A backward that is itself to be differentiated (``create_graph=True``) is the
    reference chain, in plain PyTorch operations of the saved h; from there gradients come back into this very node.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        h0: Tensor,
        w_hh: Tensor,
        tap: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
        nonlinearity: str,
        clip: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        h = ops.recurrence(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return h, reference.last_states(h, h0, batch_sizes, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, h0, w_hh, tap, batch_sizes, *ctx.options = inputs
        ctx.tapped = tap is not None
        ctx.save_for_backward(output[0], h0, w_hh, batch_sizes)
        ctx.save_for_forward(output[0], h0, w_hh, batch_sizes)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_hn: Tensor | None) -> tuple[Tensor | None, ...]:
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, clip, backend = ctx.options
        if grad_h is None:
            grad_h = h.new_zeros(h.shape[-1]).expand_as(h)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            backend = "reference"
        chain = (backend, grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)
        stats = None
        if ctx.tapped and ctx.needs_input_grad[3]:
            delta, grad_h0, stats = ops.recurrence_backward_stats(*chain)
        else:
            delta, grad_h0 = ops.recurrence_backward(*chain)
        grad_w_hh = _grad_w_hh(delta, h, h0, batch_sizes, reverse) if ctx.needs_input_grad[2] else None
        return delta, grad_h0, grad_w_hh, stats, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, z_dot: Tensor | None, h0_dot: Tensor | None, w_hh_dot: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, _, _ = ctx.options
        h_dot = reference.recurrence_jvp(h, h0, w_hh, z_dot, h0_dot, w_hh_dot, batch_sizes, reverse, nonlinearity)
        h0_dot = torch.zeros_like(h0) if h0_dot is None else h0_dot
        return h_dot, reference.last_states(h_dot, h0_dot, batch_sizes, reverse)


def _grad_w_hh(delta: Tensor, h: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Σ_t δ_tᵀ h_{t-1}: one product over all steps, with no copy of h where the sequence is dense."""
    if batch_sizes is not None:
        return delta.T @ reference.previous_states(h, h0, batch_sizes, reverse)
    if h.shape[0] == 0:
        return delta.new_zeros(h.shape[-1], h.shape[-1])
    first, rest, earlier = (delta[-1], delta[:-1], h[1:]) if reverse else (delta[0], delta[1:], h[:-1])
    return torch.addmm(first.T @ h0, rest.flatten(0, 1).T, earlier.flatten(0, 1))


def recurrence(
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
    clip: float = INF,
    tap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h like ``z`` and h_n (B, H), differentiable. Without gradients ``z`` is consumed: h takes its memory."""
    if z.is_complex():  # the chain's formulas are those of real numbers; autograd knows the others
        backends.tell_once(f"{z.dtype}: no kernel serves this; the plain PyTorch reference runs instead")
        h = reference.recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return h, reference.last_states(h, h0, batch_sizes, reverse)
    backend = backends.select(z).name
    if _only_values_wanted(z, h0, w_hh):
        ops.recurrence_(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return z, reference.last_states(z, h0, batch_sizes, reverse)
    return RNNFunction.apply(z, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)


def _only_values_wanted(*tensors: Tensor) -> bool:
    """No gradient, no tangent, no transform: nobody will ask for anything but the numbers."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack():
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors)
