"""Pascanu, Mikolov & Bengio's Ω as a regulariser that keeps the gradient's norm on its way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
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
    states: Sequence[Tensor | PackedSequence] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    variant: OmegaVariant = "paper",
    bound: float = OMEGA_BOUND,
) -> Tensor:
    """Ω (Pascanu, Mikolov & Bengio 2013, section 3.3) with its immediate derivative, to be added to the loss::

        output, h_n, states = rnn(x, return_states=True)
        loss = criterion(head(output[-1]), y)
        (loss + 0.5 * rnnkern.gradflow.omega_penalty(rnn, loss, output, h_n, states=states)).backward()

    ========  ====================================================================================================
    "paper"   Ω = Σ_t (q_t - 1)² of a sample, mean over the samples
    "code"    Ω = mean over steps and samples of (q_t² - 1)², as their published code has it
    with      q_t = ‖W_hhᵀ diag(f'(h_{t+1})) g_{t+1}‖ / ‖g_{t+1}‖ = R_t / G_{t+1},        t = 1 .. T-1
    ========  ====================================================================================================

    Each layer and direction is a chain with an Ω of its own, of its own W_hh, h and g = ∂L/∂h; the penalty is their
    sum. The derivative is the immediate one: only the W_hh that is written here counts, while g and h are constants,
    although both depend on W_hh. With u_t = diag(f'(h_{t+1})) g_{t+1} / ‖g_{t+1}‖ = δ_{t+1} / G_{t+1}

        ∂⁺Ω/∂W_hh = Σ_t 2 (q_t - 1) / q_t · u_t u_tᵀ W_hh                ("paper", one sample)

    It reaches every ``weight_hh_l{k}`` (and ``_reverse``) and nothing else. Rows with G_{t+1}² below ``bound`` have no
    direction and are left out, in both variants; so are those that are not finite. Otherwise the value does not change
    when the loss is multiplied by a number.

    It costs a second backward chain and one product (T·B, H) x (H, H) a layer and direction, and the way from a layer
    down to the next; ``loss`` keeps its graph for the backward that follows. What :func:`rnnkern.watch` records does
    not see it.

    Args:
        rnn: the module.
        loss: () scalar, not yet differentiated. It may depend on output and h_n, not on ``states``.
        output, h_n: what the module returned, as it returned it. ``h_n`` may be None where the loss does not use it.
        states: of every layer, as ``return_states=True`` gives them. Of an RNN with one layer they are its output, and
            may be None.
        lengths: what the forward was given as ``lengths``.
        variant: "paper" or "code".
        bound: least G² of a row that counts, in units of (L / h)².

    Returns:
        () tensor. 0 where there is no step back.

    Raises:
        ValueError: an unknown variant; several layers without ``states``, or with those of another forward or in
            another form; an RNN whose chain is not D W_hh (layer_norm="preactivation", recurrent_dropout while
            training), or whose layers have dropout between them while it trains; or a loss that does not depend on the
            output or h_n.
    """
    if variant not in get_args(OmegaVariant):
        raise ValueError(f"variant must be 'paper' or 'code', got {variant!r}")
    _check_module(rnn)
    states = _checked_states(rnn, output, states)
    layout = _layout(rnn, output, lengths)
    arriving, grad_hn = _arriving(loss, output, h_n)
    arriving = layout.rows(arriving)
    grad_hn = None if grad_hn is None else layout.of_state(grad_hn)
    total = torch.zeros((), dtype=torch.promote_types(arriving.dtype, torch.float32), device=arriving.device)
    h = [layout.rows(each).detach() for each in states]
    D = 2 if rnn.bidirectional else 1
    for layer in reversed(range(rnn.num_layers)):
        deltas = []
        for d in range(D):
            w_hh = getattr(rnn, rnn._all_weights[layer * D + d][1])
            grad = None if grad_hn is None else grad_hn[layer * D + d].contiguous()
            e_d, h_d = (x.unflatten(-1, (D, -1))[..., d, :].contiguous() for x in (arriving, h[layer]))
            delta, norms = _chain(rnn, e_d, grad, h_d, w_hh, layout, reverse=d == 1)
            deltas.append(delta)
            counts = layout.has_earlier(reverse=d == 1).to(norms.device) & (norms.square() >= bound) & norms.isfinite()
            u = (delta.reshape(-1, delta.shape[-1])[counts].double() / norms[counts, None]).to(total.dtype)
            with torch.autocast(u.device.type, enabled=False):  # q - 1 would lose its digits
                q = torch.linalg.vector_norm(u @ w_hh.to(u.dtype), dim=-1)
            terms = (q - 1).square() if variant == "paper" else (q.square() - 1).square()
            total = total + terms.sum() / max(1, layout.samples if variant == "paper" else len(u))
        if layer:
            below = _through_layer(rnn, layer, h, deltas)
            arriving = below + arriving if rnn.residual else below
    return total


def _check_module(rnn: RNN) -> None:
    if rnn.layer_norm == "preactivation" or (rnn.recurrent_dropout > 0 and rnn.training):
        raise ValueError("rnn must have neither layer_norm='preactivation' nor recurrent_dropout: Ω is of D W_hh alone")
    if rnn.dropout > 0 and rnn.training and rnn.num_layers > 1:
        raise ValueError(
            f"rnn must have no dropout between its layers while it trains, got dropout={rnn.dropout}: what gradient "
            "lower layers get depends on masks that are not kept"
        )


def _checked_states(
    rnn: RNN, output: Tensor | PackedSequence, states: Sequence[Tensor | PackedSequence] | None
) -> Sequence[Tensor | PackedSequence]:
    layers = rnn.num_layers
    if states is None:
        if layers > 1:
            raise ValueError(f"states must be given for an RNN of {layers} layers: rnn(x, return_states=True)[2]")
        return [output]
    if isinstance(states, (Tensor, PackedSequence)) or len(states) != layers:
        got = type(states).__name__ if isinstance(states, (Tensor, PackedSequence)) else len(states)
        raise ValueError(f"states must have one entry for each of the {layers} layers, got {got}")
    for layer, each in enumerate(states):
        if type(each) is not type(output) or _data(each).shape != _data(output).shape:
            forms = [f"{type(x).__name__} {list(_data(x).shape)}" for x in (output, each)]
            raise ValueError(f"states[{layer}] must have the form of output, {forms[0]}, got {forms[1]}")
    return states


def _data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _arriving(
    loss: Tensor, output: Tensor | PackedSequence, h_n: Tensor | None
) -> tuple[Tensor | PackedSequence, Tensor | None]:
    """The loss's gradients at the output, in its form, and at h_n."""
    tensor = _data(output)
    given = [x for x in (tensor, h_n) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True) if given else ()
    if all(g is None for g in grads):
        raise ValueError("loss must depend on output or h_n: no gradient arrives at either")
    by_id = {id(x): g for x, g in zip(given, grads)}
    e = by_id.get(id(tensor))
    e = torch.zeros_like(tensor) if e is None else e
    return output._replace(data=e) if isinstance(output, PackedSequence) else e, by_id.get(id(h_n))


class _Layout(NamedTuple):
    """How what a module takes and returns lies in the kernels' rows: (T, B, ·), or packed (N, ·)."""

    rows: Callable[[Tensor | PackedSequence], Tensor]
    of_state: Callable[[Tensor], Tensor]  # (layers·D, B, H) with the samples in the order of the rows
    there: Tensor  # (T, B) bool on the CPU: whether the sample has the step
    batch_sizes: Tensor | None

    @property
    def samples(self) -> int:
        """How many have a step back."""
        return int((self.there.sum(0) > 1).sum())

    def has_earlier(self, reverse: bool) -> Tensor:
        """(N,) bool for the rows that there are: whether the sample has the step before, in processing order."""
        earlier = torch.zeros_like(self.there)
        (earlier[:-1] if reverse else earlier[1:]).copy_(self.there[1:])
        return earlier[self.there]


def _layout(rnn: RNN, output: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None) -> _Layout:
    if isinstance(output, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths must be None for a PackedSequence, which has its own")
        return _packed(_data, output.batch_sizes, output.sorted_indices)
    dim, batch_first = output.dim(), rnn.batch_first

    def dense(x: Tensor | PackedSequence) -> Tensor:
        return _data(x).unsqueeze(1) if dim == 2 else _data(x).transpose(0, 1) if batch_first else _data(x)

    T, B = dense(output).shape[:2]
    if lengths is None:
        there = torch.ones(T, B, dtype=torch.bool, device="cpu")
        return _Layout(dense, (lambda x: x.unsqueeze(1)) if dim == 2 else (lambda x: x), there, None)
    steps = checked(lengths, T, B, rnn.allow_empty)
    present = steps.nonzero().flatten()
    if len(present) == 0:
        there = torch.zeros(0, B, dtype=torch.bool, device="cpu")
        return _Layout(lambda x: dense(x)[:0], lambda x: x, there, None)
    on_device = present.to(output.device)

    def pack(x: Tensor | PackedSequence) -> PackedSequence:
        return pack_padded_sequence(dense(x)[:, on_device], steps[present], enforce_sorted=False)

    packed = pack(output.detach())
    assert packed.sorted_indices is not None
    return _packed(lambda x: pack(x).data, packed.batch_sizes, on_device[packed.sorted_indices])


def _packed(rows: Callable[[Tensor | PackedSequence], Tensor], batch_sizes: Tensor, order: Tensor | None) -> _Layout:
    there = torch.arange(int(batch_sizes[0]), device="cpu") < batch_sizes[:, None]
    return _Layout(rows, lambda x: x if order is None else x[:, order], there, batch_sizes)


@torch.no_grad()
def _chain(
    rnn: RNN,
    e: Tensor,  # (T, B, H) or packed (N, H)
    grad_hn: Tensor | None,  # (B, H)
    h: Tensor,  # like e
    w_hh: Tensor,  # (H, H)
    layout: _Layout,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """δ like h, and ‖g‖ (N,) of the rows that there are."""
    h0 = h.new_zeros(layout.there.shape[1], h.shape[-1])  # of which δ does not depend
    options = (layout.batch_sizes, reverse, rnn.nonlinearity, rnn.clip)
    backend = backends.select(h).name
    delta, _, stats = ops.recurrence_backward_stats(backend, e, grad_hn, h, h0, w_hh.to(h.dtype), *options)
    return delta, stats[0].sqrt()[layout.there.to(h.device)]


@torch.no_grad()
def _through_layer(rnn: RNN, layer: int, states: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """∂L/∂x at the layer's input, from δ = ∂L/∂z of each direction; without what a residual connection carries past."""
    arriving = torch.zeros_like(states[layer])
    input = sum(states[1:layer], states[0]) if rnn.residual else states[layer - 1]
    with torch.autocast(input.device.type, enabled=False):
        for d, delta in enumerate(deltas):
            index = layer * len(deltas) + d
            w_ih, _, *biases = (getattr(rnn, name).to(delta.dtype) for name in rnn._all_weights[index])
            if rnn.layer_norm == "input":
                with torch.enable_grad():
                    z = F.linear(input, w_ih, sum(biases) if biases else None).detach().requires_grad_()
                    weight, bias = (each.detach().to(delta.dtype) for each in rnn._norms()[index])
                    (delta,) = torch.autograd.grad(F.layer_norm(z, z.shape[-1:], weight, bias), z, delta)
            arriving += delta @ w_ih
    return arriving
