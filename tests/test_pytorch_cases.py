"""PyTorch's own cases for nn.RNN and nn.RNNCell, run with rnnkern's classes in their place."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_nonfinite, same_bits, threads, ulps
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import rnnkern
from rnnkern.backends import Backend

OURS = {nn.RNN: rnnkern.RNN, nn.RNNCell: rnnkern.RNNCell}
INFOS = [info for info in module_db if info.module_cls in OURS]

infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

pytestmark = pytest.mark.everywhere


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For these sizes a second one has nothing to do but to be waited for."""
    with threads(1):
        yield


def test_there_are_cases() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(list(cases(INFOS[0], torch.float32, True))) > 2


def cases(info: ModuleInfo, dtype: torch.dtype, training: bool) -> Iterator[tuple[Any, nn.Module, nn.Module]]:
    """(case, our module, PyTorch's module with the same weights); packed sequences come with the batched ones."""
    packed = {"with_packed_sequence": True} if info.module_cls is nn.RNN else {}
    device = torch.get_default_device()
    with torch.device("cpu"):  # where the lengths of packed sequences belong
        given = list(info.module_inputs_func(info, device, dtype, True, training, **packed))
    for case in given:
        modules = []
        for kind in (OURS[info.module_cls], info.module_cls):
            torch.manual_seed(0)
            module = kind(*case.constructor_input.args, **case.constructor_input.kwargs)
            modules.append(module.to(dtype).train(training))
        yield case, *modules


def every_other(info: ModuleInfo, dtype: torch.dtype, training: bool) -> Iterator[tuple[Any, nn.Module, nn.Module]]:
    """For slow tests: half of the cases with training, half without; both with all arguments of the constructor."""
    return itertools.islice(cases(info, dtype, training), int(training), None, 2)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, packed sequences among them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value if v is not None for t in tensors(v)]


def floating(value: Any) -> list[Tensor]:
    return [t for t in tensors(value) if t.is_floating_point()]


def mapped(case: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """args and kwargs of the forward, the floating tensors in them changed."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor,
        lambda t: change(t.detach()) if t.is_floating_point() else t,
        (case.forward_input.args, case.forward_input.kwargs),
    )


def with_leaves(case: Any, dtype: torch.dtype) -> tuple[Any, Any, list[Tensor]]:
    """args and kwargs of the forward as leaves that require grad, and these leaves."""
    args, kwargs = mapped(case, lambda t: t.to(dtype, copy=True).requires_grad_())
    return args, kwargs, [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]


def run(module: nn.Module, case: Any, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of the inputs and weights."""
    args, kwargs, leaves = with_leaves(case, dtype)
    outputs = floating(module(*args, **kwargs))
    loss = sum((t.square().sum() for t in outputs), torch.zeros((), dtype=dtype))
    grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return [*outputs, *grads]


@pytest.mark.float64
@infos
@modes
@dtypes
def test_forward_and_backward(backend: Backend, info: ModuleInfo, training: bool, dtype: torch.dtype) -> None:
    """The rule, with one yardstick for all cases, as each of them has but a handful of numbers."""
    errors, by_plain = [], [0.0]
    for case, ours, theirs in cases(info, dtype, training):
        results, plains = run(ours, case, dtype), run(theirs, case, dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(results, plains)
            continue
        true = run(copy.deepcopy(theirs).double(), case, torch.float64)
        for i, (x, y, v) in enumerate(zip(results, plains, true, strict=True)):
            name = f"{case.constructor_input.kwargs}, {i}"
            assert_same_nonfinite(name, x, y)
            errors.append((ulps(x, v, dtype), name))
            by_plain.append(ulps(y, v, dtype))
    assert not [e for e in errors if e[0] > 2 * max(by_plain) + 1], max(by_plain)


@infos
@modes
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex(info: ModuleInfo, training: bool) -> None:
    """As nn.RNN, by plain PyTorch operations; relu is not for complex numbers there either."""
    for case, ours, theirs in cases(info, torch.complex128, training):
        if ours.nonlinearity == "relu":
            for module in (ours, theirs):
                with pytest.raises(NotImplementedError, match="not supported for complex"):
                    module(*case.forward_input.args, **case.forward_input.kwargs)
            continue
        results = []
        for module in (ours, theirs):
            outputs = [
                t for t in tensors(module(*case.forward_input.args, **case.forward_input.kwargs)) if t.is_complex()
            ]
            loss = sum(t.abs().square().sum() for t in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
        torch.testing.assert_close(*results)


@pytest.mark.float64
@infos
@modes
def test_reference_function(backend: Backend, info: ModuleInfo, training: bool) -> None:
    """PyTorch's words for what the module should compute: an unbatched input is a batch of one."""
    for case, ours, _ in cases(info, torch.float64, training):
        if case.reference_fn is not None:
            args, kwargs = case.forward_input.args, case.forward_input.kwargs
            if not isinstance(args[0], Tensor):
                continue  # the reference of packed cases takes the padded input
            torch.testing.assert_close(ours(*args, **kwargs), case.reference_fn(ours, *args, **kwargs))


def strided(t: Tensor) -> Tensor:
    """The same values, every other element of their memory."""
    return torch.stack([t, t + 1], -1)[..., 0]


@pytest.mark.float64
@infos
@modes
def test_non_contiguous(backend: Backend, info: ModuleInfo, training: bool) -> None:
    """Inputs, gradients of the outputs, or both lie in memory with gaps."""
    for case, ours, _ in cases(info, torch.float64, training):
        results = []
        for of_inputs, of_grads in itertools.product([lambda t: t, strided], repeat=2):
            args, kwargs = mapped(case, lambda t, change=of_inputs: change(t.clone()).requires_grad_())
            leaves = [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]
            outputs = floating(ours(*args, **kwargs))
            torch.manual_seed(5)
            grads = [of_grads(torch.randn_like(t)) for t in outputs]
            assert all(t.is_contiguous() == (of_inputs is not strided) for t in leaves if t.numel() > 1)
            assert all(t.is_contiguous() == (of_grads is not strided) for t in grads if t.numel() > 1)
            results.append([*outputs, *torch.autograd.grad(outputs, [*leaves, *ours.parameters()], grads)])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


@infos
@modes
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(info: ModuleInfo, training: bool, check: Callable[..., bool]) -> None:
    """First and second derivatives by all inputs and weights, against finite differences."""
    for case, ours, _ in every_other(info, torch.float64, training):
        args, kwargs, leaves = with_leaves(case, torch.float64)
        # They are changed in place, where the module finds them.
        call = lambda *_, m=ours, a=args, k=kwargs: tuple(floating(m(*a, **k)))  # noqa: E731
        assert check(call, (*leaves, *ours.parameters()), fast_mode=True)


@infos
@dtypes
def test_factory_arguments(info: ModuleInfo, dtype: torch.dtype) -> None:
    """device and dtype say where all weights are made, as does torch.device around the constructor."""
    kind = OURS[info.module_cls]
    for case, _, theirs in cases(info, dtype, True):
        made = case.constructor_input
        for device in (torch.get_default_device().type, "meta"):
            module = kind(*made.args, **made.kwargs, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
            with torch.device(device):
                module = kind(*made.args, **made.kwargs)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, torch.float32)}
            assert [n for n, _ in module.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@infos
@modes
def test_meta(info: ModuleInfo, training: bool) -> None:
    """Shapes without numbers, forward and backward; then numbers in to_empty's memory."""
    for case, ours, _ in every_other(info, torch.float32, training):
        args, kwargs = mapped(case, lambda t: t.to("meta").requires_grad_())
        leaves = [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]
        module = copy.deepcopy(ours).to("meta")
        outputs = floating(module(*args, **kwargs))
        expected = floating(ours(*case.forward_input.args, **case.forward_input.kwargs))
        assert [(t.shape, t.dtype, t.stride()) for t in outputs] == [(t.shape, t.dtype, t.stride()) for t in expected]
        grads = torch.autograd.grad(sum(t.sum() for t in outputs), [*leaves, *module.parameters()])
        assert all(t.is_meta for t in (*outputs, *grads))
        assert [g.shape for g in grads] == [t.shape for t in (*leaves, *module.parameters())]
        module.to_empty(device=torch.get_default_device()).load_state_dict(ours.state_dict())
        assert same_bits(floating(module(*case.forward_input.args, **case.forward_input.kwargs)), expected)


@infos
@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("has_grad", [False, True])
def test_to(info: ModuleInfo, swap: bool, has_grad: bool) -> None:
    """Another dtype and back: Parameters stay the objects that an optimizer holds, and take their gradients along."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for case, *modules in cases(info, torch.float32, True):
            for module in modules:  # PyTorch's too: this is what it does
                expected = run(module, case, torch.float32)
                if has_grad:
                    run_and_keep_grads(module, case, torch.float32)
                held = list(module.parameters())
                grads = [p.grad.double() for p in held if p.grad is not None]
                module.to(torch.float64)
                assert same_bits([p.grad for p in module.parameters() if p.grad is not None], grads)
                run_and_keep_grads(module, case, torch.float64)
                module.to(torch.float32).to(memory_format=torch.channels_last)  # which is for other dimensions
                assert all(p is q for p, q in zip(module.parameters(), held, strict=True))
                assert {p.grad.dtype for p in held} == {torch.float32}
                assert same_bits(run(module, case, torch.float32), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def run_and_keep_grads(module: nn.Module, case: Any, dtype: torch.dtype) -> None:
    args, kwargs, _ = with_leaves(case, dtype)
    sum(t.square().sum() for t in floating(module(*args, **kwargs))).backward()


@infos
def test_modes_differ(info: ModuleInfo) -> None:
    """Only where PyTorch says so does forward ask whether the module is training."""
    for case, ours, _ in cases(info, torch.float32, True):
        del ours.training
        if info.train_and_eval_differ:
            with pytest.raises(AttributeError, match="training"):
                ours(*case.forward_input.args, **case.forward_input.kwargs)
        else:
            ours(*case.forward_input.args, **case.forward_input.kwargs)


@infos
@modes
def test_pickle_and_repr(info: ModuleInfo, training: bool) -> None:
    for case, ours, theirs in cases(info, torch.float32, training):
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        args, kwargs = case.forward_input.args, case.forward_input.kwargs
        for again in (pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
            assert again.training == training
            assert same_bits(tensors(again(*args, **kwargs)), tensors(ours(*args, **kwargs)))
        assert repr(ours) == repr(theirs) and str(ours) == str(theirs)


@infos
@dtypes
def test_errors(backend: Backend, info: ModuleInfo, dtype: torch.dtype) -> None:
    kind = OURS[info.module_cls]
    for case in info.module_error_inputs_func(info, torch.get_default_device(), dtype, False, True):
        made, given = case.module_error_input.constructor_input, case.module_error_input.forward_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                kind(*made.args, **made.kwargs)
        else:
            module = kind(*made.args, **made.kwargs).to(dtype)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*given.args, **given.kwargs)
