"""Layers, directions, dropout and packing around the recurrence; the input projection is one GEMM over all steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern import backends, both_directions, layer_function, loop, ops, projection
from rnnkern.autograd import INF, recurrence, wants_gradient
from rnnkern.layer_function import LayerWeights

#: weight (H), bias (H) of a layer normalisation
NormWeights = tuple[Tensor, Tensor]
#: (layer, direction) -> the tap of that recurrence in one forward: a (4, T, B) float64 tensor that requires grad. Where
#: they are ReceivingTaps, a layer that is one node takes no tap, and hands over its statistics itself.
Taps = Callable[[int, int], Tensor]
#: (input, T, B, batch_sizes, unsorted_indices) -> the taps of one forward, or None: nobody wants its statistics
TapFactory = Callable[[Tensor, int, int, Tensor | None, Tensor | None], Taps | None]


class Output(NamedTuple):
    """What :func:`rnn` returns."""

    output: Tensor  # (T, B, directions·H) or (N, directions·H)
    h_n: Tensor  # (layers·directions, B, H)
    states: list[Tensor]  # of each layer, like output, before dropout and residual connections; [] if not asked for


def rnn(
    input: Tensor,
    h0: Tensor,
    weights: Sequence[LayerWeights],
    *,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    clip: float = INF,
    recurrent_dropout: float = 0.0,
    layer_norm: str | None = None,
    norms: Sequence[NormWeights] = (),
    residual: bool = False,
    with_states: bool = False,
    taps: Taps | None = None,
) -> Output:
    """A stack of tanh or ReLU RNN layers.

    Args:
        input: (T, B, I), or with ``batch_sizes`` the packed rows (N, I) of a PackedSequence.
        h0: (layers·directions, B, H), the initial states.
        weights: one entry per layer and direction, the directions of a layer side by side.
        dropout: probability of zeroing an element of a layer's output, all layers but the last, while ``training``.
        batch_sizes: (T,) int64 on the CPU, non-increasing: rows at each step.
        clip: clamp every element of ∂L/∂h_t to ±clip on its way back through time; inf for none.
        recurrent_dropout: probability of zeroing a unit of h_{t-1} on its way into h_t, while ``training``; one mask
            for each sample, layer and direction serves all steps (Gal & Ghahramani 2016). Runs on the reference.
        layer_norm: ``"input"`` normalises x_t W_ihᵀ + b (Amodei et al. 2016, with layer instead of batch statistics),
            ``"preactivation"`` all of z_t + h_{t-1} W_hhᵀ (Ba, Kiros & Hinton 2016), which runs on the reference.
        norms: weight and bias of the normalisation, one entry per layer and direction.
        residual: add its input to the output of every layer but the first.
        with_states: keep the states of every layer, for the return value.
        taps: makes the taps whose gradients are the statistics of the backward chain, see RNNFunction.

    Raises:
        RuntimeError: naming the argument whose shape, dtype or device does not fit.
    """
    directions = 2 if bidirectional else 1
    if len(weights) % directions or h0.dim() != 3 or h0.shape[0] != len(weights):
        raise RuntimeError(
            f"h0 must have shape (layers*directions, B, H) with one entry for each of the {len(weights)} weights, "
            f"got {list(h0.shape)}"
        )
    autocast = torch.get_autocast_dtype(input.device.type) if autocast_enabled(input.device) else None
    if autocast is not None:
        h0 = h0.to(autocast)
        weights = [(w_ih, w_hh.to(autocast), b_ih, b_hh) for w_ih, w_hh, b_ih, b_hh in weights]
    states: list[Tensor] = []
    final_states: list[Tensor] = []  # (B, H) each, or (1, B, H)
    layers = len(weights) // directions
    masked = recurrent_dropout > 0 and training
    options: dict[str, Any] = dict(batch_sizes=batch_sizes, nonlinearity=nonlinearity, clip=clip)

    def one_direction(layer: int, direction: int, input: Tensor) -> tuple[Tensor, Tensor]:
        index = layer * directions + direction
        w_ih, w_hh, b_ih, b_hh = weights[index]
        z, state = projection.linear(input, w_ih, _sum(b_ih, b_hh), autocast), h0[index]
        if layer_norm == "input":
            z = F.layer_norm(z, z.shape[-1:], *norms[index]).to(z.dtype)  # autocast normalises in float32
        # A tap requires grad: alone it would make the output of a frozen net require grad too.
        tapped = taps is not None and (z.requires_grad or state.requires_grad or w_hh.requires_grad)
        tap = taps(layer, direction) if taps is not None and tapped else None
        if masked or layer_norm == "preactivation":
            mask = F.dropout(torch.ones_like(state), recurrent_dropout) if masked else None
            norm = norms[index] if layer_norm == "preactivation" else None
            return loop.recurrence(z, state, w_hh, mask=mask, norm=norm, reverse=direction == 1, tap=tap, **options)
        return recurrence(z, state, w_hh, reverse=direction == 1, tap=tap, **options)

    plain = not masked and layer_norm is None
    is_fused = (
        plain
        and not bidirectional
        and batch_sizes is None
        and input.shape[0] > 1  # a single step is no chain, and goes its own way
        and all((b_ih is None) == (b_hh is None) for _, _, b_ih, b_hh in weights)
        and layer_function.serves([input, h0, *(w for of_layer in weights for w in of_layer if w is not None)])
    )
    for layer in range(layers):
        first, end = layer * directions, (layer + 1) * directions
        if is_fused:
            joined, *h_n = layer_function.layer(layer, input, h0, weights, nonlinearity, clip, taps)
        elif (
            bidirectional
            and plain
            and both_directions.serves(input, pair := (h0[first], h0[end - 1]), weights[first:end], batch_sizes)
        ):
            w_ih, w_hh, b_ih, b_hh = zip(*weights[first:end])
            biases = _sum(b_ih[0], b_hh[0]), _sum(b_ih[1], b_hh[1])
            tap = None if taps is None else functools.partial(taps, layer)
            joined, *h_n = both_directions.layer(
                input, pair, w_ih, w_hh, biases, autocast=autocast, taps=tap, **options
            )
        else:
            both = [one_direction(layer, direction, input) for direction in range(directions)]
            joined = both[0][0] if directions == 1 else torch.cat([h for h, _ in both], -1)
            h_n = [last for _, last in both]
        final_states += h_n
        if with_states:
            states.append(joined)
        input = joined + input if residual and layer > 0 else joined
        if dropout > 0 and training and layer < layers - 1:
            input = F.dropout(input, dropout)
    if is_fused:
        return Output(input, final_states[0] if layers == 1 else torch.cat(final_states), states)
    # Under autograd never a view: what hooks hang on a view, FSDP's among them, a write to it would cut off.
    is_view = len(final_states) == 1 and not final_states[0].requires_grad
    return Output(input, final_states[0][None] if is_view else torch.stack(final_states), states)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device; on some it does not exist, and asking raises."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def at_once(
    input: Tensor,  # (T, B, I)
    h0: Tensor | None,  # (layers·directions, B, H), zeros by default
    weights: Sequence[LayerWeights],
    nonlinearity: str,
    bidirectional: bool,
    clip: float,
    make_taps: Callable[[], Taps | None] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """A plain net on a CPU: where it is short, the way through :func:`rnn` would take longer than the net. Without
    gradients it is one call.

    Returns output and h_n, or None where the call is of another kind or something does not fit.
    """
    flat = [w for of_layer in weights for w in of_layer if w is not None]
    given = [input, *flat] if h0 is None else [input, *flat, h0]
    T, B, H = input.shape[0], input.shape[1], flat[1].shape[0]
    with_gradient = wants_gradient(*given)
    # With gradients both directions are a node of another kind, and a single step is none. Without them a watched net
    # still asks for its taps, on the long way.
    is_other_kind = bidirectional or T == 1 if with_gradient else make_taps is not None
    if is_other_kind or not layer_function.serves(given):
        return None
    if input.shape[2] != flat[0].shape[1] or not (h0 is None or h0.shape == (len(weights), B, H)):
        return None
    if with_gradient:
        h0 = input.new_zeros(len(weights), B, H) if h0 is None else h0
        return layer_function.layers(input, h0, weights, nonlinearity, clip, None if make_taps is None else make_taps())
    has_biases = len(flat) > 2 * len(weights)
    if T == 1 and not backends.is_named():  # no chain: as in streaming, torch.nn.RNN's own operator does it all
        operator = torch._VF.rnn_tanh if nonlinearity == "tanh" else torch._VF.rnn_relu
        layers = len(weights) // (2 if bidirectional else 1)
        h0 = input.new_zeros(len(weights), B, H) if h0 is None else h0
        return operator(input, h0, flat, has_biases, layers, 0.0, False, bidirectional, False)
    return ops.layers(input, h0, flat, has_biases, bidirectional, nonlinearity)


def _sum(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    if b_ih is None or b_hh is None:
        return b_ih if b_hh is None else b_hh
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _Sum.apply(b_ih, b_hh)
    return b_ih + b_hh


class _Sum(torch.autograd.Function):
    """a + b, with a gradient of its own for each.

    The two are equal, and Inductor gives both parameters the same memory: a second backward, which accumulates into
    it, then counts twice (torch 2.13). The copy is an operator, as a compiler would see through ``clone``.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ops.rnnkern.copied(grad)


_library = torch.library.Library("rnnkern", "FRAGMENT")
_library.define("copied(Tensor x) -> Tensor")
_library.impl("copied", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("rnnkern::copied", torch.empty_like, lib=_library)
