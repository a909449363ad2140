"""Files of modules, old ones too, and modules without numbers: meta, FakeTensorMode, skip_init."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import drawn, same_bits, threads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rnnkern

I, H, T, B = 5, 13, 6, 4
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "bias": False, "nonlinearity": "relu", "batch_first": True}]
options = pytest.mark.parametrize("options", OPTIONS, ids=["default", "all"])

pytestmark = pytest.mark.everywhere


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def random_input() -> Tensor:
    return drawn(1, T, B, I)


def outputs_and_grads(module: nn.Module) -> list[Tensor]:
    module.zero_grad()
    output, h_n = module(random_input())
    (output.square().sum() + h_n.sin().sum()).backward()
    return [output, h_n, *(p.grad for p in module.parameters())]


# Files


class Model(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = rnnkern.RNN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(I, H)
        self.rnn = kind(H, H, 2, dropout=0.5)
        self.cell = {rnnkern.RNN: rnnkern.RNNCell, nn.RNN: nn.RNNCell}[kind](H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(self.embed(x))
        return output, self.cell(output[-1], h_n[-1])


def test_file_of_a_model_in_training(tmp_path: Path) -> None:
    """The whole model, in the middle of its training, with all that its forwards have left behind."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    outputs_and_grads(model)
    optimizer.step()
    torch.save({"model": model, "optimizer": optimizer}, tmp_path / "both")
    again = torch.load(tmp_path / "both", weights_only=False)
    loaded = again["model"]
    assert type(loaded.rnn) is rnnkern.RNN and type(loaded.cell) is rnnkern.RNNCell and loaded.training
    assert repr(loaded) == repr(model)
    for m, o in ((model, optimizer), (loaded, again["optimizer"])):
        torch.manual_seed(2)
        outputs_and_grads(m)
        o.step()
    assert same_bits(loaded.parameters(), model.parameters())


def test_file_without_code(tmp_path: Path) -> None:
    """weights_only=True takes a whole module where its classes are declared safe, and weights as ever."""
    module = rnnkern.RNN(I, H, 2, bidirectional=True)
    expected = outputs_and_grads(module)
    torch.save(module, tmp_path / "module")
    with pytest.raises(pickle.UnpicklingError, match=r"rnnkern\.modules\.RNN"):
        torch.load(tmp_path / "module", weights_only=True)
    with torch.serialization.safe_globals([rnnkern.RNN, set]):
        again = torch.load(tmp_path / "module", weights_only=True)
    assert type(again) is rnnkern.RNN and same_bits(outputs_and_grads(again), expected)
    torch.save(module.state_dict(), tmp_path / "weights")
    weights = torch.load(tmp_path / "weights", weights_only=True, mmap=True)
    with torch.device("meta"):
        empty = rnnkern.RNN(I, H, 2, bidirectional=True)
    empty.load_state_dict(weights, assign=True)
    assert same_bits(outputs_and_grads(empty), expected)


class AsOurs(pickle.Unpickler):
    """Reads torch.nn's recurrent modules as ours."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("rnnkern" if module == "torch.nn.modules.rnn" else module, name)


def test_file_of_torch_read_as_ours() -> None:
    theirs, ours = Model(nn.RNN), Model()
    for model in (theirs, ours):
        torch.manual_seed(2)
        outputs_and_grads(model)  # leaves behind what a forward leaves
    loaded = AsOurs(io.BytesIO(pickle.dumps(theirs))).load()
    assert type(loaded.rnn) is rnnkern.RNN and type(loaded.cell) is rnnkern.RNNCell
    assert repr(loaded) == repr(theirs) and list(loaded.state_dict()) == list(theirs.state_dict())
    assert same_bits(outputs_and_grads(loaded.eval()), outputs_and_grads(ours.eval()))


#: Attributes that nn.Module had in its first versions; later ones get their defaults when an old pickle is read.
FIRST = ("training", "_parameters", "_buffers", "_modules", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks")


def state_of(version: str, options: dict[str, Any]) -> dict[str, Any]:
    """The state in a pickle of an nn.RNN that this version of torch wrote."""
    torch.manual_seed(0)
    theirs = nn.RNN(I, H, **options)
    theirs(random_input())
    state = copy.deepcopy(theirs.__getstate__())
    if version == "2":
        return state
    state = {key: value for key, value in state.items() if key in FIRST or not hasattr(nn.Module(), key)}
    state.pop("proj_size")
    if version == "1.7":
        return state
    state.pop("nonlinearity")  # only mode says it
    if version == "1.4":
        return state
    state.pop("_flat_weights")  # the names stand in _all_weights alone
    state.pop("_flat_weights_names")
    state["_data_ptrs"] = []
    if version == "1.3":
        return state
    key = "all_weights" if version == "first" else "_all_weights"  # which held the weights themselves
    state[key] = [[state["_parameters"][name] for name in names] for names in state.pop("_all_weights")]
    return state


@options
@pytest.mark.parametrize("version", ["2", "1.7", "1.4", "1.3", "0.1", "first"])
def test_old_pickles(version: str, options: dict[str, Any]) -> None:
    made = rnnkern.RNN.__new__(rnnkern.RNN)
    made.__setstate__(state_of(version, options))
    torch.manual_seed(0)
    fresh = rnnkern.RNN(I, H, **options)
    expected = outputs_and_grads(fresh)
    for module in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert same_bits(outputs_and_grads(module), expected)
        assert repr(module) == repr(fresh) and module.nonlinearity == fresh.nonlinearity
        assert same_bits(module.state_dict().values(), fresh.state_dict().values())
        with torch.no_grad():
            module.weight_hh_l0.zero_()
        assert not same_bits([module(random_input())[0]], expected[:1]), "no second copy of the weights is left"


# Modules without numbers


def test_skip_init() -> None:
    """No random numbers are drawn, and what comes trains like any other once it has weights."""
    device = torch.get_default_device()
    options = dict(nonlinearity="relu", bidirectional=True, dtype=torch.float64)
    torch.manual_seed(3)
    first = torch.rand(8)
    torch.manual_seed(3)
    module = nn.utils.skip_init(rnnkern.RNN, I, H, 2, **options, device=device)
    cell = nn.utils.skip_init(rnnkern.RNNCell, I, H, nonlinearity="relu", device=device)
    assert torch.equal(torch.rand(8), first)
    assert {p.dtype for p in module.parameters()} == {torch.float64} and cell.weight_hh.shape == (H, H)
    assert {p.device.type for p in (*module.parameters(), *cell.parameters())} == {device.type}
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    fresh = rnnkern.RNN(I, H, 2, **options)
    assert repr(module) == repr(fresh) and same_bits(module.parameters(), fresh.parameters())


def call(module: nn.Module, x: Tensor, hx: Tensor | None) -> list[Tensor]:
    """Outputs, and gradients of all that has some."""
    output, h_n = module(x, hx)
    leaves = [t for t in (x, hx, *module.parameters()) if t is not None]
    return [output, h_n, *torch.autograd.grad(output.square().sum() + h_n.sum(), leaves)]


@options
@pytest.mark.parametrize("shape", [(T, B, I), (1, 1, I), (T, I)], ids=["batched", "step", "unbatched"])
def test_fake_tensors(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Shapes, strides and dtypes are those of real tensors; nothing is computed."""
    x = torch.randn(shape, requires_grad=True)
    samples = () if x.dim() == 2 else (shape[0 if options.get("batch_first") else 1],)
    hx = torch.randn(4 if options else 1, *samples, H, requires_grad=True)
    module = rnnkern.RNN(I, H, **options)
    expected = call(module, x, hx)
    with FakeTensorMode() as mode:
        results = call(rnnkern.RNN(I, H, **options), mode.from_tensor(x), mode.from_tensor(hx))
    assert all(isinstance(t, FakeTensor) for t in results)
    assert [(t.shape, t.stride(), t.dtype, t.device) for t in results] == [
        (t.shape, t.stride(), t.dtype, t.device) for t in expected
    ]


def test_meta_in_a_model() -> None:
    """A whole model is planned without memory: shapes forward and backward, also of what no memory would hold."""
    with torch.device("meta"):
        model = rnnkern.RNN(1 << 10, 1 << 16, 2, bidirectional=True)
        results = call(model, torch.empty(3, 1 << 12, 1 << 10, requires_grad=True), None)
    assert [tuple(t.shape) for t in results[:3]] == [
        (3, 1 << 12, 1 << 17),
        (4, 1 << 12, 1 << 16),
        (3, 1 << 12, 1 << 10),
    ]
    assert [t.shape for t in results[3:]] == [p.shape for p in model.parameters()]
    assert all(t.is_meta for t in results)
