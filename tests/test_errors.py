"""Bad input: the right type of error, in words that name the argument, what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import make_problem
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern.backends import BACKENDS, Backend

FORWARD = ["z", "h0", "w_hh", "batch_sizes", "reverse", "nonlinearity"]
BACKWARD = ["grad_h", "grad_hn", "h", "h0", "w_hh", "batch_sizes", "reverse", "nonlinearity", "clip"]

# Dense arguments are those of T, B, H = 4, 3, 5; packed ones of lengths 4, 3, 1, that is batch_sizes 3, 2, 2, 1.
BAD_FORWARD: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {"z": torch.zeros(4, 5)}, r"z must have shape \(T, B, H\), got \[4, 5\]"),
    ("dense", {"z": torch.zeros(4, 3, 1, 5)}, r"z must have shape \(T, B, H\), got \[4, 3, 1, 5\]"),
    ("dense", {"z": torch.zeros(())}, r"z must have shape \(T, B, H\), got \[\]"),
    ("dense", {"z": torch.zeros(4, 2, 5)}, r"h0 must have shape .*\[2, 5\], got \[3, 5\]"),
    ("dense", {"z": torch.zeros(4, 3, 6)}, r"w_hh must have shape \[6, 6\], got \[5, 5\]"),
    ("dense", {"z": torch.zeros(4, 3, 5).double()}, r"h0 must have the dtype of z \(.*\), got "),
    ("dense", {"h0": torch.zeros(5)}, r"h0 must have shape .*got \[5\]"),
    ("dense", {"h0": torch.zeros(1, 3, 5)}, r"h0 must have shape .*got \[1, 3, 5\]"),
    ("dense", {"h0": torch.zeros(2, 5)}, r"h0 must have shape .*\[3, 5\], got \[2, 5\]"),
    ("dense", {"h0": torch.zeros(4, 5)}, r"h0 must have shape .*\[3, 5\], got \[4, 5\]"),
    ("dense", {"h0": torch.zeros(3, 4)}, r"h0 must have shape .*\[3, 5\], got \[3, 4\]"),
    ("dense", {"h0": torch.zeros(3, 6)}, r"h0 must have shape .*\[3, 5\], got \[3, 6\]"),
    ("dense", {"h0": torch.zeros(3, 5).bfloat16()}, r"h0 must have the dtype of z \(.*\), got "),
    ("dense", {"w_hh": torch.zeros(5)}, r"w_hh must have shape \[5, 5\], got \[5\]"),
    ("dense", {"w_hh": torch.zeros(4, 5)}, r"w_hh must have shape \[5, 5\], got \[4, 5\]"),
    ("dense", {"w_hh": torch.zeros(5, 4)}, r"w_hh must have shape \[5, 5\], got \[5, 4\]"),
    ("dense", {"w_hh": torch.zeros(5, 5).double()}, r"w_hh must have the dtype of z \(.*\), got "),
    ("dense", {"batch_sizes": torch.tensor([3, 3, 3, 3])}, r"z must have shape \(N, H\).*got \[4, 3, 5\]"),
    ("dense", {"nonlinearity": "sigmoid"}, r"nonlinearity must be 'tanh' or 'relu', got 'sigmoid'"),
    ("dense", {"nonlinearity": ""}, r"nonlinearity must be 'tanh' or 'relu', got ''"),
    ("packed", {"z": torch.zeros(7, 5)}, r"batch_sizes must add up to z.size\(0\) = 7, got .*8"),
    ("packed", {"z": torch.zeros(9, 5)}, r"batch_sizes must add up to z.size\(0\) = 9, got .*8"),
    ("packed", {"z": torch.zeros(0, 5)}, r"batch_sizes must add up to z.size\(0\) = 0, got .*"),
    ("packed", {"z": torch.zeros(8, 1, 5)}, r"z must have shape \(N, H\).*got \[8, 1, 5\]"),
    ("packed", {"h0": torch.zeros(2, 5)}, r"h0 must have batch_sizes\[0\] = 3 rows, got 2"),
    ("packed", {"h0": torch.zeros(4, 5)}, r"h0 must have batch_sizes\[0\] = 3 rows, got 4"),
    ("packed", {"h0": torch.zeros(3, 4)}, r"h0 must have shape .*\[3, 5\], got \[3, 4\]"),
    ("packed", {"batch_sizes": torch.tensor([3, 1, 2, 2])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([2, 3, 2, 1])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([3, 3, 2, 0])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([3, 3, 1, -1])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([-3, -5])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([3, 2, 2])}, r"batch_sizes must add up to z.size\(0\) = 8, got .*7"),
    ("packed", {"batch_sizes": torch.tensor([3, 3, 2, 1])}, r"batch_sizes must add up to z.size\(0\) = 8, got .*9"),
    ("packed", {"batch_sizes": torch.tensor([2**62] * 4)}, r"batch_sizes must add up to z.size\(0\) = 8, got "),
    ("packed", {"batch_sizes": torch.tensor([], dtype=torch.int64)}, r"batch_sizes must add up to .* = 8, got .*0"),
    ("packed", {"batch_sizes": torch.tensor([[3, 2, 2, 1]])}, r"batch_sizes must be a 1-D int64 .* CPU, got 2-D"),
    ("packed", {"batch_sizes": torch.tensor(8)}, r"batch_sizes must be a 1-D int64 .* CPU, got 0-D"),
    ("packed", {"batch_sizes": torch.tensor([3, 2, 2, 1]).int()}, r"batch_sizes must be a 1-D int64 .* CPU, got 1-D"),
    ("packed", {"batch_sizes": torch.tensor([3, 2, 2, 1]).float()}, r"batch_sizes must be a 1-D int64 .* CPU, got 1-D"),
    ("packed", {"batch_sizes": torch.ones(8).bool()}, r"batch_sizes must be a 1-D int64 .* CPU, got 1-D"),
    (
        "packed",
        {"batch_sizes": torch.tensor([3, 2, 2, 1], device="meta")},
        r"batch_sizes must be a 1-D int64 .* CPU, g",
    ),
]

BAD_BACKWARD: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {"grad_h": torch.zeros(4, 2, 5)}, r"grad_h must have shape \[4, 3, 5\], got \[4, 2, 5\]"),
    ("dense", {"grad_h": torch.zeros(3, 3, 5)}, r"grad_h must have shape \[4, 3, 5\], got \[3, 3, 5\]"),
    ("dense", {"grad_h": torch.zeros(12, 5)}, r"grad_h must have shape \[4, 3, 5\], got \[12, 5\]"),
    ("dense", {"grad_h": torch.zeros(4, 3, 5).half()}, r"grad_h must have the dtype of h \(.*\), got "),
    ("dense", {"grad_hn": torch.zeros(1, 3, 5)}, r"grad_hn must have shape \[3, 5\], got \[1, 3, 5\]"),
    ("dense", {"grad_hn": torch.zeros(2, 5)}, r"grad_hn must have shape \[3, 5\], got \[2, 5\]"),
    ("dense", {"grad_hn": torch.zeros(3, 5).double()}, r"grad_hn must have the dtype of h \(.*\), got "),
    ("dense", {"h": torch.zeros(4, 5)}, r"h must have shape \(T, B, H\), got \[4, 5\]"),
    ("dense", {"h": torch.zeros(5, 3, 5)}, r"grad_h must have shape \[5, 3, 5\], got \[4, 3, 5\]"),
    ("dense", {"h0": torch.zeros(2, 5)}, r"h0 must have shape .*\[3, 5\], got \[2, 5\]"),
    ("dense", {"w_hh": torch.zeros(5, 4)}, r"w_hh must have shape \[5, 5\], got \[5, 4\]"),
    ("dense", {"nonlinearity": "Tanh"}, r"nonlinearity must be 'tanh' or 'relu', got 'Tanh'"),
    ("dense", {"clip": 0.0}, r"clip must be positive \(inf for none\), got 0"),
    ("dense", {"clip": -1.0}, r"clip must be positive \(inf for none\), got -1"),
    ("dense", {"clip": float("nan")}, r"clip must be positive \(inf for none\), got -?nan"),
    ("packed", {"grad_h": torch.zeros(7, 5)}, r"grad_h must have shape \[8, 5\], got \[7, 5\]"),
    ("packed", {"grad_hn": torch.zeros(1, 5)}, r"grad_hn must have shape \[3, 5\], got \[1, 5\]"),
    ("packed", {"h": torch.zeros(7, 5)}, r"batch_sizes must add up to h.size\(0\) = 7, got .*8"),
    ("packed", {"batch_sizes": torch.tensor([3, 1, 2, 2])}, r"batch_sizes must be positive and non-increasing, got "),
    ("packed", {"batch_sizes": torch.tensor([4, 2, 2])}, r"h0 must have batch_sizes\[0\] = 4 rows, got 3"),
]


def arguments(kind: str, names: list[str], device: str, changes: dict[str, Any]) -> list[Any]:
    p = make_problem(4, 3, 5, device=device) if kind == "dense" else make_problem(lengths=[4, 3, 1], H=5, device=device)
    moved = {k: v.to(device) if k in ("z", "h0", "w_hh", "grad_h", "grad_hn", "h") else v for k, v in changes.items()}
    return [moved.get(name, getattr(p, name)) for name in names]


def idents(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{k}={list(v.shape) if isinstance(v, torch.Tensor) else v}" for k, v in value.items())
    return "" if isinstance(value, str) and " " in value else None


@pytest.mark.parametrize("operator", ["recurrence", "recurrence_"])
@pytest.mark.parametrize(("kind", "changes", "message"), BAD_FORWARD, ids=idents)
def test_forward(
    backend: Backend, device: str, operator: str, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(backend, operator)(*arguments(kind, FORWARD, device, changes))


@pytest.mark.parametrize("operator", ["recurrence_backward", "recurrence_backward_stats"])
@pytest.mark.parametrize(("kind", "changes", "message"), BAD_BACKWARD, ids=idents)
def test_backward(
    backend: Backend, device: str, operator: str, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(backend, operator)(*arguments(kind, BACKWARD, device, changes))


@pytest.mark.parametrize("name", ["h0", "w_hh"])
def test_another_device_forward(backend: Backend, device: str, name: str) -> None:
    args = arguments("dense", FORWARD, device, {})
    args[FORWARD.index(name)] = args[FORWARD.index(name)].to("meta")
    for operator in (backend.recurrence, backend.recurrence_):
        with pytest.raises((RuntimeError, NotImplementedError), match=rf"{name} must be on the device of z"):
            operator(*args)


@pytest.mark.parametrize("name", ["grad_h", "grad_hn", "h0", "w_hh"])
def test_another_device_backward(backend: Backend, device: str, name: str) -> None:
    args = arguments("dense", BACKWARD, device, {})
    args[BACKWARD.index(name)] = args[BACKWARD.index(name)].to("meta")
    for operator in (backend.recurrence_backward, backend.recurrence_backward_stats):
        with pytest.raises((RuntimeError, NotImplementedError), match=rf"{name} must be on the device of h"):
            operator(*args)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtype_without_a_kernel(cpu_library: None, dtype: torch.dtype) -> None:
    """The registered operators refuse what they have no kernel for, whoever calls them."""
    z, h0, w_hh = (torch.zeros(shape, dtype=dtype) for shape in ((4, 3, 5), (3, 5), (5, 5)))
    cpu = BACKENDS["cpu"]
    for call in (
        lambda: cpu.recurrence(z, h0, w_hh, None, False, "tanh"),
        lambda: cpu.recurrence_(z, h0, w_hh, None, False, "tanh"),
        lambda: cpu.recurrence_backward(z, None, z, h0, w_hh, None, False, "tanh", 1.0),
        lambda: cpu.recurrence_backward_stats(z, None, z, h0, w_hh, None, False, "tanh", 1.0),
    ):
        with pytest.raises(RuntimeError, match=r"dtype|float"):
            call()


def test_in_place_needs_room(backend: Backend, device: str) -> None:
    """An expanded z has one memory location for several elements: the states cannot be written there."""
    p = make_problem(4, 3, 5, device=device)
    with pytest.raises(RuntimeError):
        backend.recurrence_(p.z[:1].expand(4, 3, 5), *p.forward[1:])


def test_unknown_backend() -> None:
    message = r"unknown backend 'gpu': expected 'auto' or one of .*'cpu'.*'reference'"
    with pytest.raises(ValueError, match=message), rnnkern.use_backend("gpu"):
        pass


@pytest.mark.parametrize("place", [{"device": "meta"}, {"dtype": torch.complex64}], ids=str)
def test_named_backend_that_cannot_serve(backend: Backend, place: dict[str, Any]) -> None:
    """It raises with the reason, and is never replaced; auto falls back on the reference."""
    if backend.name == "reference":
        pytest.skip("the reference serves everything")
    module, x = rnnkern.RNN(3, 5, **place), torch.zeros(4, 2, 3, **place)
    what = "meta" if "device" in place else "complex64"
    with pytest.raises(RuntimeError, match=rf"backend '{backend.name}' was asked for but cannot serve .*{what}"):
        module(x)
    with rnnkern.use_backend("auto"):
        assert module(x)[0].shape == (4, 2, 5)


def test_backend_that_is_not_there() -> None:
    """A backend that cannot run here says why, and raises with those words where it is named."""
    for name, reason in rnnkern.backends.available().items():
        if reason is not None:
            with rnnkern.use_backend(name), pytest.raises(RuntimeError, match=re.escape(reason)):
                rnnkern.RNN(3, 5)(torch.zeros(4, 2, 3))
    assert rnnkern.backends.available()["reference"] is None


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((3, 5), {"nonlinearity": "sigmoid"}, ValueError, "Unknown nonlinearity 'sigmoid'"),
        ((3, 5, 1, "elu"), {}, ValueError, "Unknown nonlinearity 'elu'"),
        ((3, 5), {"proj_size": 2}, ValueError, "proj_size argument is only supported for LSTM"),
        ((3, 5), {"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\]"),
        ((3, 5), {"dropout": -0.1}, ValueError, r"dropout should be a number in range \[0, 1\]"),
        ((3, 5), {"dropout": True}, ValueError, r"dropout should be a number in range \[0, 1\]"),
        ((3, 0), {}, ValueError, "hidden_size must be greater than zero"),
        ((0, 5), {}, ValueError, "input_size must be greater than zero"),
        ((3, 5, 0), {}, ValueError, "num_layers must be greater than zero"),
        ((3.0, 5), {}, TypeError, "input_size should be of type int"),
        ((3, 5.0), {}, TypeError, "hidden_size should be of type int"),
        ((3, 5), {"bias": 1}, TypeError, "bias should be of type bool"),
        ((3, 5), {"batch_first": 1}, TypeError, "batch_first should be of type bool"),
    ],
)
@pytest.mark.cpu_only("no module is made")
def test_constructor(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    for module in (torch.nn.RNN, rnnkern.RNN):
        with pytest.raises(error, match=message):
            module(*args, **kwargs)


X, H0 = torch.zeros(4, 2, 3), torch.zeros(1, 2, 5)
PACKED = pack_padded_sequence(X, torch.tensor([4, 2]))


@pytest.mark.parametrize(
    ("input", "hx", "error", "message"),
    [
        (torch.zeros(3), None, ValueError, "RNN: Expected input to be 2D or 3D, got 1D"),
        (torch.zeros(1, 4, 2, 3), None, ValueError, "RNN: Expected input to be 2D or 3D, got 4D"),
        (torch.zeros(4, 2, 4), None, RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"),
        (torch.zeros(4, 4), None, RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"),
        (torch.zeros(0, 2, 3), None, RuntimeError, "Expected sequence length to be larger than 0"),
        (torch.zeros(0, 3), None, RuntimeError, "Expected sequence length to be larger than 0"),
        (X.double(), None, ValueError, "RNN input dtype .* does not match weight dtype"),
        (X, torch.zeros(2, 5), RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2-D"),
        (X[:, 0], torch.zeros(1, 1, 5), RuntimeError, "For unbatched 2-D input, hx should also be 2-D but got 3-D"),
        (X, torch.zeros(2, 2, 5), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[2, 2, 5\]"),
        (X, torch.zeros(1, 3, 5), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]"),
        (X, torch.zeros(1, 2, 4), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 2, 4\]"),
        (X[:, 0], torch.zeros(1, 4), RuntimeError, r"Expected hidden size \(1, 1, 5\), got \[1, 1, 4\]"),
        (PACKED, torch.zeros(1, 3, 5), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]"),
        (PackedSequence(torch.zeros(6, 4), PACKED.batch_sizes), None, RuntimeError, r"Expected 3, got 4"),
    ],
)
def test_module_input_as_nn_rnn(
    backend: Backend, device: str, input: Any, hx: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    for module in (torch.nn.RNN, rnnkern.RNN):
        with pytest.raises(error, match=message):
            module(3, 5).to(device)(input.to(device), None if hx is None else hx.to(device))


@pytest.mark.parametrize(
    ("hx", "message"),
    [
        (H0.double(), r"hx must have the dtype of input \(torch.float32\), got torch.float64"),
        (H0.to("meta"), r"hx must be on the device of input \(.*\), got meta"),
    ],
)
def test_module_hx_elsewhere(backend: Backend, device: str, hx: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        rnnkern.RNN(3, 5).to(device)(X.to(device), hx if hx.is_meta else hx.to(device))


def test_module_weights_elsewhere(backend: Backend, device: str) -> None:
    module = rnnkern.RNN(3, 5).to(device)
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*meta)(?=.*{device})"):
        module(X.to("meta"))


@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_hh_l0", "bias_ih_l0_reverse"])
def test_module_one_weight_elsewhere(backend: Backend, device: str, name: str) -> None:
    module = rnnkern.RNN(3, 5, 2, bidirectional=True, device=device)
    p = module.get_parameter(name)
    for change, message in (
        (p.detach().to("meta"), rf"{name} must have the device of weight_ih_l0 \({device}.*\), got meta"),
        (p.detach().double(), rf"{name} must have the dtype of weight_ih_l0 \(torch\.float32\), got torch\.float64"),
    ):
        setattr(module, name, torch.nn.Parameter(change))
        with pytest.raises(RuntimeError, match=message):
            module(torch.randn(4, 2, 3, device=device))


def test_module_packed_with_wrong_sizes(backend: Backend, device: str) -> None:
    packed = PackedSequence(torch.zeros(6, 3, device=device), torch.tensor([2, 2, 1], device="cpu"))
    with pytest.raises(RuntimeError, match=r"batch_sizes must add up to z.size\(0\) = 6, got .*5"):
        rnnkern.RNN(3, 5).to(device)(packed)


@pytest.mark.parametrize(
    ("input", "hx", "error", "message"),
    [
        (torch.zeros(2, 2, 3), None, ValueError, "RNNCell: Expected input to be 1D or 2D, got 3D instead"),
        (torch.zeros(2, 3), torch.zeros(1, 2, 5), ValueError, "RNNCell: Expected hidden to be 1D or 2D, got 3D"),
        (torch.zeros(2, 4), None, RuntimeError, "input has inconsistent input_size: got 4 expected 3"),
        (torch.zeros(2, 3), torch.zeros(2, 4), RuntimeError, "hidden0 has inconsistent hidden_size: got 4, expected 5"),
        (torch.zeros(2, 3), torch.zeros(3, 5), RuntimeError, "Input batch size 2 doesn't match hidden0 batch size 3"),
    ],
)
def test_cell(
    backend: Backend, device: str, input: torch.Tensor, hx: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    for module in (torch.nn.RNNCell, rnnkern.RNNCell):
        with pytest.raises(error, match=message):
            module(3, 5).to(device)(input.to(device), None if hx is None else hx.to(device))


def test_cell_nonlinearity(backend: Backend, device: str) -> None:
    """nn.RNNCell finds out in forward, and so do we; a word changed later counts too."""
    for module in (torch.nn.RNNCell, rnnkern.RNNCell):
        with pytest.raises((ValueError, RuntimeError), match="Unknown nonlinearity"):
            module(3, 5, nonlinearity="elu").to(device)(torch.zeros(2, 3, device=device))
