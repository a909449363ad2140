"""PyTorch's own cases for nn.RNN and nn.RNNCell, run with rnnkern's classes in their place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_nonfinite, same_bits, ulps
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import rnnkern
from rnnkern.backends import Backend

OURS = {nn.RNN: rnnkern.RNN, nn.RNNCell: rnnkern.RNNCell}
INFOS = [info for info in module_db if info.module_cls in OURS]

infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def test_there_are_cases() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(list(cases(INFOS[0], "cpu", torch.float32, True))) > 2


def cases(
    info: ModuleInfo, device: str, dtype: torch.dtype, training: bool
) -> Iterator[tuple[Any, nn.Module, nn.Module]]:
    """(case, our module, PyTorch's module with the same weights); packed sequences come with the batched ones."""
    packed = {"with_packed_sequence": True} if info.module_cls is nn.RNN else {}
    for case in info.module_inputs_func(info, device, dtype, True, training, **packed):
        modules = []
        for kind in (OURS[info.module_cls], info.module_cls):
            torch.manual_seed(0)
            module = kind(*case.constructor_input.args, **case.constructor_input.kwargs)
            modules.append(module.to(device, dtype).train(training))
        yield case, *modules


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, packed sequences among them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value if v is not None for t in tensors(v)]


def run(module: nn.Module, case: Any, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of the inputs and weights."""
    given = copy.deepcopy((case.forward_input.args, case.forward_input.kwargs))
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t, given
    )
    leaves = [t for t in tensors((*args, *kwargs.values())) if t.is_leaf and t.requires_grad]
    outputs = [t for t in tensors(module(*args, **kwargs)) if t.is_floating_point()]
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
    for case, ours, theirs in cases(info, "cpu", dtype, training):
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


@pytest.mark.float64
@infos
@modes
def test_reference_function(backend: Backend, info: ModuleInfo, training: bool) -> None:
    """PyTorch's words for what the module should compute: an unbatched input is a batch of one."""
    for case, ours, _ in cases(info, "cpu", torch.float64, training):
        if case.reference_fn is not None:
            args, kwargs = case.forward_input.args, case.forward_input.kwargs
            if not isinstance(args[0], Tensor):
                continue  # the reference of packed cases takes the padded input
            torch.testing.assert_close(ours(*args, **kwargs), case.reference_fn(ours, *args, **kwargs))


@pytest.mark.float64
@infos
@modes
def test_strided_inputs(backend: Backend, info: ModuleInfo, training: bool) -> None:
    for case, ours, _ in cases(info, "cpu", torch.float64, training):
        if all(isinstance(a, Tensor) for a in case.forward_input.args):
            expected = ours(*case.forward_input.args)
            strided = [torch.stack([a, a + 1], -1)[..., 0] for a in case.forward_input.args]
            torch.testing.assert_close(ours(*strided), expected)


@infos
def test_pickle_and_repr(backend: Backend, info: ModuleInfo) -> None:
    for case, ours, theirs in cases(info, "cpu", torch.float32, True):
        again = pickle.loads(pickle.dumps(ours))
        args = case.forward_input.args
        assert same_bits(tensors(again(*args)), tensors(ours(*args)))
        assert repr(ours) == repr(theirs)


@infos
@dtypes
def test_errors(backend: Backend, info: ModuleInfo, dtype: torch.dtype) -> None:
    kind = OURS[info.module_cls]
    for case in info.module_error_inputs_func(info, "cpu", dtype, False, True):
        made, given = case.module_error_input.constructor_input, case.module_error_input.forward_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                kind(*made.args, **made.kwargs)
        else:
            module = kind(*made.args, **made.kwargs).to(dtype)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*given.args, **given.kwargs)
