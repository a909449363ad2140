"""Lyapunov exponents and the contraction of the state, against closed forms and loops by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gradflow_helpers import chain
from helpers import threads
from torch import Tensor

import rnnkern
from rnnkern import jacobian


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):  # small matrices: more threads only wait for one another
        yield


def by_hand(rnn: rnnkern.RNN, x: Tensor, k: int, warmup: int, transposed: bool) -> np.ndarray:
    """The exponents of one sample from the same first directions, one QR a step."""
    H, w_hh = rnn.hidden_size, rnn.weight_hh_l0.detach()
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(1, H, k, dtype=torch.float64, generator=generator)[0])[0]
    total = torch.zeros(k, dtype=torch.float64)
    for t, h in enumerate(rnn(x)[0][:, 0].detach()):
        J = (1 - h * h)[:, None] * w_hh
        q, r = torch.linalg.qr((J.T if transposed else J) @ q)
        total += r.diagonal().abs().log() if t >= warmup else 0
    return (total / (len(x) - warmup)).numpy()


@pytest.mark.parametrize("every", [1, 4, 7])
def test_lyapunov_order_matters(every: int) -> None:
    """A signal hops from unit to unit, and the input opens them in that rhythm: λ_1 = ln ρ(J_3 J_2 J_1) / 3 = ln 0.9.
    Transposed Jacobians forward in time make J_1 J_2 J_3 in the end, which meets closed units: another number."""
    k, warmup = 2, 100
    rnn = rnnkern.RNN(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(3))
        rnn.weight_hh_l0.copy_(0.9 * torch.eye(3).roll(1, 0))
    x = (3 * (1 - torch.eye(3, dtype=torch.float64)))[:, None].repeat(500, 1, 1)  # 3 saturates
    measured = jacobian.lyapunov_exponents(rnn, x, k=k, warmup=warmup, every=every).exponents
    assert measured.shape == (1, 1, k, 1)
    np.testing.assert_allclose(measured[0, 0, :, 0], by_hand(rnn, x, k, warmup, transposed=False), atol=1e-9)
    h = rnn(x)[0][-3:, 0].detach()
    J = (1 - h * h)[:, :, None] * rnn.weight_hh_l0.detach()
    forwards, backwards = (
        torch.linalg.eigvals(p).abs().max().log().item() / 3 for p in (J[2] @ J[1] @ J[0], J[0] @ J[1] @ J[2])
    )
    assert forwards == pytest.approx(math.log(0.9)) and backwards < -1.5
    assert measured[0, 0, 0, 0] == pytest.approx(forwards, abs=2e-3)
    assert by_hand(rnn, x, k, warmup, transposed=True)[0] == pytest.approx(backwards, abs=1e-2)


def test_all_exponents_add_up_to_the_volume() -> None:
    """Σ λ = mean ln |det J_t|, exactly and from any first directions."""
    rnn = rnnkern.RNN(2, 5, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(120, 3, 2, dtype=torch.float64)
    exponents = jacobian.lyapunov_exponents(rnn, x, layers=1, directions=1, warmup=20).exponents
    h = rnn(x)[0][..., 5:].flip(0)[20:].detach()
    volume = (1 - h * h).log().sum(-1).mean(0) + torch.linalg.slogdet(rnn.weight_hh_l1_reverse.detach())[1]
    np.testing.assert_allclose(exponents[0, 0].sum(0), volume.numpy(), rtol=1e-10)


def test_directions_that_are_not_resolved_are_nan() -> None:
    """Two factors, 0.9 and 0.1, in a basis that is not the units': after 40 steps they are 1e38 apart."""
    rnn, x = chain(1.0, H=2), torch.zeros(200, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        basis = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
        rnn.weight_hh_l0.copy_(basis @ torch.diag(torch.tensor([0.9, 0.1], dtype=torch.float64)) @ basis.T)
    near = jacobian.lyapunov_exponents(rnn, x).exponents.ravel()
    np.testing.assert_allclose(near, np.log([0.9, 0.1]), rtol=1e-9)
    far = jacobian.lyapunov_exponents(rnn, x, every=40).exponents.ravel()
    np.testing.assert_allclose(far, [math.log(0.9), math.nan], rtol=1e-9)
    relu = rnnkern.RNN(3, 4, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        relu.bias_hh_l0.copy_(torch.tensor([9, -9, 9, -9]))  # two units are always on, two are always off
    values = jacobian.lyapunov_exponents(relu, x).exponents.ravel()
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, True])
    on = torch.linalg.eigvals(relu.weight_hh_l0.detach()[::2, ::2]).abs().log()
    assert values[:2].sum() == pytest.approx(on.sum().item(), rel=1e-9)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("given", [True, False])
def test_contraction_against_two_trajectories(nonlinearity: str, given: bool) -> None:
    rnn = rnnkern.RNN(3, 12, 2, nonlinearity=nonlinearity, dtype=torch.float64)
    x, hx = torch.randn(12, 4, 3, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    other = hx.clone()
    other[1] = torch.randn(4, 12, dtype=torch.float64)
    if not given:
        hx, other = torch.zeros_like(hx), None  # type: ignore[assignment]
    ours = jacobian.contraction(rnn, x, hx if given else None, other=other, layers=1, distance=0.25)
    assert ours.log10.shape == (1, 1, 13, 4) and ours.rate.shape == (1, 1, 4)
    if not given:
        np.testing.assert_allclose(ours.log10[0, 0, 0], math.log10(0.25))
        drawn = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        other = torch.stack([hx[0], 0.25 * drawn / drawn.norm(dim=1, keepdim=True)])
    apart = (rnn(x, hx)[0] - rnn(x, other)[0]).detach()
    distance = torch.cat([(hx[1] - other[1])[None], apart]).norm(dim=-1)
    np.testing.assert_allclose(10 ** ours.log10[0, 0], distance.numpy(), rtol=1e-9, atol=1e-14)


def test_contraction_goes_on_below_what_float64_holds_and_agrees_with_lyapunov() -> None:
    rnn, x = chain(0.5), torch.zeros(4000, 1, 3, dtype=torch.float64)
    exact = jacobian.contraction(rnn, x, distance=1e-12)  # linear from the first step on
    np.testing.assert_allclose(exact.log10.ravel(), -12 + np.arange(4001) * math.log10(0.5), rtol=1e-12)
    np.testing.assert_allclose(exact.rate, math.log(0.5), rtol=1e-12)
    rnn, x = rnnkern.RNN(3, 10, dtype=torch.float64), torch.randn(4000, 2, 3, dtype=torch.float64)
    collapse = jacobian.contraction(rnn, x)
    assert collapse.log10[0, 0, -1].max() < -500
    leading = jacobian.lyapunov_exponents(rnn, x, k=1, warmup=2000).exponents[:, :, 0]
    np.testing.assert_allclose(collapse.rate, leading, atol=5e-3)


def test_a_chaotic_net_does_not_forget() -> None:
    rnn = chain(3.0, H=32)
    x = torch.zeros(400, 2, 3, dtype=torch.float64)
    grown = jacobian.contraction(rnn, x, 0.1 * torch.randn(1, 2, 32, dtype=torch.float64), distance=1e-9)
    assert (np.abs(grown.rate) < 0.02).all() and (grown.log10[0, 0, -1] > -1).all()
    assert (jacobian.lyapunov_exponents(rnn, x, 0.1 * torch.randn(1, 2, 32).double(), k=1).exponents > 0.05).all()
