"""Gain and its factors, direct and recurrent part, Ω and its penalty, saturation, first failures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gradflow_helpers import (
    LOSSES,
    Loss,
    Parts,
    at_the_end,
    chain,
    dense_loss,
    everywhere,
    read,
    true_parts,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnkern
from rnnkern.gradflow import ModuleRecord, OutputGradient, omega_penalty, saturation

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
    arriving = OutputGradient(rnn, output)
    loss(output.unbind(1), h_n.unbind(1)).backward()
    check_against_truth(
        true_parts(rnn, x.unbind(1), loss), [9] * 3, {
            order: read(flow, per_sample=True, order=order)["rnn"].with_direct(arriving)
            for order in ("processing", "input", "lag")
        }, read(flow)["rnn"].with_direct(arriving),
    )  # fmt: skip


@LOSSES
@pytest.mark.parametrize("form", ["packed", "lengths", "batch_first"])
def test_truth_with_lengths(form: str, loss: Loss) -> None:
    samples = [torch.randn(n, 5, dtype=torch.float64) for n in LENGTHS]
    rnn = rnnkern.RNN(5, 7, 2, bidirectional=True, dtype=torch.float64, batch_first=form == "batch_first")
    flow = rnnkern.watch(rnn)
    output, h_n, lengths = run(rnn, samples, form)
    arriving = OutputGradient(rnn, output, lengths)
    loss(unpadded(output, form), h_n.unbind(1)).backward()
    check_against_truth(
        true_parts(rnn, samples, loss), LENGTHS, {
            order: read(flow, per_sample=True, order=order)["rnn"].with_direct(arriving)
            for order in ("processing", "input", "lag")
        }, read(flow)["rnn"].with_direct(arriving),
    )  # fmt: skip


def run(rnn: rnnkern.RNN, samples: list[Tensor], form: str) -> tuple[Tensor | PackedSequence, Tensor, object]:
    """output, h_n and lengths of a forward on samples of several lengths."""
    if form == "packed":
        return *rnn(pack_sequence(samples, enforce_sorted=False)), None
    lengths = [len(x) for x in samples]
    x = nn.utils.rnn.pad_sequence(samples, batch_first=rnn.batch_first)
    return *rnn(x, lengths=lengths), lengths


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
        for layer in range(len(direct)):
            got, expected = rec.direct[layer], ordered(direct)[layer]
            known = np.isfinite(got)
            if layer == len(direct) - 1:
                np.testing.assert_array_equal(known, np.isfinite(expected))
            np.testing.assert_allclose(got[known], expected[known], **tolerance)
            low, high = (bound[layer] for bound in rec.direct_bounds)
            present = np.isfinite(expected)
            slack = 1e-4 * ordered(parts.norm)[layer][present]
            assert (low[present] <= expected[present] + slack).all()
            assert (expected[present] <= high[present] + slack).all()
        cosine, expected = rec.cosine[-1], ordered(np.where(last, 0, parts.cosine))[-1]
        assert (np.isfinite(cosine) <= (np.nan_to_num(expected) != 0)).all()
        assert np.isfinite(cosine).sum() >= 0.9 * (np.nan_to_num(expected) != 0).sum()
        known = np.isfinite(cosine)
        np.testing.assert_allclose(cosine[known], expected[known], atol=0.01)
        share = ordered(direct / np.where(there, direct + recurrent, 1))[-1]
        np.testing.assert_allclose(rec.direct_share[-1], share, rtol=2e-4, atol=1e-12)
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
    arriving = OutputGradient(rnn, output, lengths)
    (output - 1).square().sum().backward()
    direct = read(flow)["rnn"].with_direct(arriving).direct[0, 0]
    np.testing.assert_allclose(direct[3:5], 2 * (output[3:5, 0] - 1).detach().norm(dim=-1), rtol=1e-5)


def test_without_measurement_the_direct_part_is_known_where_it_follows() -> None:
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    output, _ = rnn(torch.randn(6, 2, 3))
    (output[2].sum() + output[4].sum()).backward()
    rec = read(flow)
    known = rec.direct[0, 0]
    # 4: nothing comes from 5, so all is direct; 2: both; elsewhere none
    assert np.isnan(known).tolist() == [False, False, True, False, False, False]
    np.testing.assert_array_equal(known[[0, 1, 3, 5]], 0)
    assert known[4] == rec.norm[0, 0, 4] == pytest.approx(np.sqrt(8))
    assert np.isnan(rec.cosine).all()
    assert not rec.loss_at_end.any()


def test_cosine_that_rounding_would_make_up_is_nan() -> None:
    rnn = rnnkern.RNN(3, 16)
    flow = rnnkern.watch(rnn)
    output, h_n = rnn(torch.randn(6, 2, 3))
    arriving = OutputGradient(rnn, output)
    (1e-7 * output.sum() + 1e3 * h_n.sum()).backward()
    rec = read(flow)["rnn"].with_direct(arriving)
    assert np.isfinite(rec.direct).all()
    assert np.isnan(rec.cosine[0, 0, 1:]).all()


def test_output_gradient_of_several_forwards_and_backwards() -> None:
    rnn = rnnkern.RNN(3, 4, dtype=torch.float64)
    flow = rnnkern.watch(rnn)
    xs = [torch.randn(T, B, 3, dtype=torch.float64) for T, B in ((5, 2), (3, 1))]
    arriving = []
    for x in xs:
        output, _ = rnn(x)
        arriving.append(OutputGradient(rnn, output))
        output.square().sum().backward(retain_graph=True)
        output.square().sum().backward()
    rec = read(flow, per_sample=True)["rnn"].with_direct(*arriving)
    parts = [true_parts(rnn, x.unbind(1), lambda ys, _: sum(y.square().sum() for y in ys)) for x in xs]
    np.testing.assert_allclose(rec.direct[0, 0, :-1, :2], np.sqrt(2) * parts[0].direct[0, 0, :-1])
    np.testing.assert_allclose(rec.cosine[0, 0, :2, 2], parts[1].cosine[0, 0, :2, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"lengths \[5, 5, 3\]; got lengths \[3, 5, 5\]"):
        read(flow)["rnn"].with_direct(*arriving[::-1])
    with pytest.raises(ValueError, match="got lengths"):
        read(flow)["rnn"].with_direct()


def test_output_gradient_errors() -> None:
    rnn = rnnkern.RNN(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="output must require grad"):
        OutputGradient(rnn, rnn(x)[0])
    with pytest.raises(ValueError, match="output must have 4 features, got 5"):
        OutputGradient(rnn, torch.zeros(5, 2, 5, requires_grad=True))
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence"):
        OutputGradient(rnn, rnn(pack_sequence([x[:, 0]]))[0], [5])
    flow = rnnkern.watch(rnn)
    rnn(x)[0].sum().backward()
    rec = read(flow)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'code', got 'papers'"):
        rec.omega_by("papers")


# Ω as a penalty


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "batch_first", "unbatched"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("loss", [at_the_end, everywhere])
def test_penalty(variant: str, form: str, bidirectional: bool, loss: Loss) -> None:
    """The value is the record's Ω, the gradient finite differences of the formula in W_hh with g and h constant."""
    options = dict(bidirectional=bidirectional, dtype=torch.float64, batch_first=form == "batch_first")
    rnn = rnnkern.RNN(3, 4, **options)
    samples = [torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS]
    flow = rnnkern.watch(rnn)
    lengths = None
    if form in ("dense", "unbatched"):
        x = torch.randn(6, 3, 3, dtype=torch.float64)
        output, h_n = rnn(x[:, 0] if form == "unbatched" else x)
        samples = [x[:, 0]] if form == "unbatched" else list(x.unbind(1))
        value = loss([output], [h_n]) if form == "unbatched" else loss(output.unbind(1), h_n.unbind(1))
    else:
        output, h_n, lengths = run(rnn, samples, form)
        value = loss(unpadded(output, form), h_n.unbind(1))
    penalty = omega_penalty(rnn, value, output, h_n, lengths=lengths, variant=variant)
    grads = torch.autograd.grad(penalty, list(rnn.parameters()), allow_unused=True, retain_graph=True)
    named = {name: g for (name, _), g in zip(rnn.named_parameters(), grads)}
    assert {name for name, g in named.items() if g is not None} == {n for n in named if "weight_hh" in n}
    before = penalty.item()
    (value + penalty).backward()  # the loss's own graph is still there
    rec = read(flow, per_sample=True)
    assert before == pytest.approx(read(flow).omega_by(variant).sum(), rel=1e-10)

    # δ_{t+1} from the chain itself, by its product with perturbed weights: ‖δ W‖ with δ recomputed by autograd
    for d, name in enumerate(["weight_hh_l0", "weight_hh_l0_reverse"][: 1 + bidirectional]):
        deltas = true_deltas(rnn, samples, loss, d)

        def formula(w: Tensor, deltas: list[tuple[Tensor, Tensor]] = deltas) -> Tensor:
            ratios = [(delta[:-1] @ w).norm(dim=-1) / g[:-1] for delta, g in deltas]  # processed backwards
            if variant == "paper":
                return sum((q - 1).square().sum() for q in ratios) / sum(len(q) > 0 for q in ratios)
            return (torch.cat(ratios).square() - 1).square().mean()

        w = rnn.get_parameter(name).detach()
        numeric, step = torch.zeros_like(w), 1e-6
        for i in range(4):
            for j in range(4):
                bump = torch.zeros_like(w)
                bump[i, j] = step
                numeric[i, j] = (formula(w + bump) - formula(w - bump)) / (2 * step)
        torch.testing.assert_close(named[name], numeric, rtol=1e-6, atol=1e-7)
    assert rec.samples == (5 if lengths is not None or form == "packed" else 1 if form == "unbatched" else 3)


def true_deltas(rnn: rnnkern.RNN, samples: list[Tensor], loss: Loss, d: int) -> list[tuple[Tensor, Tensor]]:
    """δ_t (n, H) and ‖g_t‖ (n,) of each sample, from the last step that the direction takes to the first."""
    plain = nn.RNN(3, 4, bidirectional=rnn.bidirectional, dtype=torch.float64)
    plain.load_state_dict(rnn.state_dict())
    states, finals, outputs = [], [], []
    for x in samples:
        per_direction, last = [], []
        for k in range(1 + rnn.bidirectional):
            end = "_l0" + ("_reverse" if k else "")
            h, hs = torch.zeros(4, dtype=torch.float64), []
            for x_t in reversed(x) if k else x:
                a = plain.get_parameter("weight_ih" + end) @ x_t + plain.get_parameter("weight_hh" + end) @ h
                a = a + plain.get_parameter("bias_ih" + end) + plain.get_parameter("bias_hh" + end)
                h = torch.tanh(a)
                a.retain_grad()
                h.retain_grad()
                hs.append((a, h))
            if k == d:
                states.append(hs)
            last.append(h)
            steps = [h for _, h in hs]
            per_direction.append(torch.stack(steps[::-1] if k else steps))
        finals.append(torch.stack(last))
        outputs.append(torch.cat(per_direction, -1))
    loss(outputs, finals).backward()
    zero = torch.zeros(4, dtype=torch.float64)
    return [
        (
            torch.stack([zero if a.grad is None else a.grad for a, _ in reversed(hs)]),
            torch.stack([(zero if h.grad is None else h.grad).norm() for _, h in reversed(hs)]),
        )
        for hs in states
    ]


def test_penalty_moves_the_gain_towards_one() -> None:
    rnn = rnnkern.RNN(3, 16)
    x, optimizer = torch.randn(20, 4, 3), torch.optim.SGD([rnn.weight_hh_l0], lr=0.05)
    values = []
    for _ in range(30):
        output, h_n = rnn(x)
        penalty = omega_penalty(rnn, h_n.sum(), output, h_n)
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert values[-1] < 0.2 * values[0]


def test_penalty_of_vanished_and_absent_rows_is_a_number() -> None:
    rnn = chain(0.01)
    output, h_n = rnn(zeros(40))
    penalty = omega_penalty(rnn, h_n.sum(), output, h_n)
    assert penalty.item() == pytest.approx(6 * 0.99**2)  # G² falls below 1e-20 after six steps
    penalty.backward()
    assert rnn.weight_hh_l0.grad.isfinite().all()
    output, h_n = rnn(zeros(1))
    assert omega_penalty(rnn, h_n.sum(), output, h_n).item() == 0


def test_penalty_under_autocast() -> None:
    """Half precision goes into the chain alone: the value is the record's, which has float64 squares."""
    rnn = rnnkern.RNN(3, 16)
    flow = rnnkern.watch(rnn)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = rnn(torch.randn(12, 4, 3))
        loss = output.float().square().mean()
        penalty = omega_penalty(rnn, loss, output, h_n)
    assert output.dtype == torch.bfloat16 and penalty.dtype == torch.float32
    (loss + penalty).backward()
    assert penalty.item() == pytest.approx(read(flow).omega.item(), rel=2**-8)  # δ is rounded to bfloat16
    assert rnn.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_default_device(kind: str) -> None:
    """Where tensors are made by default is nothing to what is measured of a model that is elsewhere."""
    rnn = rnnkern.RNN(3, 4, bidirectional=True)
    x = torch.randn(6, 2, 3)
    given = pack_sequence([x[:4, 0], x[:, 1]], enforce_sorted=False) if kind == "packed" else x
    seen = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            output, h_n = rnn(given)
            arrives = OutputGradient(rnn, output)
            loss = output.data.square().sum() + h_n.sum()
            penalty = omega_penalty(rnn, loss, output, h_n)
            loss.backward()
        seen.append((penalty.item(), arrives.lengths.tolist(), arrives.squares()[-1].tolist()))
    assert seen[0] == seen[1] and seen[0][1] == ([4, 6] if kind == "packed" else [6, 6])


def test_penalty_errors() -> None:
    rnn, x = rnnkern.RNN(3, 4), torch.randn(5, 2, 3)
    output, h_n = rnn(x)
    with pytest.raises(ValueError, match="variant must be"):
        omega_penalty(rnn, output.sum(), output, variant="book")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss must depend on output or h_n"):
        omega_penalty(rnn, rnn.weight_hh_l0.sum(), output, h_n)
    for other, match in [
        (rnnkern.RNN(3, 4, 2), "one layer, got num_layers=2"),
        (rnnkern.RNN(3, 4, layer_norm="preactivation"), "neither layer_norm"),
        (rnnkern.RNN(3, 4, recurrent_dropout=0.5), "neither layer_norm"),
    ]:
        output, h_n = other(x)
        with pytest.raises(ValueError, match=match):
            omega_penalty(other, output.sum(), output, h_n)


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
