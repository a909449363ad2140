"""RNNFunction ties the operators to autograd: forward, backward, forward-mode, and backward of backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import backends, contract, ops, reference

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

    @staticmethod
    def forward(
        ctx: Any,
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
        h, h_n = _forward(z, h0, w_hh, batch_sizes, reverse, nonlinearity, backend)
        _save(ctx, h, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)
        return h, h_n

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_hn: Tensor | None) -> tuple[Tensor | None, ...]:
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, clip, backend = ctx.options
        if grad_h is None:
            grad_h = h.new_zeros(()).expand_as(h)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            backends.tell_once("create_graph=True: the backward chain runs on the plain PyTorch reference")
            backend = "reference"
        chain = (backend, grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)
        stats = None
        if ctx.tapped and ctx.needs_input_grad[3]:
            delta, grad_h0, stats = ops.recurrence_backward_stats(*chain)
        else:
            delta, grad_h0 = ops.recurrence_backward(*chain)
        grad_w_hh = _grad_w_hh(delta, h, h0, batch_sizes, reverse) if ctx.needs_input_grad[2] else None
        return delta, grad_h0, grad_w_hh, stats, None, None, None, None, None


class TransformableRNNFunction(torch.autograd.Function):
    """RNNFunction for forward-mode AD and torch.func: the form that these ask for costs more at every call, and
    torch.compile does not take it."""

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
        return _forward(z, h0, w_hh, batch_sizes, reverse, nonlinearity, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, output[0], *inputs[1:])

    backward = RNNFunction.backward

    @staticmethod
    def jvp(
        ctx: Any, z_dot: Tensor | None, h0_dot: Tensor | None, w_hh_dot: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        backends.tell_once("forward-mode AD: tangents run on the plain PyTorch reference")
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, _, _ = ctx.options
        h_dot = reference.recurrence_jvp(h, h0, w_hh, z_dot, h0_dot, w_hh_dot, batch_sizes, reverse, nonlinearity)
        h0_dot = torch.zeros_like(h0) if h0_dot is None else h0_dot
        return h_dot, reference.last_states(h_dot, h0_dot, batch_sizes, reverse)


def _forward(
    z: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    h = ops.recurrence(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
    return h, reference.last_states(h, h0, batch_sizes, reverse)


def _save(
    ctx: Any, h: Tensor, h0: Tensor, w_hh: Tensor, tap: Tensor | None, batch_sizes: Tensor | None, *options: Any
) -> None:
    ctx.options = options
    ctx.tapped = tap is not None
    ctx.save_for_backward(h, h0, w_hh, batch_sizes)
    ctx.save_for_forward(h, h0, w_hh, batch_sizes)
    ctx.set_materialize_grads(False)


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
    backend = backends.select(z).name
    if z.is_complex():  # the chain's formulas are those of real numbers; autograd knows the others
        h = reference.recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return h, reference.last_states(h, h0, batch_sizes, reverse)
    if z.dim() == 3 and z.shape[0] == 1 and tap is None and clip == INF and not backends.is_named():
        # A single step is no chain: PyTorch's GEMM takes w_hh as it lies, where a kernel would pack it to use it once.
        contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        h = reference.activation(nonlinearity, torch.addmm(z[0], h0, w_hh.T))
        return h[None], h.clone()
    if torch.compiler.is_compiling():
        transformed, wants_gradient = False, True
    else:
        transformed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, h0, w_hh, tap))
    if not transformed and not wants_gradient:
        ops.recurrence_(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return z, reference.last_states(z, h0, batch_sizes, reverse)
    function = TransformableRNNFunction if transformed else RNNFunction
    return function.apply(z, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)
