"""RNN.from_torch and RNN.to_torch, and the cell's: another module on the same parameters."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4

pytestmark = pytest.mark.everywhere

OPTIONS = [
    dict(num_layers=n, bidirectional=b, nonlinearity=f, bias=bias, batch_first=first, dropout=0.5 * (n > 1))
    for n, b, f, bias, first in itertools.product((1, 2), (False, True), ("tanh", "relu"), (True, False), (False, True))
]


def same_objects(a: nn.Module, b: nn.Module) -> bool:
    return [(n, id(p)) for n, p in a.named_parameters()] == [(n, id(p)) for n, p in b.named_parameters()]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_there_and_back(options: dict[str, Any]) -> None:
    theirs = nn.RNN(I, H, **options).eval()
    ours = rnnkern.RNN.from_torch(theirs)
    back = ours.to_torch()
    assert (type(ours), type(back)) == (rnnkern.RNN, nn.RNN) and back is not theirs
    assert same_objects(theirs, ours) and same_objects(theirs, back)
    built = rnnkern.RNN(I, H, **options).eval()
    for module in (theirs, back, built):
        module.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(module.state_dict(), strict=True)
    for name in vars(built).keys() - vars(nn.Module()).keys() - {"_flat_weight_refs"}:
        assert getattr(ours, name) == getattr(built, name)
    x = torch.randn(T, B, I)
    assert same_bits(ours(x), built(x)) and same_bits(back(x), theirs(x))
    for module in (theirs, ours, back):
        assert not module.training
        module.train()  # the mode is each one's own
    assert repr(ours) == repr(theirs)


def test_from_torch_trains_both(backend: Backend, device: str) -> None:
    theirs = nn.RNN(I, H, 2).to(device)
    ours = rnnkern.RNN.from_torch(theirs)
    optimizer = torch.optim.Adam(theirs.parameters(), 1e-2)
    x = torch.randn(T, B, I, device=device)
    before = theirs(x)[0]
    ours(x)[0].square().sum().backward()
    optimizer.step()
    assert all(p.grad.any() for p in theirs.parameters())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert not torch.allclose(theirs(x)[0], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_mode(dtype: torch.dtype) -> None:
    theirs = nn.RNN(I, H, device="meta", dtype=dtype).eval().requires_grad_(False)
    ours = rnnkern.RNN.from_torch(theirs)
    assert same_objects(theirs, ours) and not ours.training
    assert all(p.is_meta and p.dtype == dtype and not p.requires_grad for p in ours.parameters())


def test_cell() -> None:
    theirs = nn.RNNCell(I, H, nonlinearity="relu").eval()
    ours = rnnkern.RNNCell.from_torch(theirs)
    back = ours.to_torch()
    assert (type(ours), type(back)) == (rnnkern.RNNCell, nn.RNNCell)
    assert same_objects(theirs, ours) and same_objects(theirs, back) and not ours.training and not back.training
    x = torch.randn(B, I)
    assert same_bits([ours(x), back(x)], [theirs(x), theirs(x)])
    assert ours.state_dict().keys() == back.state_dict().keys() == theirs.state_dict().keys()


def test_nothing_but_the_parameters_is_tied() -> None:
    """Attributes, hooks and buffers come along; what is added to one module or taken from it is not the other's."""
    theirs = nn.RNN(I, H)
    theirs.note = note = object()
    theirs.register_buffer("mean", torch.zeros(3))
    fired: list[nn.Module] = []
    theirs.register_forward_hook(lambda module, args, output: fired.append(module))
    theirs.register_load_state_dict_pre_hook(lambda module, *args: fired.append(module))
    ours = rnnkern.RNN.from_torch(theirs)
    assert ours.note is note and ours.mean is theirs.mean
    ours.register_forward_hook(lambda module, args, output: fired.append(module))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(H, H))
    ours.other, ours.mean = 1, torch.ones(3)
    x = torch.randn(T, B, I)
    theirs(x)
    assert fired == [theirs] and theirs.weight_hh_l0.any() and not hasattr(theirs, "other") and not theirs.mean.any()
    del theirs
    gc.collect()
    fired.clear()
    ours(x)
    ours.load_state_dict(ours.state_dict())
    assert fired == [ours] * 3


def test_hook_of_another_object_is_not_copied() -> None:
    """A bound method leads to its object, which may be as large as a trainer."""

    class Trainer:
        seen = 0

        def after(self, *args: Any) -> None:
            self.seen += 1

        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("copied")

    trainer, theirs = Trainer(), nn.RNN(I, H)
    theirs.trainer = trainer
    theirs.register_forward_hook(trainer.after)
    theirs.register_load_state_dict_post_hook(trainer.after)
    ours = rnnkern.RNN.from_torch(theirs)
    ours(torch.randn(T, B, I))
    ours.load_state_dict(theirs.state_dict())
    assert trainer.seen == 2 and ours.trainer is trainer


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "prune"])
def test_computed_weights(how: str) -> None:
    """Parametrized and pruned modules share the sources of their weights."""
    theirs = nn.RNN(I, H).eval()
    if how == "prune":
        prune.l1_unstructured(theirs, "weight_hh_l0", 0.5)
    else:
        getattr(parametrizations, how)(theirs, "weight_hh_l0")
    x = torch.randn(T, B, I)
    theirs(x)
    ours = rnnkern.RNN.from_torch(theirs)
    back = ours.to_torch()
    assert isinstance(ours, rnnkern.RNN) and isinstance(back, nn.RNN)
    assert same_objects(theirs, ours) and same_objects(theirs, back)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
    expected = theirs(x)[0]
    for module in (ours, back):
        torch.testing.assert_close(module(x)[0], expected)
    if how != "prune":
        parametrize.remove_parametrizations(ours, "weight_hh_l0", leave_parametrized=how == "weight_norm")
        assert type(ours) is rnnkern.RNN
        torch.testing.assert_close(theirs(x)[0], expected)


class Sub(nn.RNN):
    pass


class SubOfOurs(rnnkern.RNN):
    pass


class SubOfOurCell(rnnkern.RNNCell):
    pass


@pytest.mark.parametrize("rnn", [nn.LSTM(2, 3), nn.RNNCell(2, 3), Sub(2, 3), rnnkern.RNN(2, 3), "rnn", None])
def test_from_torch_takes_an_rnn(rnn: Any) -> None:
    with pytest.raises(TypeError, match=f"rnn must be a torch.nn.RNN, and of no subclass, got {type(rnn).__name__}"):
        rnnkern.RNN.from_torch(rnn)


@pytest.mark.parametrize("cell", [nn.GRUCell(2, 3), nn.RNN(2, 3), rnnkern.RNNCell(2, 3), None])
def test_from_torch_takes_a_cell(cell: Any) -> None:
    with pytest.raises(
        TypeError, match=f"cell must be a torch.nn.RNNCell, and of no subclass, got {type(cell).__name__}"
    ):
        rnnkern.RNNCell.from_torch(cell)


def test_subclasses_of_ours() -> None:
    made = SubOfOurs.from_torch(nn.RNN(2, 3))
    assert type(made) is SubOfOurs
    for module in (made, SubOfOurCell.from_torch(nn.RNNCell(2, 3))):
        with pytest.raises(
            TypeError, match=r"SubOfOur.* is a subclass of rnnkern.RNN.*: torch.nn.RNN.* lacks what it adds"
        ):
            module.to_torch()


def test_replaced_forward() -> None:
    for module, change in ((nn.RNN(2, 3), rnnkern.RNN.from_torch), (rnnkern.RNN(2, 3), rnnkern.RNN.to_torch)):
        module.forward = module.forward
        with pytest.raises(ValueError, match="the forward of this RNN was replaced on the instance"):
            change(module)


def test_options_beyond_nn_rnn(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = rnnkern.RNN(2, 3)
    monkeypatch.setattr(rnnkern.RNN, "_beyond_nn_rnn", lambda self: ["clip", "layer_norm"])
    with pytest.raises(ValueError, match=r"torch.nn.RNN has no clip, layer_norm"):
        rnn.to_torch()


def test_watched_or_compiled() -> None:
    """Who watches a module, and what was compiled for it, stays with it."""
    ours = rnnkern.RNN(I, H)
    parametrizations.orthogonal(ours, "weight_hh_l0")
    ours.compile(backend="eager")
    x = torch.randn(T, B, I)
    with rnnkern.watch(ours) as flow:
        theirs = ours.to_torch()
        assert "tap" not in vars(theirs)
        theirs(x)[0].sum().backward()
        assert flow.read() is None
    plain = rnnkern.RNN(I, H)
    plain.compile(backend="eager")
    for other in (plain.to_torch(), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert other._compiled_call_impl is None
        with torch.no_grad():
            other.weight_hh_l0 = nn.Parameter(torch.zeros(H, H))
        assert not torch.allclose(other(x)[0], plain(x)[0])


class Head(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.linear = nn.Linear(2 * H, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how: str) -> None:
    """What to_torch() is for: a trained model leaves for a place where there is no rnnkern."""
    model = Head(rnnkern.RNN(I, H, 2, bidirectional=True)).eval()
    x = torch.randn(T, B, I)
    expected = model(x)
    model.rnn = model.rnn.to_torch()
    left = torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(left, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "rnnkern" not in str(loaded.inlined_graph)
    torch.testing.assert_close(loaded(x), expected)
    longer = torch.randn(3 * T, B + 1, I)
    torch.testing.assert_close(loaded(longer), model(longer))


@pytest.mark.cpu_only("PyTorch quantizes for CPUs")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_cell() -> None:
    """Quantization goes by a module's very class: it knows torch.nn.RNNCell."""
    ours, theirs = nn.Sequential(rnnkern.RNNCell(I, H)), nn.Sequential(nn.RNNCell(I, H))
    theirs.load_state_dict(ours.state_dict())
    ours[0] = ours[0].to_torch()
    quantized = [torch.ao.quantization.quantize_dynamic(model, {nn.RNNCell}) for model in (ours, theirs)]
    assert type(quantized[0][0]) is torch.ao.nn.quantized.dynamic.RNNCell
    x = torch.randn(B, I)
    assert same_bits([quantized[0](x)], [quantized[1](x)])
