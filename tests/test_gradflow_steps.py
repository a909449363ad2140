"""Which backward belongs to which training step, and graphs of all kinds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from gradflow_helpers import (
    Classifier,
    dense_loss,
    everywhere,
    over_batch,
    read,
    truth,
)
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern.gradflow import recorder

pytestmark = pytest.mark.usefixtures("nothing_stays")


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
    assert asked == [0, 1, 2, 3, 4, 5]  # when a step begins


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
    monkeypatch.setattr(recorder, "MAX_BYTES", 4 * 4 * 2 * 8 * 5)  # five forwards
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
        (stats,) = (s for f in flow._recorder._kept[-1].received for s in f.stats.values())
        assert not stats.requires_grad


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_batches_of_gradients_are_not_recorded(layers: int, bidirectional: bool) -> None:
    """autograd.grad leaves the taps out, mapped or not."""
    rnn, x = rnnkern.RNN(3, 4, layers, bidirectional=bidirectional), torch.randn(5, 2, 3, requires_grad=True)
    with rnnkern.watch(rnn) as flow:
        y = rnn(x)[0]
        of_y = torch.randn(3, *y.shape)
        grads = torch.autograd.grad(y, [x, *rnn.parameters()], of_y, is_grads_batched=True, retain_graph=True)
        assert grads[0].shape == (3, *x.shape) and flow.read() is None
        torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(of_y)
        assert flow.read() is None
        y.backward(of_y[0])
        assert read(flow).samples == 2


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
