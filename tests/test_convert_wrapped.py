"""rnnkern.convert on models that others have changed: parametrize, weight_norm, prune, compilers, torch.distributed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_but_for_rounding, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rnnkern

I, H, T, B = 5, 13, 6, 4

pytestmark = pytest.mark.everywhere


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below = nn.RNN(I, H, 2)
        self.above = nn.RNN(H, I, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x)[0])[0]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return 2 * w


PARAMETRIZATIONS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of a user": lambda module, name: parametrize.register_parametrization(module, name, Halved()),
}


@pytest.mark.parametrize("how", PARAMETRIZATIONS)
def test_parametrized(how: str) -> None:
    rnn = nn.RNN(I, H, 2).eval()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        PARAMETRIZATIONS[how](rnn, name)
    x = torch.randn(T, B, I)
    expected = rnn(x)[0]
    twin = nn.RNN(I, H, 2).eval()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        PARAMETRIZATIONS[how](twin, name)
    twin.load_state_dict(rnn.state_dict())
    twin = copy.deepcopy(twin)
    copied = copy.deepcopy(twin)  # torch gives a copy the very class of its original
    parameters = dict(rnn.named_parameters())
    rnnkern.convert(rnn)
    rnnkern.convert(copied)
    assert isinstance(rnn, rnnkern.RNN) and isinstance(copied, rnnkern.RNN) and isinstance(twin, nn.RNN)
    assert all(p is parameters[name] for name, p in rnn.named_parameters())
    for module in (rnn, copied, twin, copy.deepcopy(rnn)):
        torch.testing.assert_close(module(x)[0], expected)
    rnn(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in rnn.parametrizations.parameters())
    for left, name in ((1, "weight_hh_l0"), (0, "weight_hh_l1")):
        parametrize.remove_parametrizations(rnn, name)
        assert (type(rnn) is rnnkern.RNN) == (left == 0)
        torch.testing.assert_close(rnn(x)[0], expected)
    torch.testing.assert_close(copied(x)[0], expected)
    parametrize.register_parametrization(rnn, "weight_hh_l0", Halved())
    torch.testing.assert_close(rnn(x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune"])
def test_weights_that_hooks_compute(how: str) -> None:
    """Before each forward, from what the optimizer has made of their sources."""
    rnn, twin = nn.RNN(I, H), nn.RNN(I, H)
    for module in (rnn, twin):
        {
            "weight_norm": weight_norm,
            "spectral_norm": spectral_norm,
            "prune": functools.partial(prune.random_unstructured, amount=0.5),
        }[how](module, "weight_hh_l0")
    source = getattr(rnn, "weight_hh_l0_g" if how == "weight_norm" else "weight_hh_l0_orig")
    x = torch.randn(T, B, I)
    rnnkern.convert(rnn)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    rnn(x)[0].square().sum().backward()
    assert source.grad.any()
    optimizer.step()
    rnn.eval()  # spectral_norm moves its vectors in training
    output = rnn(x)[0]
    built = rnnkern.RNN(I, H)
    built.load_state_dict({name: getattr(rnn, name) for name in rnn._flat_weights_names})
    assert same_bits([output], [built(x)[0]])
    twin.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(twin.eval()(x)[0], output)
    if how == "prune":
        assert (rnn.weight_hh_l0 == 0).sum() >= H * H // 2
        prune.remove(rnn, "weight_hh_l0")
    else:
        getattr(nn.utils, f"remove_{how}")(rnn, "weight_hh_l0")
    torch.testing.assert_close(rnn(x)[0], output)


@pytest.fixture
def group() -> Iterator[None]:
    """One process, alone."""
    on_gpu = torch.get_default_device().type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["FSDP", "DDP"])
def test_wrapped_class_is_refused(group: None, how: str) -> None:
    model = Model()
    if how == "FSDP":
        fully_shard(model.above, mesh=init_device_mesh(torch.get_default_device().type, (1,)))
    else:
        replicate(model.above)
    with pytest.raises(TypeError, match=f"cannot convert above: its class {how}RNN was made by torch.distributed"):
        rnnkern.convert(model)
    assert type(model.below) is nn.RNN, "something was converted before the refusal"


@pytest.mark.parametrize("how", ["DataParallel", "DistributedDataParallel", "fully_shard"])
def test_inside_a_wrapper(group: None, how: str) -> None:
    """A model that is converted after it was wrapped trains as one that never was."""
    model, device = Model(), torch.get_default_device().type
    if how == "DataParallel" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("DataParallel takes no model on the CPU where there is a GPU")
    alone = rnnkern.convert(copy.deepcopy(model))
    if how == "fully_shard":
        wrapped = fully_shard(model, mesh=init_device_mesh(device, (1,)))
    else:
        wrapped = getattr(nn.parallel, how)(model, device_ids=[0] if device == "cuda" else None)
    x = torch.randn(T, B, I)
    gradients(wrapped, x)
    rnnkern.convert(wrapped)
    assert type(model.below) is rnnkern.RNN and type(model.above) is rnnkern.RNN
    found = [g.full_tensor() if how == "fully_shard" else g for g in gradients(wrapped, x)]
    assert same_bits(found, gradients(alone, x))


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_compiled_model_compiles_anew(how: str) -> None:
    model = nn.Sequential(nn.Linear(I, I), nn.RNN(I, H))
    counter = CompileCounter()
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend=counter)
    else:
        model.compile(backend=counter)
    x = torch.randn(T, B, I)
    expected = compiled(x)[0]
    before = counter.frame_count
    rnnkern.convert(compiled)
    output = compiled(x)[0]
    assert counter.frame_count > before
    torch.testing.assert_close(output, expected)
    built = nn.Sequential(nn.Linear(I, I), rnnkern.RNN(I, H))
    built.load_state_dict(model.state_dict())
    assert_same_but_for_rounding([output], [built(x)[0]])


def test_compiled_rnn() -> None:
    """A model that is itself compiled, and an RNN."""
    for compiled in (torch.compile(nn.RNN(I, H), backend="eager"), nn.RNN(I, H)):
        if isinstance(compiled, nn.RNN):
            compiled.compile(backend="eager")
        x = torch.randn(T, B, I)
        expected = compiled(x)[0]
        rnnkern.convert(compiled)
        assert isinstance(getattr(compiled, "_orig_mod", compiled), rnnkern.RNN)
        torch.testing.assert_close(compiled(x)[0], expected)
        with torch.no_grad():
            compiled.weight_hh_l0.zero_()
        assert not torch.allclose(compiled(x)[0], expected)


def test_graph_module() -> None:
    """torch.fx keeps torch.nn's modules as leaves, so that they can be converted in a traced model too."""
    model = nn.Sequential(nn.Linear(I, I), nn.RNN(I, H))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(T, B, I)
    expected = traced(x)[0]
    rnnkern.convert(traced)
    assert type(traced.get_submodule("1")) is rnnkern.RNN
    torch.testing.assert_close(traced(x)[0], expected)
