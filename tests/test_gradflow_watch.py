"""What watching costs and leaves behind, and what the user sees."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradflow_helpers import (
    Classifier,
    at_the_end,
    chain,
    over_batch,
    read,
    truth,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.gradflow import recorder
from rnnkern.gradflow.taps import ModuleTaps
from rnnkern.layer_function import ReceivingTaps

pytestmark = pytest.mark.usefixtures("nothing_stays")


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
    arguments = (x, 4, 2, None, None)
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
        taps = ModuleTaps(flow._recorder, "rnn", torch.device("cpu"))(torch.zeros(1000, 64, 3), 1000, 64, None, None)
        assert taps is not None
        tap = taps(0, 0)
        assert tap.shape == (4, 1000, 64)
        assert tap.dtype == torch.float64
        assert tap.requires_grad
        assert tap.untyped_storage().nbytes() == 8


class _SpiedTaps(ReceivingTaps):
    """Keeps weak references to the nodes of taps, or to receivers where these are asked for."""

    def __init__(self, taps: Callable[[int, int], Tensor], refs: list[weakref.ref[object]]) -> None:
        assert isinstance(taps, ReceivingTaps)
        self.anchor, self.taps, self.refs = taps.anchor, taps, refs

    def __call__(self, layer: int, direction: int) -> Tensor:
        made = self.taps(layer, direction)
        assert made.grad_fn is not None
        self.refs.append(weakref.ref(made.grad_fn))
        return made

    def receiver(self, layer: int, direction: int) -> Callable[[Tensor], None]:
        made = self.taps.receiver(layer, direction)
        self.refs.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("receiving", [False, True])
def test_taps_go_with_their_graph(without_gc: None, receiving: bool) -> None:
    model, x = Classifier(num_layers=2), torch.randn(4, 2, 3)
    with rnnkern.watch(model) as flow:
        refs: list[weakref.ref[object]] = []
        factory = model.rnn.tap

        def spy(*arguments: object) -> Callable[[int, int], Tensor]:
            spied = _SpiedTaps(factory(*arguments), refs)
            return spied if receiving else spied.__call__

        model.rnn.tap = spy
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
            stats += [weakref.ref(s) for f in flow._recorder._kept[-1].received for s in f.stats.values()]
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
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")  # gives the module a __deepcopy__ of torch's own
    assert copy.deepcopy(model).rnn.tap is None and model.rnn.tap is not None
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(flow)


# What the user sees


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        rnnkern.watch([])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"there is no recurrent module in this Linear: none of rnnkern\.RNN, nn\.LSTM"
    ):
        rnnkern.watch(nn.Linear(2, 2))
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
