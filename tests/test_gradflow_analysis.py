"""Gain and its factors, direct and recurrent part, Ω, saturation, first failures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gradflow_helpers import (
    LOSSES,
    Loss,
    Parts,
    chain,
    dense_loss,
    everywhere,
    read,
    true_parts,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnkern
from rnnkern.gradflow import ModuleRecord, saturation

pytestmark = pytest.mark.usefixtures("nothing_stays")

LENGTHS = [2, 6, 1, 6, 4]


def zeros(T: int, B: int = 2) -> Tensor:
    return torch.zeros(T, B, 3, dtype=torch.float64)


def true_ratios(parts: Parts, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gain, saturation and weight factor per sample at the step where the gradient arrives; NaN elsewhere."""
    ratios = np.full((3, *parts.norm.shape), np.nan)
    for b, n in enumerate(lengths):
        for d in range(parts.norm.shape[1]):
            for t in range(n):
                later = t - 1 if d else t + 1
                if 0 <= later < n:
                    g, delta = parts.norm[:, d, later, b], parts.delta[:, d, later, b]
                    r = parts.recurrent[:, d, t, b]
                    ratios[:, :, d, t, b] = r / g, delta / g, r / delta
    return tuple(ratios)  # type: ignore[return-value]


# The chain whose every Jacobian is known


@pytest.mark.parametrize("gain", [0.3, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("per_sample", [False, True])
def test_orthogonal_chain(gain: float, per_sample: bool) -> None:
    """W_hh = g·orthogonal at h = 0: gain g, saturation factor 1, weight factor g at each step, Ω = (T-1)(g-1)²."""
    T = 20
    rnn = chain(gain)
    flow = rnnkern.watch(rnn)
    rnn(zeros(T))[1].sum().backward()
    rec = read(flow, per_sample=per_sample)
    tail = (2,) if per_sample else ()
    assert rec.gain.shape == (1, 1, T, *tail)
    for got, expected in [(rec.gain, gain), (rec.saturation_factor, 1), (rec.weight_factor, gain)]:
        np.testing.assert_allclose(got[:, :, :-1], np.full((1, 1, T - 1, *tail), expected), rtol=1e-13)
        assert np.isnan(got[:, :, -1]).all()
    for mean, expected in [(rec.mean_gain, gain), (rec.mean_saturation_factor, 1), (rec.mean_weight_factor, gain)]:
        np.testing.assert_allclose(mean, np.full((1, 1, *tail), expected), rtol=1e-13)
    if gain != 1:
        np.testing.assert_allclose(rec.weight_share, np.ones((1, 1, *tail)), rtol=1e-12)
    np.testing.assert_allclose(rec.omega, np.full((1, 1, *tail), (T - 1) * (gain - 1) ** 2), atol=1e-12)
    np.testing.assert_allclose(rec.omega_by("paper"), rec.omega)
    if gain >= 0.9:
        np.testing.assert_allclose(rec.omega_by("code"), np.full((1, 1, *tail), (gain**2 - 1) ** 2), atol=1e-12)
    assert rec.loss_at_end.all()
    assert np.isnan(rec.first_zero).all() and np.isnan(rec.first_nonfinite).all()
    assert rec.first_zero.shape == rec.loss_at_end.shape == (1, 1, *tail)


def test_textbook_table() -> None:
    """A scalar chain: the mean gain to the power of the lag is what is left."""
    for w, lag, expected in [(0.9, 10, 0.35), (0.9, 50, 0.005), (0.9, 100, 0.000026), (0.5, 20, 9.5e-7)]:
        rnn = rnnkern.RNN(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(rnn.weight_hh_l0, w)
        flow = rnnkern.watch(rnn)
        rnn(torch.zeros(lag + 1, 1, 1, dtype=torch.float64))[1].sum().backward()
        assert read(flow).mean_gain.item() ** lag == pytest.approx(expected, rel=0.05)
        flow.close()


def test_saturated_states_take_the_gradient_and_orthogonal_weights_do_not() -> None:
    rnn = chain(1.0)
    nn.init.zeros_(rnn.weight_ih_l0)
    flow = rnnkern.watch(rnn)
    h0 = torch.full((1, 2, 16), 0.9, dtype=torch.float64)
    rnn(zeros(12), h0)[1].sum().backward()
    rec = read(flow)
    np.testing.assert_allclose(rec.weight_factor[0, 0, :-1], 1, rtol=1e-13)
    np.testing.assert_allclose(rec.gain[0, 0, :-1], rec.saturation_factor[0, 0, :-1], rtol=1e-13)
    np.testing.assert_allclose(rec.weight_share, 0, atol=1e-12)
    np.testing.assert_allclose(rec.mean_gain**11, rec.norm[:, :, 0] / rec.norm[:, :, -1])  # telescopes


# Against a float64 loop over cells


@LOSSES
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_truth(layers: int, bidirectional: bool, loss: Loss, backend: object, device: str) -> None:
    x = torch.randn(9, 3, 5)
    rnn = rnnkern.RNN(5, 7, layers, bidirectional=bidirectional, device=device)
    flow = rnnkern.watch(rnn)
    output, h_n = rnn(x.to(device))
    loss(output.unbind(1), h_n.unbind(1)).backward()
    check_against_truth(
        true_parts(rnn, x.unbind(1), loss), [9] * 3, {
            order: read(flow, per_sample=True, order=order)["rnn"] for order in ("processing", "input", "lag")
        }, read(flow)["rnn"],
    )  # fmt: skip


@LOSSES
@pytest.mark.parametrize("form", ["packed", "lengths", "batch_first"])
def test_truth_with_lengths(form: str, loss: Loss) -> None:
    samples = [torch.randn(n, 5, dtype=torch.float64) for n in LENGTHS]
    rnn = rnnkern.RNN(5, 7, 2, bidirectional=True, dtype=torch.float64, batch_first=form == "batch_first")
    flow = rnnkern.watch(rnn)
    output, h_n = run(rnn, samples, form)
    loss(unpadded(output, form), h_n.unbind(1)).backward()
    check_against_truth(
        true_parts(rnn, samples, loss), LENGTHS, {
            order: read(flow, per_sample=True, order=order)["rnn"] for order in ("processing", "input", "lag")
        }, read(flow)["rnn"],
    )  # fmt: skip


def run(rnn: rnnkern.RNN, samples: list[Tensor], form: str) -> tuple[Tensor | PackedSequence, Tensor]:
    """A forward on samples of several lengths."""
    if form == "packed":
        return rnn(pack_sequence(samples, enforce_sorted=False))
    lengths = [len(x) for x in samples]
    x = nn.utils.rnn.pad_sequence(samples, batch_first=rnn.batch_first)
    return rnn(x, lengths=lengths)


def unpadded(output: Tensor | PackedSequence, form: str) -> list[Tensor]:
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first=True)
    elif form != "batch_first":
        output = output.transpose(0, 1)
    return [y[:n] for y, n in zip(output, LENGTHS)]


def check_against_truth(
    parts: Parts, lengths: list[int], records: dict[str, ModuleRecord], batch: ModuleRecord
) -> None:
    ratios = true_ratios(parts, lengths)
    there = np.arange(parts.norm.shape[2])[:, None] < lengths
    last = np.zeros(parts.norm.shape[1:], bool)
    for b, n in enumerate(lengths):
        last[0, n - 1, b] = True
        last[1:, 0, b] = True
    recurrent, direct = np.where(last, 0, parts.recurrent), np.where(last, parts.norm, parts.direct)
    tolerance = dict(rtol=2e-4, atol=1e-12)
    for order, rec in records.items():

        def ordered(x: np.ndarray, order: str = order) -> np.ndarray:
            x = np.where(there, x, np.nan)
            flip = {"processing": 1, "input": None, "lag": 0}[order]
            for b, n in enumerate(lengths):
                if flip is not None and flip < x.shape[1]:
                    x[:, flip, :n, b] = x[:, flip, :n, b][:, ::-1]
            return x

        for name, expected in zip(("gain", "saturation_factor", "weight_factor"), ratios):
            np.testing.assert_allclose(getattr(rec, name), ordered(expected), err_msg=f"{name} {order}", **tolerance)
        np.testing.assert_allclose(rec.recurrent, ordered(recurrent), **tolerance)
        np.testing.assert_allclose(rec.direct, ordered(direct), **tolerance)
        low, high = rec.direct_bounds
        slack = 1e-4 * ordered(parts.norm)
        with np.errstate(invalid="ignore"):
            assert not ((rec.direct < low - slack) | (rec.direct > high + slack)).any()
        cosine, expected = rec.cosine, ordered(np.where(last, 0, parts.cosine))
        known = np.isfinite(cosine)
        assert (known <= (np.nan_to_num(expected) != 0)).all()
        assert known.sum() >= 0.9 * (np.nan_to_num(expected) != 0).sum()
        np.testing.assert_allclose(cosine[known], expected[known], atol=0.01)
        share = ordered(direct / np.where(there, direct + recurrent, 1))
        np.testing.assert_allclose(rec.direct_share, share, rtol=2e-4, atol=1e-12)
    # over the batch
    per_sample = records["processing"]
    e, r = per_sample.direct[-1], per_sample.recurrent[-1]
    np.testing.assert_allclose(batch.direct[-1], np.sqrt(np.nansum(np.square(e), -1)), rtol=1e-12)
    np.testing.assert_allclose(batch.recurrent[-1], np.sqrt(np.nansum(np.square(r), -1)), rtol=1e-12)
    squares = per_sample.omega_by("paper")
    np.testing.assert_allclose(batch.omega, np.nanmean(squares, -1), rtol=1e-12)
    expected = np.where(np.isnan(ratios[0]).all(2), np.nan, np.nansum(np.square(ratios[0] - 1), 2))
    np.testing.assert_allclose(squares, expected, rtol=1e-3)
    code = np.square(np.square(ratios[0]) - 1)
    np.testing.assert_allclose(batch.omega_by("code"), np.nanmean(code, (2, 3)), rtol=1e-3)


def test_the_gain_of_a_batch_is_of_the_samples_that_have_both_steps() -> None:
    """A sample's last r is the gradient at h_n: it must not count as a step back."""
    rnn = chain(0.5)
    flow = rnnkern.watch(rnn)
    packed = pack_sequence([zeros(n, 1)[:, 0] for n in (9, 3, 1)], enforce_sorted=False)
    (torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64)[:, None] * rnn(packed)[1][0]).sum().backward()
    for order in ("processing", "input", "lag"):
        gain = read(flow, order=order).gain[0, 0]
        np.testing.assert_allclose(gain[np.isfinite(gain)], 0.5, rtol=1e-13)
        assert np.isfinite(gain).sum() == 8
    assert np.isnan(read(flow, per_sample=True).gain[0, 0, :, 2]).all()
    assert np.isnan(read(flow, per_sample=True).omega[0, 0]).tolist() == [False, False, True]
    np.testing.assert_allclose(read(flow).omega, (8 + 2) * 0.25 / 2)


# What is not known is NaN


def test_zero_and_nonfinite_norms_divide_nothing() -> None:
    """A dead ReLU: gain 0 where the chain stops, and no number before it."""
    rnn = chain(0.5, nonlinearity="relu")
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    x = zeros(8, 1) + 1
    x[4] = -100.0
    flow = rnnkern.watch(rnn)
    rnn(x)[1].sum().backward()
    rec = read(flow)
    np.testing.assert_allclose(rec.gain[0, 0], [np.nan, np.nan, np.nan, 0, 0.5, 0.5, 0.5, np.nan], rtol=1e-12)
    np.testing.assert_allclose(rec.saturation_factor[0, 0], [np.nan] * 3 + [0, 1, 1, 1, np.nan])
    np.testing.assert_allclose(rec.weight_factor[0, 0], [np.nan] * 4 + [0.5, 0.5, 0.5, np.nan], rtol=1e-12)
    np.testing.assert_allclose([rec.mean_gain, rec.mean_weight_factor], np.full((2, 1, 1), 0.5), rtol=1e-12)
    assert rec.first_zero == 4
    assert np.isnan(rec.omega)
    np.testing.assert_allclose(rec.omega_by("code"), (1 + 3 * (0.25 - 1) ** 2) / 4)
    flow.close()

    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    output, _ = rnn(torch.randn(5, 2, 3))
    output.backward(torch.full_like(output, float("inf")))
    rec = read(flow)
    for name in ("gain", "saturation_factor", "weight_factor", "direct", "cosine", "direct_share", "omega"):
        assert np.isnan(getattr(rec, name)).all(), name
    assert np.isnan([rec.mean_gain, rec.weight_share, rec.omega_by("code")]).all()
    assert rec.first_nonfinite == 0 and np.isnan(rec.first_zero)
    assert not rec.loss_at_end.any()


def test_a_finite_norm_over_an_infinite_one_is_no_zero() -> None:
    squares = np.ones((3, 1, 1, 4, 1))
    squares[0, 0, 0, 2] = np.inf
    squares[2, 0, 0, 3] = 0
    rec = ModuleRecord("rnn", squares, np.array([4]))
    np.testing.assert_array_equal(rec.gain[0, 0], [1, np.nan, 1, np.nan])
    np.testing.assert_array_equal(rec.saturation_factor[0, 0], [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(rec.weight_factor[0, 0], [1, 1, np.nan, np.nan])  # R = 1 of Δ = 0: no such chain
    assert rec.first_nonfinite == 1


def test_gradients_at_padding_are_not_of_the_sample() -> None:
    """A loss may look at the zeros behind a sample's end: nothing of it goes into the chain."""
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    x, lengths = torch.randn(6, 2, 3), [6, 3]
    output, _ = rnn(x, lengths=lengths)
    (output - 1).square().sum().backward()
    direct = read(flow).direct[0, 0]
    np.testing.assert_allclose(direct[3:5], 2 * (output[3:5, 0] - 1).detach().norm(dim=-1), rtol=1e-5)


def test_of_a_cell_the_direct_part_is_known_where_it_follows() -> None:
    cell = nn.RNNCell(3, 4)
    flow = rnnkern.watch(cell)
    h, outputs = None, []
    for x in torch.randn(6, 2, 3):
        h = cell(x, h)
        outputs.append(h)
    (outputs[2].sum() + outputs[4].sum()).backward()
    rec = read(flow)
    known = rec.direct[0, 0]
    # 4: nothing comes from 5, so all is direct; 2: both; elsewhere none
    assert np.isnan(known).tolist() == [False, False, True, False, False, False]
    np.testing.assert_array_equal(known[[0, 1, 3, 5]], 0)
    assert known[4] == rec.norm[0, 0, 4] == pytest.approx(np.sqrt(8))
    assert np.isnan(rec.cosine).all()
    assert not rec.loss_at_end.any()


@pytest.mark.parametrize("cell_states", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_direct_part_of_torch_modules(kind: type[nn.RNNBase], cell_states: bool) -> None:
    """What arrives at the output of the last layer; and E² + 2 E R cos + R² = G² in every layer."""
    rnn = kind(3, 5, 2, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    flow = rnnkern.watch(rnn, cell_states=cell_states)
    output, _ = rnn(x)
    output.retain_grad()
    output.square().sum().backward()
    record = read(flow, per_sample=True)
    for name in record.modules:
        rec = record[name]
        known = np.isfinite(rec.cosine)
        assert known[:, :, :-1].all()
        e, r = rec.direct[known], rec.recurrent[known]
        np.testing.assert_allclose(e**2 + r**2 + 2 * e * r * rec.cosine[known], rec.norm[known] ** 2)
    np.testing.assert_allclose(record[record.modules[0]].direct[1, 0], output.grad.norm(dim=-1))
    if cell_states and kind is nn.LSTM:  # c reaches the loss through h = o ⊙ tanh(c) and through the next c
        assert record.modules == ("rnn", "rnn.c")
        assert (record["rnn.c"].direct[:, :, :-1] > 0).all()


def test_cosine_that_rounding_would_make_up_is_nan() -> None:
    rnn = rnnkern.RNN(3, 16)
    flow = rnnkern.watch(rnn)
    output, h_n = rnn(torch.randn(6, 2, 3))
    (1e-7 * output.sum() + 1e3 * h_n.sum()).backward()
    rec = read(flow)
    assert np.isfinite(rec.direct).all()
    assert np.isnan(rec.cosine[0, 0, 1:]).all()


def test_direct_part_of_several_forwards_and_backwards() -> None:
    rnn = rnnkern.RNN(3, 4, dtype=torch.float64)
    flow = rnnkern.watch(rnn)
    xs = [torch.randn(T, B, 3, dtype=torch.float64) for T, B in ((5, 2), (3, 1))]
    for x in xs:
        output, _ = rnn(x)
        output.square().sum().backward(retain_graph=True)
        output.square().sum().backward()
    rec = read(flow, per_sample=True)
    parts = [true_parts(rnn, x.unbind(1), lambda ys, _: sum(y.square().sum() for y in ys)) for x in xs]
    np.testing.assert_allclose(rec.direct[0, 0, :-1, :2], np.sqrt(2) * parts[0].direct[0, 0, :-1])
    np.testing.assert_allclose(rec.cosine[0, 0, :2, 2], parts[1].cosine[0, 0, :2, 0], atol=1e-6)


def test_errors() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    rnn(torch.randn(5, 2, 3))[0].sum().backward()
    rec = read(flow)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'code', got 'papers'"):
        rec.omega_by("papers")


# Saturation


def test_saturation() -> None:
    h = torch.tensor([0.0, 0.5, -0.995, 1.0]).view(4, 1, 1)
    got = saturation(h)
    assert got.mean_derivative.item() == pytest.approx((1 + 0.75 + (1 - 0.995**2) + 0) / 4)
    assert got.share.item() == 0.5
    assert got.mean_derivative.dtype == torch.float64
    relu = saturation(torch.tensor([[0.0, 2.0, 3.0]]), nonlinearity="relu")
    assert (relu.mean_derivative.item(), relu.share.item()) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    with pytest.raises(ValueError, match="nonlinearity must be"):
        saturation(h, nonlinearity="gelu")
    with pytest.raises(ValueError, match="lengths must be None for unbatched"):
        saturation(h[:, :, 0], lengths=[1])


@pytest.mark.parametrize("form", ["packed", "lengths", "batch_first"])
def test_saturation_counts_steps_that_there_are(form: str) -> None:
    samples = [3 * torch.randn(n, 5) for n in LENGTHS]
    rnn = rnnkern.RNN(5, 7, 2, bidirectional=True, batch_first=form == "batch_first")
    if form == "packed":
        states, lengths = rnn(pack_sequence(samples, enforce_sorted=False), return_states=True)[2], None
    else:
        lengths = LENGTHS
        x = nn.utils.rnn.pad_sequence(samples, batch_first=rnn.batch_first)
        states = rnn(x, lengths=lengths, return_states=True)[2]
    got = saturation(states, lengths=lengths, batch_first=rnn.batch_first)
    each = [rnn(x.unsqueeze(0 if rnn.batch_first else 1), return_states=True)[2] for x in samples]
    for layer in range(2):
        h = torch.cat([s[layer].flatten() for s in each]).double()
        assert got.mean_derivative[layer].item() == pytest.approx((1 - h.square()).mean().item(), rel=1e-6)
        assert got.share[layer].item() == pytest.approx((h.abs() > 0.99).double().mean().item())
    assert got.share.shape == (2,)


def test_names_on_the_record() -> None:
    """One RNN's record gives everything under its own name, and per module."""
    model = nn.ModuleDict({"a": rnnkern.RNN(3, 4), "b": rnnkern.RNN(3, 4)})
    with rnnkern.watch(model) as flow:
        for rnn in model.values():
            dense_loss(rnn, torch.randn(5, 2, 3), everywhere).backward()
        rec = read(flow)
        assert rec["a"].gain.shape == rec["b"].gain.shape == (1, 1, 5)
        with pytest.raises(AttributeError, match=r"rec\['a'\]\.gain"):
            _ = rec.gain
    with rnnkern.watch(model["a"]) as flow:
        dense_loss(model["a"], torch.randn(5, 2, 3), everywhere).backward()
        rec = read(flow)
        assert rec.gain is rec["rnn"].gain and "weight_factor" in dir(rec)
