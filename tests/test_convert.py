"""rnnkern.convert: torch.nn's RNNs inside a model become rnnkern's, and nothing else about the model changes."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4

pytestmark = pytest.mark.everywhere


class Model(nn.Module):
    """An RNN, a cell and modules that are neither, some of them deep down."""

    def __init__(self, rnn: type[nn.Module] = nn.RNN, cell: type[nn.Module] = nn.RNNCell) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, I)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([rnn(I, H, 2, dropout=0.5), rnn(H, H, bidirectional=True)])}
        )
        self.cell = cell(2 * H, H, nonlinearity="relu")
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(x)[0]
        for layer in self.encoder["layers"]:
            x = layer(x)[0]
        h = torch.zeros_like(x[0, :, :H])
        for step in x:
            h = self.cell(step, h)
        return self.head(h)


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, dropout from a fixed seed."""
    torch.manual_seed(2)
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters())]


def test_computes_with_our_kernels(backend: Backend, device: str) -> None:
    """A converted model gives the bits of one that was built of rnnkern's modules."""
    model, built = Model().to(device), Model(rnnkern.RNN, rnnkern.RNNCell).to(device)
    built.load_state_dict(model.state_dict())
    assert rnnkern.convert(model) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds == [type(m) for m in built.modules()] and kinds.count(rnnkern.RNN) == 2 and kinds.count(nn.LSTM) == 1
    x = torch.randn(T, B, I, device=device)
    assert same_bits(train(model, x), train(built, x))
    again = [train(copy.deepcopy(model), x), train(pickled(model), x), train(rnnkern.convert(model), x)]
    assert all(same_bits(other, train(built, x)) for other in again)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


OPTIONS = [
    dict(num_layers=n, bidirectional=b, nonlinearity=f, bias=bias, batch_first=first)
    for n, b, f, bias, first in itertools.product((1, 2), (False, True), ("tanh", "relu"), (True, False), (False, True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_stay(options: dict[str, Any]) -> None:
    """A model that is itself an RNN, with every option: padded and packed, it answers as rnnkern.RNN does."""
    rnn = rnnkern.convert(nn.RNN(I, H, **options))
    built = rnnkern.RNN(I, H, **options)
    built.load_state_dict(rnn.state_dict())
    assert type(rnn) is rnnkern.RNN and repr(rnn) == repr(built)
    x = torch.randn(B, T, I) if options["batch_first"] else torch.randn(T, B, I)
    packed = pack_padded_sequence(x, [3, 6, 1, 4], options["batch_first"], enforce_sorted=False)
    assert same_bits(rnn(x), built(x))
    assert same_bits([rnn(packed)[0].data, rnn(packed)[1]], [built(packed)[0].data, built(packed)[1]])
    # What a constructor sets and convert does not must be the class's, or a converted module would lack it.
    names = vars(built).keys() - vars(nn.Module()).keys() - {"_flat_weight_refs"}
    assert all(getattr(rnn, name) == getattr(built, name) for name in names)


def test_instances_are_untouched() -> None:
    """The modules and all that hangs on them are the very objects that they were."""
    model = Model().double().eval()
    rnn = model.encoder["layers"][0]
    rnn.train()
    rnn.weight_hh_l1 = rnn.weight_hh_l0  # tied
    rnn.bias_hh_l0.requires_grad_(False)
    rnn.register_buffer("mean", torch.zeros(3), persistent=False)
    rnn.note = {"by": "a user"}
    rnn.weight_ih_l0.grad = torch.ones_like(rnn.weight_ih_l0)

    def objects() -> dict[str, int]:
        """Of every module: what it holds, and what its containers hold."""
        found = {}
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in ("_flat_weights", "_flat_weight_refs"):
                    found[f"{path}.{name}"] = value if isinstance(value, str) else id(value)
                    found |= {f"{path}.{name}.{k}": id(v) for k, v in value.items()} if isinstance(value, dict) else {}
        return found

    before, keys = objects(), list(model.state_dict())
    values = [value.clone() for value in model.state_dict().values()]
    rnnkern.convert(model)
    assert objects() == before and "_flat_weights" not in vars(rnn)
    assert list(model.state_dict()) == keys and same_bits(model.state_dict().values(), values)
    assert rnn.weight_hh_l1 is rnn.weight_hh_l0 and not rnn.bias_hh_l0.requires_grad and rnn.weight_ih_l0.grad.all()
    assert rnn.training and not model.training and not model.cell.training
    for built in (Model().double(), Model(rnnkern.RNN, rnnkern.RNNCell).double()):
        built.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(built.state_dict(), strict=True)


def test_every_hook_still_fires() -> None:
    fired: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: fired.append(name)

    rnn = nn.RNN(I, H)
    kinds = (
        "forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook",
        "state_dict_pre_hook", "state_dict_post_hook", "load_state_dict_pre_hook", "load_state_dict_post_hook",
    )  # fmt: skip
    handles = [getattr(rnn, f"register_{kind}")(hook(kind)) for kind in kinds]
    handles += [
        rnn.register_forward_pre_hook(hook("with kwargs before"), with_kwargs=True, prepend=True),
        rnn.register_forward_hook(hook("with kwargs"), with_kwargs=True, always_call=True),
        rnn.weight_hh_l0.register_hook(hook("of a parameter")),
        rnn.weight_hh_l0.register_post_accumulate_grad_hook(hook("when a gradient is there")),
    ]
    kept = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
    assert all(vars(rnn)[name] for name in kept), "a kind of hook that this test does not register"

    def use() -> list[str]:
        fired.clear()
        rnn(torch.randn(T, B, I, requires_grad=True))[0].sum().backward()
        rnn.load_state_dict(rnn.state_dict())
        return list(fired)

    before = use()
    assert sorted(before) == sorted([*kinds, *(set(before) - set(kinds))]) and len(before) == len(handles)
    rnnkern.convert(rnn)
    assert use() == before
    for handle in handles:
        handle.remove()
    assert use() == []


def test_hooks_change_what_they_changed() -> None:
    rnn = nn.RNN(I, H)
    rnn.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    rnn.register_forward_hook(lambda module, args, result: (result[0], result[1] + 1))
    rnn.register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],))
    plain = rnnkern.RNN(I, H)
    plain.load_state_dict(rnn.state_dict())
    rnnkern.convert(rnn)
    x = torch.randn(T, B, I)
    a, b = x.clone().requires_grad_(), (2 * x).requires_grad_()
    ours, theirs = rnn(a), plain(b)
    assert same_bits(ours, [theirs[0], theirs[1] + 1])
    ours[0].sum().backward()
    theirs[0].sum().backward()
    torch.testing.assert_close(a.grad, 2 * 3 * b.grad)


def test_optimizer_stays_valid() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(T, B, I)
    train(model, x)
    optimizer.step()
    state = {p: {k: id(v) for k, v in values.items()} for p, values in optimizer.state.items()}
    rnnkern.convert(model)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    before = [p.clone() for p in model.parameters()]
    train(model, x)
    optimizer.step()
    assert {p: {k: id(v) for k, v in values.items()} for p, values in optimizer.state.items()} == state
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    twin = Model(rnnkern.RNN, rnnkern.RNNCell)  # an optimizer's state loads into a model built of ours
    other = torch.optim.Adam(twin.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, x)
        o.step()
    assert same_bits(model.parameters(), twin.parameters())


def test_weights_in_one_piece_of_memory() -> None:
    """cuDNN wants all weights of torch.nn.RNN there, and on a GPU they are: converted, they stay, and train."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        rnn = nn.RNN(I, H, 2, bidirectional=True)
        x = torch.randn(T, B, I)
        expected = [t.detach() for t in rnn(x)]
    places = [p.data_ptr() for p in rnn.parameters()]
    rnnkern.convert(rnn)
    output, h_n = rnn(x)
    torch.testing.assert_close([output, h_n], expected)
    output.square().sum().backward()
    torch.optim.SGD(rnn.parameters(), 0.1).step()
    assert [p.data_ptr() for p in rnn.parameters()] == places
    assert not torch.allclose(rnn(x)[0], output)


def test_shared_modules_stay_shared(caplog: pytest.LogCaptureFixture) -> None:
    rnn, cell = nn.RNN(H, H), nn.RNNCell(H, H)
    model = nn.ModuleDict({"a": rnn, "b": rnn, "deep": nn.Sequential(cell, nn.Sequential(cell))})
    with caplog.at_level(logging.INFO, "rnnkern"):
        rnnkern.convert(model)
    assert model["a"] is model["b"] is rnn and model["deep"][0] is model["deep"][1][0] is cell
    assert type(rnn) is rnnkern.RNN and type(cell) is rnnkern.RNNCell
    assert caplog.messages == ["convert(ModuleDict): a, deep.0"]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 3), nn.Sequential(nn.LSTM(2, 3), nn.GRU(2, 3), nn.GRUCell(2, 3)), nn.RNNBase("RNN_TANH", 2, 3),
     rnnkern.RNN(2, 3), rnnkern.RNNCell(2, 3)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_nothing_to_convert(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "rnnkern"):
        assert rnnkern.convert(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert caplog.messages == [f"convert({type(model).__name__}): nothing to convert"]


def test_graph_in_flight() -> None:
    """A backward whose forward ran before the conversion."""
    model = Model()
    x = torch.randn(T, B, I)
    expected = train(model, x)
    torch.manual_seed(2)
    model.zero_grad()
    output = model(x)
    rnnkern.convert(model)
    output.square().sum().backward()
    assert same_bits([output, *(p.grad for p in model.parameters())], expected)


def test_what_nn_rnn_computes_counts() -> None:
    """nn.RNN computes by its mode, which another nonlinearity given to it later does not change."""
    rnn = nn.RNN(I, H)
    rnn.nonlinearity = "relu"
    x = torch.randn(T, B, I)
    expected = rnn(x)[0]
    assert rnnkern.convert(rnn).nonlinearity == "tanh"
    torch.testing.assert_close(rnn(x)[0], expected)


class Doubled(nn.RNN):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = super().forward(input, hx)
        return 2 * output, h_n


class NamedCell(nn.RNNCell):
    """A subclass that changes nothing yet, and may tomorrow."""


def test_subclasses_are_left_and_named() -> None:
    model = nn.ModuleDict({"ours": nn.RNN(I, H), "theirs": Doubled(I, H), "cell": NamedCell(I, H)})
    parametrizations.orthogonal(model["theirs"], "weight_hh_l0")
    x = torch.randn(T, B, I)
    expected = model["theirs"](x)
    with pytest.warns(
        UserWarning, match=r"theirs \(Doubled is a .* torch.nn.RNN: derive it from rnnkern.RNN\), cell \(N"
    ):
        rnnkern.convert(model)
    assert isinstance(model["theirs"], Doubled) and type(model["cell"]) is NamedCell
    assert type(model["ours"]) is rnnkern.RNN and same_bits(model["theirs"](x), expected)


def test_replaced_forward_is_left_and_named() -> None:
    """As wrappers do that keep the old forward: what stands there would go on calling torch.nn's."""
    model = nn.Sequential(nn.RNN(I, H))
    old = model[0].forward
    model[0].forward = lambda *args: old(*args)
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(its forward was replaced"):
        rnnkern.convert(model)
    assert type(model[0]) is nn.RNN
    del model[0].forward
    assert type(rnnkern.convert(model)[0]) is rnnkern.RNN


@pytest.mark.parametrize("model", ["rnn", nn.RNN, nn.RNN(2, 3).forward, None], ids=lambda m: type(m).__name__)
def test_not_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"):
        rnnkern.convert(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused() -> None:
    model = nn.Sequential(nn.RNN(I, H))
    traced = torch.jit.trace(model, torch.randn(T, B, I))
    with pytest.raises(TypeError, match="cannot convert the model itself: it is TorchScript"):
        rnnkern.convert(traced)
    both = nn.ModuleDict({"plain": model, "traced": traced, "head": torch.jit.script(nn.Linear(2, 3))})
    with pytest.raises(TypeError, match=r"cannot convert traced.0: it is TorchScript"):
        rnnkern.convert(both)
    assert type(model[0]) is nn.RNN, "something was converted before the refusal"
    del both["traced"]
    rnnkern.convert(both)  # a scripted head is nobody's business
    assert type(model[0]) is rnnkern.RNN


def test_converted_model_can_be_watched() -> None:
    model = rnnkern.convert(Model())
    with rnnkern.watch(model) as flow:
        train(model, torch.randn(T, B, I))
        record = flow.read()
    assert flow.modules == ("lstm", "encoder.layers.0", "encoder.layers.1", "cell")
    assert (record["encoder.layers.0"].norm > 0).all() and record["encoder.layers.0"].norm.shape == (2, 1, T)
