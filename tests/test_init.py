"""Initial values: what W_hh becomes, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern
from rnnkern import init, jacobian

RECURRENT = [
    lambda: rnnkern.RNN(3, 8, 2, bidirectional=True),
    lambda: nn.RNN(3, 8, 2, bidirectional=True, nonlinearity="relu"),
    lambda: rnnkern.RNNCell(3, 8),
    lambda: nn.RNNCell(3, 8, bias=False),
    lambda: rnnkern.RNN(3, 8, dtype=torch.bfloat16),
]
GATED = [lambda: nn.LSTM(3, 8, 2), lambda: nn.GRU(3, 8, bidirectional=True), lambda: nn.LSTMCell(3, 8)]
IN_PLACE = [
    lambda rnn: init.orthogonal_(rnn, 0.7),
    lambda rnn: init.spectral_radius_(rnn, 1.2),
    lambda rnn: init.identity_(rnn, 0.5),
]
recurrent = pytest.mark.parametrize("make", RECURRENT)
all_kinds = pytest.mark.parametrize("make", RECURRENT + GATED)


def blocks(rnn: nn.Module) -> list[Tensor]:
    """Every H×H block of W_hh in float64."""
    return [w for name, p in rnn.named_parameters() if "weight_hh" in name for w in p.detach().double().split(8)]


def eps(rnn: nn.Module) -> float:
    return torch.finfo(next(rnn.parameters()).dtype).eps


@all_kinds
def test_orthogonal(make: Callable[[], nn.Module]) -> None:
    rnn = make()
    assert init.orthogonal_(rnn, 0.7) is rnn
    for w in blocks(rnn):
        torch.testing.assert_close(w.T @ w, 0.49 * torch.eye(8, dtype=torch.float64), atol=4 * eps(rnn), rtol=0)
    flat = [w.flatten().tolist() for w in blocks(rnn)]
    assert len({tuple(w) for w in flat}) == len(flat)  # each drawn on its own


@all_kinds
def test_spectral_radius(make: Callable[[], nn.Module]) -> None:
    rnn = make()
    before = blocks(rnn)
    assert init.spectral_radius_(rnn, 1.2) is rnn
    for w, v in zip(blocks(rnn), before):
        assert torch.linalg.eigvals(w).abs().max().item() == pytest.approx(1.2, rel=16 * eps(rnn))
        torch.testing.assert_close(w / w.norm(), v / v.norm(), atol=eps(rnn), rtol=0)  # the direction stays


@recurrent
def test_identity(make: Callable[[], nn.Module]) -> None:
    rnn = make()
    assert init.identity_(rnn, 0.5) is rnn
    assert all(torch.equal(w, 0.5 * torch.eye(8, dtype=torch.float64)) for w in blocks(rnn))
    assert not any(p.any() for name, p in rnn.named_parameters() if "bias" in name)


@pytest.mark.parametrize("change", IN_PLACE)
@recurrent
def test_all_else_stays(make: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]) -> None:
    """Objects, memory, gradients, grad mode, W_ih; torch.nn.RNN's flat weights are still the parameters."""
    rnn = make()
    objects = {name: (p, p.data_ptr(), p.clone()) for name, p in rnn.named_parameters()}
    change(rnn)
    for name, p in rnn.named_parameters():
        same, address, before = objects[name]
        assert p is same and p.data_ptr() == address and p.requires_grad and p.grad is None and p.is_leaf
        kept = "weight_ih" in name or ("bias" in name and change is not IN_PLACE[2])
        assert torch.equal(p, before) == kept
    assert torch.is_grad_enabled()
    if isinstance(rnn, nn.RNN):
        assert all(flat is getattr(rnn, name) for flat, name in zip(rnn._flat_weights, rnn._flat_weights_names))
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(rnn(x)[0], rnnkern.RNN.from_torch(rnn)(x)[0])


def test_what_it_is_for() -> None:
    """Near a zero state the Jacobian products are what the initialisation promises."""
    x = torch.zeros(50, 1, 3)
    rnn = init.orthogonal_(rnnkern.RNN(3, 8, bias=False), 0.9)
    norms = jacobian.spectral_norms(rnn, x, lags=[50]).log10.item()
    assert norms == pytest.approx(50 * math.log10(0.9), abs=1e-5)
    np.testing.assert_allclose(jacobian.spectral_radius(init.spectral_radius_(rnn, 1.5)), 1.5, rtol=1e-6)
    irnn = init.identity_(rnnkern.RNN(3, 8, nonlinearity="relu"))
    values = jacobian.singular_values(irnn, x, torch.ones(1, 1, 8), lags=[50])
    np.testing.assert_allclose(values.log10, np.zeros((1, 1, 1, 1, 8)), atol=1e-14)


def test_orthogonal_is_uniform_and_takes_a_generator() -> None:
    """Of a uniform orthogonal matrix every element has mean 0 and variance 1/H, and the determinant either sign."""
    rnn, generator = nn.RNNCell(1, 4), torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    drawn = torch.stack([init.orthogonal_(rnn, generator=generator).weight_hh.detach().clone() for _ in range(1000)])
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.mean(0).abs().max() < 4.5 * (1 / 4 / 1000) ** 0.5
    assert 450 < (torch.linalg.det(drawn) > 0).sum() < 550
    again = init.orthogonal_(nn.RNNCell(1, 4), generator=torch.Generator().manual_seed(5)).weight_hh
    assert torch.equal(again, drawn[0])


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize(
    "compute",
    [
        lambda rnn: parametrizations.spectral_norm(rnn, "weight_hh_l1"),
        lambda rnn: parametrize.register_parametrization(rnn, "weight_hh_l1", nn.Tanh()),
        lambda rnn: prune.l1_unstructured(rnn, "weight_hh_l1", 3),
    ],
)
def test_weights_that_are_computed_are_refused(
    compute: Callable[[nn.Module], Any], change: Callable[[nn.Module], nn.Module]
) -> None:
    rnn = rnnkern.RNN(3, 4, 2)
    compute(rnn)
    before = {name: value.clone() for name, value in rnn.state_dict().items()}
    with pytest.raises(ValueError, match=r"weight_hh_l1 of this .*RNN is computed from other parameters"):
        change(rnn)
    assert all(torch.equal(value, before[name]) for name, value in rnn.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.orthogonal_(nn.Linear(4, 4)), TypeError, "rnn must be an RNN, LSTM.*got Linear"),
        (lambda: init.spectral_radius_(nn.Linear(4, 4), 1), TypeError, "got Linear"),
        (lambda: init.identity_(nn.LSTM(3, 4)), TypeError, "rnn must be an RNN or RNNCell.*got LSTM"),
        (lambda: init.identity_(nn.GRUCell(3, 4)), TypeError, "got GRUCell"),
        (lambda: init.orthogonal_(nn.RNN(3, 4), gain=0), ValueError, "gain must be a positive, finite number, got 0"),
        (lambda: init.identity_(nn.RNN(3, 4), scale=math.inf), ValueError, "scale must be"),
        (lambda: init.spectral_radius_(nn.RNN(3, 4), -1), ValueError, "radius must be"),
        (lambda: init.orthogonal_(nn.LSTM(3, 4, proj_size=2)), ValueError, r"blocks of 4×4, got \[16, 2\]"),
        (lambda: init.orthogonal_(nn.RNN(3, 4, dtype=torch.cfloat)), ValueError, "must be real, got torch.complex64"),
    ],
)
def test_errors_name_what_came(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("value", "words"), [(0.0, "a spectral radius of 0"), (math.nan, "not finite")])
def test_a_radius_that_cannot_be_scaled(value: float, words: str) -> None:
    rnn = nn.RNN(3, 4, 2)
    nn.init.constant_(rnn.weight_hh_l1, value)
    before = rnn.weight_hh_l0.clone()
    with pytest.raises(ValueError, match=words):
        init.spectral_radius_(rnn, 1.0)
    assert torch.equal(rnn.weight_hh_l0, before)
