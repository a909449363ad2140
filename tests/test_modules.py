"""rnnkern.RNN and RNNCell against torch.nn's, from the same seed, under the rule of helpers.py."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import assert_as_good, drawn, same_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4

OPTIONS = [
    dict(num_layers=n, bidirectional=b, nonlinearity=f, bias=bias)
    for n, b, f, bias in itertools.product((1, 2, 3), (False, True), ("tanh", "relu"), (True, False))
]


def twins(
    device: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> tuple[rnnkern.RNN, nn.RNN]:
    modules = []
    for kind in (rnnkern.RNN, nn.RNN):
        torch.manual_seed(seed)
        modules.append(kind(I, H, **options).to(device or torch.get_default_device(), dtype))
    return modules[0], modules[1]


def random_input(kind: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    x = torch.randn(T, B, I)
    lengths = torch.tensor([6, 3, 3, 1], device="cpu")
    return {
        "padded": x,
        "one": x[:1, :1],
        "unbatched": x[:, 0],
        "packed": pack_padded_sequence(x, lengths),
        "unsorted": pack_padded_sequence(x, lengths[[2, 0, 3, 1]], enforce_sorted=False),
    }[kind]


def random_hx(module: nn.RNN, x: Any) -> Tensor:
    states = module.num_layers * (2 if module.bidirectional else 1)
    if isinstance(x, PackedSequence):
        return torch.randn(states, int(x.batch_sizes[0]), H)
    return torch.randn(states, H) if x.dim() == 2 else torch.randn(states, x.shape[0 if module.batch_first else 1], H)


def train_once(
    module: nn.Module, x: Any, hx: Tensor | None, dtype: torch.dtype, device: str, seed: int = 7
) -> dict[str, Tensor]:
    """Outputs and all gradients for a loss that the seed fixes."""
    x = x.to(device)
    data = (x.data if isinstance(x, PackedSequence) else x).to(dtype).detach().requires_grad_()
    leaf = None if hx is None else hx.to(device, dtype).detach().requires_grad_()
    module.zero_grad()
    output, h_n = module(x._replace(data=data) if isinstance(x, PackedSequence) else data, leaf)
    rows = output.data if isinstance(output, PackedSequence) else output
    torch.manual_seed(seed)
    loss = (rows * torch.randn(rows.shape).to(rows)).sum() + (h_n * torch.randn(h_n.shape).to(h_n)).sum()
    loss.backward()
    results = {"output": rows, "h_n": h_n, "input.grad": data.grad}
    if leaf is not None:
        results["hx.grad"] = leaf.grad
    return results | {f"{name}.grad": p.grad for name, p in module.named_parameters()}


def compare(
    ours: nn.Module, theirs: nn.Module, x: Any, hx: Tensor | None, device: str, seeds: Sequence[int] = ()
) -> None:
    """Every output and gradient of two modules with the same weights; truth is nn.RNN in float64. ``seeds`` give nn.RNN
    more inputs and losses to err on, where it is known to be lucky with all of the few numbers of one."""
    dtype = next(theirs.parameters()).dtype
    exact = copy.deepcopy(theirs).double()
    found = train_once(ours, x, hx, dtype, device)
    given = [(x, 7), *((_another(x, seed), seed) for seed in seeds)]
    pairs = [
        [train_once(m, v, hx, d, device, seed) for m, d in ((theirs, dtype), (exact, torch.float64))]
        for v, seed in given
    ]
    assert found.keys() == pairs[0][0].keys()
    for name, value in found.items():
        (plain, true), *yardsticks = [(plain[name], true[name]) for plain, true in pairs]
        assert_as_good(name, value, plain, true, yardsticks)


def _another(x: Any, seed: int) -> Any:
    """An input of the size of x."""
    if isinstance(x, PackedSequence):
        return x._replace(data=_another(x.data, seed))
    return drawn(seed, *x.shape).to(x)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("kind", ["padded", "unsorted"])
def test_options(backend: Backend, device: str, options: dict[str, Any], kind: str) -> None:
    ours, theirs = twins(device, **options)
    x = random_input(kind)
    compare(ours, theirs, x, random_hx(theirs, x), device)


@pytest.mark.parametrize("kind", ["padded", "one", "unbatched", "packed", "unsorted"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs(backend: Backend, device: str, kind: str, batch_first: bool, with_hx: bool, dtype: torch.dtype) -> None:
    ours, theirs = twins(device, dtype, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = random_input(kind)
    compare(ours, theirs, x, random_hx(theirs, x) if with_hx else None, device, (11, 12) if kind == "unbatched" else ())


def test_packed_carries_its_indices(backend: Backend, device: str) -> None:
    """Unsorted: hx is permuted on its way in and h_n on its way out; batch_first does not matter."""
    sequences = [torch.randn(n, I, device=device) for n in (2, 5, 1, 5)]
    for batch_first in (False, True):
        module = rnnkern.RNN(I, H, num_layers=2, bidirectional=True, batch_first=batch_first).to(device)
        hx = torch.randn(4, 4, H, device=device)
        packed = pack_sequence(sequences, enforce_sorted=False)
        output, h_n = module(packed, hx)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        assert torch.equal(output.sorted_indices, packed.sorted_indices)
        assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
        for b, (x, y) in enumerate(zip(sequences, nn.utils.rnn.unpack_sequence(output), strict=True)):
            alone, last = module(x, hx[:, b])
            torch.testing.assert_close(y, alone)
            torch.testing.assert_close(h_n[:, b], last)
    in_order = pack_sequence(sorted(sequences, key=len, reverse=True))
    output, _ = module(in_order)
    assert output.sorted_indices is None and output.unsorted_indices is None


@pytest.mark.everywhere
@pytest.mark.parametrize("options", OPTIONS[::3], ids=lambda o: "-".join(map(str, o.values())))
def test_parameters_and_state_dict(options: dict[str, Any]) -> None:
    ours, theirs = twins(**options)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and same_bits(a.values(), b.values())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    other, theirs_other = twins(seed=5, **options)
    theirs_other.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert same_bits(other.parameters(), theirs.parameters())
    short = dict(a)
    short.pop("weight_hh_l0")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_hh_l0"'):
        other.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
        other.load_state_dict({**a, "weight_hr_l0": torch.zeros(1)})


@pytest.mark.everywhere
def test_positional_arguments_and_attributes() -> None:
    ours, theirs = rnnkern.RNN(3, 4, 2, "relu", False, True, 0.5, True), nn.RNN(3, 4, 2, "relu", False, True, 0.5, True)
    for name in ("mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
                 "bidirectional", "proj_size"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)
    assert [[tuple(w.shape) for w in layer] for layer in ours.all_weights] == [
        [tuple(w.shape) for w in layer] for layer in theirs.all_weights
    ]
    made = nn.utils.skip_init(rnnkern.RNN, 3, 4)
    assert made.weight_ih_l0.shape == (4, 3)
    assert rnnkern.RNN(3, 4, dtype=torch.float64).weight_hh_l0.dtype == torch.float64


def by_layers(module: nn.RNN, x: Any, masks: list[Tensor]) -> Tensor:
    """The rows of the output in float64, one layer at a time, each but the last times its mask."""
    rows = x.data
    for layer in range(module.num_layers):
        one = nn.RNN(rows.shape[-1], H, nonlinearity=module.nonlinearity, bidirectional=module.bidirectional)
        of_layer = {n.replace(f"_l{layer}", "_l0"): w for n, w in module.named_parameters() if f"_l{layer}" in n}
        one.to(rows.device, torch.float64).load_state_dict(of_layer)
        output = one(x._replace(data=rows.double()) if isinstance(x, PackedSequence) else rows.double())[0]
        rows = output.data
        if layer < len(masks):
            rows = rows * masks[layer]
    return rows


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_follows_the_seed(backend: Backend, device: str, kind: str, bidirectional: bool) -> None:
    """The same elements fall as in nn.RNN and in F.dropout on the output of a layer."""
    options = dict(num_layers=3, dropout=0.4, bidirectional=bidirectional, nonlinearity="relu")
    ours, theirs = twins(device, **options)
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.copy_(p.abs())
    x = random_input(kind).to(device)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(module(x)[0].data)
    torch.manual_seed(3)
    masks = [nn.functional.dropout(torch.ones_like(results[0]), 0.4) for _ in range(2)]
    assert_as_good("output", *results, by_layers(theirs, x, masks))
    ours.eval(), theirs.eval()
    # All units are alive: the gradients of the biases depend on the loss alone.
    compare(ours, theirs, random_input(kind), None, device, (11, 12) if bidirectional else ())


def test_dropout_of_everything(backend: Backend, device: str) -> None:
    ours, theirs = twins(device, num_layers=2, dropout=1.0)
    compare(ours, theirs, random_input("padded"), None, device)
    x = random_input("padded").to(device)
    assert same_bits([ours(x)[0]], [ours(torch.randn_like(x))[0]]), "nothing of the first layer comes through"


@pytest.mark.everywhere
def test_dropout_warns_with_one_layer() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        module = rnnkern.RNN(3, 4, dropout=0.5)
    x = torch.randn(5, 2, 3)
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "four"])
def test_h_n_does_not_alias_output(backend: Backend, device: str, grad: bool, options: dict[str, Any]) -> None:
    module = rnnkern.RNN(I, H, **options).to(device)
    for steps in (1, 4):
        x = torch.randn(steps, 1, I, device=device)
        before = x.clone()
        with torch.set_grad_enabled(grad):
            output, h_n = module(x)
        hx = torch.zeros_like(h_n)
        kept = h_n.clone()
        output.detach().fill_(9.0)
        assert torch.equal(h_n, kept) and torch.equal(x, before)
        with torch.set_grad_enabled(grad):
            module(x, hx)
        assert not hx.any(), "hx is not written to"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: Backend, device: str, mode: Any) -> None:
    """The in-place path gives the same bits, and leaves its input alone."""
    module = rnnkern.RNN(I, I, 2, bidirectional=True).to(device)
    for kind in ("padded", "unbatched", "packed"):
        x = random_input(kind).to(device)
        expected = module(x)
        with mode():
            output = module(x)
            assert not output[1].requires_grad
        a, b = (y[0].data if kind == "packed" else y[0] for y in (output, expected))
        assert same_bits([a, output[1]], [b, expected[1]])
    with torch.no_grad():  # nothing but hx could be taken for a buffer
        hx = torch.zeros(4, B, I, device=device)
        module(random_input("padded").to(device), hx)
        assert not hx.any()


def test_eval_mode_has_a_backward(backend: Backend, device: str) -> None:
    ours, theirs = twins(device, num_layers=2, dropout=0.5)
    compare(ours.eval(), theirs.eval(), random_input("padded"), None, device)


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l1", "all but weight_hh_l1", "all"])
def test_frozen_weights(backend: Backend, device: str, frozen: str) -> None:
    ours, theirs = twins(device, num_layers=2)
    for module in (ours, theirs):
        for name, p in module.named_parameters():
            p.requires_grad_((name != frozen and not frozen.startswith("all")) or frozen == f"all but {name}")
    x = random_input("padded").to(device).requires_grad_(frozen == "all")
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_empty_batch(backend: Backend, device: str) -> None:
    ours, theirs = twins(device, num_layers=2, bidirectional=True)
    results = [train_once(m, torch.zeros(T, 0, I), torch.zeros(4, 0, H), torch.float32, device) for m in (ours, theirs)]
    for name, value in results[0].items():
        assert value.shape == results[1][name].shape and not value.any(), name


@pytest.mark.unnamed
@pytest.mark.float64
@pytest.mark.parametrize("kind", ["padded", "lengths", "packed", "unsorted"])
def test_default_device(backend: Backend, device: str, kind: str) -> None:
    """Where tensors are made by default, torch.set_default_device, is nothing to a module that is elsewhere."""
    module = rnnkern.RNN(I, H, 2, bidirectional=True).to(device, torch.float64)
    x = random_input("padded" if kind == "lengths" else kind).to(device, torch.float64)
    options = {"lengths": [2, 6, 1, 6]} if kind == "lengths" else {}
    weights = list(module.parameters())
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            output, h_n = module(x, **options)
            loss = (output.data if isinstance(output, PackedSequence) else output).square().sum() + h_n.sum()
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), weights)
            with torch.no_grad():
                results.append([module(x, **options)[1], h_n, *grads, *second])
    assert same_bits(*results)


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("kind", ["padded", "unsorted"])
def test_autocast(backend: Backend, device: str, with_hx: bool, kind: str) -> None:
    """Both outputs are in the autocast dtype, also with a float32 hx; gradients in the dtype of their leaves."""
    ours, theirs = twins(device, num_layers=2, bidirectional=True)
    x = random_input(kind)
    hx = random_hx(theirs, x) if with_hx else None
    exact = train_once(copy.deepcopy(theirs).double(), x, hx, torch.float64, device)
    results = []
    for module in (ours, theirs):
        with torch.autocast(device, torch.bfloat16):
            results.append(train_once(module, x, hx, torch.float32, device))
    assert results[0]["output"].dtype == results[0]["h_n"].dtype == torch.bfloat16
    for name, value in results[0].items():
        assert value.dtype == results[1][name].dtype, name
        # Judged in the dtype of the computation: the gradients of float32 leaves are float32 numbers all the same.
        assert_as_good(name, *(r[name].bfloat16() for r in results), exact[name])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_hx", [True, False])
def test_cell(backend: Backend, device: str, nonlinearity: str, bias: bool, batched: bool, with_hx: bool) -> None:
    modules = []
    for kind in (rnnkern.RNNCell, nn.RNNCell):
        torch.manual_seed(0)
        modules.append(kind(I, H, bias, nonlinearity, device=device))
    ours, theirs = modules
    assert same_bits(ours.state_dict().values(), theirs.state_dict().values()) and repr(ours) == repr(theirs)
    shape = (B,) if batched else ()
    x, hx = torch.randn(*shape, I, device=device), torch.randn(*shape, H, device=device) if with_hx else None
    results = []
    for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (copy.deepcopy(theirs), torch.float64)):
        module.to(dtype).zero_grad()
        leaves = [v.to(dtype).detach().requires_grad_() for v in (x, hx) if v is not None]
        output = module(*leaves)
        output.square().sum().backward()
        results.append([output, *(v.grad for v in leaves), *(p.grad for p in module.parameters())])
    for i, values in enumerate(zip(*results, strict=True)):
        assert_as_good(str(i), *values)


@pytest.mark.everywhere
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_single_step(nonlinearity: str, bidirectional: bool) -> None:
    """One step is left to PyTorch's own operators, unless a backend is named; both give what nn.RNN gives."""
    ours, theirs = twins(num_layers=2, nonlinearity=nonlinearity, bidirectional=bidirectional)
    x, hx = torch.randn(1, B, I), torch.randn(4 if bidirectional else 2, B, H)

    def answers(module: nn.Module) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), hx.clone().requires_grad_()]
        output, h_n = module(*inputs)
        assert output.untyped_storage().data_ptr() != h_n.untyped_storage().data_ptr()
        return [
            output,
            h_n,
            *torch.autograd.grad(output.sin().sum() + h_n.cos().sum(), [*inputs, *module.parameters()]),
        ]

    expected, found = answers(theirs), answers(ours)
    with rnnkern.use_backend("reference"):
        named = answers(ours)
    for a, b, c in zip(expected, found, named, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
    with rnnkern.watch(ours) as flow:
        answers_of_watched = ours(x, hx)[0]
        answers_of_watched.sum().backward()
        record = flow.read()
    assert record is not None
    assert record.norm.shape == (2, 2 if bidirectional else 1, 1)
    with pytest.raises(RuntimeError, match=r"w_hh must have shape"):
        rnnkern.autograd.recurrence(torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.zeros(3, 4))
