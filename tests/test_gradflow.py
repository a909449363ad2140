"""watch(), read() and the record, against a float64 loop over cells that retains the gradient of every state."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from helpers import threads
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern.gradflow import Flow, Record, recorder

#: outputs of each sample (length, D·H), h_n of each sample (layers·D, H) -> the loss
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def at_the_end(outputs: Sequence[Tensor], h_n: Sequence[Tensor]) -> Tensor:
    """Only the final states, of every layer and direction."""
    return sum((b + 1) * h.sin().sum() for b, h in enumerate(h_n))  # type: ignore[return-value]


def everywhere(outputs: Sequence[Tensor], h_n: Sequence[Tensor]) -> Tensor:
    """Every step's output and every final state."""
    return sum(((b + 1) * y.square().sum() + h.cos().sum()) for b, (y, h) in enumerate(zip(outputs, h_n, strict=True)))  # type: ignore[return-value]


LOSSES = pytest.mark.parametrize("loss", [at_the_end, everywhere])


def truth(rnn: rnnkern.RNN, samples: Sequence[Tensor], loss: Loss) -> np.ndarray:
    """‖∂L/∂h_t‖ (layers, directions, T, B) in float64 and input order, one cell at a time; 0 where there is no step.

    ``samples`` are (length, I) each.
    """
    L, D = rnn.num_layers, 2 if rnn.bidirectional else 1
    weights = {name: p.detach().double().cpu() for name, p in rnn.named_parameters()}
    f = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu
    states: dict[tuple[int, int, int, int], Tensor] = {}
    outputs, finals = [], []
    for b, sample in enumerate(samples):
        x, last = list(sample.detach().double().cpu()), []
        for layer in range(L):
            y: list[list[Tensor]] = [[] for _ in x]
            for d in range(D):
                end = f"_l{layer}" + ("_reverse" if d else "")
                h = torch.zeros(rnn.hidden_size, dtype=torch.float64)
                for t in reversed(range(len(x))) if d else range(len(x)):
                    a = weights["weight_ih" + end] @ x[t] + weights["weight_hh" + end] @ h
                    if rnn.bias:
                        a = a + weights["bias_ih" + end] + weights["bias_hh" + end]
                    h = f(a).requires_grad_()
                    h.retain_grad()
                    states[layer, d, t, b] = h
                    y[t].append(h)
                last.append(h)
            x = [torch.cat(step) for step in y]
        outputs.append(torch.stack(x))
        finals.append(torch.stack(last))
    loss(outputs, finals).backward()
    norms = np.zeros((L, D, max(map(len, samples)), len(samples)))
    for index, h in states.items():
        norms[index] = 0 if h.grad is None else h.grad.norm().item()
    return norms


def dense_loss(rnn: rnnkern.RNN, x: Tensor, loss: Loss) -> Tensor:
    """The loss of a forward on x (T, B, I), or (B, T, I) with batch_first."""
    output, h_n = rnn(x)
    return loss(output.unbind(0 if rnn.batch_first else 1), h_n.unbind(1))


def over_batch(norms: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(norms).sum(-1))


def read(flow: Flow, **options: object) -> Record:
    rec = flow.read(**options)  # type: ignore[arg-type]
    assert rec is not None
    return rec


def chain(gain: float, H: int = 16, nonlinearity: str = "tanh") -> rnnkern.RNN:
    """A float64 RNN whose every Jacobian is gain times an orthogonal matrix, for zero input (and h0 > 0 for relu)."""
    rnn = rnnkern.RNN(3, H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    orthogonal = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0]
    if nonlinearity == "relu":  # keeps positive states positive
        orthogonal = torch.eye(H, dtype=torch.float64)[torch.randperm(H)]
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(gain * orthogonal)
    return rnn


class Classifier(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.rnn = rnnkern.RNN(3, 8, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1]).square()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Every test ends without an open Flow and without the hook on all optimizers."""
    with threads(1):  # small models: more threads only wait for one another
        yield
    assert not recorder._open
    assert recorder._optimizer_stepped not in torch_optimizer._global_optimizer_post_hooks.values()


# The norms


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


# Steps


def test_accumulation_adds_squares() -> None:
    """Micro-batches give the record of the whole batch, with their samples in order."""
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(9, 6, 3)
    with rnnkern.watch(model) as flow:
        model(x).sum().backward()
        whole = read(flow, per_sample=True)
        optimizer.zero_grad()
        flow.step()
        for part in x.split([1, 2, 3], dim=1):
            model(part).sum().backward()
        parts = read(flow, per_sample=True)
        optimizer.step()
        assert (whole.step, parts.step) == (0, 1)
        np.testing.assert_allclose(parts.norm, whole.norm, rtol=1e-5)
        np.testing.assert_array_equal(read(flow, per_sample=True).norm, parts.norm)  # the step is over, and the newest
        np.testing.assert_allclose(read(flow).norm, np.sqrt(np.square(whole.norm).sum(-1)), rtol=1e-5)


def test_samples_are_in_the_order_of_the_forwards() -> None:
    model, (x, y) = Classifier(), torch.randn(2, 5, 2, 3)
    with rnnkern.watch(model) as flow:
        first, second = model(x).sum(), model(y).sum()
        second.backward()
        first.backward()
        both = read(flow, per_sample=True).norm
        flow.step()
        model(x).sum().backward()
        np.testing.assert_array_equal(both[..., :2], read(flow, per_sample=True).norm)


def test_forwards_of_different_lengths_are_aligned_at_the_start() -> None:
    rnn = rnnkern.RNN(3, 8, bidirectional=True)
    flow = rnnkern.watch(rnn)
    xs = [torch.randn(4, 2, 3), torch.randn(7, 1, 3)]
    for x in xs:
        dense_loss(rnn, x, everywhere).backward()
    rec = read(flow, order="input", per_sample=True)
    assert rec.lengths.tolist() == [4, 4, 7]
    np.testing.assert_allclose(rec.norm[:, :, :4, :2], truth(rnn, xs[0].unbind(1), everywhere), rtol=1e-4)
    np.testing.assert_allclose(rec.norm[:, :, :, 2:], truth(rnn, xs[1].unbind(1), everywhere), rtol=1e-4)
    assert np.isnan(rec.norm[:, :, 4:, :2]).all()


def test_every() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def sampled(every: int | Callable[[int], bool], steps: int) -> list[int]:
        seen = []
        with rnnkern.watch(model, every) as flow:
            for _ in range(steps):
                model(x).sum().backward()
                optimizer.step()
                seen.append(read(flow).step)
            assert flow.steps == steps
        return seen

    assert sampled(1, 4) == [0, 1, 2, 3]
    assert sampled(2, 6) == [0, 0, 2, 2, 4, 4]
    asked: list[int] = []

    def decide(step: int) -> bool:
        asked.append(step)
        return step in (0, 3)

    assert sampled(decide, 5) == [0, 0, 0, 3, 3]
    assert asked == [0, 1, 2, 3, 4]


def test_read_is_none_where_nothing_was_sampled() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model, every=lambda step: step == 1) as flow:
        assert flow.read() is None
        model(x).sum().backward()
        assert flow.read() is None
        flow.step()
        loss = model(x).sum()
        assert flow.read() is None  # no backward yet
        loss.backward()
        assert read(flow).step == 1


@pytest.mark.parametrize("read_before_step", [False, True])
def test_reading_changes_nothing(read_before_step: bool) -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model) as flow:
        for step in range(3):
            for micro_batch in range(3):
                model(x).sum().backward()
                if step and read_before_step:
                    assert (read(flow).step, read(flow).samples) == (step, 2 * (micro_batch + 1))
            optimizer.step()
            assert (read(flow).step, read(flow).samples) == (step, 6)


def test_a_loop_that_never_steps() -> None:
    """backward, read, backward, read: each on its own."""
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        for i in range(1, 4):
            (i * model(x).sum()).backward()
            rec = read(flow)
            assert (rec.step, rec.samples) == (i - 1, 2)
            assert read(flow).step == rec.step
            if i == 1:
                first = rec.norm
            np.testing.assert_allclose(rec.norm, i * first, rtol=1e-6)
        model(x).sum().backward()
        model(x).sum().backward()  # not read in between
        assert read(flow).samples == 4
    with rnnkern.watch(model, every=2) as flow:
        steps = []
        for _ in range(5):
            model(x).sum().backward()
            steps.append(read(flow).step)
        assert steps == [0, 0, 2, 2, 4]


def test_only_optimizers_of_the_model_end_a_step() -> None:
    model, x, other = Classifier(), torch.randn(4, 2, 3), nn.Linear(2, 2)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    heads, rnns = torch.optim.SGD(model.head.parameters(), lr=0.1), torch.optim.Adam(model.rnn.parameters())
    with rnnkern.watch(model) as flow:
        heads.step()  # before any forward
        assert flow.steps == 0
        model(x).sum().backward()
        others.step()
        assert flow.steps == 0
        heads.step()
        rnns.step()  # two optimizers of one model, one after the other
        flow.step()
        assert flow.steps == 1
        model(x).sum().backward()
        rnns.step()
        assert flow.steps == 2
    model(x).sum().backward()
    rnns.step()
    assert flow.steps == 2


def test_gradients_go_to_the_step_of_their_forward() -> None:
    """A backward that comes after an optimizer's step, as with two losses and an optimizer for each."""
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model, every=2) as flow:
        first, second = model(x).sum(), model(x).sum()
        first.backward()
        flow.step()
        assert read(flow).samples == 2
        second.backward()
        assert (read(flow).step, read(flow).samples) == (0, 4)
        flow.step()
        assert flow.steps == 1
    with rnnkern.watch(model) as flow:
        late = model(x).sum()
        flow.step()
        model(x).sum().backward()
        late.backward()
        assert read(flow).step == 1  # the newest stays the newest


def test_several_flows_share_one_hook() -> None:
    a, b, x = Classifier(), Classifier(), torch.randn(4, 2, 3)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    with rnnkern.watch(a) as flow_a:
        with rnnkern.watch(b) as flow_b:
            assert len(torch_optimizer._global_optimizer_post_hooks) == hooks + 1
            (a(x) + b(x)).sum().backward()
            optimizer.step()
        assert len(torch_optimizer._global_optimizer_post_hooks) == hooks + 1
        a(x).sum().backward()
        optimizer.step()
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks
    assert (flow_a.steps, flow_b.steps) == (2, 1)
    assert (read(flow_a).step, read(flow_b).step) == (1, 0)


def test_a_step_that_never_ends_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    monkeypatch.setattr(recorder, "MAX_BYTES", 3 * 4 * 2 * 8 * 5)  # five forwards
    with rnnkern.watch(model) as flow:
        for _ in range(5):
            model(x).sum().backward()
        with pytest.warns(RuntimeWarning, match=r"flow\.step\(\)"):
            model(x).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x).sum().backward()  # told once
        assert read(flow).samples == 10
        flow.step()
        model(x).sum().backward()
        assert read(flow).samples == 2


# Graphs


def test_two_backwards_through_one_graph_add_squares() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        once = read(flow, per_sample=True).norm
        loss.backward()
        twice = read(flow, per_sample=True)
    assert twice.samples == 2
    np.testing.assert_allclose(twice.norm, np.sqrt(2) * once, rtol=1e-14)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    """Recomputed forwards: the record, the gradients and the number of samples are those without checkpointing."""
    torch.manual_seed(1)
    model = nn.ModuleList([rnnkern.RNN(3, 8, 2, bidirectional=True), rnnkern.RNN(16, 4)])
    x = torch.randn(6, 2, 3, requires_grad=True)

    def loss(run: Callable[..., Tensor]) -> Tensor:
        hidden = run(lambda x: model[0](x)[0], x)
        return run(lambda h: model[1](h)[0], hidden).square().sum()

    results = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad()
        with rnnkern.watch(model) as flow:
            for _ in range(2):
                loss(run).backward()
            optimizer.step()
            rec = read(flow, per_sample=True)
            assert flow.steps == 1
        results.append([*(rec[name].squares for name in rec.modules), *(p.grad for p in model.parameters())])
        assert rec["0"].samples == 4
    for plain, checkpointed in zip(*results, strict=True):
        np.testing.assert_array_equal(checkpointed, plain)


def test_create_graph_keeps_no_graph() -> None:
    """A gradient penalty: its own backward is recorded too, and the statistics hold no graph."""
    model, x = Classifier(), torch.randn(4, 2, 3, requires_grad=True)
    with rnnkern.watch(model) as flow:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        assert flow.read() is None  # autograd.grad leaves the taps out
        grad.square().sum().backward()
        assert read(flow).samples == 2
        flow.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            model(x).sum().backward(create_graph=True)
        model.zero_grad()
        x.grad = None
        assert read(flow).step == 1
        (stats,) = (s for f in flow._recorder._newest.received for s in f.stats.values())
        assert not stats.requires_grad


def test_evaluation_in_between_disturbs_nothing() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(evaluate: Callable[[], object]) -> tuple[np.ndarray, int]:
        with rnnkern.watch(model) as flow:
            evaluate()
            model(x).sum().backward()
            evaluate()
            model(x).sum().backward()
            evaluate()
            optimizer.zero_grad()
            optimizer.step()
            evaluate()
            optimizer.step()
            return read(flow).norm, flow.steps

    def no_grad() -> None:
        with torch.no_grad():
            model(torch.randn(9, 5, 3))

    def inference() -> None:
        with torch.inference_mode():
            model(torch.randn(9, 5, 3))

    plain = train(lambda: None)
    for evaluate in (no_grad, inference):
        norm, steps = train(evaluate)
        np.testing.assert_array_equal(norm, plain[0])
        assert steps == plain[1] == 1
    norm, _ = train(lambda: model(torch.randn(9, 5, 3)))  # with a graph, but without a backward
    np.testing.assert_array_equal(norm, plain[0])


def test_frozen_models_do_not_begin_to_require_grad() -> None:
    rnn = rnnkern.RNN(3, 4).requires_grad_(False)
    with rnnkern.watch(rnn) as flow:
        output, h_n = rnn(torch.randn(5, 2, 3))
        assert not output.requires_grad
        assert not h_n.requires_grad
        x = torch.randn(5, 2, 3, requires_grad=True)  # frozen, but on the way to something that is not
        rnn(x)[0].sum().backward()
        assert read(flow).samples == 2


def test_function_transforms_pass_through() -> None:
    rnn, x = rnnkern.RNN(3, 4), torch.randn(5, 2, 3)

    def loss_of(output: Tensor) -> Tensor:
        return output.square().sum()

    def loss(x: Tensor) -> Tensor:
        return loss_of(rnn(x)[0])

    def of_outputs(outputs: Sequence[Tensor], _: object) -> Tensor:
        return loss_of(torch.stack(list(outputs)))

    expected = torch.func.grad(loss)(x)
    with rnnkern.watch(rnn) as flow:
        assert torch.equal(torch.func.grad(loss)(x), expected)
        assert flow.read() is None
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=1, out_dims=1)(x)
        torch.testing.assert_close(per_sample, expected)
        assert flow.read() is None
        torch.func.vmap(loss, in_dims=1)(x).sum().backward()
        np.testing.assert_allclose(read(flow).norm, over_batch(truth(rnn, x.unbind(1), of_outputs)), rtol=1e-4)


def test_compiled_model_breaks_the_graph_and_records() -> None:
    torch.compiler.reset()
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        model(x).sum().backward()
        expected = read(flow).norm
        torch.compile(model, backend="eager")(x).sum().backward()
        rec = read(flow)
        assert rec.step == 1
        np.testing.assert_allclose(rec.norm, expected, rtol=1e-5)


# What it costs, and what it leaves


def test_same_bits_watched_or_not(backend: object, device: str) -> None:
    def run(watched: bool, every: int = 1) -> list[Tensor]:
        torch.manual_seed(3)
        model = Classifier(num_layers=2, dropout=0.5).to(device)
        optimizer = torch.optim.Adam(model.parameters())
        flow = rnnkern.watch(model, every) if watched else None
        outputs = []
        for _ in range(3):
            optimizer.zero_grad()
            outputs.append(model(torch.randn(7, 4, 3).to(device)))
            outputs[-1].sum().backward()
            optimizer.step()
        assert flow is None or flow.read() is not None
        return [*outputs, *(p.grad for p in model.parameters()), *model.parameters()]  # type: ignore[list-item]

    plain = run(False)
    for watched in (run(True), run(True, every=2)):
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_off_is_one_attribute() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    assert model.rnn.tap is None
    flow = rnnkern.watch(model, every=2)
    assert callable(model.rnn.tap)
    arguments = (4, 2, None, None, x.device)
    assert model.rnn.tap(*arguments) is not None
    with torch.no_grad():
        assert model.rnn.tap(*arguments) is None
    flow.step()
    assert model.rnn.tap(*arguments) is None  # not sampled
    flow.close()
    assert model.rnn.tap is None
    assert "tap" not in vars(model.rnn)


def test_a_tap_takes_no_memory() -> None:
    with rnnkern.watch(rnnkern.RNN(3, 4)) as flow:
        taps = flow._recorder.taps("rnn", 1000, 64, None, None, torch.device("cpu"))
        assert taps is not None
        tap = taps(0, 0)
        assert tap.shape == (3, 1000, 64)
        assert tap.dtype == torch.float64
        assert tap.is_leaf
        assert tap.requires_grad
        assert tap.untyped_storage().nbytes() == 8


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What goes now goes by its reference count alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _spied(rnn: rnnkern.RNN) -> list[weakref.ref[Tensor]]:
    """Weak references to all taps that rnn gets from now on."""
    refs: list[weakref.ref[Tensor]] = []
    factory = rnn.tap
    assert factory is not None

    def spy(*arguments: object) -> Callable[[int, int], Tensor] | None:
        taps = factory(*arguments)  # type: ignore[arg-type]

        def tap(layer: int, direction: int) -> Tensor:
            assert taps is not None
            leaf = taps(layer, direction)
            refs.append(weakref.ref(leaf))
            return leaf

        return tap

    rnn.tap = spy
    return refs


def test_taps_go_with_their_graph(without_gc: None) -> None:
    model, x = Classifier(num_layers=2), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        refs = _spied(model.rnn)
        loss = model(x).sum()
        assert len(refs) == 2
        assert all(ref() is not None for ref in refs)
        del loss  # a forward whose backward never comes
        assert all(ref() is None for ref in refs)
        assert flow.read() is None
        loss = model(x).sum()
        loss.backward()
        del loss
        assert all(ref() is None for ref in refs)
        assert read(flow).samples == 2


def test_steps_do_not_pile_up(without_gc: None) -> None:
    """Only the newest step's statistics are kept."""
    model, x = Classifier(), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        stats = []
        for _ in range(4):
            model(x).sum().backward()
            stats += [weakref.ref(s) for f in flow._recorder._newest.received for s in f.stats.values()]
            flow.step()
        assert [ref() is not None for ref in stats] == [False, False, False, True]


def test_a_flow_that_nobody_holds_is_closed(without_gc: None) -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    flow = rnnkern.watch(model)
    refs = [weakref.ref(flow), weakref.ref(flow._recorder)]
    model(x).sum().backward()
    del flow
    assert [ref() for ref in refs] == [None, None]
    assert model.rnn.tap is None
    assert not recorder._open


def test_a_flow_does_not_keep_the_model(without_gc: None) -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    ref = weakref.ref(model.rnn.weight_hh_l0)
    flow = rnnkern.watch(model)
    model(x).sum().backward()
    del model
    gc.collect()
    assert ref() is None
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).step()
    assert read(flow).samples == 2


def test_close() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    flow = rnnkern.watch(model)
    model(x).sum().backward()
    late = model(x).sum()
    flow.close()
    flow.close()
    assert "closed" in repr(flow)
    assert model.rnn.tap is None
    model(x).sum().backward()
    assert read(flow).samples == 2  # what was recorded can still be read
    late.backward()
    assert read(flow).samples == 4
    with rnnkern.watch(model), pytest.raises(ValueError, match="already watched"):
        rnnkern.watch(model)
    with pytest.raises(ZeroDivisionError), rnnkern.watch(model):
        _ = 1 / 0
    assert model.rnn.tap is None


def test_copies_are_not_watched() -> None:
    model, x = Classifier(), torch.randn(4, 2, 3)
    flow = rnnkern.watch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        copy.copy(model.rnn),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        rnn = other if isinstance(other, rnnkern.RNN) else other.rnn
        assert rnn.tap is None
        rnn(x)[0].sum().backward()
    assert flow.read() is None
    model(x).sum().backward()
    assert read(flow).samples == 2
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(flow)


# What the user sees


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        rnnkern.watch([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no rnnkern\.RNN in this Linear$"):
        rnnkern.watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"other classes \(1, 2\) cannot be watched yet.*torch\.nn\.RNN"):
        rnnkern.watch(nn.Sequential(nn.Linear(2, 2), nn.RNN(2, 2), rnnkern.RNNCell(2, 2)))
    with pytest.raises(ValueError, match=r"other classes \(the model\)"):
        rnnkern.watch(nn.LSTM(2, 2))
    rnn = rnnkern.RNN(2, 2)
    for every in (0, -1, 2.0, True, None, "2"):
        with pytest.raises(ValueError, match=r"every must be a positive int or a callable"):
            rnnkern.watch(rnn, every)  # type: ignore[arg-type]
    assert rnn.tap is None
    model = nn.Sequential(rnnkern.RNN(2, 2), rnn)
    with rnnkern.watch(rnn):
        with pytest.raises(ValueError, match="'1' is already watched"):
            rnnkern.watch(model)
        assert model[0].tap is None
    with rnnkern.watch(rnn) as flow:
        with pytest.raises(ValueError, match="order must be one of 'processing', 'input', 'lag', got 'time'"):
            flow.read(order="time")  # type: ignore[arg-type]
        rnn(torch.randn(3, 1, 2))[0].sum().backward()
        for eps in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="eps must be positive"):
                read(flow).horizon_at(eps)


def test_several_modules() -> None:
    model = nn.ModuleDict(
        {"encoder": Classifier(bidirectional=True), "decoder": rnnkern.RNN(3, 5), "unused": rnnkern.RNN(3, 5)}
    )
    x = torch.randn(6, 2, 3)
    with rnnkern.watch(model) as flow:
        assert flow.modules == ("encoder.rnn", "decoder", "unused")
        (model["encoder"](x).sum() + model["decoder"](x)[0].square().sum()).backward()
        rec = read(flow, order="input")
    assert rec.modules == ("encoder.rnn", "decoder")
    assert rec["encoder.rnn"].log10_norm.shape == (1, 2, 6)
    expected = truth(model["decoder"], x.unbind(1), lambda outputs, _: torch.stack(list(outputs)).square().sum())
    np.testing.assert_allclose(rec["decoder"].norm, over_batch(expected), rtol=1e-4)
    with pytest.raises(AttributeError, match=r"'encoder\.rnn', 'decoder', 'unused'.*rec\['encoder\.rnn'\]\.log10_norm"):
        _ = rec.log10_norm
    with pytest.raises(KeyError, match="no gradient has reached 'unused'"):
        rec["unused"]
    with pytest.raises(KeyError, match="'head' is not watched"):
        rec["head"]
    assert "log10_norm" not in dir(rec)
    lines = repr(rec).splitlines()
    assert lines[0] == "step 0"
    assert lines[2] == "encoder.rnn  (T=6, 2 samples)"
    assert lines[-1] == "unused: no gradient has reached it"
    assert len(lines) == 8


def test_one_module() -> None:
    rnn = chain(0.5)
    with rnnkern.watch(rnn) as flow:
        assert flow.modules == ("rnn",)
        assert repr(flow) == "<rnnkern Flow of rnn: every 1, step 0>"
        rnn(torch.zeros(8, 2, 3, dtype=torch.float64))[1].sum().backward()
    rec = read(flow)
    assert rec.log10_norm is rec["rnn"].log10_norm
    assert "log10_norm" in dir(rec)
    with pytest.raises(AttributeError, match="'Record' object has no attribute 'log2_norm'"):
        _ = rec.log2_norm
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rec)).norm, rec.norm)
    np.testing.assert_array_equal(copy.deepcopy(rec).norm, rec.norm)
    table = repr(rec).splitlines()
    assert table[1].split() == [
        "log10",
        "first",
        "log10",
        "last",
        "slope",
        "horizon",
        "zeros",
        "nonfinite",
        "first→last",
    ]
    assert table[2] == "rnn  (T=8, 2 samples)"
    assert table[3].split() == ["l0", "-1.35", "0.75", "-0.301", "7", "0", "0", "▁▂▃▄▅▆▇█"]
    assert repr(read(flow, per_sample=True)) == repr(rec)
    assert repr(rec["rnn"]).splitlines() == table[1:]


def test_mean_loss_is_proportional_to_one_over_the_batch() -> None:
    rnn, x = chain(0.9), torch.zeros(5, 1, 3, dtype=torch.float64)
    norms = []
    for B in (1, 4):
        with rnnkern.watch(rnn) as flow:
            rnn(x.expand(5, B, 3))[1].sum(-1).mean().backward()
        norms.append(read(flow, per_sample=True))
    np.testing.assert_allclose(norms[0].samples * norms[0].norm[..., 0], norms[1].samples * norms[1].norm[..., 3])


def test_padded_with_batch_first() -> None:
    rnn, x, lengths = rnnkern.RNN(3, 4, batch_first=True), torch.randn(3, 6, 3), [6, 2, 5]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    with rnnkern.watch(rnn) as flow:
        loss = at_the_end((), rnn(packed)[1].unbind(1))
        loss.backward()
    expected = truth(rnn, [sample[:n] for sample, n in zip(x, lengths, strict=True)], at_the_end)
    np.testing.assert_allclose(read(flow).norm, over_batch(expected), rtol=1e-4)
