"""The input projection z = x W_ihᵀ + b: one product over all steps, PyTorch's own or that of rnnkern.products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern import products
from rnnkern.autograd import is_eager, is_wanted


def linear(x: Tensor, w_ih: Tensor, b: Tensor | None, autocast: torch.dtype | None = None) -> Tensor:
    """x W_ihᵀ + b, differentiable, for x (T, B, I) or (N, I), w_ih (H, I) and b (H); ``autocast`` is the dtype of
    autocast where that is on."""
    dtype = x.dtype if autocast is None else autocast
    if is_eager() and not torch.jit.is_tracing() and products.takes(dtype, x, w_ih.shape[0]):
        taken = (dtype,) if autocast is None else (torch.float32, *products.HALVES)  # what autocast casts
        if all(products.is_plain(v) and v.dtype in taken for v in (x, w_ih, b) if v is not None):
            return ProjectionFunction.apply(x.to(dtype), w_ih.to(dtype), None if b is None else b.to(dtype))
    return F.linear(x, w_ih, b)


class ProjectionFunction(torch.autograd.Function):
    """``apply(x, w_ih, b)``: the products of forward and backward are those of rnnkern.products, and nothing in float32
    is kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_ih: Tensor, b: Tensor | None) -> Tensor:
        for_x, for_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_w else None, w_ih if for_x else None)
        return products.linear(x, w_ih, b)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, w_ih = ctx.saved_tensors
        for_x, for_w, for_b = (is_wanted(ctx, index) for index in range(3))
        grad_x = grad_w = None
        rows = delta.reshape(-1, delta.shape[-1])  # not flatten, for which a batch of gradients has no rule
        if torch.is_grad_enabled() or not is_eager() or products.is_batched(delta):
            # This backward may be differentiated itself, or is mapped over.
            grad_x = delta @ w_ih if for_x else None
            grad_w = rows.T @ x.reshape(-1, x.shape[-1]) if for_w else None
        else:
            grad_x = products.input_gradient(delta, w_ih) if for_x else None
            grad_w = products.weight_gradient((delta, x)) if for_w else None
        return grad_x, grad_w, rows.sum(0) if for_b else None
