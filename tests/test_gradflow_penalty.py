"""Ω as a penalty, against plain autograd over a float64 loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradflow_helpers import LOSSES, Loss, chain, everywhere, read
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnkern
from rnnkern.gradflow import omega_penalty

pytestmark = pytest.mark.usefixtures("nothing_stays")

LENGTHS = [2, 6, 1, 6, 4]
VARIANTS = pytest.mark.parametrize("variant", ["paper", "code"])
#: (layer, direction) -> what the nonlinearity gets and gives at each step, in processing order
Chains = dict[tuple[int, int], list[tuple[Tensor, Tensor]]]


def loop(rnn: rnnkern.RNN, x: Tensor) -> tuple[Tensor, Tensor, Chains]:
    """output (n, D·H), h_n (layers·D, H) and the chains of a sample (n, I)."""
    chains: Chains = {}
    finals = []
    f = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(1 + rnn.bidirectional):
            end = f"_l{layer}" + ("_reverse" if d else "")
            w_ih, w_hh, b_ih, b_hh = (
                getattr(rnn, name) for name in rnn._all_weights[layer * (1 + rnn.bidirectional) + d]
            )
            z = F.linear(x, w_ih, b_ih + b_hh)
            if rnn.layer_norm == "input":
                z = F.layer_norm(z, z.shape[1:], getattr(rnn, "norm_weight" + end), getattr(rnn, "norm_bias" + end))
            h, steps = torch.zeros(rnn.hidden_size, dtype=x.dtype), []
            for z_t in reversed(z) if d else z:
                a = z_t + w_hh @ h
                h = f(a)
                for part in (a, h):
                    part.retain_grad()
                steps.append((a, h))
            chains[layer, d] = steps
            finals.append(h)
            outputs.append(torch.stack([h for _, h in (reversed(steps) if d else steps)]))
        joined = torch.cat(outputs, -1)
        x = joined + x if rnn.residual and layer else joined
    return x, torch.stack(finals), chains


def plain_omega(rnn: rnnkern.RNN, samples: Sequence[Tensor], loss: Loss, variant: str) -> tuple[Tensor, list[Tensor]]:
    """Ω summed over layers and directions as autograd has it, g and h detached; and its gradients in the W_hh."""
    runs = [loop(rnn, x) for x in samples]
    loss([output for output, _, _ in runs], [h_n for _, h_n, _ in runs]).backward()
    total, weights = torch.zeros((), dtype=torch.float64), []
    for layer, d in runs[0][2]:
        weights.append(getattr(rnn, f"weight_hh_l{layer}" + ("_reverse" if d else "")).detach().requires_grad_())
        ratios = []
        for _, _, chains in runs:
            grads = [[torch.zeros_like(x) if x.grad is None else x.grad for x in step] for step in chains[layer, d][1:]]
            if grads:
                delta, g = (torch.stack(each) for each in zip(*grads))
                ratios.append((delta @ weights[-1]).norm(dim=1) / g.norm(dim=1))
        if variant == "paper":
            total = total + sum((q - 1).square().sum() for q in ratios) / len(ratios)
        else:
            total = total + (torch.cat(ratios).square() - 1).square().mean()
    rnn.zero_grad()
    return total.detach(), list(torch.autograd.grad(total, weights))


def forward(rnn: rnnkern.RNN, form: str, loss: Loss) -> tuple[list[Tensor], Tensor, Any, Tensor, dict[str, Any]]:
    """Random samples, and the loss, output, h_n and keyword arguments for the penalty of a forward on them."""
    samples = [torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS]
    lengths = None
    if form == "packed":
        output, h_n, states = rnn(pack_sequence(samples, enforce_sorted=False), return_states=True)
    elif form == "lengths":
        lengths = LENGTHS
        x = nn.utils.rnn.pad_sequence(samples)
        output, h_n, states = rnn(x, lengths=lengths, return_states=True)
    else:
        samples = [torch.randn(6, 3, dtype=torch.float64) for _ in range(1 if form == "unbatched" else 3)]
        x = samples[0] if form == "unbatched" else torch.stack(samples, 0 if rnn.batch_first else 1)
        output, h_n, states = rnn(x, return_states=True)
    if form == "unbatched":
        return samples, loss([output], [h_n]), output, h_n, dict(states=states)
    each = pad_packed_sequence(output)[0] if isinstance(output, PackedSequence) else output
    each = each if rnn.batch_first else each.transpose(0, 1)
    value = loss([y[: len(x)] for x, y in zip(samples, each)], h_n.unbind(1))
    return samples, value, output, h_n, dict(states=states, lengths=lengths)


def check(rnn: rnnkern.RNN, form: str, loss: Loss, variant: Any) -> None:
    """The value is the record's Ω, and value and gradient are those of plain autograd."""
    with rnnkern.watch(rnn) as flow:
        samples, value, output, h_n, options = forward(rnn, form, loss)
        penalty = omega_penalty(rnn, value, output, h_n, variant=variant, **options)
        grads = torch.autograd.grad(penalty, list(rnn.parameters()), allow_unused=True, retain_graph=True)
        (value + penalty).backward()  # the loss's own graph is still there
    assert penalty.item() == pytest.approx(read(flow).omega_by(variant).sum(), rel=1e-10)
    named = {name: grad for (name, _), grad in zip(rnn.named_parameters(), grads) if grad is not None}
    assert list(named) == [name for name, _ in rnn.named_parameters() if "weight_hh" in name]
    expected, expected_grads = plain_omega(rnn, samples, loss, variant)
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-10, atol=0)
    for (name, got), true in zip(named.items(), expected_grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@LOSSES
@VARIANTS
@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "batch_first", "unbatched"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_penalty(form: str, bidirectional: bool, loss: Loss, variant: str) -> None:
    check(chains_of(1, form, bidirectional=bidirectional), form, loss, variant)


@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "batch_first", "unbatched"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_penalty_of_several_layers(form: str, bidirectional: bool) -> None:
    check(chains_of(3, form, bidirectional=bidirectional), form, everywhere, "paper")


@VARIANTS
@pytest.mark.parametrize(
    "options",
    [
        dict(residual=True),
        dict(layer_norm="input"),
        dict(nonlinearity="relu"),
        dict(residual=True, layer_norm="input", bidirectional=True),
    ],
    ids=str,
)
def test_penalty_of_layers_with_options(options: dict[str, Any], variant: str) -> None:
    """The loss stands at the end of the last layer: lower ones get all from above."""

    def last(outputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
        return sum((b + 1) * y[-1].sin().sum() for b, y in enumerate(outputs))  # type: ignore[return-value]

    rnn = chains_of(3, "packed", **options)
    for name, p in rnn.named_parameters():
        if name.startswith("norm_"):
            nn.init.normal_(p, 1.0, 0.3)
    if rnn.nonlinearity == "relu":  # units that are off would leave rows without a gradient
        for bias in (p for name, p in rnn.named_parameters() if "bias" in name):
            nn.init.constant_(bias, 1.0)
    if rnn.bidirectional:  # the reverse chain's gradient stands at its own first step alone
        last = everywhere
    check(rnn, "packed", last, variant)


def chains_of(layers: int, form: str, **options: Any) -> rnnkern.RNN:
    return rnnkern.RNN(3, 4, layers, batch_first=form == "batch_first", dtype=torch.float64, **options)


@pytest.mark.parametrize("layers", [1, 2])
def test_penalty_moves_the_gain_towards_one(layers: int) -> None:
    rnn = rnnkern.RNN(3, 16, layers)
    weights = [p for name, p in rnn.named_parameters() if "weight_hh" in name]
    x, optimizer = torch.randn(20, 4, 3), torch.optim.SGD(weights, lr=0.05)
    values = []
    for _ in range(30):
        output, h_n, states = rnn(x, return_states=True)
        penalty = omega_penalty(rnn, h_n.sum(), output, h_n, states=states)
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert values[-1] < 0.2 * values[0]


def test_penalty_of_vanished_and_absent_rows_is_a_number() -> None:
    rnn = chain(0.01)
    zeros = torch.zeros(40, 2, 3, dtype=torch.float64)
    output, h_n = rnn(zeros)
    penalty = omega_penalty(rnn, h_n.sum(), output, h_n)
    assert penalty.item() == pytest.approx(6 * 0.99**2)  # G² falls below 1e-20 after six steps
    penalty.backward()
    assert rnn.weight_hh_l0.grad.isfinite().all()
    output, h_n = rnn(zeros[:1])
    assert omega_penalty(rnn, h_n.sum(), output, h_n).item() == 0


def test_penalty_of_empty_samples() -> None:
    rnn = rnnkern.RNN(3, 4, 2, allow_empty=True, dtype=torch.float64)
    x, lengths = torch.randn(5, 3, 3, dtype=torch.float64), [5, 0, 3]
    some, all_of_it = [0, 2], []
    for part, n in ((x, lengths), (x[:, some], [lengths[b] for b in some])):
        output, h_n, states = rnn(part, lengths=n, return_states=True)
        all_of_it.append(omega_penalty(rnn, output.sum(), output, states=states, lengths=n))
    torch.testing.assert_close(*all_of_it, rtol=1e-12, atol=0)
    output, h_n, states = rnn(
        x, torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True), lengths=[0, 0, 0], return_states=True
    )
    assert omega_penalty(rnn, h_n.sum(), output, h_n, states=states, lengths=[0, 0, 0]).item() == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_penalty_under_autocast(layers: int) -> None:
    """Half precision goes into the chain alone: the value is the record's, which has float64 squares."""
    rnn = rnnkern.RNN(3, 16, layers)
    flow = rnnkern.watch(rnn)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, states = rnn(torch.randn(12, 4, 3), return_states=True)
        loss = output.float().square().mean()
        penalty = omega_penalty(rnn, loss, output, h_n, states=states)
    assert output.dtype == torch.bfloat16 and penalty.dtype == torch.float32
    (loss + penalty).backward()
    assert penalty.item() == pytest.approx(read(flow).omega.sum(), rel=2**-8)  # δ is rounded to bfloat16
    assert rnn.weight_hh_l0.grad.dtype == torch.float32


def test_dropout_of_an_evaluating_net_is_none() -> None:
    rnn, x = rnnkern.RNN(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    output, _, states = rnn(x, return_states=True)
    with pytest.raises(ValueError, match=r"no dropout between its layers while it trains, got dropout=0\.5"):
        omega_penalty(rnn, output.sum(), output, states=states)
    values = []
    for p in (0.5, 0.0):
        rnn.eval().dropout = p
        output, _, states = rnn(x, return_states=True)
        values.append(omega_penalty(rnn, output.sum(), output, states=states).item())
    assert values[0] == values[1] > 0


def test_penalty_errors() -> None:
    rnn, x = rnnkern.RNN(3, 4), torch.randn(5, 2, 3)
    output, h_n = rnn(x)
    with pytest.raises(ValueError, match="variant must be"):
        omega_penalty(rnn, output.sum(), output, variant="book")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss must depend on output or h_n"):
        omega_penalty(rnn, rnn.weight_hh_l0.sum(), output, h_n)
    packed, _ = rnn(pack_sequence([x[:, 0]]))
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence"):
        omega_penalty(rnn, packed.data.sum(), packed, lengths=[5])
    for other in (rnnkern.RNN(3, 4, layer_norm="preactivation"), rnnkern.RNN(3, 4, recurrent_dropout=0.5)):
        output, h_n = other(x)
        with pytest.raises(ValueError, match="neither layer_norm"):
            omega_penalty(other, output.sum(), output, h_n)


def test_states_that_do_not_fit() -> None:
    rnn, x = rnnkern.RNN(3, 4, 2), torch.randn(5, 2, 3)
    output, _, states = rnn(x, return_states=True)
    packed = pack_sequence([x[:, 0]])
    for given, match in [
        (None, r"states must be given for an RNN of 2 layers: rnn\(x, return_states=True\)\[2\]"),
        (states[:1], "one entry for each of the 2 layers, got 1"),
        (output, "one entry for each of the 2 layers, got Tensor"),
        (packed, "one entry for each of the 2 layers, got PackedSequence"),
        (
            (states[0], states[1][:4]),
            r"states\[1\] must have the form of output, Tensor \[5, 2, 4\], got Tensor \[4, 2, 4\]",
        ),
        (
            (packed, packed),
            r"states\[0\] must have the form of output, Tensor \[5, 2, 4\], got PackedSequence \[5, 3\]",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            omega_penalty(rnn, output.sum(), output, states=given)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_default_device(kind: str) -> None:
    """Where tensors are made by default is nothing to what is measured of a model that is elsewhere."""
    rnn = rnnkern.RNN(3, 4, bidirectional=True)
    x = torch.randn(6, 2, 3)
    given = pack_sequence([x[:4, 0], x[:, 1]], enforce_sorted=False) if kind == "packed" else x
    seen = []
    for default in ("cpu", "meta"):
        with torch.device(default), rnnkern.watch(rnn) as flow:
            output, h_n = rnn(given)
            loss = output.data.square().sum() + h_n.sum()
            penalty = omega_penalty(rnn, loss, output, h_n)
            loss.backward()
            rec = read(flow)
        seen.append((penalty.item(), rec.squares.tolist(), rec["rnn"].lengths.tolist()))
    assert seen[0] == seen[1] and seen[0][2] == ([4, 6] if kind == "packed" else [6, 6])
