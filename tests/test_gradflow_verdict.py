"""Each symptom is named for a net that has it, with the figures that show it, and for none that has not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradflow_helpers import chain, read
from torch import Tensor, nn

import rnnkern
from rnnkern.gradflow import ModuleRecord, Record, Symptom, Verdict

pytestmark = pytest.mark.usefixtures("nothing_stays")


def zeros(T: int, B: int = 2) -> Tensor:
    return torch.zeros(T, B, 3, dtype=torch.float64)


def record(rnn: rnnkern.RNN, x: Tensor, h0: Tensor | None = None, scale: float = 1.0) -> Record:
    """Of a loss at the end."""
    flow = rnnkern.watch(rnn)
    (scale * rnn(x, h0)[1].sum()).backward()
    return read(flow)


def only(verdict: Verdict, name: str) -> Symptom:
    assert verdict.names == {name}, str(verdict)
    (symptom,) = verdict.symptoms
    return symptom


# One symptom at a time


def test_none() -> None:
    verdict = record(chain(1.0), zeros(64)).verdict()
    assert not verdict.symptoms
    assert verdict.sentences == (
        "rnn l0: learns 63 steps back; there are 63. At lag 63 1 of the gradient's norm is left. "
        "One step back keeps the norm: times 1 (saturation 1, weights 1).",
        "No symptom.",
    )


def test_vanishing_by_the_weights() -> None:
    verdict = record(chain(0.3), zeros(64)).verdict(needs=40)
    symptom = only(verdict, "vanishing")
    assert verdict.sentences == (
        "rnn l0: learns 5 steps back; the loss needs 40. At lag 40 1.2e-21 of the gradient's norm is left. "
        "One step back multiplies the norm by 0.3 in the geometric mean (saturation 1, weights 0.3): "
        "100% of the decay comes from the weights, 0% from saturation.",
    )
    assert symptom.where == "rnn l0"
    assert (symptom.figures["horizon"], symptom.figures["needs"]) == (5, 40)
    assert symptom.figures["gain"] == pytest.approx(0.3) and symptom.figures["weight_share"] == pytest.approx(1)
    assert "orthogonal init" in symptom.remedy and "one step back would keep 1 and 1 would arrive" in symptom.remedy
    assert "truncated BPTT costs less if 5 steps are enough" in symptom.remedy
    assert "layer norm" not in symptom.remedy


def test_what_is_needed_decides() -> None:
    rec = record(chain(0.3), zeros(64))
    assert not rec.verdict(needs=5).symptoms
    assert rec.verdict(needs=6).names == {"vanishing"}
    assert "more than the 63 that there are" in str(rec.verdict(needs=100))
    assert not record(chain(0.3), zeros(5)).verdict().symptoms  # so short that it reaches all of it
    for needs in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="needs must be a positive int or None"):
            rec.verdict(needs=needs)


def test_vanishing_by_saturation() -> None:
    """Orthogonal weights, but large inputs: orthogonal init is no remedy, and not named."""
    rnn = chain(1.0)
    nn.init.constant_(rnn.weight_ih_l0, 0.4)
    verdict = record(rnn, zeros(64) + 1).verdict()
    assert verdict.names >= {"vanishing"}
    symptom = verdict.symptoms[0]
    assert symptom.figures["weight_share"] == pytest.approx(0, abs=1e-9)
    assert symptom.remedy.startswith("layer norm") and "orthogonal" not in symptom.remedy
    assert ": 0% of the decay comes from the weights, 100% from saturation" in verdict.sentences[0]


def test_exploding() -> None:
    verdict = record(chain(1.5), zeros(64)).verdict()
    symptom = only(verdict, "exploding")
    assert symptom.figures["growth"] == pytest.approx(1.5**63)
    assert symptom.figures["weight_factor"] == pytest.approx(1.5)
    assert "clip" in symptom.remedy and "orthogonal init takes the weight factor from 1.5 to 1" in symptom.remedy
    assert "100% of the growth comes from the weights" in verdict.sentences[0]
    assert not record(chain(1.5), zeros(17)).verdict().symptoms  # 1.5^16 = 657


def test_saturation() -> None:
    rnn = chain(1.0)
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    verdict = record(rnn, zeros(5) + 1).verdict(needs=1)
    symptom = next(s for s in verdict.symptoms if s.name == "saturation")
    assert symptom.figures["saturation_factor"] < 0.5
    assert "layer_norm" in symptom.remedy


def test_weights_work_against_saturation() -> None:
    rnn = chain(1.2)
    nn.init.constant_(rnn.weight_ih_l0, 0.4)
    sentence = record(rnn, zeros(64) + 1).verdict().sentences[0]
    assert "the decay comes from saturation, which the weights work against" in sentence


def test_underflow() -> None:
    """Float32 gradients end at about 1e-38, and the rows behind are exactly 0."""
    verdict = record(chain(0.3).float(), zeros(120).float()).verdict()
    assert verdict.names == {"vanishing", "underflow"}
    symptom = verdict.symptoms[1]
    assert 0 < symptom.figures["norm_before"] < 1e-30
    assert symptom.figures["zeros"] > 0 and symptom.figures["stops"] == 2  # in each of the samples


def test_dead_units_cut_the_chain() -> None:
    rnn = chain(1.0, nonlinearity="relu")
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    x = zeros(20) + 1
    x[6] = -1000.0
    verdict = record(rnn, x).verdict(needs=10)
    symptom = only(verdict, "cut")
    assert symptom.figures["stops"] == 2 and symptom.figures["zeros"] == 2 * 6
    assert symptom.figures["norm_before"] == pytest.approx(4)
    assert "dead ReLU" in symptom.remedy and "float16" not in symptom.remedy
    assert record(rnn, x, scale=1e-7).verdict(needs=10).symptoms[0].remedy.count("float16 ends") == 1


def in_chunks(gain: float, every_chunk: bool) -> Record:
    """Three chunks of truncated BPTT, five steps each, with a loss at the end of each or of the last alone."""
    rnn = chain(gain)
    flow = rnnkern.watch(rnn)
    bptt = rnnkern.TruncatedBPTT(5, flow=flow)
    for (x,) in bptt.chunks(zeros(15)):
        output, bptt.hx = rnn(x, bptt.hx)
        if every_chunk:
            output[-1].sum().backward()
    if not every_chunk:
        output[-1].sum().backward()
    return read(flow)


def test_truncated_bptt_is_a_cut() -> None:
    symptom = only(in_chunks(1.0, every_chunk=True).verdict(), "cut")
    assert symptom.figures["stops"] == 2 * 2 and symptom.figures["zeros"] == 0
    assert "truncated BPTT" in symptom.remedy


def test_a_cut_that_is_the_horizon_is_no_vanishing() -> None:
    verdict = in_chunks(0.9, every_chunk=False).verdict()
    only(verdict, "cut")
    assert verdict.sentences[0].startswith("rnn l0: learns 4 steps back; there are 14.")


def test_nonfinite_from_the_loss() -> None:
    verdict = record(chain(0.9), zeros(10), scale=float("nan")).verdict()
    symptom = only(verdict, "nonfinite")
    assert symptom.figures["first_nonfinite"] == 0 and symptom.figures["nonfinite"] == 20
    assert "with the loss or the forward pass" in symptom.says
    assert "nothing can be said of how far back it learns" in verdict.sentences[0]


def test_nonfinite_by_overflow() -> None:
    verdict = record(chain(30.0).float(), zeros(40).float()).verdict()
    assert verdict.names == {"nonfinite", "exploding"}
    symptom = verdict.symptoms[0]
    assert symptom.figures["norm_before"] > 1e18 and symptom.figures["first_nonfinite"] > 20
    assert "overflow" in symptom.says and "clip=" in symptom.remedy


def test_nonfinite_in_between() -> None:
    rnn = chain(0.9)
    flow = rnnkern.watch(rnn)
    output, _ = rnn(zeros(10))
    weight = torch.ones(10, 1, 1, dtype=torch.float64)
    weight[4] = float("inf")
    output.backward(weight.expand_as(output))
    symptom = only(read(flow).verdict(), "nonfinite")
    assert "they enter at lag 5" in symptom.says


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_plateau(scale: float) -> None:
    verdict = record(chain(1.0), zeros(10), scale=scale).verdict()
    symptom = only(verdict, "plateau")
    assert symptom.figures["deltas"] == pytest.approx(scale * 10 * 2 * 4)
    if scale == 0:
        assert verdict.sentences == ("rnn l0: no gradient arrives.",)


def test_depth() -> None:
    rnn = rnnkern.RNN(3, 8, 3)
    nn.init.constant_(rnn.weight_ih_l1, 1e-5)
    flow = rnnkern.watch(rnn)
    rnn(torch.randn(6, 2, 3))[0].sum().backward()
    symptom = only(read(flow).verdict(), "depth")
    assert symptom.where == "rnn l0" and 0 < symptom.figures["share"] < 1e-3
    assert "residual=True" in symptom.remedy


# What the data do not show


def test_a_loss_at_every_step_has_no_horizon() -> None:
    """Neither is far context said to be forgotten, nor to be learned."""
    rnn = chain(0.3)
    flow = rnnkern.watch(rnn)
    rnn(zeros(64))[0].sum().backward()
    verdict = read(flow).verdict()
    assert not verdict.symptoms
    assert "horizon and slope do not say how far back it learns" in verdict.sentences[0]
    assert "gradient enters at 126 of 128 (step, sample) rows" in verdict.sentences[0]
    assert "steps back;" not in str(verdict)
    assert verdict.sentences[-1] == "No symptom among those that these figures can show."
    rec = read(flow)
    share, cosine = np.nanmedian(rec.direct_share[0, 0, :-1]), np.nanmedian(rec.cosine)
    assert f"are as {100 * share:.0f} : {100 - 100 * share:.0f}; the median" in verdict.sentences[0]
    assert f"cosine between them is {cosine:+.2f}." in verdict.sentences[0]


def test_reach_of_an_lstms_c() -> None:
    """c gets its gradient through h at every step; with a loss at the end it all comes from there."""
    lstm = nn.LSTM(3, 8)
    flow = rnnkern.watch(lstm, cell_states=True)
    lstm(torch.randn(30, 2, 3))[0][-1].sum().backward()
    rec = read(flow)
    of_h, of_c = rec.verdict().sentences[:2]
    assert of_h.startswith("rnn l0: learns ") and of_c.startswith("rnn.c l0: learns ")
    assert f"learns {rec['rnn.c'].horizon.item():.0f} steps back" in of_c
    lstm(torch.randn(30, 2, 3))[0].sum().backward()
    assert "horizon and slope do not say" in read(flow).verdict().sentences[1]


def test_explosion_under_a_loss_at_every_step() -> None:
    rnn = chain(1.5)
    flow = rnnkern.watch(rnn)
    rnn(zeros(40))[0].sum().backward()
    assert only(read(flow).verdict(), "exploding").figures["gain"] > 1.4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(40))
def test_any_record_has_a_verdict(seed: int) -> None:
    """Zeros, inf, NaN and absent steps in any place: numbers or NaN, words, and no warning."""
    rng = np.random.default_rng(seed)
    L, D, T, B = rng.integers(1, [4, 3, 9, 5])
    squares = 10.0 ** rng.uniform(-30, 30, (3, L, D, T, B))
    for value in (0.0, np.inf, np.nan):
        squares[rng.random(squares.shape) < rng.choice([0, 0.2])] = value
    lengths = rng.integers(0, T + 1, B)
    squares = np.where(np.arange(T)[:, None] < lengths, squares, 0)
    for per_sample in (False, True):
        rec = ModuleRecord("rnn", squares, lengths, per_sample=per_sample)
        for name in ("gain", "saturation_factor", "weight_factor", "direct", "recurrent", "direct_share", "cosine"):
            assert getattr(rec, name).shape == (L, D, T, *([B] if per_sample else [])), name
        for name in ("mean_gain", "weight_share", "omega", "first_zero", "first_nonfinite", "loss_at_end"):
            assert getattr(rec, name).shape == (L, D, *([B] if per_sample else [])), name
        assert len(rec.verdict().sentences) >= L * D


def test_growth_of_the_losses_weights_is_no_explosion() -> None:
    rnn = chain(0.9)
    flow = rnnkern.watch(rnn)
    output, _ = rnn(zeros(30))
    weight = 10.0 ** -torch.arange(30, dtype=torch.float64).view(-1, 1, 1)
    output.backward(weight.expand_as(output))
    assert not read(flow).verdict().symptoms


def test_lower_layers_under_a_loss_at_the_end() -> None:
    """What reaches a lower layer comes from that loss too; its reach is the net's."""
    rnn = rnnkern.RNN(3, 16, 2)
    for name, p in rnn.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(p, 0.3)
    flow = rnnkern.watch(rnn)
    rnn(torch.zeros(60, 2, 3))[0][-1].sum().backward()
    verdict = read(flow).verdict()
    assert [s.where for s in verdict.symptoms if s.name == "vanishing"] == ["rnn l0", "rnn l1"]
    assert [("through the last layer alone" in line) for line in verdict.sentences] == [True, False]
    both = rnnkern.RNN(3, 16, 2, bidirectional=True)
    flow.close()
    flow = rnnkern.watch(both)
    both(torch.zeros(60, 2, 3))[1].sum().backward()
    lines = read(flow).verdict().sentences
    assert [("do not say" in line) for line in lines[:4]] == [True, True, False, False]
    assert [line.split(":")[0] for line in lines[:4]] == ["rnn l0", "rnn l0 reverse", "rnn l1", "rnn l1 reverse"]


def test_short_and_empty() -> None:
    assert "one step long" in str(record(chain(0.3), zeros(1)).verdict())
    rnn = rnnkern.RNN(3, 4)
    flow = rnnkern.watch(rnn)
    rnn(torch.randn(5, 0, 3))[0].sum().backward()
    assert read(flow).verdict().sentences[0] == "rnn l0: there is no step."


def test_print_shows_it() -> None:
    rec = record(chain(0.3), zeros(64))
    assert str(rec) == f"{rec!r}\n{rec.verdict()}"
    assert str(rec["rnn"]).endswith(str(rec["rnn"].verdict()))
    assert "forgets distant context" in str(rec)
    model = nn.ModuleDict({"a": chain(0.3), "b": chain(1.0)})
    flow = rnnkern.watch(model)
    (model["a"](zeros(20))[1].sum() + model["b"](zeros(20))[1].sum()).backward()
    verdict = read(flow, per_sample=True).verdict()
    assert [s.where for s in verdict.symptoms] == ["a l0"]
    assert [line.split(":")[0] for line in verdict.sentences] == ["a l0", "b l0"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gated_modules_have_no_factors(kind: type[nn.RNNBase]) -> None:
    """Their δ stands elsewhere: the verdict says how far they reach, and nothing of saturation or the weights' part."""
    module = kind(3, 8)
    with rnnkern.watch(module, cell_states=True) as flow:
        module(torch.randn(40, 2, 3))[0][-1].sum().backward()
        record = flow.read()
    assert record is not None
    of_h = record["rnn"]
    assert np.isnan(of_h.saturation_factor).all() and np.isnan(of_h.mean_weight_factor).all()
    last = of_h.norm[0, 0, -1] * of_h.mean_gain[0, 0] ** 39
    np.testing.assert_allclose(last, of_h.norm[0, 0, 0], rtol=1e-6)
    text = str(record.verdict())
    assert "through gates and weights" in text and "saturation" not in text and "nan" not in text
    assert ("bias of 1 for the forget gate" in text) == ("vanishing" in record.verdict().names)
