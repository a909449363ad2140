"""watch() on torch.nn's own LSTM, GRU, RNN and cells: the norms of a float64 loop, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import Loss, at_the_end, everywhere, over_batch, read
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern.gradflow.recorder import MAX_BYTES

pytestmark = pytest.mark.usefixtures("nothing_stays")

I, H = 3, 5
F64 = torch.float64

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *args, **options: nn.RNNCell(*args, nonlinearity="relu", **options),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, **options: Any) -> Any:
    """A float64 module whose gates are not all half open."""
    torch.manual_seed(1)
    module = KINDS[kind](I, H, dtype=F64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    return module


def cell_of(kind: str, module: nn.RNNBase, end: str) -> nn.RNNCellBase:
    """torch.nn's cell with the weights of one layer and direction."""
    weights = {name.removesuffix(end): p.detach().double() for name, p in module.named_parameters()}
    weights = {name: p for name, p in weights.items() if name + end in dict(module.named_parameters())}
    cell = CELLS[kind](weights["weight_ih"].shape[1], module.hidden_size, module.bias, dtype=F64)
    cell.load_state_dict({name: weights[name] for name, _ in cell.named_parameters()})
    return cell


def truth(kind: str, module: nn.RNNBase, samples: Sequence[Tensor], loss: Loss) -> dict[str, np.ndarray]:
    """‖∂L/∂h_t‖ and ‖∂L/∂c_t‖ (layers, directions, T, B) in input order, by torch.nn's cells and retain_grad.

    Without projections. The loss takes outputs and h_n; with an LSTM h_n is h_n + c_n.
    """
    L, D = module.num_layers, 2 if module.bidirectional else 1
    kept: dict[tuple[int, int, int, int], tuple[Tensor, ...]] = {}
    outputs, finals = [], []
    for b, sample in enumerate(samples):
        x, last = list(sample.double()), []
        for layer in range(L):
            y: list[list[Tensor]] = [[] for _ in x]
            for d in range(D):
                cell = cell_of(kind, module, f"_l{layer}" + ("_reverse" if d else ""))
                state: tuple[Tensor, ...] = (torch.zeros(1, H, dtype=F64),) * (2 if kind == "lstm" else 1)
                for t in reversed(range(len(x))) if d else range(len(x)):
                    new = cell(x[t][None], state if kind == "lstm" else state[0])
                    state = tuple(new) if kind == "lstm" else (new,)
                    for s in state:
                        s.retain_grad()
                    kept[layer, d, t, b] = state
                    y[t].append(state[0][0])
                last.append(sum(state)[0])  # type: ignore[index]
            x = [torch.cat(step) for step in y]
        outputs.append(torch.stack(x))
        finals.append(torch.stack(last))
    loss(outputs, finals).backward()
    shape = (L, D, max(map(len, samples)), len(samples))
    norms = {"h": np.zeros(shape), "c": np.zeros(shape)}
    for index, states in kept.items():
        for name, s in zip("hc", states, strict=False):
            norms[name][index] = 0 if s.grad is None else s.grad.norm().item()
    return norms


def final(result: Any) -> Tensor:
    """h_n, or the sum of h_n and c_n."""
    return sum(result[1]) if isinstance(result[1], tuple) else result[1]


@ALL
@pytest.mark.parametrize("loss", [at_the_end, everywhere])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_the_truth(kind: str, loss: Loss, options: dict[str, Any]) -> None:
    module, x = made(kind, **options), torch.randn(7, 4, I, dtype=F64)
    with rnnkern.watch(module, cell_states=True) as flow:
        result = module(x)
        loss(result[0].unbind(1), final(result).unbind(1)).backward()
    expected = truth(kind, module, x.unbind(1), loss)
    rec = read(flow, order="input", per_sample=True)
    np.testing.assert_allclose(rec["rnn"].norm, expected["h"], rtol=1e-10, atol=1e-14)
    assert (rec["rnn"].norm > 0).any(-1).all() or kind == "relu"
    if kind == "lstm":
        np.testing.assert_allclose(rec["rnn.c"].norm, expected["c"], rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(rec["rnn.c"].squares[2], rec["rnn.c"].squares[0])
    else:
        assert rec.modules == ("rnn",)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_float32_up_to_lag_120(kind: str) -> None:
    module, x = KINDS[kind](I, H), torch.randn(121, 2, I)
    with rnnkern.watch(module, cell_states=True) as flow:
        at_the_end((), final(module(x)).unbind(1)).backward()
    expected, rec = truth(kind, module, x.unbind(1), at_the_end), read(flow, per_sample=True)
    for name, norms in zip(rec.modules, (expected["h"], expected["c"]), strict=False):
        assert norms.max() > 1e6 * norms.min()
        np.testing.assert_allclose(rec[name].norm, norms, rtol=0.01)


@ALL
def test_packed_unsorted(kind: str) -> None:
    module, lengths = made(kind, num_layers=2, bidirectional=True), [3, 7, 1, 5]
    x = torch.randn(4, 7, I, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    with rnnkern.watch(module, cell_states=True) as flow:
        result = module(packed)
        padded = pad_packed_sequence(result[0], batch_first=True)[0]
        outputs = [y[:n] for y, n in zip(padded, lengths, strict=True)]
        everywhere(outputs, final(result).unbind(1)).backward()
    samples = [sample[:n] for sample, n in zip(x, lengths, strict=True)]
    expected = truth(kind, module, samples, everywhere)
    rec = read(flow, order="input", per_sample=True)
    assert rec["rnn"].lengths.tolist() == lengths
    np.testing.assert_allclose(np.nan_to_num(rec["rnn"].norm), expected["h"], rtol=1e-10, atol=1e-14)
    if kind == "lstm":
        np.testing.assert_allclose(np.nan_to_num(rec["rnn.c"].norm), expected["c"], rtol=1e-10, atol=1e-14)


@ALL
def test_the_parts(kind: str) -> None:
    """r_t and δ_t by another way: ∂L/∂x_t = δ_t W_ih, which is as long as δ_t where W_ih is orthogonal."""
    gates = len(made(kind).weight_ih_l0)
    wide, x = KINDS[kind](gates, H, dtype=F64), torch.randn(6, 2, gates, dtype=F64, requires_grad=True)
    nn.init.orthogonal_(wide.weight_ih_l0)
    with rnnkern.watch(wide) as flow:
        output, state = wide(x)
        states = state if isinstance(state, tuple) else (state,)
        (output.sin().sum() + sum(h.square().sum() for h in states)).backward()
    squares = read(flow).squares[:, 0, 0]  # (4, T, B)
    assert x.grad is not None
    np.testing.assert_allclose(squares[2], x.grad.square().sum(-1).numpy(), rtol=1e-10)
    # without the losses on the outputs up to t, only what comes from later steps is left at t
    for t in range(6):
        with rnnkern.watch(wide) as flow:
            output, state = wide(x)
            states = state if isinstance(state, tuple) else (state,)
            (output[t + 1 :].sin().sum() + sum(h.square().sum() for h in states)).backward()
        later = read(flow).squares[:, 0, 0]
        np.testing.assert_allclose(squares[1, t], later[0, t], rtol=1e-10)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nn_rnn_as_rnnkern_rnn(nonlinearity: str) -> None:
    """All three statistics, against the kernel's."""
    module = made(nonlinearity, num_layers=2, bidirectional=True)
    fused = rnnkern.RNN.from_torch(module)
    packed = pack_padded_sequence(torch.randn(6, 3, I, dtype=F64), torch.tensor([2, 6, 4]), enforce_sorted=False)
    records = []
    for rnn in (module, fused):
        with rnnkern.watch(rnn) as flow:
            output, h_n = rnn(packed)
            (output.data.sin().sum() + h_n.square().sum()).backward()
        records.append(read(flow))
    np.testing.assert_allclose(records[0].squares, records[1].squares, rtol=1e-10, atol=1e-20)
    assert (records[0].squares > 0).any((1, 2, 3, 4)).all()


FORMS: dict[str, Callable[[], tuple[dict[str, Any], Any, int | None]]] = {  # options, input, batch of the state
    "dense": lambda: ({}, torch.randn(6, 4, I, dtype=F64), 4),
    "batch_first": lambda: ({"batch_first": True}, torch.randn(4, 6, I, dtype=F64), 4),
    "unbatched": lambda: ({}, torch.randn(6, I, dtype=F64), None),
    "unbatched batch_first": lambda: ({"batch_first": True}, torch.randn(6, I, dtype=F64), None),
    "packed": lambda: (
        {"batch_first": True},
        pack_padded_sequence(torch.randn(6, 4, I, dtype=F64), torch.tensor([2, 6, 3, 3]), enforce_sorted=False),
        4,
    ),
    "one step": lambda: ({}, torch.randn(1, 4, I, dtype=F64), 4),
}


@ALL
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("proj_size", [0, 2])
def test_as_its_own_forward(kind: str, form: str, proj_size: int) -> None:
    """Outputs and gradients in every form of input, with dropout from the same random numbers."""
    if proj_size and kind != "lstm":
        return
    options, x, B = FORMS[form]()
    options |= {"proj_size": proj_size} if proj_size else {}
    module = made(kind, num_layers=2, bidirectional=True, dropout=0.5, **options)
    sizes = (4, *([] if B is None else [B]))
    hx: Any = torch.randn(*sizes, proj_size or H, dtype=F64).requires_grad_()
    leaves = [*module.parameters(), hx]
    if kind == "lstm":
        leaves.append(torch.randn(*sizes, H, dtype=F64).requires_grad_())
        hx = (hx, leaves[-1])

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        output, state = module(x, hx)
        rows = output.data if isinstance(output, PackedSequence) else output
        results = [rows, *(state if isinstance(state, tuple) else (state,))]
        loss = sum((y * torch.linspace(1, 2, y.numel(), dtype=F64).view_as(y)).sum() for y in results)
        return [*results, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]

    own = run()
    with rnnkern.watch(module) as flow:
        module(x, hx)[0][0].sum().backward()
        assert read(flow).squares.shape[1:3] == (2, 2)
        watched = run()
    for a, b in zip(own, watched, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)
    assert any(not torch.equal(a, b) for a, b in zip(run(), [x + 1 for x in own], strict=True))


@pytest.mark.parametrize("kind", ["gru", "tanh"])  # where oneDNN has no bfloat16, nn.LSTM itself raises
def test_float32_and_autocast_keep_their_dtypes(kind: str) -> None:
    module, x = made(kind, num_layers=2).float(), torch.randn(6, 4, I)
    own = module(x)[0]
    with rnnkern.watch(module):
        torch.testing.assert_close(module(x)[0], own)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            watched = module(x)
            watched[0].float().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = module(x)
    torch.testing.assert_close(watched[0], own[0], rtol=3e-2, atol=3e-2)
    for a, b in zip(*(r[1] if isinstance(r[1], tuple) else (r[1],) for r in (watched, own)), strict=True):
        assert a.dtype == b.dtype


# Cells, in the caller's loop


def loop(cell: nn.RNNCellBase, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), state


@ALL
@pytest.mark.parametrize("batched", [True, False])
def test_cells(kind: str, batched: bool) -> None:
    module = made(kind)
    cell = cell_of(kind, module, "_l0")
    x = torch.randn(6, 3, I, dtype=F64) if batched else torch.randn(6, I, dtype=F64)
    results = []
    for watched in (module, cell):
        with rnnkern.watch(watched, cell_states=True) as flow:
            output, state = watched(x) if watched is module else loop(cell, x)
            total = state[0].sin().sum() + state[1].cos().sum() if kind == "lstm" else state.sin().sum()
            (output.square().sum() + total).backward()
        rec = read(flow, per_sample=True)
        assert rec["rnn"].squares.shape == (4 if watched is module else 3, 1, 1, 6, 3 if batched else 1)
        results.append([rec[name].squares for name in rec.modules])
    assert len(results[0]) == (2 if kind == "lstm" else 1)
    for a, b in zip(*results, strict=True):
        a = a[:3].copy()
        assert (b[1, ..., -1, :] == 0).all()  # a cell cannot tell what the last state is used for
        a[1, ..., -1, :] = 0
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-20)


def test_a_cell_as_its_own_forward() -> None:
    for kind in CELLS:
        cell, x = cell_of(kind, made(kind), "_l0"), torch.randn(5, 2, I, dtype=F64)
        own = loop(cell, x)[0]
        with rnnkern.watch(cell):
            torch.testing.assert_close(loop(cell, x)[0], own, rtol=1e-13, atol=1e-14)
    assert isinstance(rnnkern.RNNCell(I, H), nn.RNNCell)
    cell = rnnkern.RNNCell(I, H)
    with rnnkern.watch(cell) as flow:
        loop(cell, torch.randn(5, 2, I))[1].sum().backward()
    assert read(flow).norm.shape == (1, 1, 5)


def test_where_a_cells_sequence_begins() -> None:
    """At no state, at a detached one, and at any that the cell did not return last."""
    cell, x = nn.GRUCell(I, H), torch.randn(4, 2, I)
    with rnnkern.watch(cell) as flow:
        a, state = loop(cell, x)
        b, _ = loop(cell, x[:2], state.detach())
        c, _ = loop(cell, x[:3], torch.zeros(2, H))
        (a.sum() + b.sum() + c.sum()).backward()
        rec = read(flow, per_sample=True)
        assert rec.lengths.tolist() == [4, 4, 2, 2, 3, 3]
        flow.step()
        state = cell(x[0])
        flow.step()
        cell(x[1], state).sum().backward()  # a step's calls are its own
        rec = read(flow)
        assert (rec.step, rec.norm.shape) == (2, (1, 1, 1))


def test_a_cell_between_backwards() -> None:
    """A backward on the way, then more time steps: later squares add."""
    cell, x = nn.GRUCell(I, H, dtype=F64), torch.randn(5, 2, I, dtype=F64)
    with rnnkern.watch(cell) as flow:
        early, state = loop(cell, x[:2])
        early.sum().backward(retain_graph=True)
        first = read(flow).squares
        assert first.shape[3] == 2
    with rnnkern.watch(cell) as flow:
        early, state = loop(cell, x[:2])
        early.sum().backward(retain_graph=True)
        late, _ = loop(cell, x[2:4], state)
        loop(cell, x[4:], late[-1])  # another tensor than the one returned: a sequence whose backward never comes
        late.sum().backward()
        squares = read(flow).squares
    assert squares.shape[3] == 4
    with rnnkern.watch(cell) as flow:
        loop(cell, x[:4])[0][2:].sum().backward()
    second = read(flow).squares
    np.testing.assert_allclose(squares[:, :, :, :2], first + second[:, :, :, :2], rtol=1e-10)
    np.testing.assert_allclose(squares[:, :, :, 2:], second[:, :, :, 2:], rtol=1e-10)


def test_a_state_that_was_changed_on_the_way() -> None:
    cell, x = nn.GRUCell(I, H), torch.randn(4, 2, I)
    with rnnkern.watch(cell) as flow:
        state = cell(x[0]) * 0.9
        with pytest.warns(RuntimeWarning, match="'rnn' is not the one that it returned last"):
            state = cell(x[1], state) * 0.9
        cell(x[3], cell(x[2], state * 2) * 0.9).sum().backward()  # it is said once
    assert read(flow, per_sample=True).lengths.tolist() == [1] * 8


# What it costs, and what it leaves


class Model(nn.Module):
    def __init__(self, kind: str = "lstm") -> None:
        super().__init__()
        self.rnn = KINDS[kind](I, H)
        self.cell = nn.GRUCell(H, H)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for y in self.rnn(x)[0]:
            state = self.cell(y, state)
        assert state is not None
        return state


ATTRIBUTES = ("forward", "__getstate__", "_replicate_for_data_parallel")


def untouched(model: Model) -> bool:
    return not any(name in vars(m) for m in (model.rnn, model.cell) for name in ATTRIBUTES)


def test_steps_that_are_not_sampled_run_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkern.gradflow import gated

    entered = []
    monkeypatch.setattr(gated.InPlaceOfOperator, "__enter__", lambda self: entered.append(self) or self)
    monkeypatch.setattr(gated.InPlaceOfOperator, "__exit__", lambda *args: None)
    monkeypatch.setattr(gated.Watched, "_warn", lambda *args: None)
    model, x = Model(), torch.randn(4, 2, I)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    with rnnkern.watch(model, every=2):
        for _ in range(4):
            with torch.no_grad():
                model(x)
            counts.append(-len(entered))
            model(x).sum().backward()
            optimizer.step()
            counts[-1] += len(entered)
    assert counts == [5, 0, 5, 0]


def test_close_leaves_nothing() -> None:
    model, x = Model(), torch.randn(4, 2, I)
    before = [dict(vars(m)) for m in (model.rnn, model.cell)]
    with rnnkern.watch(model) as flow:
        assert not untouched(model)
        assert flow.modules == ("rnn", "cell")
        with pytest.raises(ValueError, match="'rnn' is already watched"):
            rnnkern.watch(model)
        late = model(x)
        gc.collect()
    assert untouched(model)
    assert [list(vars(m)) for m in (model.rnn, model.cell)] == [list(b) for b in before]
    late.sum().backward()
    assert read(flow).modules == ("rnn", "cell")
    with rnnkern.watch(model):
        pass
    flow = rnnkern.watch(model)
    del flow
    assert untouched(model)


def test_a_flow_does_not_keep_the_model() -> None:
    model, x = Model(), torch.randn(4, 2, I)
    ref = weakref.ref(model.rnn)
    flow = rnnkern.watch(model)
    model(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        del model
        assert ref() is None
    finally:
        gc.enable()
    assert read(flow).modules == ("rnn", "cell")
    flow.close()


def test_copies_are_not_watched() -> None:
    model, x = Model(), torch.randn(4, 2, I)
    with rnnkern.watch(model) as flow:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        shallow = copy.copy(model.rnn)
        for other in copies:
            assert untouched(other)
            torch.testing.assert_close(other(x), model(x))
            other(x).sum().backward()
        assert flow.read() is None
        assert not any(name in vars(shallow) for name in ATTRIBUTES)
        replica = model.rnn._replicate_for_data_parallel()
        assert not any(name in vars(replica) for name in ATTRIBUTES)
        model(x).sum().backward()
        assert read(flow)["rnn"].samples == 2
    assert model.state_dict().keys() == Model().state_dict().keys()


def test_parametrizations() -> None:
    model, x = Model(), torch.randn(4, 2, I)
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    parametrizations.weight_norm(model.cell, "weight_hh")
    with rnnkern.watch(model) as flow:
        own = copy.deepcopy(model)
        torch.testing.assert_close(own(x), model(x))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
        assert not torch.allclose(own(x), model(x))  # the copy runs on its own weights
        own(x).sum().backward()
        assert flow.read() is None
        model(x).sum().backward()
        assert read(flow)["rnn"].norm.shape == (1, 1, 4)
        assert model.rnn.parametrizations["weight_hh_l0"].original.grad is not None
    assert untouched(model)


def test_hooks_subclasses_and_a_forward_on_the_instance() -> None:
    class Twice(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, state = super().forward(input, hx)
            return output * 2, state

    rnn, x, seen = Twice(I, H), torch.randn(4, 2, I), []
    rnn.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    rnn.register_forward_hook(lambda m, args, out: seen.append("post"))
    own = rnn(x)[0]
    with rnnkern.watch(rnn) as flow:
        output = rnn(x)[0]
        torch.testing.assert_close(output, own)
        output.sum().backward()
        assert read(flow).norm.shape == (1, 1, 4)
    assert seen == ["pre", "post"] * 2

    rnn = nn.LSTM(I, H)
    inner = rnn.forward
    rnn.forward = lambda *args: (inner(*args)[0] * 3, None)  # type: ignore[method-assign]
    mine, own = rnn.forward, rnn(x)[0]
    with rnnkern.watch(rnn) as flow:
        torch.testing.assert_close(rnn(x)[0], own)
        rnn(x)[0].sum().backward()
        assert read(flow).samples == 2
    assert vars(rnn)["forward"] is mine

    rnn = nn.LSTM(I, H)
    flow = rnnkern.watch(rnn)
    watching = rnn.forward
    rnn.forward = lambda *args: watching(*args)  # type: ignore[method-assign]
    mine = rnn.forward
    flow.close()
    assert vars(rnn)["forward"] is mine
    assert rnn(x)[0].shape == (4, 2, H)


def test_a_forward_without_the_operator() -> None:
    class Other(nn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return input @ self.weight_ih_l0.T, None

    rnn = Other(I, H)
    with rnnkern.watch(rnn) as flow:
        with pytest.warns(RuntimeWarning, match="'rnn' did not call the operator"):
            output = rnn(torch.randn(4, 2, I))[0]
        output.sum().backward()
    assert flow.read() is None


def test_its_errors_are_its_own() -> None:
    for kind in KINDS:
        rnn = KINDS[kind](I, H)
        for x in (torch.randn(2), torch.randn(4, 2, I + 1), torch.randn(0, 2, I), torch.randn(4, 2, I, dtype=F64)):
            messages = []
            for watched in (False, True):
                flow = rnnkern.watch(rnn) if watched else None
                with pytest.raises((RuntimeError, ValueError)) as error:
                    rnn(x)
                messages.append((error.type, str(error.value)))
                if flow is not None:
                    flow.close()
            assert messages[0] == messages[1]


def test_a_cells_errors_are_its_own() -> None:
    for kind, make in CELLS.items():
        cell = make(I, H)
        for x, h in (
            (torch.randn(2, I + 1), torch.randn(2, H)),
            (torch.randn(2, I), torch.randn(1, H)),
            (torch.randn(2, I), torch.randn(2, H + 1)),
            (torch.randn(2, I), torch.randn(H)),
            (torch.randn(2, I), torch.randn(2, H, dtype=F64)),
            (torch.randn(2, I, dtype=F64), torch.randn(2, H)),
            (torch.randn(2, 2, I), torch.randn(2, H)),
        ):
            messages = []
            for watched in (False, True):
                flow = rnnkern.watch(cell) if watched else None
                with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
                    cell(x, (h, h) if kind == "lstm" else h)
                messages.append((error.type, str(error.value)))
                if flow is not None:
                    flow.close()
            assert messages[0] == messages[1]


def test_convert_leaves_a_watched_module_alone() -> None:
    model, x = nn.ModuleDict({"rnn": nn.RNN(I, H)}), torch.randn(4, 2, I)
    with rnnkern.watch(model) as flow:
        with pytest.warns(UserWarning, match="rnn .its forward was replaced on the instance: convert before that"):
            rnnkern.convert(model)
        model["rnn"](x)[0].sum().backward()
        assert read(flow)["rnn"].samples == 2
    assert isinstance(rnnkern.convert(model)["rnn"], rnnkern.RNN)


def test_frozen_layers_stay_frozen() -> None:
    for rnn, run in ((nn.LSTM(I, H), lambda m, x: m(x)[0]), (nn.LSTMCell(I, H), lambda m, x: loop(m, x)[0])):
        rnn.requires_grad_(False)
        with rnnkern.watch(rnn) as flow:
            assert not run(rnn, torch.randn(4, 2, I)).requires_grad
            run(rnn, torch.randn(4, 2, I).requires_grad_()).sum().backward()
            assert read(flow).norm.shape == (1, 1, 4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model, x = Model(), torch.randn(4, 2, I).requires_grad_()
    squares = []
    for checkpointed in (False, True):
        with rnnkern.watch(model) as flow:
            (checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)).sum().backward()
            squares.append([read(flow)[name].squares for name in ("rnn", "cell")])
    for a, b in zip(*squares, strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_and_truncated_bptt() -> None:
    lstm, x = nn.LSTM(I, H, dtype=F64), torch.randn(8, 4, I, dtype=F64)
    norms = []
    for parts in (1, 2):
        with rnnkern.watch(lstm) as flow:
            for chunk in x.chunk(parts, 1):
                lstm(chunk)[0][-1].sum().backward()
            norms.append(read(flow).norm)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-10)
    with rnnkern.watch(lstm) as flow, flow.sequence() as next_chunk:
        state = None
        for chunk in x.chunk(2):
            next_chunk()
            output, state = lstm(chunk, state)
            state = tuple(s.detach() for s in state)
            output.sum().backward()
        assert read(flow).norm.shape == (1, 1, 8)
        squares = read(flow).squares
    cell = nn.LSTMCell(I, H, dtype=F64)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.named_parameters()})
    with rnnkern.watch(cell) as flow, flow.sequence() as next_chunk:
        state = None
        for chunk in x.chunk(2):
            next_chunk()
            output, state = loop(cell, chunk, state)
            state = tuple(s.detach() for s in state)
            output.sum().backward()
        np.testing.assert_allclose(read(flow).squares, squares[:3], rtol=1e-10)


def test_compile_breaks_the_graph_and_records() -> None:
    torch.compiler.reset()
    model, x = Model(), torch.randn(4, 2, I)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compiled = torch.compile(model, backend="aot_eager")
    with rnnkern.watch(model, every=2) as flow:
        steps = []
        for _ in range(4):
            compiled(x).sum().backward()
            optimizer.step()
            rec = read(flow)
            steps.append(rec.step)
        assert steps == [0, 0, 2, 2]
    with rnnkern.watch(model) as flow:
        model(x).sum().backward()
    for name in ("rnn", "cell"):
        np.testing.assert_allclose(rec[name].norm, read(flow)[name].norm, rtol=1e-4)


def test_one_graph_where_it_is_not_sampled() -> None:
    torch.compiler.reset()
    cell, x = nn.GRUCell(I, H), torch.randn(2, I)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.0)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    with rnnkern.watch(cell, every=lambda step: step == 2) as flow:
        for _ in range(2):
            compiled(x).sum().backward()
            optimizer.step()
        assert flow.steps == 2
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"rnnkern\.watch records this module by a Python loop"):
            compiled(x)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about tracing
def test_what_traces_sees_the_operator() -> None:
    gru, x = nn.GRU(I, H), torch.randn(4, 2, I)
    model = nn.Sequential(rnnkern.RNNCell(I, H))
    with rnnkern.watch(model) as flow:
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        assert flow._recorder.has_forward is False
    with rnnkern.watch(gru):
        assert "aten::gru" in str(torch.jit.trace(gru, (x,)).inlined_graph)
        nodes = torch.export.export(gru, (x,)).graph.nodes
        assert any(node.target is torch.ops.aten.gru.input for node in nodes)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_torch_func_and_second_derivatives(kind: str) -> None:
    module, x = made(kind), torch.randn(4, 2, I, dtype=F64, requires_grad=True)
    doubled = {name: (2 * p).detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x.detach(),))[0].sum()

    own = torch.func.grad(loss)(doubled)
    with rnnkern.watch(module) as flow:
        watched = torch.func.grad(loss)(doubled)
        assert flow.read() is None
        loss({name: p.requires_grad_() for name, p in doubled.items()}).backward()
        squares = read(flow).squares
        assert torch.autograd.gradgradcheck(lambda x: module(x)[0].sin(), x)
    for name, grad in own.items():
        torch.testing.assert_close(watched[name], grad)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    with rnnkern.watch(module) as flow:
        module(x)[0].sum().backward()
    np.testing.assert_allclose(read(flow).squares, squares, rtol=1e-12)


def test_one_log_line_a_module(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model(), torch.randn(4, 2, I)
    with caplog.at_level(logging.INFO, "rnnkern"), rnnkern.watch(model):
        assert not caplog.records
        model(x)
        model(x)
    lines = [r.getMessage() for r in caplog.records if "slow" in r.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["'rnn' is a LSTM", "'cell' is a GRUCell"]


def test_next_to_rnnkerns_own() -> None:
    model = nn.ModuleDict({"a": rnnkern.RNN(I, H), "b": nn.LSTM(I, H), "c": nn.Linear(H, 1)})
    with rnnkern.watch(model, cell_states=True) as flow:
        assert flow.modules == ("a", "b", "b.c")
        x = torch.randn(4, 2, I)
        (model["a"](x)[0].sum() + model["b"](x)[0].sum()).backward()
        assert read(flow).modules == ("a", "b", "b.c")
    assert over_batch(read(flow, per_sample=True)["b"].norm).shape == (1, 1, 4)


def test_a_step_that_is_never_told_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BYTES == 1 << 30
    monkeypatch.setattr("rnnkern.gradflow.recorder.MAX_BYTES", 3 * 8 * 4 * 2 * 2)
    cell, x = nn.GRUCell(I, H), torch.randn(4, 2, I)
    with rnnkern.watch(cell) as flow:
        for _ in range(2):
            loop(cell, x)[0].sum().backward()
        with pytest.warns(RuntimeWarning, match="the rest of the step is not recorded"):
            loop(cell, x)
    assert read(flow).samples == 4
