"""The recorded norms and what is derived from them, against a float64 loop over cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradflow_helpers import (
    LOSSES,
    Loss,
    at_the_end,
    chain,
    dense_loss,
    over_batch,
    read,
    truth,
)
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import rnnkern

pytestmark = pytest.mark.usefixtures("nothing_stays")


# The norms


@pytest.mark.float64
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.25])
def test_orthogonal_chain(gain: float, nonlinearity: str, backend: object) -> None:
    """W_hh = gain·orthogonal: G_{T-k} = gain^k G_T, so slope = log10 gain, and the horizon is known."""
    T, B, H = 90, 2, 16
    rnn = chain(gain, H, nonlinearity)
    h0 = torch.full((1, B, H), float(nonlinearity == "relu"), dtype=torch.float64)
    with rnnkern.watch(rnn) as flow:
        rnn(torch.zeros(T, B, 3, dtype=torch.float64), h0)[1].sum().backward()
    rec = read(flow)
    assert rec.norm.shape == (1, 1, T)
    np.testing.assert_allclose(rec.norm[0, 0, -1], np.sqrt(B * H), rtol=1e-14)
    np.testing.assert_allclose(rec.norm[0, 0, ::-1] / rec.norm[0, 0, -1], gain ** np.arange(T), rtol=1e-12)
    np.testing.assert_allclose(rec.log10_norm, np.log10(rec.norm))
    np.testing.assert_allclose(rec.slope, [[np.log10(gain)]], atol=1e-14)
    assert rec.horizon == min(T - 1, np.floor(np.log(1e-3) / np.log(gain)) if gain < 1 else T - 1)
    assert rec.horizon_at(0.3) == min(T - 1, np.floor(np.log(0.3) / np.log(gain)) if gain < 1 else T - 1)
    assert rec.zeros == rec.nonfinite == 0


def test_textbook_table() -> None:
    """A scalar chain at h = 0: 0.9^10 = 0.35, 0.9^50 = 0.005, 0.9^100 = 0.000026, 0.5^20 = 9.5e-7."""
    for w, lag, expected in [(0.9, 10, 0.35), (0.9, 50, 0.005), (0.9, 100, 0.000026), (0.5, 20, 9.5e-7)]:
        rnn = rnnkern.RNN(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(rnn.weight_hh_l0, w)
        with rnnkern.watch(rnn) as flow:
            rnn(torch.zeros(lag + 1, 1, 1, dtype=torch.float64))[1].sum().backward()
        norm = read(flow, order="lag").norm[0, 0]
        assert norm[0] == 1
        assert norm[lag] == pytest.approx(w**lag, rel=1e-13)
        assert norm[lag] == pytest.approx(expected, rel=0.05)


@LOSSES
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_truth(layers: int, bidirectional: bool, batch_first: bool, loss: Loss, backend: object, device: str) -> None:
    x = torch.randn(12, 3, 5)
    rnn = rnnkern.RNN(5, 7, layers, bidirectional=bidirectional, batch_first=batch_first, device=device)
    flow = rnnkern.watch(rnn)
    dense_loss(rnn, (x.transpose(0, 1) if batch_first else x).to(device), loss).backward()
    expected = truth(rnn, x.unbind(1), loss)
    assert expected.shape == (layers, 1 + bidirectional, 12, 3)
    np.testing.assert_allclose(read(flow, order="input").norm, over_batch(expected), rtol=1e-4)
    np.testing.assert_allclose(read(flow, order="input", per_sample=True).norm, expected, rtol=1e-4, atol=1e-12)
    processed = expected.copy()
    processed[:, 1:] = processed[:, 1:, ::-1]
    np.testing.assert_allclose(read(flow).norm, over_batch(processed), rtol=1e-4)
    np.testing.assert_allclose(read(flow, order="lag").norm, over_batch(processed[:, :, ::-1]), rtol=1e-4)


def test_unbatched() -> None:
    rnn, x = rnnkern.RNN(5, 7), torch.randn(6, 5)
    with rnnkern.watch(rnn) as flow:
        rnn(x)[1].sin().sum().backward()
    expected = truth(rnn, [x], at_the_end)
    np.testing.assert_allclose(read(flow, per_sample=True).norm, expected, rtol=1e-4)


def test_single_precision_far_back(backend: object, device: str) -> None:
    """Within 1 % of the truth to lag 120, where squares of the gradients have long left fp32; then 0 or the truth."""
    T, H = 180, 64
    rnn, x = rnnkern.RNN(8, H, device=device), torch.randn(T, 2, 8)
    with rnnkern.watch(rnn) as flow:
        dense_loss(rnn, x.to(device), at_the_end).backward()
    expected = over_batch(truth(rnn, x.unbind(1), at_the_end))[0, 0, ::-1]
    norm = read(flow, order="lag").norm[0, 0]
    assert expected[121] < 1e-22
    np.testing.assert_allclose(norm[:121], expected[:121], rtol=0.01)
    # What a product may lose where each of its terms is flushed to zero.
    flushed = np.sqrt(2 * H) * H * float(torch.finfo(torch.float32).tiny)
    np.testing.assert_allclose(norm[121:], expected[121:], rtol=0.01, atol=flushed)


@LOSSES
@pytest.mark.parametrize("lengths", [[5, 3, 1], [2, 6, 1, 6, 4]], ids=["sorted", "unsorted"])
def test_packed(lengths: list[int], loss: Loss, backend: object, device: str) -> None:
    """Samples are in the order of the batch, and steps that a sample doesn't have count nowhere."""
    samples = [torch.randn(n, 5) for n in lengths]
    rnn = rnnkern.RNN(5, 7, 2, bidirectional=True, device=device)
    flow = rnnkern.watch(rnn)
    output, h_n = rnn(pack_sequence([x.to(device) for x in samples], enforce_sorted=False))
    padded, _ = pad_packed_sequence(output, batch_first=True)
    loss([y[:n] for y, n in zip(padded, lengths, strict=True)], h_n.unbind(1)).backward()

    expected = truth(rnn, samples, loss)
    rec = read(flow, order="input")
    np.testing.assert_allclose(rec.norm, over_batch(expected), rtol=1e-4)
    assert rec.lengths.tolist() == lengths
    assert rec.samples == len(lengths)
    assert (rec.zeros == 0).all()

    orders = {order: read(flow, order=order, per_sample=True).norm for order in ("processing", "input", "lag")}
    for b, n in enumerate(lengths):
        forward, backward = expected[:, 0, :n, b], expected[:, 1, :n, b]
        for order, directions in {
            "processing": (forward, backward[:, ::-1]),
            "input": (forward, backward),
            "lag": (forward[:, ::-1], backward),
        }.items():
            np.testing.assert_allclose(orders[order][:, :, :n, b], np.stack(directions, 1), rtol=1e-4, atol=1e-12)
            assert np.isnan(orders[order][:, :, n:, b]).all()
    rec = read(flow)
    np.testing.assert_allclose(rec.norm, np.sqrt(np.nansum(np.square(orders["processing"]), -1)))
    np.testing.assert_allclose(10**rec.log10_first, np.sqrt(np.square(orders["processing"][:, :, 0]).sum(-1)))
    np.testing.assert_allclose(10**rec.log10_last, np.sqrt(np.square(orders["lag"][:, :, 0]).sum(-1)))


def test_lengths_are_counted_back_from_each_end() -> None:
    """Samples of several lengths, with a loss at the end of each, have the slope and horizon of one chain."""
    gain, lengths = 0.5, [30, 4, 17]
    rnn = chain(gain)
    flow = rnnkern.watch(rnn)
    packed = pack_sequence([torch.zeros(n, 3, dtype=torch.float64) for n in lengths], enforce_sorted=False)
    rnn(packed)[1].sum().backward()
    rec = read(flow)
    np.testing.assert_allclose(rec.slope, [[np.log10(gain)]], rtol=1e-12)
    assert rec.horizon == 9
    np.testing.assert_allclose(rec.rms_by_lag[0, 0], 4 * gain ** np.arange(30), rtol=1e-12)
    rec = read(flow, per_sample=True)
    np.testing.assert_array_equal(rec.horizon, [[[9, 3, 9]]])
    np.testing.assert_allclose(rec.slope, np.full((1, 1, 3), np.log10(gain)), rtol=1e-12)


# The counts, and numbers that there are not


def test_underflow_and_zeros() -> None:
    """A dead ReLU stops the gradient: exactly zero before it, log10 -inf without a warning, and not in the slope."""
    T, dead = 20, 6
    rnn = chain(0.5, nonlinearity="relu")
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    x = torch.zeros(T, 2, 3, dtype=torch.float64)
    x[dead, 0] = -100.0  # in the first sample
    x[dead + 1 :] = 1.0
    x[:dead] = 1.0
    x[dead, 1] = 1.0
    flow = rnnkern.watch(rnn)
    rnn(x)[1].sum().backward()
    rec = read(flow)
    assert rec.zeros.tolist() == [[dead]]
    assert rec.nonfinite.tolist() == [[0]]
    rec = read(flow, per_sample=True)
    assert rec.zeros.tolist() == [[[dead, 0]]]
    assert np.isneginf(rec.log10_norm[0, 0, :dead, 0]).all()
    assert np.isfinite(rec.log10_norm[0, 0, dead:, 0]).all()
    np.testing.assert_allclose(rec.slope, np.full((1, 1, 2), np.log10(0.5)))
    np.testing.assert_array_equal(rec.horizon, [[[9, 9]]])
    assert "·" not in repr(rec)  # the other sample's gradient gets there


def test_nonfinite() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    output, _ = rnn(torch.randn(5, 2, 3))
    output.backward(torch.tensor(float("inf")) * torch.ones_like(output))
    rec = read(flow)
    assert rec.nonfinite.tolist() == [[10]]
    assert rec.zeros.tolist() == [[0]]
    assert np.isnan(rec.horizon).all()
    assert np.isnan(rec.slope).all()
    assert "!!!!!" in repr(rec)


def test_a_loss_that_is_not_at_the_end_has_no_horizon() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    rnn(torch.randn(5, 2, 3))[0][0].sum().backward()
    rec = read(flow)
    assert rec.zeros.tolist() == [[8]]
    assert np.isnan(rec.horizon).all()
    assert np.isnan(rec.slope).all()  # one point is no line
    np.testing.assert_array_equal(np.isneginf(rec.log10_norm), [[[False, True, True, True, True]]])
    assert "····" in repr(rec)


def test_no_gradient_at_all_is_recorded_as_zero() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    (0.0 * rnn(torch.randn(5, 2, 3))[0].sum()).backward()
    rec = read(flow)
    assert rec.zeros.tolist() == [[10]]
    assert np.isneginf(rec.log10_norm).all()
    assert "·····" in repr(rec)


def test_empty_batch() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    rnn(torch.randn(5, 0, 3))[0].sum().backward()
    rec = read(flow)
    assert rec.samples == rec.zeros == 0
    assert np.isneginf(rec.log10_norm).all()
    assert np.isnan(rec.horizon).all()
    assert repr(rec).splitlines()[-1].split() == ["l0", "-inf", "-inf", "-", "-", "0", "0", "·····"]
