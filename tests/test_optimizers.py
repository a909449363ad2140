"""What works on a module's parameters from outside: optimizers, clipping, hooks, averages, vectors, other processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import drawn, same_bits, threads
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rnnkern

I, H, T, B = 5, 13, 6, 4

pytestmark = pytest.mark.everywhere


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def made(kind: type[nn.RNNBase] = rnnkern.RNN, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(I, H, 2, bidirectional=True, **{"dtype": torch.float64, **options})


def batch(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(step, T, B, I, dtype=dtype)


def loss_of(module: nn.Module, step: int = 0) -> Tensor:
    output, h_n = module(batch(step, next(module.parameters()).dtype))
    return output.square().mean() + h_n.sin().mean()


def trained(module: nn.Module, update: Callable[[], object], steps: int = 5) -> list[Tensor]:
    """The parameters after some steps, of which ``update`` does what comes after backward."""
    for step in range(steps):
        loss_of(module, step).backward()
        update()
    return list(module.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("how", ["foreach", "fused", "loop"])
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_optimizer(optimizer: type[torch.optim.Optimizer], how: str, to_none: bool) -> None:
    """Gradients are where each form of an optimizer looks for them; the training is nn.RNN's, to rounding."""
    results = []
    for kind in (rnnkern.RNN, nn.RNN):
        module = made(kind)
        options = {"foreach": how == "foreach", "fused": how == "fused"}
        opt = optimizer(module.parameters(), lr=0.01, weight_decay=0.1, **options)
        places: list[list[int]] = []

        def update(opt: Any = opt, module: nn.Module = module, places: list[list[int]] = places) -> None:
            nn.utils.clip_grad_norm_(module.parameters(), 0.05, foreach=how != "loop")
            opt.step()
            places.append([p.grad.data_ptr() for p in module.parameters()])
            opt.zero_grad(set_to_none=to_none)
            assert all(p.grad is None if to_none else not p.grad.any() for p in module.parameters())

        results.append(trained(module, update))
        assert to_none or places[0] == places[-1], "gradients are added to what is there"
        assert not any(torch.equal(p, q) for p, q in zip(results[-1], made(kind).parameters(), strict=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("foreach", [False, True])
def test_clipping(foreach: bool) -> None:
    """The norm over all parameters is nn.RNN's, and after clipping it is the bound."""
    norms = []
    for kind in (rnnkern.RNN, nn.RNN):
        module = made(kind)
        loss_of(module).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 1e-3, foreach=foreach))
        clipped = nn.utils.get_total_norm([p.grad for p in module.parameters()], foreach=foreach)
        torch.testing.assert_close(clipped, 1e-3 * norms[-1] / (norms[-1] + 1e-6))
        nn.utils.clip_grad_value_(module.parameters(), 1e-5, foreach=foreach)
        assert max(p.grad.abs().max() for p in module.parameters()) == 1e-5
    torch.testing.assert_close(*norms)


def test_step_in_backward() -> None:
    """Hooks that update a parameter as soon as its gradient is there, and free that: the training is the same."""
    plain = made()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = trained(plain, lambda: (optimizer.step(), optimizer.zero_grad()))

    hooked = made()
    calls: list[Tensor] = []

    def step(p: Tensor) -> None:
        calls.append(p)
        with torch.no_grad():
            p.add_(p.grad, alpha=-0.1)
        p.grad = None

    for p in hooked.parameters():
        p.register_post_accumulate_grad_hook(step)
    assert same_bits(trained(hooked, lambda: None), expected)
    assert len(calls) == 5 * len(expected), "each parameter's gradient comes once, whole"
    assert all(p.grad is None for p in hooked.parameters())


def test_hooks() -> None:
    """Those on parameters change the gradient; those on the module see each call and its gradients."""
    module, x = made(), batch().requires_grad_()
    module.weight_hh_l1.register_hook(lambda grad: 2 * grad)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, outputs: seen.append(f"forward {len(outputs)}"))
    module.register_full_backward_pre_hook(lambda m, grads: seen.append(f"backward pre {len(grads)}"))
    module.register_full_backward_hook(lambda m, inputs, outputs: seen.append(f"backward {inputs[0].shape == x.shape}"))
    module(x)[0].sum().backward()
    assert seen == ["pre", "forward 2", "backward pre 2", "backward True"]
    plain = made()
    plain(batch())[0].sum().backward()
    expected = {name: (1 + (name == "weight_hh_l1")) * p.grad for name, p in plain.named_parameters()}
    assert same_bits([p.grad for p in module.parameters()], expected.values())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average(use_buffers: bool) -> None:
    """An exponential moving average: a module of its own, with the averaged weights, which nn.RNN's are too."""
    outputs, averages = [], []
    for kind in (rnnkern.RNN, nn.RNN):
        module = made(kind)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        expected = [p.detach().clone() for p in module.parameters()]

        def update(
            optimizer: torch.optim.Optimizer = optimizer,
            average: AveragedModel = average,
            module: nn.Module = module,
            expected: list[Tensor] = expected,
        ) -> None:
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(module)
            if average.n_averaged == 1:
                expected[:] = [p.detach().clone() for p in module.parameters()]
            else:
                expected[:] = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, module.parameters(), strict=True)]

        trained(module, update)
        averages.append(list(average.parameters()))
        torch.testing.assert_close([p.detach() for p in averages[-1]], expected)
        outputs.append(average(batch())[0])
        assert not torch.equal(outputs[-1], module(batch())[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(averages[0], averages[1])


@pytest.mark.parametrize("offset", [0, 1])
def test_parameters_in_one_vector(offset: int) -> None:
    """vector_to_parameters makes the weights views of one vector, at any place in its memory: kernels take them there,
    they train, and change as the vector does."""
    module, other = made(dtype=torch.float32), made(dtype=torch.float32)
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert vector.numel() == sum(p.numel() for p in module.parameters())
    vector = torch.cat([vector.new_zeros(offset), -0.5 * vector])[offset:]
    nn.utils.vector_to_parameters(vector, module.parameters())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.5)
    assert module.weight_hh_l1.data_ptr() % 16 or not offset, "no longer where an allocator puts it"
    assert same_bits(module(batch(dtype=torch.float32)), other(batch(dtype=torch.float32)))
    results = []
    for m in (module, other):
        loss_of(m).backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
        results.append(m(batch(dtype=torch.float32)))
    assert same_bits(*results)
    vector.zero_()
    assert not module(batch(dtype=torch.float32))[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtype_of_the_module(dtype: torch.dtype) -> None:
    """After .to, .half and the like the module is one of that dtype, and an optimizer made before still trains it."""
    module = made(dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss_of(module).backward()
    moved = {torch.float64: module.double, torch.float16: module.half, torch.bfloat16: module.bfloat16}[dtype]()
    assert moved is module and {p.grad.dtype for p in module.parameters()} == {dtype}
    fresh = made(dtype=torch.float32).to(dtype)
    expected = fresh(batch(dtype=dtype))
    assert expected[0].dtype == dtype and same_bits(module(batch(dtype=dtype)), expected)
    optimizer.zero_grad()
    loss_of(module).backward()
    optimizer.step()
    assert not torch.equal(module(batch(dtype=dtype))[0], expected[0])


def train_in_process(module: nn.Module, done: Any) -> None:
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trained(module, lambda: (optimizer.step(), optimizer.zero_grad()), steps=2)
    done.set()


@pytest.mark.cpu_only("processes share the memory of the host")
def test_shared_memory() -> None:
    """Weights in shared memory are those of every process: one trains them, the other computes with what it learned."""
    module = made().share_memory()
    assert all(p.is_shared() for p in module.parameters())
    expected = copy.deepcopy(module)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    trained(expected, lambda: (optimizer.step(), optimizer.zero_grad()), steps=2)

    context = torch.multiprocessing.get_context("spawn")
    done = context.Event()
    process = context.Process(target=train_in_process, args=(module, done), daemon=True)
    process.start()
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0 and done.is_set()
    assert same_bits(module.parameters(), expected.parameters())
    assert same_bits(module(batch()), expected(batch()))


class Encoded(torch.utils.data.Dataset):
    """Items that an RNN computes, as where it makes features."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> Tensor:
        with torch.no_grad():
            return self.module(batch(step))[1]


@pytest.mark.cpu_only("a forked process cannot use the GPU of its parent")
def test_workers_of_a_loader() -> None:
    """Forked processes, whose parent has used the kernels with several threads."""
    module = made()
    with threads(2):
        module(torch.randn(64, 64, I, dtype=torch.float64))[0].sum().backward()
        loader = torch.utils.data.DataLoader(
            Encoded(module), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        found = list(loader)
    assert same_bits(found, [module(batch(step))[1].detach() for step in range(4)])


def test_data_parallel() -> None:
    """On a single GPU, or where there is none, it calls the module. Its replicas hold their weights as plain tensors,
    with a graph."""
    module = made()
    on_gpu = module.weight_hh_l0.is_cuda
    if on_gpu or not torch.cuda.is_available():  # it takes no module on the CPU where there is a GPU
        parallel = nn.DataParallel(module, device_ids=[0] if on_gpu else None)
        assert same_bits(parallel(batch()), module(batch()))
    replica = module._replicate_for_data_parallel()
    assert type(replica) is rnnkern.RNN
    for name, p in module.named_parameters():
        setattr(replica, name, 2 * p)
    assert not list(replica.parameters())
    output = replica(batch())
    doubled = made()
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert same_bits(output, doubled(batch()))
    output[0].square().mean().backward()
    doubled(batch())[0].square().mean().backward()
    assert same_bits([p.grad for p in module.parameters()], [2 * p.grad for p in doubled.parameters()])
