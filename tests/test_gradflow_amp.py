"""A watched model under a GradScaler: norms without the loss scale, and steps that the scaler skips."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import Classifier, everywhere, read, truth
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD, Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern.gradflow import Flow, ModuleRecord, Record

pytestmark = pytest.mark.usefixtures("nothing_stays")

SCALE = 2.0**16


def scaled(scale: float = SCALE, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


def batch(B: int = 2) -> Tensor:
    return torch.randn(4, B, 3)


def train(
    model: nn.Module,
    scaler: GradScaler,
    optimizers: list[Optimizer],
    overflows: bool,
    micro_batches: int = 1,
    prepare: Callable[[Optimizer], object] = lambda optimizer: None,
) -> None:
    """An iteration; the loss of the first micro-batch overflows."""
    for i in range(micro_batches):
        loss = model(batch()).sum()
        scaler.scale(loss * (torch.inf if overflows and i == 0 else 1)).backward()
    for optimizer in optimizers:
        prepare(optimizer)
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad()


# The loss scale


def cells(cell: nn.LSTMCell) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        h, c = cell(x[0])
        for t in x[1:]:
            h, c = cell(t, (h, c))
        return h.square().sum()

    return loss


KINDS: dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]]] = {
    "rnn": lambda: (m := rnnkern.RNN(3, 8, 2, bidirectional=True), lambda x: m(x)[0].square().sum()),
    "packed": lambda: (m := rnnkern.RNN(3, 8), lambda x: m(pack_sequence([x[:, 0], x[:2, 1]]))[1].square().sum()),
    "compiled": lambda: (m := Classifier(), lambda x: torch.compile(m, backend="eager", fullgraph=True)(x).sum()),
    "lstm": lambda: (m := nn.LSTM(3, 8), lambda x: m(x)[0].square().sum()),
    "cell": lambda: (m := nn.LSTMCell(3, 8), cells(m)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_is_divided_out(kind: str) -> None:
    """A power of two leaves no trace, any other number a rounding."""
    torch.compiler.reset()
    model, loss = KINDS[kind]()
    x = batch()

    def squares(scaler: GradScaler | None) -> tuple[np.ndarray, float]:
        with rnnkern.watch(model, cell_states=True, scaler=scaler) as flow:
            (loss(x) if scaler is None else scaler.scale(loss(x))).backward()
        rec = read(flow)
        return np.concatenate([rec[name].squares for name in rec.modules]), rec.scale

    plain, one = squares(None)
    assert plain.any() and one == 1
    of_power, scale = squares(scaled(SCALE))
    np.testing.assert_array_equal(of_power, plain)
    assert scale == SCALE
    of_other, scale = squares(scaled(1000.0))
    np.testing.assert_allclose(of_other, plain, rtol=1e-4)
    assert scale == 1000


def test_under_autocast() -> None:
    """The scaler searches from far too high; once it has found a scale, the norms are those of float64."""
    torch.manual_seed(0)
    rnn, scaler = rnnkern.RNN(3, 8), scaled(2.0**24)
    optimizer, x = SGD(rnn.parameters(), lr=0.0), batch()
    with rnnkern.watch(rnn, keep=30, scaler=scaler) as flow:
        for _ in range(30):
            with torch.autocast("cpu", torch.float16):
                output, h_n = rnn(x)
                loss = everywhere(output.unbind(1), h_n.unbind(1))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        records = flow.history(per_sample=True)
    skipped = [rec.skipped for rec in records]
    searched = skipped.index(False)
    assert searched > 3 and skipped == [True] * searched + [False] * (30 - searched)
    assert [rec.scale for rec in records] == [2.0 ** (24 - min(i, searched)) for i in range(30)]
    # Each of four steps rounds states and gradients to float16.
    np.testing.assert_allclose(records[-1].norm, truth(rnn, x.unbind(1), everywhere), rtol=8 * 2.0**-10)


def test_scale_of_each_backward() -> None:
    """Squares add in one unit, whatever was updated in between."""
    model, scaler, x = Classifier(), scaled(8.0), batch()
    with rnnkern.watch(model, scaler=scaler) as flow:
        loss = model(x).sum()
        scaler.scale(loss).backward(retain_graph=True)
        once = read(flow).squares
        for scale in (2.0**12, 3.0):
            scaler.update(scale)
            scaler.scale(loss).backward(retain_graph=True)
        assert read(flow).scale == 3
    np.testing.assert_allclose(read(flow).squares, 3 * once, rtol=1e-6)


def test_backward_before_anything_is_scaled() -> None:
    model, scaler, x = Classifier(), scaled(8.0), batch()
    with rnnkern.watch(model, scaler=scaler) as flow:
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        once, scale = read(flow).squares, read(flow).scale
        scaler.scale(loss).backward()
    assert (scale, read(flow).scale) == (1, 8)
    np.testing.assert_array_equal(read(flow).squares, 2 * once)


def test_disabled_scaler_and_none() -> None:
    model, scaler = Classifier(), GradScaler("cpu", enabled=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model, scaler=scaler) as flow:
        train(model, scaler, [optimizer], overflows=False)
        assert (read(flow).scale, read(flow).skipped, flow.steps) == (1, False, 1)
    with rnnkern.watch(model) as flow:
        train(model, scaler, [optimizer], overflows=False)
        assert (read(flow).scale, read(flow).skipped, flow.steps) == (1, None, 1)


def test_direct_part() -> None:
    rnn, x = rnnkern.RNN(3, 8), batch()
    parts = []
    for scaler in (None, scaled()):
        with rnnkern.watch(rnn, scaler=scaler) as flow:
            output, _ = rnn(x)
            loss = output.square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
        parts.append(read(flow)["rnn"])
    np.testing.assert_array_equal(parts[1].direct, parts[0].direct)
    np.testing.assert_array_equal(parts[1].cosine, parts[0].cosine)


def test_scale_that_has_fallen_to_0() -> None:
    model, scaler = Classifier(), scaled(0.0)
    with rnnkern.watch(model, scaler=scaler) as flow:
        scaler.scale(model(batch()).sum()).backward()
    assert np.isnan(read(flow).norm).all()


# Steps that are skipped


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "plain": lambda model: [SGD(model.parameters(), lr=0.1)],
    "fused": lambda model: [Adam(model.parameters(), fused=True)],
    "two": lambda model: [SGD(model.head.parameters(), lr=0.1), Adam(model.rnn.parameters())],
}


@pytest.mark.parametrize("optimizers", list(OPTIMIZERS))
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clipped", [False, True])
def test_skipped_step_ends(optimizers: str, micro_batches: int, clipped: bool) -> None:
    """From the first on, and one amid others; the record has its micro-batches, and the next one has its own."""
    model, scaler = Classifier(), scaled()
    trained_by = OPTIMIZERS[optimizers](model)

    def prepare(optimizer: Optimizer) -> None:
        if clipped and optimizers != "fused":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    overflows = [True, False, True, True, False]
    scales = [SCALE / 2**halved for halved in (0, 1, 1, 2, 3)]
    with rnnkern.watch(model, keep=5, scaler=scaler) as flow:
        for i, overflow in enumerate(overflows):
            before = [p.clone() for p in model.parameters()]
            train(model, scaler, trained_by, overflow, micro_batches, prepare)
            assert flow.steps == i + 1
            assert overflow == all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            assert (read(flow).step, read(flow).skipped, read(flow).scale) == (i, overflow, scales[i])
        records = flow.history()
    assert [rec.skipped for rec in records] == overflows
    assert [rec.samples for rec in records] == [2 * micro_batches] * 5
    assert [bool(rec.nonfinite.any()) for rec in records] == overflows


@pytest.mark.parametrize("is_first", [True, False])
def test_one_of_two_optimizers_is_skipped(is_first: bool) -> None:
    """Whichever ends the step: one step, and it is marked, though every norm is finite."""
    model, scaler = Classifier(), scaled()
    model.head.weight.register_hook(lambda grad: grad * torch.inf)
    heads, rnns = SGD(model.head.parameters(), lr=0.1), SGD(model.rnn.parameters(), lr=0.1)
    with rnnkern.watch(model, scaler=scaler) as flow:
        for step in range(2):
            train(model, scaler, [heads, rnns] if is_first else [rnns, heads], overflows=False)
            rec = read(flow)
            assert (rec.step, rec.skipped, rec.samples, flow.steps) == (step, True, 2, step + 1)
            assert not rec.nonfinite.any()


def test_unknown_before_the_optimizer() -> None:
    model, scaler = Classifier(), scaled()
    optimizer = SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model, scaler=scaler) as flow:
        for overflow in (False, True):
            scaler.scale(model(batch()).sum() * (torch.inf if overflow else 1)).backward()
            rec = read(flow)
            assert rec.skipped is None
            scaler.step(optimizer)
            assert (read(flow).step, read(flow).skipped, rec.skipped) == (rec.step, overflow, None)
            scaler.update()
            assert read(flow).skipped == overflow
            optimizer.zero_grad()
        model(batch()).sum().backward()
        flow.step()
        assert read(flow).skipped is None  # no scaler has been asked


def test_sampled_steps_alone() -> None:
    model, scaler = Classifier(), scaled()
    optimizer, seen = SGD(model.parameters(), lr=0.1), []
    with rnnkern.watch(model, every=2, scaler=scaler) as flow:
        for overflow in (False, True, True, False, True):
            train(model, scaler, [optimizer], overflow)
            seen.append((read(flow).step, read(flow).skipped))
    assert seen == [(0, False), (0, False), (2, True), (2, True), (4, True)]


def test_compiled_steps() -> None:
    """A graph that is not sampled comes by unseen: its skipped step must end all the same."""
    torch.compiler.reset()
    model, scaler = Classifier(), scaled()
    compiled, optimizer, seen = torch.compile(model, backend="eager"), SGD(model.parameters(), lr=0.1), []
    with rnnkern.watch(model, every=2, scaler=scaler) as flow:
        for overflow in (True, True, False, True):
            train(compiled, scaler, [optimizer], overflow)
            seen.append((flow.steps, read(flow).step, read(flow).skipped, read(flow).samples))
    assert seen == [(1, 0, True, 2), (2, 0, True, 2), (3, 2, False, 2), (4, 2, False, 2)]


def test_another_model_is_skipped() -> None:
    """One scaler for two models, as with a GAN: what it finds for one says nothing of the other."""
    a, b, scaler = Classifier(), Classifier(), scaled()
    of_a, of_b = SGD(a.parameters(), lr=0.1), SGD(b.parameters(), lr=0.1)
    with rnnkern.watch(a, scaler=scaler) as flow_a, rnnkern.watch(b, scaler=scaler) as flow_b:
        for overflow in (True, False):
            scaler.scale(a(batch()).sum()).backward()
            scaler.scale(b(batch()).sum() * (torch.inf if overflow else 1)).backward()
            scaler.step(of_a)
            scaler.step(of_b)
            scaler.update()  # adds what it has found for b to what it has found for a
            assert (read(flow_a).skipped, read(flow_b).skipped) == (False, overflow)
            of_a.zero_grad(), of_b.zero_grad()
        assert (flow_a.steps, flow_b.steps) == (2, 2)


def test_sequence_in_chunks() -> None:
    """Truncated BPTT steps after each chunk: one record, each chunk with its own scale, skipped if one chunk was."""
    model, x = rnnkern.RNN(3, 8), torch.randn(9, 2, 3)

    def record(scaler: GradScaler, overflows: int) -> Record:
        optimizer = SGD(model.parameters(), lr=0.0)
        with rnnkern.watch(model, scaler=scaler) as flow:
            bptt = rnnkern.TruncatedBPTT(3, flow=flow)
            for number, (part,) in enumerate(bptt.chunks(x)):
                output, bptt.hx = model(part, bptt.hx)
                scaler.scale(output.square().sum() * (torch.inf if number == overflows else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert flow.steps == 1
        return read(flow)

    plain = record(GradScaler("cpu", enabled=False), -1)
    growing = record(scaled(growth_interval=1), -1)
    np.testing.assert_array_equal(growing.squares, plain.squares)
    assert (growing.scale, growing.skipped) == (4 * SCALE, False)
    one = record(scaled(), 1)
    assert (one.scale, one.skipped) == (SCALE / 2, True)
    np.testing.assert_array_equal(one.squares[:, :, :, :3], plain.squares[:, :, :, :3])
    np.testing.assert_array_equal(one.squares[:, :, :, 6:], plain.squares[:, :, :, 6:])
    assert not np.isfinite(one.squares[0, :, :, 3:6]).any()


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """GradScaler itself asks once a step."""
    counts = []
    for watched in (False, True):
        model, scaler = Classifier(), scaled()
        optimizer = SGD(model.parameters(), lr=0.1)
        flow = rnnkern.watch(model, keep=9, scaler=scaler) if watched else None
        with monkeypatch.context() as patched, Waits() as waits:
            for name in ("cpu", "numpy", "tolist"):
                patched.setattr(Tensor, name, None)
            for overflow in (False, True, False):
                train(model, scaler, [optimizer], overflow)
        counts.append(waits.count)
        if flow is not None:
            with Waits() as waits:
                assert [rec.skipped for rec in flow.history()] == [False, True, False]
            assert waits.count > 0
            flow.close()
    assert counts == [3, 3]


# What stays on the scaler


def test_nothing_stays_on_the_scaler(without_gc: None) -> None:
    model, scaler = Classifier(), scaled()
    attributes = dict(vars(scaler))
    flows = [rnnkern.watch(model, scaler=scaler), rnnkern.watch(nn.LSTM(3, 4), scaler=scaler)]
    assert vars(scaler) != attributes
    flows.pop(0).close()
    assert vars(scaler) != attributes  # the other still listens
    refs = [weakref.ref(flows[0]), weakref.ref(flows[0]._recorder)]
    flows.clear()
    assert vars(scaler) == attributes
    assert [ref() for ref in refs] == [None, None]
    assert scaler.step.__func__ is GradScaler.step
    flow = rnnkern.watch(model, scaler=scaler)
    ref = weakref.ref(scaler)
    scaler.scale(model(batch()).sum()).backward()
    del scaler
    assert ref() is None  # a Flow does not keep it
    model(batch()).sum().backward()
    assert read(flow).scale == 1
    flow.close()


def test_two_flows_hear_one_scaler() -> None:
    model, scaler = nn.ModuleList([Classifier(), Classifier()]), scaled()
    optimizer = SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model[0], scaler=scaler) as first:
        with rnnkern.watch(model[1], scaler=scaler) as second:
            scaler.scale((model[0](batch()) + model[1](batch())).sum() * torch.inf).backward()
            scaler.step(optimizer)
            scaler.update()
            assert read(first).skipped and read(second).skipped
        optimizer.zero_grad()
        scaler.scale((model[0](batch()) + model[1](batch())).sum()).backward()
        scaler.step(optimizer)
        assert (first.steps, second.steps, read(first).skipped) == (2, 1, False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies_are_not_heard(copied: Callable[[GradScaler], GradScaler]) -> None:
    model, scaler = Classifier(), scaled()
    optimizer = SGD(model.parameters(), lr=0.1)
    with rnnkern.watch(model, scaler=scaler) as flow:
        train(model, scaler, [optimizer], overflows=True)
        twin = copied(scaler)
        assert "step" not in vars(twin) and vars(twin).keys() == vars(copied(twin)).keys()
        assert twin.state_dict() == scaler.state_dict() and twin.get_scale() == SCALE / 2
        scaler.load_state_dict({**twin.state_dict(), "scale": 4.0})
        train(model, scaler, [optimizer], overflows=False)
        assert read(flow).scale == 4
        train(model, twin, [optimizer], overflows=True)
        assert read(flow).skipped is None


def test_what_the_user_has_put_there_comes_back() -> None:
    """A step of the instance's own, before the watching and during it."""
    model, calls = Classifier(), []

    class Own(GradScaler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("class")
            return super().step(*args, **kwargs)

    scaler = Own("cpu")
    optimizer, of_class = SGD(model.parameters(), lr=0.1), scaler.step

    def earlier(*args: Any) -> Any:
        calls.append("earlier")
        return of_class(*args)

    scaler.step = earlier  # type: ignore[method-assign]
    with rnnkern.watch(model, scaler=scaler) as flow:
        train(model, scaler, [optimizer], overflows=True)
        assert calls == ["earlier", "class"] and read(flow).skipped
        heard = scaler.step
        scaler.step = lambda *args: heard(*args)  # type: ignore[method-assign]
        later = scaler.step
    assert scaler.step is later and "__getstate__" not in vars(scaler)
    train(model, scaler, [optimizer], overflows=True)  # goes through to what was there
    assert flow.steps == 1 and calls == ["earlier", "class"] * 2


def test_wrong_scaler() -> None:
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler or None, got float"):
        rnnkern.watch(Classifier(), scaler=65536.0)  # type: ignore[arg-type]


# What is said of it


def record(norms: list[float], **options: Any) -> Record:
    """One layer; by time step, of which the last has the loss."""
    squares = np.broadcast_to(np.square(np.array(norms))[None, None, None, :, None], (3, 1, 1, len(norms), 1)).copy()
    squares[1, ..., -1, :] = 0
    return Record(3, ["rnn"], [ModuleRecord("rnn", squares, np.array([len(norms)]), **options)])


def test_table_says_it() -> None:
    norms = [0.1, 0.2]
    assert repr(record(norms)).splitlines()[0] == "step 3"
    assert repr(record(norms, scale=0.5, skipped=False)).splitlines()[0] == "step 3, loss scale 0.5 divided out"
    first = repr(record(norms, scale=2.0**24, skipped=True)).splitlines()[0]
    assert first == "step 3, skipped by the GradScaler, loss scale 16777216 divided out"


@pytest.mark.parametrize(
    ("options", "says", "is_symptom"),
    [
        (
            dict(scale=SCALE, skipped=True),
            "skipped this step: gradients were not finite at a scale of 65536. It",
            False,
        ),
        (dict(scale=SCALE, skipped=None), "With a loss scale of 65536 that is no symptom", False),
        (dict(scale=SCALE, skipped=False), "1 of 3 norms, from lag 2 on", True),  # it has let them pass
        (dict(scale=1.0, skipped=True), "at a scale of 1, which is not what makes them so", True),
        (dict(scale=1.0, skipped=None), "1 of 3 norms, from lag 2 on", True),
    ],
)
def test_verdict_on_what_is_not_finite(options: dict[str, Any], says: str, is_symptom: bool) -> None:
    verdict = record([math.inf, 1.0, 1.0], **options).verdict()
    assert says in str(verdict)
    assert ("nonfinite" in verdict.names) == is_symptom


def test_verdict_on_a_skipped_step_of_finite_norms() -> None:
    """What overflowed is elsewhere, in the gradient of a weight say."""
    verdict = record([0.9, 1.0, 1.0], scale=SCALE, skipped=True).verdict()
    assert "GradScaler skipped this step" in str(verdict) and not verdict.names


def test_verdict_knows_where_numbers_end() -> None:
    """The gradient has its scale while it is computed: 1e-29 / 2**16 was 1e-29 one step before it was 0."""
    norm = 1e-29
    assert "cut" in record([0.0, norm, 1.0]).verdict().names
    assert "cut" in record([0.0, norm / SCALE, 1.0], scale=SCALE).verdict().names
    assert "underflow" in record([0.0, norm / SCALE, 1.0]).verdict().names


def skipping_flow() -> Flow:
    """Of five steps, the first and the fourth skipped, each read before anyone knows."""
    model, scaler = Classifier(), scaled()
    optimizer = SGD(model.parameters(), lr=0.1)
    flow = rnnkern.watch(model, scaler=scaler)
    for overflow in (True, False, False, True, False):
        scaler.scale(model(batch()).sum() * (torch.inf if overflow else 1)).backward()
        assert read(flow).skipped is None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    flow.close()
    return flow


def test_heat_map_marks_skipped_steps() -> None:
    figure = skipping_flow().plot()
    figure.canvas.draw()
    (panel,) = (ax for ax in figure.axes if ax.get_ylabel().startswith("lag"))
    (marks,) = (line for line in panel.lines if line.get_gid() == "skipped")
    assert marks.get_xdata().tolist() == [0, 3]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "skipped by the GradScaler (2 steps)" in labels


def test_curve_and_report_say_it(tmp_path: Any) -> None:
    skipped = record([math.inf, 0.1, 0.2], scale=SCALE, skipped=True)
    assert skipped.plot().get_title("left").endswith("training step 3, skipped")
    flow = skipping_flow()
    flow.report(tmp_path / "flow.html")
    page = (tmp_path / "flow.html").read_text()
    assert "Under mixed precision: loss scale 16384 divided out." in page
    assert "A mark on top says that the GradScaler skipped the step." in page
