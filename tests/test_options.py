"""What rnnkern.RNN has beyond torch.nn.RNN: clipping in the chain, recurrent dropout, normalisation, residuals."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradflow_helpers import read
from helpers import INF, make_problem, pack
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkern
from rnnkern import backends, loop
from rnnkern.backends import Backend

pytestmark = pytest.mark.everywhere

LOOP = [dict(layer_norm="preactivation"), dict(recurrent_dropout=0.4), dict(layer_norm="preactivation", clip=0.2)]
loops = pytest.mark.parametrize("options", LOOP, ids=str)


@pytest.fixture
def reference() -> Any:
    with rnnkern.use_backend("reference"):
        yield


def cells(rnn: rnnkern.RNN, x: Tensor, masks: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Output (T, B, D·H) and the states of every layer, one step at a time, by the formulas of the options."""
    T, B, _ = x.shape
    f = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu
    states, index = [], 0
    for layer in range(rnn.num_layers):
        outputs = []
        for end in ("", "_reverse") if rnn.bidirectional else ("",):
            w = {
                n.removesuffix(f"_l{layer}{end}"): p for n, p in rnn.named_parameters() if n.endswith(f"_l{layer}{end}")
            }
            norm = (rnn.hidden_size,), w.get("norm_weight"), w.get("norm_bias")
            h: list[Tensor] = [x] * T
            state = x.new_zeros(B, rnn.hidden_size)
            for t in reversed(range(T)) if end else range(T):
                a = x[t] @ w["weight_ih"].T + w["bias_ih"] + w["bias_hh"]
                if rnn.layer_norm == "input":
                    a = F.layer_norm(a, *norm)
                a = a + (state if masks is None else state * masks[index]) @ w["weight_hh"].T
                if rnn.layer_norm == "preactivation":
                    a = F.layer_norm(a, *norm)
                h[t] = f(a)
                state = h[t]
                if rnn.clip != INF:
                    h[t].register_hook(lambda g: g.clamp(-rnn.clip, rnn.clip))
            outputs.append(torch.stack(h))
            index += 1
        states.append(torch.cat(outputs, -1))
        x = states[-1] + x if rnn.residual and layer else states[-1]
    return x, states


@pytest.mark.float64
@pytest.mark.parametrize(
    "options",
    [
        dict(clip=0.05),
        dict(clip=0.05, nonlinearity="relu"),
        dict(residual=True),
        dict(layer_norm="input"),
        dict(layer_norm="input", residual=True, clip=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both"])
def test_with_kernels(backend: Backend, device: str, options: dict[str, Any], bidirectional: bool) -> None:
    """Outputs, states and gradients of a loop over cells, with hooks that clamp."""
    rnn = rnnkern.RNN(3, 4, 3, bidirectional=bidirectional, dtype=torch.float64, device=device, **options)
    x = torch.randn(6, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    output, _, states = rnn(x, return_states=True)
    expected, by_cells = cells(rnn, x)
    torch.testing.assert_close((output, states), (expected, tuple(by_cells)))
    inputs = [x, *rnn.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (output, expected)]
    torch.testing.assert_close(*grads)
    if "clip" in options:  # it does something
        rnn.clip = INF
        assert not torch.allclose(torch.autograd.grad(rnn(x)[0].square().sum(), x)[0], grads[0][0])


@loops
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both"])
def test_loops(reference: None, options: dict[str, Any], kind: str, bidirectional: bool) -> None:
    """The same for what runs as a loop; masks are what F.dropout makes of ones from the same seed."""
    rnn = rnnkern.RNN(3, 4, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    lengths = [6, 6] if kind == "dense" else [6, 4]
    samples = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
    masks = None
    if rnn.recurrent_dropout:
        torch.manual_seed(5)
        ones = torch.ones(2, 4, dtype=torch.float64)
        masks = [F.dropout(ones, rnn.recurrent_dropout) for _ in range(4 if bidirectional else 2)]
    torch.manual_seed(5)
    if kind == "dense":
        output = rnn(torch.stack(samples, 1))[0]
        outputs = list(output.unbind(1))
    else:
        outputs = torch.nn.utils.rnn.unpack_sequence(rnn(pack(samples))[0])
    expected = [
        cells(rnn, sample[:, None], None if masks is None else [m[b : b + 1] for m in masks])[0][:, 0]
        for b, sample in enumerate(samples)
    ]
    torch.testing.assert_close(outputs, expected)
    inputs = [*samples, *rnn.parameters()]
    ours, theirs = (torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (outputs, expected))
    torch.testing.assert_close(ours, theirs)


@loops
def test_loops_are_differentiable_to_any_order(reference: None, options: dict[str, Any]) -> None:
    rnn = rnnkern.RNN(2, 3, dtype=torch.float64, **{**options, "clip": INF})
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(1)
        names = [name for name, _ in rnn.named_parameters()]
        return torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(call, (x, *rnn.parameters()), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *rnn.parameters()), fast_mode=True)


@loops
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("lengths", [None, [4, 3, 1]], ids=["dense", "packed"])
def test_statistics_of_loops(options: dict[str, Any], reverse: bool, lengths: list[int] | None) -> None:
    """The squared norms of ∂L/∂h_t, of its part from later steps, and of ∂L/∂z_t, before clipping."""
    size = dict(T=4, B=3) if lengths is None else dict(lengths=lengths)
    p = make_problem(**size, H=5, dtype=torch.float64, reverse=reverse, device=torch.get_default_device().type)
    clip = options.get("clip", INF)
    mask = F.dropout(torch.ones_like(p.h0), 0.4) if "recurrent_dropout" in options else None
    norm = (torch.rand(5).double(), torch.randn(5).double()) if "layer_norm" in options else None
    tap = torch.zeros(4, len(p.sizes), 3, dtype=torch.float64, requires_grad=True)
    z = p.z.clone().requires_grad_()
    chain = dict(mask=mask, norm=norm, batch_sizes=p.batch_sizes, reverse=reverse, clip=clip)
    outputs = loop.recurrence(z, p.h0, p.w_hh, **chain, tap=tap)
    (delta,) = torch.autograd.grad(outputs, z, [p.grad_h, p.grad_hn], retain_graph=True)
    torch.autograd.backward(outputs, [p.grad_h, p.grad_hn])

    def steps(rows: Tensor) -> Tensor:
        """(T, B): squared norms of the rows of each step, 0 where a sample has none."""
        squares = rows.square().sum(-1)
        parts = squares.unbind(0) if p.batch_sizes is None else squares.split(p.sizes)
        return torch.stack([F.pad(part, (0, 3 - len(part))) for part in parts])

    torch.testing.assert_close(tap.grad[2], steps(delta))
    if clip == INF:  # g_t and r_t by finite cuts: the gradient at h_t is that of a loss which begins at h_t
        seen: list[Tensor] = []
        real = loop.activation

        def remembered(nonlinearity: str, a: Tensor) -> Tensor:
            seen.append(real(nonlinearity, a))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "activation", remembered)
            outputs = loop.recurrence(p.z.clone().requires_grad_(), p.h0, p.w_hh, **chain)
        total = torch.autograd.grad(outputs, seen, [p.grad_h, p.grad_hn], retain_graph=True)
        ordered = total[::-1] if reverse else total
        g = torch.stack(ordered) if p.batch_sizes is None else torch.cat(ordered)
        torch.testing.assert_close(tap.grad[0], steps(g))
        torch.testing.assert_close(tap.grad[1], steps(g - p.grad_h))
    without = loop.recurrence(z, p.h0, p.w_hh, **chain)
    assert torch.equal(torch.autograd.grad(without, z, [p.grad_h, p.grad_hn])[0], delta)


def test_watched(nothing_stays: None) -> None:
    rnn = rnnkern.RNN(3, 4, 2, layer_norm="preactivation", recurrent_dropout=0.3, clip=1e-3, bidirectional=True)
    with rnnkern.watch(rnn) as flow:
        rnn(torch.randn(5, 2, 3))[0].sum().backward()
        norm = read(flow).norm
    assert norm.shape == (2, 2, 5) and np.isfinite(norm).all() and (norm > 0).all()
    assert (norm[1] > 1).all()  # the norm before clipping; of what it lets pass it would be 0.003 at most


def test_recurrent_dropout_masks() -> None:
    """One mask per sequence: a unit that is dropped is dropped at every step; none while evaluating."""
    rnn = rnnkern.RNN(3, 64, recurrent_dropout=0.5)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(64))
        rnn.weight_ih_l0.zero_()
        rnn.bias_ih_l0.fill_(1e-3)
        rnn.bias_hh_l0.zero_()
    h = rnn(torch.zeros(4, 50, 3))[0]
    kept = h[1] > 1.5e-3  # h_2 = tanh(c + m h_1), m = 0 or 2
    assert torch.equal(kept, h[3] > 1.5e-3)
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(h[1][kept], torch.full_like(h[1][kept], math.tanh(3e-3)), rtol=1e-4, atol=0)
    assert not torch.equal(kept[0], kept[1])  # each sample has its own
    rnn.eval()
    assert torch.equal(rnn(torch.zeros(4, 50, 3))[0][:, 0], rnn(torch.zeros(4, 50, 3))[0][:, 1])
    everything = rnnkern.RNN(3, 4, recurrent_dropout=1.0)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(everything(x)[0][3], everything(x[3:4])[0][0])


def test_layer_norm_begins_at_one_and_zero() -> None:
    torch.manual_seed(3)
    plain = rnnkern.RNN(3, 4, 2, bidirectional=True)
    torch.manual_seed(3)
    rnn = rnnkern.RNN(3, 4, 2, bidirectional=True, layer_norm="input")
    for name, p in plain.named_parameters():
        assert torch.equal(p, rnn.get_parameter(name))
    added = {name: p for name, p in rnn.named_parameters() if name.startswith("norm")}
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert set(added) == {f"norm_{what}_{end}" for what in ("weight", "bias") for end in ends}
    for _ in range(2):
        assert all((p == ("weight" in name)).all() and p.shape == (4,) for name, p in added.items())
        nn.init.normal_(rnn.norm_weight_l1)
        rnn.reset_parameters()
    assert rnn.weight_ih_l0.abs().max() <= 0.5
    other = rnnkern.RNN(3, 4, 2, bidirectional=True, layer_norm="input")
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(rnn(x)[0], other(x)[0])
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_weight_l0"):
        rnn.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("options", [dict(layer_norm="input"), *LOOP], ids=str)
def test_autocast(options: dict[str, Any]) -> None:
    rnn = rnnkern.RNN(3, 4, 2, **options)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        output, h_n = rnn(torch.randn(5, 2, 3), torch.randn(2, 2, 4))
    assert output.dtype == h_n.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in rnn.parameters())


def test_states_of_every_layer(backend: Backend, device: str) -> None:
    rnn = rnnkern.RNN(3, 4, 3, dropout=0.5, batch_first=True, device=device)
    x = torch.randn(2, 5, 3, device=device)
    output, h_n, states = rnn(x, return_states=True)
    assert len(states) == 3 and all(s.shape == (2, 5, 4) for s in states)
    assert torch.equal(states[-1], output)
    for layer, state in enumerate(states):
        assert torch.equal(state[:, -1], h_n[layer])
    assert rnn(x[0], return_states=True)[2][0].shape == (5, 4)
    packed = pack_sequence([torch.randn(n, 3, device=device) for n in (2, 5, 3)], enforce_sorted=False)
    rows, _, states = rnn(packed, return_states=True)
    assert all(isinstance(s, PackedSequence) and s.unsorted_indices is packed.unsorted_indices for s in states)
    assert torch.equal(states[-1].data, rows.data)
    assert len(rnn(x)) == 2


@loops
def test_loops_say_that_no_kernel_serves_them(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    rnn, x = rnnkern.RNN(3, 4, **options), torch.randn(5, 2, 3)
    features = [name for name in ("recurrent_dropout", "layer_norm") if name in options]
    message = f"{' and '.join(features)}: no kernel computes this; the plain PyTorch reference runs instead"
    backends._told.discard(message)
    with caplog.at_level(logging.INFO, "rnnkern"):
        rnn(x)
        rnn(x)
    assert [r.message for r in caplog.records] == [message]
    with rnnkern.use_backend("cpu"), pytest.raises(RuntimeError, match=f"'cpu' was asked for but.*{features[-1]}"):
        rnn(x)
    if "recurrent_dropout" in options:
        with rnnkern.use_backend("cpu"):
            rnn.eval()(x)  # no dropout, no loop


def test_options_show_and_are_kept() -> None:
    rnn = rnnkern.RNN(3, 4, 2, clip=1, recurrent_dropout=0.25, layer_norm="input", residual=True, allow_empty=True)
    assert repr(rnn) == (
        "RNN(3, 4, num_layers=2, clip=1.0, recurrent_dropout=0.25, layer_norm='input', residual=True, allow_empty=True)"
    )
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert repr(other) == repr(rnn)
    assert repr(rnnkern.RNN(3, 4)) == repr(nn.RNN(3, 4))


def test_modules_from_before_the_options() -> None:
    """A pickle of an earlier version lacks them."""
    rnn, x = rnnkern.RNN(3, 4), torch.randn(5, 2, 3)
    state = rnn.__getstate__()
    for name in ("clip", "recurrent_dropout", "layer_norm", "residual", "allow_empty"):
        del state[name]
    old = rnnkern.RNN.__new__(rnnkern.RNN)
    old.__setstate__(state)
    assert torch.equal(old(x)[0], rnn(x)[0]) and repr(old) == repr(rnn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(clip=0), ValueError, r"clip must be a positive number \(inf for none\), got 0$"),
        (dict(clip=-1.0), ValueError, "clip must be a positive number"),
        (dict(clip=float("nan")), ValueError, "clip must be a positive number"),
        (dict(clip="1"), ValueError, "clip must be a positive number.*got '1'"),
        (dict(recurrent_dropout=1.5), ValueError, r"recurrent_dropout must be in \[0, 1\], got 1\.5"),
        (dict(recurrent_dropout=True), TypeError, "recurrent_dropout must be a number, got bool"),
        (dict(layer_norm=True), ValueError, "layer_norm must be None, 'input' or 'preactivation', got True"),
        (dict(residual=1), TypeError, "residual should be of type bool, got: int"),
        (dict(allow_empty="no"), TypeError, "allow_empty should be of type bool, got: str"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnnkern.RNN(3, 4, **options)
