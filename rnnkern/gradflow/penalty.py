"""Pascanu, Mikolov & Bengio's Ω as a regulariser that keeps the gradient's norm on its way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnnkern import backends, ops
from rnnkern.gradflow.analysis import OMEGA_BOUND, OmegaVariant
from rnnkern.modules import RNN
from rnnkern.padding import checked


def omega_penalty(
    rnn: RNN,
    loss: Tensor,
    output: Tensor | PackedSequence,
    h_n: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    variant: OmegaVariant = "paper",
    bound: float = OMEGA_BOUND,
) -> Tensor:
    """Ω (Pascanu, Mikolov & Bengio 2013, section 3.3) with its immediate derivative, to be added to the loss::

        output, h_n = rnn(x)
        loss = criterion(head(output[-1]), y)
        (loss + 0.5 * rnnkern.gradflow.omega_penalty(rnn, loss, output, h_n)).backward()

    ========  ====================================================================================================
    "paper"   Ω = Σ_t (q_t - 1)² of a sample, mean over the samples
    "code"    Ω = mean over steps and samples of (q_t² - 1)², as their published code has it
    with      q_t = ‖W_hhᵀ diag(f'(h_{t+1})) g_{t+1}‖ / ‖g_{t+1}‖ = R_t / G_{t+1},        t = 1 .. T-1
    ========  ====================================================================================================

    The derivative is the immediate one: only the W_hh that is written here counts, while g = ∂L/∂h and h are
    constants, although both depend on W_hh. With u_t = diag(f'(h_{t+1})) g_{t+1} / ‖g_{t+1}‖ = δ_{t+1} / G_{t+1}

        ∂⁺Ω/∂W_hh = Σ_t 2 (q_t - 1) / q_t · u_t u_tᵀ W_hh                ("paper", one sample)

    It reaches ``weight_hh_l0`` (and ``_reverse``) and nothing else. Rows with G_{t+1}² below ``bound`` have no
    direction and are left out, in both variants; so are those that are not finite. Otherwise the value does not change
    when the loss is multiplied by a number.

    It costs a second backward chain and one product (T·B, H) x (H, H); ``loss`` keeps its graph for the backward that
    follows. What :func:`rnnkern.watch` records does not see it.

    Args:
        rnn: with one layer: Ω belongs to one chain. Make a stack of several such modules to penalise each.
        loss: () scalar, not yet differentiated.
        output, h_n: what the module returned, as it returned it. ``h_n`` may be None where the loss does not use it.
        lengths: what the forward was given as ``lengths``.
        variant: "paper" or "code".
        bound: least G² of a row that counts, in units of (L / h)².

    Returns:
        () tensor; the sum of both directions'. 0 where there is no step back.

    Raises:
        ValueError: an unknown variant, more than one layer, an RNN whose chain is not D W_hh (layer_norm=
            "preactivation", recurrent_dropout while training), or a loss that does not depend on the output or h_n.
    """
    if variant not in get_args(OmegaVariant):
        raise ValueError(f"variant must be 'paper' or 'code', got {variant!r}")
    if rnn.num_layers != 1:
        raise ValueError(f"rnn must have one layer, got num_layers={rnn.num_layers}")
    if rnn.layer_norm == "preactivation" or (rnn.recurrent_dropout > 0 and rnn.training):
        raise ValueError("rnn must have neither layer_norm='preactivation' nor recurrent_dropout: Ω is of D W_hh alone")
    rows, batch_sizes, e, grad_hn = _at_the_output(rnn, loss, output, h_n, lengths)
    total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for direction, names in enumerate(rnn._all_weights):
        w_hh = getattr(rnn, names[1])
        part = slice(direction * rnn.hidden_size, (direction + 1) * rnn.hidden_size)
        grad = None if grad_hn is None else grad_hn[direction]
        chain = (e[..., part].contiguous(), grad, rows[..., part].contiguous(), w_hh.detach(), batch_sizes)
        u, samples = _unit_deltas(rnn, *chain, reverse=direction == 1, bound=bound)
        with torch.autocast(u.device.type, enabled=False):  # q - 1 would lose its digits
            q = torch.linalg.vector_norm(u @ w_hh.to(u.dtype), dim=-1)
        terms = (q - 1).square() if variant == "paper" else (q.square() - 1).square()
        total = total + terms.sum() / max(1, samples if variant == "paper" else len(u))
    return total


def _at_the_output(
    rnn: RNN,
    loss: Tensor,
    output: Tensor | PackedSequence,
    h_n: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """States (T, B, D·H) or packed, batch_sizes, and the loss's gradients at the states and at h_n."""
    tensor = output.data if isinstance(output, PackedSequence) else output
    given = [x for x in (tensor, h_n) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True) if given else ()
    if all(g is None for g in grads):
        raise ValueError("loss must depend on output or h_n: no gradient arrives at either")
    by_id = {id(x): g for x, g in zip(given, grads)}
    e, grad_hn, h = by_id.get(id(tensor)), by_id.get(id(h_n)), tensor.detach()
    e = torch.zeros_like(h) if e is None else e
    if isinstance(output, PackedSequence):
        sizes, order = output.batch_sizes, output.sorted_indices
        return h, sizes, e, grad_hn if grad_hn is None or order is None else grad_hn[:, order]
    if h.dim() == 2:
        h, e = h.unsqueeze(1), e.unsqueeze(1)
        grad_hn = None if grad_hn is None else grad_hn.unsqueeze(1)
    elif rnn.batch_first:
        h, e = h.transpose(0, 1), e.transpose(0, 1)
    if lengths is None:
        return h, None, e, grad_hn
    steps = checked(lengths, h.shape[0], h.shape[1], rnn.allow_empty)
    present = steps.nonzero().flatten()
    if len(present) == 0:
        return h[:0], None, e[:0], None
    on_device = present.to(h.device)
    packed, of_e = (pack_padded_sequence(x[:, on_device], steps[present], enforce_sorted=False) for x in (h, e))
    assert packed.sorted_indices is not None
    order = on_device[packed.sorted_indices]
    return packed.data, packed.batch_sizes, of_e.data, None if grad_hn is None else grad_hn[:, order]


@torch.no_grad()
def _unit_deltas(
    rnn: RNN,
    e: Tensor,  # (T, B, H) or packed (N, H)
    grad_hn: Tensor | None,  # (B, H)
    h: Tensor,  # like e
    w_hh: Tensor,  # (H, H)
    batch_sizes: Tensor | None,
    *,
    reverse: bool,
    bound: float,
) -> tuple[Tensor, int]:
    """δ / ‖g‖ (M, H) of every row that has a step before it in processing order, and how many samples have such."""
    B = h.shape[1] if batch_sizes is None else int(batch_sizes[0])
    T = h.shape[0] if batch_sizes is None else len(batch_sizes)
    h0, w_hh = h.new_zeros(B, h.shape[-1]), w_hh.to(h.dtype)
    grad_hn = None if grad_hn is None else grad_hn.contiguous()
    options = (batch_sizes, reverse, rnn.nonlinearity, rnn.clip)
    backend = backends.select(h).name
    delta, _, stats = ops.recurrence_backward_stats(backend, e, grad_hn, h, h0, w_hh, *options)
    sizes = torch.full((T,), B, device="cpu") if batch_sizes is None else batch_sizes
    there = torch.arange(B, device="cpu") < sizes[:, None]  # (T, B)
    before = torch.zeros_like(there)  # whether the sample has the step before, in processing order
    if reverse:
        before[:-1] = there[1:]
    else:
        before[1:] = there[1:]
    norms = stats[0].sqrt()[there.to(h.device)]  # of each row, (N,)
    counts = before[there].to(h.device) & (norms.square() >= bound) & norms.isfinite()
    u = delta.reshape(-1, delta.shape[-1])[counts].double() / norms[counts, None]
    return u.to(torch.promote_types(h.dtype, torch.float32)), int(before.any(0).sum())
