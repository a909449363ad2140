"""``rnnkern doctor``: what runs on this machine, why something does not, and whether the numbers are right."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

import rnnkern
from rnnkern import backends, extension
from rnnkern.backends import triton

#: What is right for a float32 chain of 24 steps: plain PyTorch is at 1e-7 to 1e-6, a wrong kernel at 1e-2 or more.
TOLERANCE = 1e-5

#: Hidden sizes that are checked: on a GPU one for each regime of its kernels.
SIZES = {"cpu": (32,), "cuda": (32, 256, 1024)}


def run() -> int:
    """Print the report; 0 where the backend that a call would get works on every device here, else 1."""
    print("\n".join(_versions()))
    print("\nenvironment variables")
    for name, otherwise in (("RNNKERN_BACKEND", "auto"), ("RNNKERN_CPU_ISA", "the best that the processor has")):
        value = os.environ.get(name)
        print(f"  {name:<17}{f'not set: {otherwise}' if value is None else value}")
    print("\nbackends, and the largest relative error of gradients and recorded norms in float32")
    works = {}
    for name, reason in backends.available().items():
        works[name], message = (False, f"does not run here: {reason}") if reason else _check(name)
        print(f"  {name:<17}{message}")
        if not reason and backends.BACKENDS[name].unproven:
            print(f"  {'':<17}({backends.BACKENDS[name].unproven})")
    for line in _triton_choices():
        print(line)
    print("\nwhat a call gets")
    healthy = True
    for device in _devices():
        try:
            name = _selected(device)
        except (RuntimeError, ValueError) as error:
            healthy, message = False, str(error)
        else:
            healthy, message = healthy and works[name], name if works[name] else f"{name}, which does not work"
        print(f"  {device:<17}{message}")
    return 0 if healthy else 1


def in_one_line() -> str:
    """What computes on the CPU here.

    Raises:
        RuntimeError, ValueError: the backend or the instruction set that the environment asks for cannot be had.
    """
    name = _selected("cpu")
    threads = torch.get_num_threads()
    kernels = f"{name}, {torch.ops.rnnkern.cpu_isa()}" if name == "cpu" else name
    return (
        f"rnnkern {rnnkern.__version__} (backend {kernels}), torch {torch.__version__}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}"
    )


def _versions() -> list[str]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    rows = {
        "rnnkern": rnnkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": triton.installed() or "not installed",
        "platform": platform.platform(),
        "GPU": cuda,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "instruction set": _instruction_set(),
    }
    return [f"{name:<19}{value}" for name, value in rows.items()]


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    if extension.unavailable() is not None:
        return "unknown: the C++ library is not loaded"
    available = ", ".join(torch.ops.rnnkern.cpu_isas())
    try:
        return f"{torch.ops.rnnkern.cpu_isa()} (this processor can: {available})"
    except RuntimeError as error:
        return f"{_first_line(error)} (this processor can: {available})"


def _triton_choices() -> list[str]:
    """What the Triton backend's ladder chooses on the GPU that is here."""
    if not torch.cuda.is_available() or backends.BACKENDS["triton"].unavailable() is not None:
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    lines = ["", "Triton kernels for this GPU, by hidden size (docs/triton-kernels.md says where they have run)"]
    for dtype in (torch.float32, torch.bfloat16):
        precision = triton.precision(dtype) if dtype == torch.float32 else "tensor cores"
        lines.append(f"  {str(dtype)[6:]:<17}{triton.choices(dtype, device)} ({precision})")
    return lines


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _selected(device: str) -> str:
    return backends.select(torch.empty((1, 1, 32), device=device)).name


def _check(name: str) -> tuple[bool, str]:
    """Whether the backend's numbers are right, and a line that says so."""
    served = [d for d in _devices() if backends.BACKENDS[name].refuses(d, torch.float32, 32) is None]
    if not served:
        return False, "serves no device that is here"
    try:
        with _full_float32():
            error = max(_error(name, device, H) for device in served for H in SIZES[device])
    except RuntimeError as raised:
        return False, f"fails: {_first_line(raised)}"
    right = error <= TOLERANCE  # False for NaN
    return right, f"{'works' if right else 'COMPUTES WRONG NUMBERS'} on {', '.join(served)}, error {error:.1e}"


@contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, which PyTorch allows RNNs by default, and whose rounding is that of a wrong kernel."""
    switches: tuple[Any, ...] = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


def _error(name: str, device: str, H: int) -> float:
    """Largest error of the output, of every gradient and of the norms, each relative to its largest value."""
    truth = _answers("reference", "cpu", torch.float64, H)
    answers = _answers(name, device, torch.float32, H)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(answers, truth))


def _answers(name: str, device: str, dtype: torch.dtype, H: int) -> list[torch.Tensor]:
    """Output, gradients and norms by step of a small RNN with two directions, always from the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    T, B = 24, 5
    rnn = rnnkern.RNN(H, H, bidirectional=True, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.copy_(numbers(*parameter.shape) * H**-0.5)
    x = numbers(T, B, H).requires_grad_()
    with rnnkern.use_backend(name), rnnkern.watch(rnn) as flow:
        output, _ = rnn(x)
        output.backward(numbers(T, B, 2 * H))
        record = flow.read()
    assert record is not None and x.grad is not None
    gradients = [p.grad for p in rnn.parameters() if p.grad is not None]
    found = [output, x.grad, *gradients, torch.from_numpy(record.norm)]
    return [each.detach().cpu().double() for each in found]


def _first_line(error: Exception) -> str:
    """Without the C++ stack that some builds of torch append."""
    return str(error).partition("\n")[0]
