"""A module's weights, however they are copied, replaced or computed, are those that the next call uses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4


def random_input(device: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(T, B, I, device=device)


def copies(module: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), loaded]


def test_copies(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(I, H, 2, bidirectional=True).to(device)
    x = random_input(device)
    for used in (False, True):
        for other in copies(module):
            assert type(other) is rnnkern.RNN
            assert same_bits(other(x), module(x))
        if not used:
            module(x)[0].sum().backward()
    cell = rnnkern.RNNCell(I, H).to(device)
    assert all(same_bits([other(x[0])], [cell(x[0])]) for other in copies(cell))


def test_state_of_nn_rnn(backend: Backend, device: str) -> None:
    """The attributes of a pickled nn.RNN, with its flat list of weights, make an rnnkern.RNN."""
    theirs = nn.RNN(I, H, 2).to(device)
    ours = rnnkern.RNN(I, H, 2).to(device)
    ours.load_state_dict(theirs.state_dict())
    made = rnnkern.RNN.__new__(rnnkern.RNN)
    made.__setstate__(theirs.__getstate__())
    x = random_input(device)
    assert same_bits(made(x), ours(x))
    with torch.no_grad():
        made.weight_hh_l1.zero_()
        ours.weight_hh_l1.zero_()
    assert same_bits(made(x), ours(x))


@torch.no_grad()
def same_function(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Does the module compute what a fresh one with these weights computes, bit for bit?"""
    fresh = rnnkern.RNN(I, H, 2).to(next(iter(weights.values())))
    fresh.load_state_dict(weights)
    x = random_input("cpu").to(next(fresh.parameters()))
    return same_bits(module(x), fresh(x))


def replaced(change: str, module: rnnkern.RNN) -> None:
    new = torch.randn_like(module.weight_hh_l1)
    if change == "data":
        module.weight_hh_l1.data = new
    elif change == "copy_":
        module.weight_hh_l1.data.copy_(new)
    elif change == "set_":
        with torch.no_grad():
            module.weight_hh_l1.set_(new)
    elif change == "setattr":
        module.weight_hh_l1 = nn.Parameter(new)
    elif change == "register":
        del module.weight_hh_l1
        module.register_parameter("weight_hh_l1", nn.Parameter(new))
    elif change == "buffer":
        del module.weight_hh_l1
        module.register_buffer("weight_hh_l1", new)
    elif change == "tie":
        module.weight_hh_l1 = module.weight_hh_l0
    elif change == "assign":
        module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", ["data", "copy_", "set_", "setattr", "register", "buffer", "tie", "assign"])
def test_changed_weights_are_used(backend: Backend, device: str, change: str) -> None:
    module = rnnkern.RNN(I, H, 2).to(device)
    x = random_input(device)
    before = module(x)[0]
    replaced(change, module)
    assert not torch.equal(module(x)[0], before)
    assert same_function(module, module.state_dict())
    module(x)[0].sum().backward()
    if change == "tie":
        separate = rnnkern.RNN(I, H, 2).to(device)
        separate.load_state_dict(module.state_dict())
        separate(x)[0].sum().backward()
        expected = separate.weight_hh_l0.grad + separate.weight_hh_l1.grad
        torch.testing.assert_close(module.weight_hh_l0.grad, expected)
    elif change != "buffer":
        assert module.weight_hh_l1.grad.any()
    assert same_function(copy.deepcopy(module), module.state_dict())


@pytest.mark.float64
def test_from_meta(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(I, H, 2, device="meta").to_empty(device=device)
    module.reset_parameters()
    assert same_function(module, module.state_dict())
    module.double()
    assert same_function(module, module.state_dict())


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1"])
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "prune", "parametrize"])
def test_computed_weights(backend: Backend, device: str, name: str, how: str) -> None:
    """A weight that is computed reaches the output, and its gradient reaches what it is computed from."""

    class Halved(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    module = rnnkern.RNN(I, H, 2).to(device)
    module(random_input(device))
    if how == "prune":
        prune.l1_unstructured(module, name, amount=0.5)
        source = getattr(module, f"{name}_orig")
    elif how == "parametrize":
        parametrize.register_parametrization(module, name, Halved())
        source = module.parametrizations[name].original
    else:
        getattr(parametrizations, how)(module, name)
        source = getattr(module.parametrizations[name], "original1" if how == "weight_norm" else "original")
    module.eval()  # spectral_norm keeps its vectors
    weights = {n: getattr(module, n).detach().clone() for n in module._flat_weights_names}
    assert same_function(module, weights)
    assert same_function(copy.deepcopy(module), weights)
    module(random_input(device))[0].square().sum().backward()
    assert source.grad is not None and source.grad.any()
    with torch.no_grad():
        source.mul_(-0.5)
        module(random_input(device))  # where pruning computes the weight
    assert same_function(module, {n: getattr(module, n).detach().clone() for n in module._flat_weights_names})


def test_functional_call(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(I, H, 2).to(device)
    x = random_input(device)
    weights = {name: (2 * p).detach().requires_grad_() for name, p in module.named_parameters()}
    output, h_n = torch.func.functional_call(module, weights, (x,))
    other = rnnkern.RNN(I, H, 2).to(device)
    other.load_state_dict(weights)
    assert same_bits((output, h_n), other(x))
    output.sum().backward()
    assert all(w.grad.any() for w in weights.values()) and all(p.grad is None for p in module.parameters())
