"""torch.lstm, torch.gru and torch.rnn_* as a loop over time steps, with taps at every state.

    lstm   i, f, o = σ(a_i), σ(a_f), σ(a_o), g = tanh(a_g)     c_t = f ⊙ c_{t-1} + i ⊙ g,  h_t = W_hr (o ⊙ tanh c_t)
    gru    r, u = σ(a_r), σ(a_u), n = tanh(z_n + r ⊙ (W_n h_{t-1} + b_n))        h_t = (1 - u) ⊙ n + u ⊙ h_{t-1}
    rnn    h_t = f(a_t)
           a_t = z_t + W_hh h_{t-1} + b_hh, z_t = W_ih x_t + b_ih     W_hr only where an LSTM has projections

What a tap is told: g_t = ∂L/∂h_t, all of it; r_t, the part that came from later steps and from h_n; and δ_t, the
gradient at the arguments of the step's nonlinearities: (a_i, a_f, a_g, a_o), (a_r, a_u, tanh's in n), or a_t. It is the
gradient at z_t, which is added there and nowhere else.

A tap of an LSTM's c is told ∂L/∂c_t likewise. There is no nonlinearity between c_{t-1} and c_t: δ_t is g_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnkern.functional import Taps, autocast_enabled
from rnnkern.loop import DELTA, DIRECT, INF, RECURRENT, TOTAL, Observed
from rnnkern.reference import activation, join_steps, split_steps, with_rows


class Weights(NamedTuple):
    """Of one layer and direction; a gate's rows lie one block behind the other."""

    w_ih: Tensor  # (gates·H, I)
    w_hh: Tensor  # (gates·H, H), or (gates·H, P) with projections
    b_ih: Tensor | None  # (gates·H)
    b_hh: Tensor | None  # (gates·H)
    w_hr: Tensor | None  # (P, H)


class Call(NamedTuple):
    """The arguments of the operator, dense or packed."""

    kind: str  # "lstm", "gru", "rnn_tanh", "rnn_relu"
    input: Tensor  # (T, B, I), or packed (N, I)
    batch_sizes: Tensor | None  # (T,)
    h0: Tensor  # (layers·directions, B, H), or P for H with projections
    c0: Tensor | None  # (layers·directions, B, H)
    weights: list[Weights]
    dropout: float
    bidirectional: bool
    batch_first: bool  # what the output is to be; the input is (T, B, I) already

    @classmethod
    def parse(cls, kind: str, args: Sequence[Any]) -> Call:
        """From the arguments in their order, as the modules' own forward passes them."""
        packed = not isinstance(args[3], bool)
        if packed:
            input, batch_sizes, hx, flat, bias, layers, dropout, training, bidirectional = args
            batch_first = False
        else:
            input, hx, flat, bias, layers, dropout, training, bidirectional, batch_first = args
            batch_sizes = None
        h0, c0 = hx if kind == "lstm" else (hx, None)
        count = layers * (2 if bidirectional else 1)
        if input.device.type != "cpu" and autocast_enabled(
            input.device
        ):  # as PyTorch does: on a CPU it casts by product
            dtype = torch.get_autocast_dtype(input.device.type)
            input, h0, c0 = input.to(dtype), h0.to(dtype), None if c0 is None else c0.to(dtype)
            flat = [w.to(dtype) for w in flat]
        each = len(flat) // count
        weights = [_weights(flat[i * each : (i + 1) * each], bias) for i in range(count)]
        x = input.transpose(0, 1) if batch_first else input
        return cls(kind, x, batch_sizes, h0, c0, weights, dropout if training else 0.0, bidirectional, batch_first)

    @property
    def T(self) -> int:
        """Time steps."""
        return len(self.input) if self.batch_sizes is None else len(self.batch_sizes)

    @property
    def B(self) -> int:
        """Samples."""
        return self.h0.shape[1]


def _weights(flat: Sequence[Tensor], bias: bool) -> Weights:
    b_ih, b_hh = (flat[2], flat[3]) if bias else (None, None)
    return Weights(flat[0], flat[1], b_ih, b_hh, flat[-1] if len(flat) % 2 else None)


def unrolled(call: Call, taps: Taps | None, c_taps: Taps | None) -> tuple[Tensor, ...]:
    """What the operator returns: output and h_n, and for an LSTM c_n."""
    x, directions = call.input, 2 if call.bidirectional else 1
    layers = len(call.weights) // directions
    h_n, c_n = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            h, last, c_last = _chain(call, x, index, layer, direction, taps, c_taps)
            outputs.append(h)
            h_n.append(last)
            c_n.append(c_last)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if call.dropout > 0 and layer < layers - 1:
            x = F.dropout(x, call.dropout)
    output = x.transpose(0, 1) if call.batch_first else x
    cells = [c for c in c_n if c is not None]
    return (output, torch.stack(h_n), *([torch.stack(cells)] if cells else []))


def _chain(
    call: Call, x: Tensor, index: int, layer: int, direction: int, taps: Taps | None, c_taps: Taps | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer and direction over all steps: h like x, h_n (B, H) and c_n (B, H)."""
    weights, h = call.weights[index], call.h0[index]
    c = None if call.c0 is None else call.c0[index]
    seen = requires_grad(x, h, c, *weights)
    h_taps = taps(layer, direction).unbind(1) if taps is not None and seen else (None,) * call.T
    c_seen = c_taps(layer, direction).unbind(1) if c_taps is not None and seen else (None,) * call.T
    steps = split_steps(F.linear(x, weights.w_ih, weights.b_ih), call.batch_sizes)
    states: list[Tensor] = [x] * call.T
    for t in reversed(range(call.T)) if direction else range(call.T):
        z = steps[t]
        n = z.shape[0]
        h_t, c_t = step(call.kind, z, h[:n], None if c is None else c[:n], weights, h_taps[t], c_seen[t])
        states[t] = observed(h_t, h_taps[t], DIRECT)
        h = with_rows(h, observed(h_t, h_taps[t], RECURRENT))
        if c is not None and c_t is not None:
            c = with_rows(c, observed(c_t, c_seen[t], RECURRENT))
    return join_steps(states, x), h, c


def step(
    kind: str,
    z: Tensor,  # (n, gates·H)
    h: Tensor,  # (n, H)
    c: Tensor | None,  # (n, H)
    weights: Weights,
    tap: Tensor | None,  # (4, B), or (3, B) where nobody knows what of h's gradient is direct
    c_tap: Tensor | None,  # the same
) -> tuple[Tensor, Tensor | None]:
    """The next h and c, with their total gradients and δ seen by the taps."""
    z = observed(z, tap, DELTA)
    a = F.linear(h, weights.w_hh, weights.b_hh)
    if kind == "lstm":
        assert c is not None
        i, f, g, o = (z + a).chunk(4, -1)
        c = observed(observed(f.sigmoid() * c + i.sigmoid() * g.tanh(), c_tap, TOTAL), c_tap, DELTA)
        h = o.sigmoid() * observed(c, c_tap, DIRECT).tanh()
        if weights.w_hr is not None:
            h = h @ weights.w_hr.T
    elif kind == "gru":
        (z_r, z_u, z_n), (a_r, a_u, a_n) = z.chunk(3, -1), a.chunk(3, -1)
        n = torch.tanh(z_n + torch.sigmoid(z_r + a_r) * a_n)
        h = n + torch.sigmoid(z_u + a_u) * (h - n)
    else:
        h = activation(kind.removeprefix("rnn_"), z + a)
    return observed(h, tap, TOTAL), c


def observed(x: Tensor, tap: Tensor | None, kind: int) -> Tensor:
    """x, whose gradient leaves its squared norms in that of the tap."""
    return x if tap is None else Observed.apply(x, tap, kind, INF)


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of them does. A tap does: alone it would make the output of a frozen net require grad too."""
    return any(x is not None and x.requires_grad for x in tensors)
