"""RNNFunction ties the operators to autograd: forward, backward, forward-mode, and backward of backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import backends, contract, ops, products, reference

INF = float("inf")


class RNNFunction(torch.autograd.Function):
    """The recurrence as one node of the autograd graph.

    ``apply(z, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)`` returns ``h`` like ``z`` and
    ``h_n (B, H)``. Where ``tap``, a (4, T, B) float64 tensor that requires grad, is given, its value is ignored and its
    "gradient" is the statistics of the backward chain: ``tap.grad[0] = ‖∂L/∂h_t‖²`` per step and sample, ``[1]`` the
    part that came from later steps, ``[2]`` ``‖δ_t‖²``, ``[3]`` the part that arrived at ``h``. Statistics of several
    passes add up, as squares should.

    A backward that may be differentiated itself (``create_graph=True``, and any under ``torch.func``) runs the same
    kernel, as a node of its own: :class:`RNNBackwardFunction`. From there gradients come back into this very node.

    With ``z_is_free`` as a last argument h takes the memory of z, which nobody may read any more; a node that has saved
    z for its own backward says so there.
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
        z_is_free: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if z_is_free:
            h = z.detach()  # h_n could not stand beside a z that is marked as changed where that is a view
            ops.recurrence_(backend, h, h0, w_hh, batch_sizes, reverse, nonlinearity)
        else:
            h = ops.recurrence(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        _save(ctx, h, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)
        return h, reference.last_states(h, h0, batch_sizes, reverse)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_hn: Tensor | None) -> tuple[Tensor | None, ...]:
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, clip, backend = ctx.options
        if grad_h is None:
            grad_h = h.new_zeros(()).expand_as(h)
        chain = (grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)
        delta, grad_h0, stats = backward_chain(backend, ctx.tapped and is_wanted(ctx, 3), *chain)
        work = delta.numel() * h.shape[-1]
        grad_w_hh = grad_w_hh_of(delta, h, h0, batch_sizes, reverse) if is_wanted(ctx, 2, work) else None
        return delta, grad_h0, grad_w_hh, stats, None, None, None, None, None, None


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
        h = ops.recurrence(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return h, reference.last_states(h, h0, batch_sizes, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, output[0], *inputs[1:])

    backward = RNNFunction.backward

    @staticmethod
    def jvp(
        ctx: Any, z_dot: Tensor | None, h0_dot: Tensor | None, w_hh_dot: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        backends.require_reference("forward-mode AD")
        h, h0, w_hh, batch_sizes = ctx.saved_tensors
        reverse, nonlinearity, _, _ = ctx.options
        h_dot = reference.recurrence_jvp(h, h0, w_hh, z_dot, h0_dot, w_hh_dot, batch_sizes, reverse, nonlinearity)
        h0_dot = torch.zeros_like(h0) if h0_dot is None else h0_dot
        return h_dot, reference.last_states(h_dot, h0_dot, batch_sizes, reverse)


class RNNBackwardFunction(torch.autograd.Function):
    """The backward chain as a node of the graph; its own derivatives are those of the reference chain.

    ``apply(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, backend, with_stats)`` returns
    ``delta`` like ``h``, ``grad_h0 (B, H)``, and the statistics (4, T, B), which are not differentiable, or None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        *chain, backend, with_stats = arguments
        return _backward(backend, with_stats, *chain)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        *tensors, ctx.reverse, ctx.nonlinearity, ctx.clip, _, _ = inputs
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_delta: Tensor, grad_grad_h0: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        backends.require_reference("double backward")
        chain, given = _reference_chain(ctx)
        pull_back = torch.func.vjp(chain, *given)[1]
        grads = iter(pull_back((grad_delta, grad_grad_h0)))
        return *(None if x is None else next(grads) for x in ctx.saved_tensors[:5]), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        backends.require_reference("forward-mode AD")
        chain, given = _reference_chain(ctx)
        pairs = zip(ctx.saved_tensors[:5], tangents)
        dots = tuple(torch.zeros_like(x) if dot is None else dot for x, dot in pairs if x is not None)
        delta_dot, grad_h0_dot = torch.func.jvp(chain, given, dots)[1]
        return delta_dot, grad_h0_dot, None


def _reference_chain(ctx: Any) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """delta and grad_h0 as a function of those of grad_h, grad_hn, h, h0, w_hh that there are; and these."""
    *tensors, batch_sizes = ctx.saved_tensors
    options: tuple[Any, ...] = (batch_sizes, ctx.reverse, ctx.nonlinearity, ctx.clip)

    def chain(*given: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(given)
        arguments: list[Any] = [None if x is None else next(remaining) for x in tensors]
        return reference.recurrence_backward(*arguments, *options)

    return chain, tuple(x for x in tensors if x is not None)


def backward_chain(backend: str, with_stats: bool, *chain: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """delta, grad_h0 and the statistics, differentiable where this backward may be differentiated itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return RNNBackwardFunction.apply(*chain, backend, with_stats)
    return _backward(backend, with_stats, *chain)


def _backward(backend: str, with_stats: bool, *chain: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if with_stats:
        return ops.recurrence_backward_stats(backend, *chain)
    return *ops.recurrence_backward(backend, *chain), None


#: Multiply-adds that take about as long as the question whether somebody wants them: 42 µs on a Xeon, as an exception
#: answers it (see below).
_WORK_OF_ASKING = 1 << 21


def is_wanted(ctx: Any, index: int, work: float = INF, absent: int = 0) -> bool:
    """Whether this backward pass has a use for the gradient of an input, which takes ``work`` multiply-adds:
    ``needs_input_grad`` knows only whether some pass may have one, and ``autograd.grad(loss, x)`` has none for those of
    the weights. ``absent`` of the inputs before this one were None, which has no edge in the graph."""
    if not ctx.needs_input_grad[index] or torch.compiler.is_compiling() or is_transformed():
        return ctx.needs_input_grad[index]
    if work < _WORK_OF_ASKING:
        return True
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index - absent][0])
    except RuntimeError:  # it does not answer for a leaf whose gradient is to be returned: that one is wanted
        return True


def _save(
    ctx: Any, h: Tensor, h0: Tensor, w_hh: Tensor, tap: Tensor | None, batch_sizes: Tensor | None, *options: Any
) -> None:
    ctx.options = options
    ctx.tapped = tap is not None
    ctx.save_for_backward(h, h0, w_hh, batch_sizes)
    ctx.save_for_forward(h, h0, w_hh, batch_sizes)
    ctx.set_materialize_grads(False)


def grad_w_hh_of(delta: Tensor, h: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Σ_t δ_tᵀ h_{t-1}: one product over all steps, with no copy of h where the sequence is dense."""
    taken = is_eager() and not torch.is_grad_enabled() and products.takes(delta.dtype, delta, h.shape[-1])
    if batch_sizes is not None:
        previous = reference.previous_states(h, h0, batch_sizes, reverse)
        return products.weight_gradient((delta, previous)) if taken else delta.T @ previous
    if h.shape[0] == 0:
        return delta.new_zeros(h.shape[-1], h.shape[-1])
    B = h0.shape[0]
    N = h.shape[0] * B
    # Not flatten, for which the batches of autograd.grad(is_grads_batched=True) have no rule.
    delta, h = delta.reshape(N, h.shape[-1]), h.reshape(N, h.shape[-1])
    first, later, earlier = slice(B), slice(B, None), slice(N - B)
    if reverse:
        first, later, earlier = slice(N - B, None), slice(N - B), slice(B, None)
    if taken:
        return products.weight_gradient((delta[first], h0), (delta[later], h[earlier]))
    return torch.addmm(delta[first].T @ h0, delta[later].T, h[earlier])


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
    """h like ``z`` and h_n (B, H), differentiable. ``z`` is consumed, unless it is a leaf whose gradient is asked for:
    h takes its memory."""
    if z.is_complex():  # the chain's formulas are those of real numbers; autograd knows the others
        if clip != INF:
            raise RuntimeError(f"clip must be inf for complex numbers, which have no order, got {clip}")
        backends.select(z)
        h = reference.recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return h, reference.last_states(h, h0, batch_sizes, reverse)
    if z.dim() == 3 and z.shape[0] == 1 and tap is None and clip == INF and not backends.is_named():
        # A single step is no chain: PyTorch's GEMM takes w_hh as it lies, where a kernel would pack it to use it once.
        contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        h = reference.activation(nonlinearity, torch.addmm(z[0], h0, w_hh.T))
        return h[None], h.clone()
    backend = backends.select(z).name
    transformed = is_transformed()
    if not (transformed or wants_gradient(z, h0, w_hh, tap)):
        ops.recurrence_(backend, z, h0, w_hh, batch_sizes, reverse, nonlinearity)
        return z, reference.last_states(z, h0, batch_sizes, reverse)
    arguments = (z, h0, w_hh, tap, batch_sizes, reverse, nonlinearity, clip, backend)
    if transformed:
        return TransformableRNNFunction.apply(*arguments)
    z_is_free = not (torch.compiler.is_compiling() or is_observed() or (z.is_leaf and z.requires_grad))
    return RNNFunction.apply(*arguments, z_is_free)


def is_transformed() -> bool:
    """Whether forward-mode AD or a torch.func transform is at work."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_eager() -> bool:
    """Whether eager autograd is all that is at work: no compiler, no forward-mode AD, no torch.func transform."""
    return not (torch.compiler.is_compiling() or is_transformed())


def is_observed() -> bool:
    """Whether a TorchDispatchMode looks at the operators: one for selective checkpointing may keep what they return, so
    each chain is then an operator that returns its states."""
    return torch._C._len_torch_dispatch_stack() > 0


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd has to see what is computed from these inputs. A compiler's graph may be used either way."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
