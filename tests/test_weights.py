"""A module's weights, however they are copied, replaced or computed, are those that the next call uses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import drawn, same_bits
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern
from rnnkern.backends import Backend

I, H, T, B = 5, 13, 6, 4

pytestmark = [
    pytest.mark.everywhere,
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]


def random_input(device: str | None = None) -> Tensor:
    return drawn(1, T, B, I).to(device or torch.get_default_device())


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
    x = random_input().to(next(fresh.parameters()))
    return same_bits(module(x), fresh(x))


def load_by_swapping(module: nn.Module, weights: dict[str, Tensor]) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(weights)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


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
    elif change == "swap":
        torch.utils.swap_tensors(module.weight_hh_l1, nn.Parameter(new))
    elif change == "load":
        load_by_swapping(module, {k: torch.randn_like(v) for k, v in module.state_dict().items()})
    elif change == "assign":
        module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()}, assign=True)


CHANGES = ["data", "copy_", "set_", "setattr", "register", "buffer", "tie", "assign", "swap", "load"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(backend: Backend, device: str, change: str) -> None:
    module = rnnkern.RNN(I, H, 2).to(device)
    x = random_input(device)
    before = module(x)[0].detach()
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


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_hh_l0"])
def test_weights_with_gaps(backend: Backend, device: str, name: str) -> None:
    """A weight that is transposed in memory, or every other element of it, is taken as it lies."""
    module = rnnkern.RNN(I, H, 2).to(device)
    compact = copy.deepcopy(module)
    w = getattr(module, name)
    last = w.detach().moveaxis(0, -1)
    w.data = torch.stack([last, torch.full_like(last, torch.nan)], -1)[..., 0].moveaxis(-1, 0)
    assert not w.is_contiguous()
    x = random_input(device)
    torch.testing.assert_close(module(x), compact(x))
    for m in (module, compact):
        m(x)[0].square().sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in compact.parameters()])


def test_copies_can_be_swapped_into() -> None:
    """Nothing that a copy or a pickle brings along refers to the weights, which would forbid it."""
    for module in copies(rnnkern.RNN(I, H, 2)):
        module(random_input())
        load_by_swapping(module, rnnkern.RNN(I, H, 2).state_dict())
        assert same_function(module, module.state_dict())


# Computed weights in training. What they are computed with comes from torch.nn.utils; the kernels need not be known.


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return 2 * w


def mask_of(module: nn.Module, name: str) -> Tensor:
    """A checkerboard."""
    w = getattr(module, name)
    return (torch.arange(w.numel()).view_as(w) + torch.arange(len(w))[:, None]) % 2


def remove_parametrizations(module: nn.Module, name: str) -> None:
    parametrize.remove_parametrizations(module, name)


def twice(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Halved())
    parametrize.register_parametrization(module, name, Halved())


def prune_twice(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, 0.3)
    prune.ln_structured(module, name, 0.3, n=2, dim=0)


#: how -> (apply, remove); the first five by hooks on the module, the others by parametrization
WAYS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "old weight_norm": (utils.weight_norm, utils.remove_weight_norm),
    "old spectral_norm": (utils.spectral_norm, utils.remove_spectral_norm),
    "prune.l1_unstructured": (lambda m, name: prune.l1_unstructured(m, name, 0.5), prune.remove),
    "prune.custom_from_mask": (lambda m, name: prune.custom_from_mask(m, name, mask_of(m, name)), prune.remove),
    "prune twice": (prune_twice, prune.remove),
    "weight_norm": (parametrizations.weight_norm, remove_parametrizations),
    "spectral_norm": (parametrizations.spectral_norm, remove_parametrizations),
    "orthogonal": (parametrizations.orthogonal, remove_parametrizations),
    "parametrize twice": (twice, remove_parametrizations),
}
PARAMETRIZED = list(WAYS)[5:]
ways = pytest.mark.parametrize("how", WAYS)
names = pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1"])


def computed(how: str, name: str, kind: type[nn.RNNBase] = rnnkern.RNN, seed: int = 0) -> nn.RNNBase:
    """A module that has run forward before its weight became a computed one."""
    torch.manual_seed(seed)
    module = kind(I, H, 2, dtype=torch.float64)
    module(random_input().double())
    WAYS[how][0](module, name)
    return module


def train(module: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        loss = (module(random_input().double())[0] - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def current(module: nn.Module) -> dict[str, Tensor]:
    """The weights, computed or not, as a module in eval mode would take them."""
    module.eval()
    module(random_input().double())  # hooks compute the weight here
    return {name: getattr(module, name).detach().clone() for name in nn.RNN(I, H, 2).state_dict()}


@ways
@names
def test_computed_weights_train(how: str, name: str) -> None:
    """The gradient reaches all that the weight is computed from, and each new value reaches the next output."""
    module = computed(how, name)
    sources = {n: p.detach().clone() for n, p in module.named_parameters()}
    assert name not in sources
    losses = train(module)
    assert losses[0] > losses[1] > losses[2]
    assert not [n for n, p in module.named_parameters() if torch.equal(p, sources[n])]
    weights = current(module)
    assert same_function(module, weights)
    w = weights[name]
    if how == "orthogonal":
        torch.testing.assert_close(w.T @ w, torch.eye(H, dtype=torch.float64))
    elif "prune" in how:
        assert not w[getattr(module, f"{name}_mask") == 0].any() and not w.all()
        assert prune.is_pruned(module)
    elif "weight_norm" in how:
        g = getattr(module, f"{name}_g") if "old" in how else module.parametrizations[name].original0
        torch.testing.assert_close(w.norm(dim=1, keepdim=True), g.detach())
    if "spectral_norm" not in how:  # which iterates whenever it is computed, and nn.RNN computes it more often
        theirs = computed(how, name, nn.RNN)
        assert train(theirs) == pytest.approx(losses)
        torch.testing.assert_close(list(module.parameters()), list(theirs.parameters()))


@ways
@names
def test_computed_weights_are_saved_and_loaded(how: str, name: str) -> None:
    """As state_dict, under the names that nn.RNN has; what is made by hooks also as a pickle."""
    module = computed(how, name)
    train(module)
    state = module.state_dict()
    assert list(state) == list(computed(how, name, nn.RNN).state_dict())
    other = computed(how, name, seed=1)
    other.load_state_dict(state)
    assert same_bits(current(other).values(), current(module).values())
    if how in PARAMETRIZED:
        copied = copy.deepcopy(module)
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
            pickle.dumps(module)
    else:
        copied = pickle.loads(pickle.dumps(module))
    assert same_bits(current(copied).values(), current(module).values())
    train(copied.train())
    assert not same_bits(current(copied).values(), current(module).values()), "a copy has weights of its own"
    assert same_bits(current(other).values(), current(module).values())


@ways
@names
def test_removal(how: str, name: str) -> None:
    """What was computed last is a plain parameter under its own name, and the module one like any other."""
    module = computed(how, name)
    train(module)
    weights = current(module)
    WAYS[how][1](module, name)
    assert type(module) is rnnkern.RNN and type(getattr(module, name)) is nn.Parameter
    assert sorted(module.state_dict()) == sorted(weights)
    torch.testing.assert_close(getattr(module, name).detach(), weights[name])  # the old ones compute it once more
    assert same_function(module, module.state_dict())
    # torch.nn.utils.parametrizations.weight_norm leaves a local function behind, in any module, that no pickle takes.
    for other in copies(module) if how != "weight_norm" else [copy.deepcopy(module)]:
        assert same_bits(other(random_input().double()), module(random_input().double()))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    losses = train(module.train())
    assert losses[0] > losses[2]
    assert not [n for n, p in module.named_parameters() if torch.equal(p, before[n])]


def test_assigning_to_a_computed_weight() -> None:
    """It goes through the inverse of what computes the weight."""
    module = computed("parametrize twice", "weight_hh_l0")
    value = torch.randn(H, H, dtype=torch.float64)
    module.weight_hh_l0 = value
    assert torch.equal(module.parametrizations.weight_hh_l0.original, 4 * value)
    assert same_function(module, current(module)) and torch.equal(current(module)["weight_hh_l0"], value)


def test_cached_parametrizations() -> None:
    """Within parametrize.cached() a weight is computed once, for all calls; gradients of all reach its source."""
    module = computed("orthogonal", "weight_hh_l0")
    x = random_input().double()
    with parametrize.cached():
        (module(x)[0].sum() + module(2 * x)[0].sum()).backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    (module(x)[0].sum() + module(2 * x)[0].sum()).backward()
    torch.testing.assert_close(found, [p.grad for p in module.parameters()])


@pytest.mark.parametrize("how", ["weight_norm", "orthogonal", "prune.l1_unstructured"])
def test_every_weight_is_computed(how: str) -> None:
    """All matrices of both layers and directions, and biases where they can be."""
    torch.manual_seed(0)
    module = rnnkern.RNN(I, H, 2, bidirectional=True, dtype=torch.float64)
    every = [name for name, p in module.named_parameters() if p.dim() == 2 or "prune" in how]
    for name in every:
        WAYS[how][0](module, name)
    sources = [p.detach().clone() for p in module.parameters()]
    losses = train(module)
    assert losses[0] > losses[1] > losses[2]
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), sources, strict=True))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_hh_l1"])
def test_computed_once_a_forward(name: str) -> None:
    """Some weights take long to compute, some iterate (spectral_norm) or draw random numbers (dropped weights)."""
    calls = []

    class Counted(Halved):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(w)
            return super().forward(w)

    module = rnnkern.RNN(I, H, 2)
    parametrize.register_parametrization(module, name, Counted())
    for mode in (torch.enable_grad, torch.no_grad):
        calls.clear()
        with mode():
            module(random_input())
        assert len(calls) == 1
