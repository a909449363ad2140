"""Jacobian products against closed forms, autograd and loops by hand; and that measuring leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import chain
from helpers import threads
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import rnnkern
from rnnkern import jacobian
from rnnkern.backends import Backend

GAINS = pytest.mark.parametrize("gain", [0.5, 0.9, 1.5])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):  # small matrices: more threads only wait for one another
        yield


def steady(gain: float, nonlinearity: str, T: int, H: int = 16) -> tuple[rnnkern.RNN, Tensor, Tensor]:
    """Every Jacobian is gain times an orthogonal matrix: module, zero input, initial state."""
    h0 = torch.zeros(1, 1, H) if nonlinearity == "tanh" else torch.ones(1, 1, H)
    return chain(gain, H, nonlinearity), torch.zeros(T, 1, 3, dtype=torch.float64), h0.double()


@GAINS
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.float64
def test_orthogonal_chain(gain: float, nonlinearity: str, backend: Backend) -> None:
    rnn, x, h0 = steady(gain, nonlinearity, T=50)
    k = np.arange(51)
    lag = k * math.log10(gain)
    frobenius = jacobian.frobenius_norms(rnn, x, h0, probes=5)
    np.testing.assert_array_equal(frobenius.lags, k)
    assert frobenius.log10.shape == (1, 1, 51, 1) and frobenius.log10.dtype == np.float64
    np.testing.assert_allclose(frobenius.log10.ravel(), lag + math.log10(4), atol=1e-12)  # g^k √H
    spectral = jacobian.spectral_norms(rnn, x, h0, lags=range(51), iterations=1)
    np.testing.assert_allclose(spectral.log10.ravel(), lag, atol=1e-12)
    assert spectral.relative_error.max() < 1e-12
    values = jacobian.singular_values(rnn, x, h0)
    np.testing.assert_allclose(values.log10[0, 0, :, 0], np.repeat(lag[:, None], 16, 1), atol=1e-12)
    exponents = jacobian.lyapunov_exponents(rnn, x, h0)
    np.testing.assert_allclose(exponents.exponents.ravel(), math.log(gain), atol=1e-12)
    assert (exponents.steps, exponents.warmup) == (45, 5)


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_ten_thousand_steps(gain: float) -> None:
    rnn, x, _ = steady(gain, "tanh", T=10_000)
    lags = [1, 9_999, 10_000]
    exact = np.array(lags) * math.log10(gain)
    np.testing.assert_allclose(
        jacobian.spectral_norms(rnn, x, lags=lags, iterations=1).log10.ravel(), exact, rtol=1e-12
    )
    np.testing.assert_allclose(
        jacobian.frobenius_norms(rnn, x, lags=lags, probes=2).log10.ravel(), exact + math.log10(4), rtol=1e-12
    )
    np.testing.assert_allclose(
        jacobian.singular_values(rnn, x, lags=lags).log10[0, 0, :, 0], np.repeat(exact[:, None], 16, 1), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("w", "steps", "product"), [(0.9, 10, 0.35), (0.9, 50, 0.005), (0.9, 100, 0.000026), (0.5, 20, 9.5e-7)]
)
def test_the_textbooks_scalar_table(w: float, steps: int, product: float) -> None:
    rnn = rnnkern.RNN(1, 1, bias=False)
    nn.init.constant_(rnn.weight_hh_l0, w)
    norms = jacobian.frobenius_norms(rnn, torch.zeros(steps, 1))
    shrunk = 10 ** norms.log10[0, 0, -1, 0]
    assert shrunk == pytest.approx(w**steps, rel=1e-5)  # w is a float32
    assert shrunk == pytest.approx(product, rel=0.035)  # of which the book prints one or two digits
    assert norms.relative_error.max() == 0


def products(rnn: Any, x: Tensor, layer: int, direction: int, end: int, hx: Tensor | None = None) -> list[Tensor]:
    """∂h_t/∂h_{t-lag} at lag 0 … t+1 for one sample x (T, I), by autograd; t and the lags in processing order."""
    D = 2 if rnn.bidirectional else 1
    f = torch.tanh if rnn.mode == "RNN_TANH" else torch.relu
    for l in range(layer + 1):
        states, steps = [], []
        for d in range(D):
            name = f"_l{l}" + "_reverse" * d
            w_ih, w_hh = getattr(rnn, "weight_ih" + name).detach(), getattr(rnn, "weight_hh" + name).detach()
            b = getattr(rnn, "bias_ih" + name).detach() + getattr(rnn, "bias_hh" + name).detach()
            z = (x.flip(0) if d else x) @ w_ih.T + b

            def run(h: Tensor, z: Tensor, w_hh: Tensor = w_hh) -> list[Tensor]:
                each = [h]
                for z_t in z:
                    each.append(f(z_t + w_hh @ each[-1]))
                return each

            h0 = torch.zeros(rnn.hidden_size, dtype=x.dtype) if hx is None else hx[l * D + d]
            h = run(h0, z)
            steps.append((run, h, z))
            states.append(torch.stack(h[1:]).flip(0) if d else torch.stack(h[1:]))
        x = torch.cat(states, 1)
    run, h, z = steps[direction]
    return [
        torch.autograd.functional.jacobian(lambda state, s=s: run(state, z[s : end + 1])[-1], h[s])
        for s in range(end + 1, -1, -1)
    ]


def log10(x: Tensor) -> np.ndarray:
    return x.log10().numpy()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("module", [rnnkern.RNN, nn.RNN])
def test_against_autograd(module: Callable[..., Any], nonlinearity: str) -> None:
    """Layers, directions, an initial state, batch_first; biases that keep some relu units alive."""
    rnn = module(3, 6, 2, nonlinearity=nonlinearity, bidirectional=True, batch_first=True, dtype=torch.float64)
    for name, p in rnn.named_parameters():
        if name.startswith("bias"):
            nn.init.constant_(p, 0.3)
    x, hx = torch.randn(2, 11, 3, dtype=torch.float64), torch.randn(4, 2, 6, dtype=torch.float64)
    frobenius = jacobian.frobenius_norms(rnn, x, hx, probes=6)
    spectral = jacobian.spectral_norms(rnn, x, hx, lags=[0, 3, 11, 1], iterations=100).log10
    values = jacobian.singular_values(rnn, x, hx)
    assert frobenius.log10.shape == (2, 2, 12, 2) and values.log10.shape == (2, 2, 12, 2, 6)
    for l in range(2):
        for d in range(2):
            for b in range(2):
                true = torch.stack(products(rnn, x[b], l, d, 10, hx[:, b]))
                sigma = torch.linalg.svdvals(true)
                np.testing.assert_allclose(frobenius.log10[l, d, :, b], log10(true.norm(dim=(1, 2))), atol=1e-12)
                below = log10(sigma[[0, 3, 11, 1], 0]) - spectral[l, d, :, b]  # the power method's error, never above
                assert below.min() > -1e-12 and below.max() < 1e-2 and below[[0, 2]].max() < 1e-9
                ours, known = values.log10[l, d, :, b], ~np.isnan(values.log10[l, d, :, b])
                assert known[:, 0].all() and known[:3].sum() >= (18 if nonlinearity == "tanh" else 8)
                relative = (10**ours - sigma.numpy()) / sigma[:, :1].numpy()
                assert np.abs(relative[known]).max() < 1e-13
                assert (sigma.numpy() / sigma[:, :1].numpy())[~known].max(initial=0) < 1e-14


def test_chosen_layers_directions_steps_and_lags() -> None:
    rnn = rnnkern.RNN(3, 5, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(9, 1, 3, dtype=torch.float64)
    norms = jacobian.frobenius_norms(rnn, x, layers=[-1, 0], directions=1, end=4, lags=[5, 2], probes=9)
    assert (norms.layers, norms.directions, norms.log10.shape) == ((2, 0), (1,), (2, 1, 2, 1))
    for i, layer in enumerate(norms.layers):
        true = products(rnn, x[:, 0], layer, 1, end=4)
        np.testing.assert_allclose(norms.log10[i, 0, :, 0], log10(torch.stack([true[5].norm(), true[2].norm()])))


@pytest.mark.parametrize("end", [None, 3])
def test_samples_of_several_lengths(end: int | None) -> None:
    """Each is what it is alone: padded with lengths, packed, sorted or not."""
    rnn = rnnkern.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64)
    samples = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 9, 1, 6)]
    hx = torch.randn(4, 4, 5, dtype=torch.float64)
    padded = nn.utils.rnn.pad_sequence(samples, padding_value=math.nan)
    given: list[tuple[Any, dict[str, Any]]] = [
        (padded, {"lengths": [4, 9, 1, 6]}),
        (pack_sequence(samples, enforce_sorted=False), {}),
    ]
    for x, options in given:
        norms = jacobian.frobenius_norms(rnn, x, hx, end=end, probes=5, **options)
        values = jacobian.singular_values(rnn, x, hx, end=end, **options)
        spectral = jacobian.spectral_norms(rnn, x, hx, end=end, lags=[0, 1, 4], iterations=100, **options)
        for b, sample in enumerate(samples):
            if end is not None and end >= len(sample):
                assert np.isnan(norms.log10[..., b]).all() and np.isnan(spectral.log10[..., b]).all()
                continue
            alone = jacobian.frobenius_norms(rnn, sample, hx[:, b], end=end, probes=5).log10[..., 0]
            n = alone.shape[2]
            np.testing.assert_allclose(norms.log10[:, :, :n, b], alone, atol=1e-12)
            assert np.isnan(norms.log10[:, :, n:, b]).all()
            np.testing.assert_array_equal(np.isnan(spectral.log10[0, 0, :, b]), np.array([0, 1, 4]) >= n)
            below = values.log10[:, :, 1, b, 0] - spectral.log10[:, :, 1, b]
            assert below.min() > -1e-12 and below.max() < 1e-2


@pytest.mark.parametrize("probes", [1, 4, 15])
def test_frobenius_estimate_errs_as_it_says(probes: int) -> None:
    """Over 400 draws: no bias, and the deviation that holds for a product of rank 1, which 40 steps come close to."""
    H, draws = 16, 400
    rnn = rnnkern.RNN(3, H, dtype=torch.float64)
    x = torch.randn(40, 1, 3, dtype=torch.float64).expand(40, draws, 3)  # every sample draws its own probes
    exact = jacobian.frobenius_norms(rnn, x[:, :1], lags=[1, 40], probes=H).log10[0, 0]
    norms = jacobian.frobenius_norms(rnn, x, lags=[1, 40], probes=probes)
    ratio = 10 ** (2 * (norms.log10[0, 0] - exact))
    error = norms.relative_error[0, 0, 0, 0]
    assert error == pytest.approx(math.sqrt(2 / probes * (H - probes) / (H + 2))) and error < math.sqrt(2 / probes)
    np.testing.assert_array_less(np.abs(ratio.mean(1) - 1), 4 * error / math.sqrt(draws))
    assert ratio[0].std() < 0.8 * error  # one step has many singular values
    assert 0.8 < ratio[1].std() / error < 1.25


def test_probes_are_reproducible_and_the_callers_generator_is_used() -> None:
    rnn, x = rnnkern.RNN(3, 16), torch.randn(7, 2, 3)

    def norms(generator: torch.Generator | None = None) -> np.ndarray:
        return jacobian.frobenius_norms(rnn, x, probes=2, generator=generator).log10[0, 0, 1:]

    np.testing.assert_array_equal(norms(), norms())
    mine = torch.Generator().manual_seed(7)
    assert (norms(mine) != norms(mine)).all()


def saturated(dtype: torch.dtype = torch.float64) -> tuple[rnnkern.RNN, Tensor]:
    rnn = rnnkern.RNN(3, 8, dtype=dtype)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(3)
        rnn.bias_hh_l0.fill_(12)
    return rnn, torch.randn(60, 2, 3, dtype=dtype)


def test_saturation_is_not_taken_for_zero() -> None:
    """f' of 1e-8 at every step makes 1e-480 in 60, which no float64 holds; a loop that keeps each step's logarithm."""
    rnn, x = saturated()
    rows, log, logs = torch.eye(8, dtype=torch.float64).expand(2, 8, 8), torch.zeros(2), [torch.zeros(2)]
    for h in rnn(x)[0].detach().flip(0):
        rows = (rows * (1 - h * h)[:, None]) @ rnn.weight_hh_l0.detach()
        norm = rows.norm(dim=(1, 2), keepdim=True)
        rows, log = rows / norm, log + norm[:, 0, 0].log10()
        logs.append(log)
    true = torch.stack(logs[1:]).numpy()
    assert true[-1].max() < -400
    np.testing.assert_allclose(jacobian.frobenius_norms(rnn, x, probes=8).log10[0, 0, 1:], true, rtol=1e-6)
    np.testing.assert_allclose(jacobian.spectral_norms(rnn, x, lags=[60]).log10[0, 0, 0], true[-1], rtol=1e-3)


def test_what_vanishes_exactly_is_minus_infinity() -> None:
    rnn = rnnkern.RNN(2, 4, nonlinearity="relu", bias=False)
    x = torch.zeros(20, 1, 2)  # the units are off, and f'(0) = 0
    expected = [0.0] + [-math.inf] * 20
    np.testing.assert_allclose(jacobian.frobenius_norms(rnn, x).log10.ravel(), [math.log10(2), *expected[1:]])
    np.testing.assert_array_equal(jacobian.spectral_norms(rnn, x, lags=range(21)).log10.ravel(), expected)
    assert (jacobian.singular_values(rnn, x).log10[0, 0, 1:] == -math.inf).all()
    assert (jacobian.lyapunov_exponents(rnn, x).exponents == -math.inf).all()
    assert (jacobian.contraction(rnn, x, distance=1e-3).log10[0, 0, 1:, 0] < -3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_measured_in_float64(dtype: torch.dtype) -> None:
    rnn, x = rnnkern.RNN(3, 6, dtype=dtype), torch.randn(30, 2, 3, dtype=dtype)
    twin = rnnkern.RNN(3, 6, dtype=torch.float64)
    twin.load_state_dict(rnn.state_dict())
    for measure in (jacobian.frobenius_norms, jacobian.spectral_norms, jacobian.contraction):
        np.testing.assert_array_equal(measure(rnn, x).log10, measure(twin, x.double()).log10)


def test_residuals_and_input_normalisation() -> None:
    rnn = rnnkern.RNN(4, 4, 3, layer_norm="input", residual=True, dtype=torch.float64)
    x = torch.randn(8, 2, 4, dtype=torch.float64)
    _, _, states = rnn(x, return_states=True)
    for layer in range(3):
        h, w_hh = states[layer].detach(), getattr(rnn, f"weight_hh_l{layer}").detach()
        rows = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        for h_t in h[3:].flip(0):
            rows = (rows * (1 - h_t * h_t)[:, None]) @ w_hh
        norms = jacobian.frobenius_norms(rnn, x, layers=layer, lags=[5])
        np.testing.assert_allclose(norms.log10[0, 0, 0], log10(rows.norm(dim=(1, 2))))


@pytest.mark.parametrize("H", [64, 256, 1024])
def test_spectral_radius_of_the_default_init(H: int) -> None:
    radius = jacobian.spectral_radius(rnnkern.RNN(1, H))
    assert radius.shape == (1, 1) and 0.57 < radius[0, 0] < 0.65


def test_spectral_radius_is_exact() -> None:
    rnn = nn.RNN(2, 2, 2, bidirectional=True)
    for i, p in enumerate(p for name, p in rnn.named_parameters() if "weight_hh" in name):
        p.data = torch.tensor([[0.0, -(i + 2.0)], [i + 2.0, 5 * (i == 3)]])
    np.testing.assert_allclose(jacobian.spectral_radius(rnn), [[2, 3], [4, 5]])


def test_measuring_leaves_no_trace() -> None:
    rnn = rnnkern.RNN(3, 6, 2, dropout=0.5)
    parametrizations.spectral_norm(rnn, "weight_hh_l0")
    before = {name: value.clone() for name, value in rnn.state_dict().items()}
    x = torch.randn(7, 2, 3, requires_grad=True)
    calls: list[object] = []
    rnn.register_forward_hook(lambda *args: calls.append(args))
    with rnnkern.watch(rnn) as flow:
        rnn(x)[0].sum().backward()
        grads = [p.grad.clone() for p in rnn.parameters()]
        calls.clear()
        tap, state = rnn.tap, torch.get_rng_state()
        first = flow.read()
        before = {name: value.clone() for name, value in rnn.state_dict().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = jacobian.frobenius_norms(rnn, x).log10
        for measure in (
            jacobian.frobenius_norms,
            jacobian.spectral_norms,
            jacobian.singular_values,
            jacobian.lyapunov_exponents,
            jacobian.contraction,
        ):
            measure(rnn, x)
        jacobian.spectral_radius(rnn)
        np.testing.assert_array_equal(under_autocast, jacobian.frobenius_norms(rnn, x).log10)
        assert all(module.training for module in rnn.modules())
        assert rnn.tap is tap and torch.equal(torch.get_rng_state(), state) and not calls
        assert all(torch.equal(p.grad, grad) for p, grad in zip(rnn.parameters(), grads))
        assert all(torch.equal(value, before[name]) for name, value in rnn.state_dict().items())
        again = flow.read()
        assert first is not None and again is not None
        np.testing.assert_array_equal(first.squares, again.squares)
    assert x.grad is not None and torch.is_grad_enabled()
    rnn.eval()
    jacobian.frobenius_norms(rnn, x)
    assert not any(module.training for module in rnn.modules())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda rnn, x: jacobian.frobenius_norms(nn.LSTM(3, 4), x), TypeError, "rnn must be an rnnkern.RNN.*got LSTM"),
        (lambda rnn, x: jacobian.spectral_radius(nn.Linear(3, 4)), TypeError, "got Linear"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, probes=0), ValueError, "probes must be a positive int, got 0"),
        (lambda rnn, x: jacobian.spectral_norms(rnn, x, iterations=0), ValueError, "iterations must be .* got 0"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, layers=2), IndexError, r"layers must be in \[0, 1\), got 2"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, directions=1), IndexError, "directions must be in"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, end=5), IndexError, r"end must be in \[0, 5\), got 5"),
        (lambda rnn, x: jacobian.singular_values(rnn, x, lags=[6]), IndexError, r"lags must be in \[0, 5\]"),
        (lambda rnn, x: jacobian.lyapunov_exponents(rnn, x, k=5), ValueError, r"k must be in \[1, 4\], got 5"),
        (lambda rnn, x: jacobian.lyapunov_exponents(rnn, x, every=0), ValueError, "every must be positive, got 0"),
        (lambda rnn, x: jacobian.lyapunov_exponents(rnn, x, warmup=5), ValueError, "warmup must be in .* got 5"),
        (lambda rnn, x: jacobian.lyapunov_exponents(rnn, pack_sequence([x[:, 0]])), TypeError, "got PackedSequence"),
        (lambda rnn, x: jacobian.contraction(rnn, x, distance=0), ValueError, "distance must be positive"),
        (lambda rnn, x: jacobian.contraction(rnn, x, other=x), ValueError, "other must have the shape of hx"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x[0, 0]), ValueError, "input must be 2-D or 3-D, got 1-D"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x[:0]), ValueError, "at least one step"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, lengths=[5, 6]), ValueError, r"lengths must be in \[1, 5\]"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x * math.inf), RuntimeError, "states of layer 0 are not finite"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x.double()), ValueError, "RNN input dtype"),
        (lambda rnn, x: jacobian.frobenius_norms(rnn, x, x), RuntimeError, "Expected hidden size"),
        (
            lambda rnn, x: jacobian.frobenius_norms(rnnkern.RNN(3, 4, layer_norm="preactivation"), x),
            ValueError,
            "layer_norm='preactivation'",
        ),
        (
            lambda rnn, x: jacobian.frobenius_norms(rnnkern.RNN(3, 4, dtype=torch.complex64), x),
            ValueError,
            "real weights",
        ),
    ],
)
def test_errors_name_what_came(call: Callable[[Any, Tensor], Any], error: type[Exception], words: str) -> None:
    rnn = rnnkern.RNN(3, 4)
    with pytest.raises(error, match=words):
        call(rnn, torch.randn(5, 2, 3))
    assert rnn.training and torch.is_grad_enabled()


def test_reprs_are_short_tables() -> None:
    rnn, x = rnnkern.RNN(3, 4, 2, bidirectional=True), torch.randn(30, 2, 3)
    results = [
        jacobian.frobenius_norms(rnn, x, probes=2),
        jacobian.spectral_norms(rnn, x),
        jacobian.singular_values(rnn, x),
        jacobian.lyapunov_exponents(rnn, x),
        jacobian.contraction(rnn, x),
    ]
    for result in results:
        lines = repr(result).splitlines()
        assert "of 2 samples" in lines[0] and max(map(len, lines)) < 130
        assert sum(line.startswith("layer 1 reverse") for line in lines) == (3 if result is results[2] else 1)
    assert "standard error of its square 57.7%" in repr(results[0])
    lengths = jacobian.frobenius_norms(rnn, x, lengths=[3, 3], lags=[0, 3])
    assert repr(lengths).splitlines()[1].split() == ["lag", "0", "3"]
