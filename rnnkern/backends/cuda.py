"""The CUDA kernels of csrc/cuda, reached through the operators that the extension registers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rnnkern import extension
from rnnkern.backends import devices
from rnnkern.backends.base import Backend

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_tf32_allowed = False  # what the kernels have been told


def unavailable() -> str | None:
    reason = extension.unavailable() or extension.cuda_unavailable()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    return reason or devices.too_old() or _driver_too_old()


@cache
def _driver_too_old() -> str | None:
    """The kernels bring a CUDA runtime of their own, which needs a driver of its major version or later."""
    driver, runtime = torch.ops.rnnkern.cuda_versions()
    if driver // 1000 >= runtime // 1000:
        return None
    return (
        f"it was built with CUDA {runtime // 1000}, and the NVIDIA driver serves CUDA {driver // 1000}."
        f"{driver % 1000 // 10} at most: update the driver, or build rnnkern with an older nvcc"
    )


def _refuses(device: str, dtype: torch.dtype, hidden_size: int) -> str | None:
    reason = unavailable()
    if reason is not None:
        return reason
    if device != "cuda":
        return f"it computes on NVIDIA GPUs, and the tensors are on {device}"
    if dtype not in _DTYPES:
        return f"it has no kernel for {dtype} (only for float32, float64, bfloat16, float16)"
    return None


def _allow_tf32_as_pytorch_does() -> None:
    """Tell the kernels when PyTorch's switch for RNNs in float32 has changed.

    That is ``torch.backends.cudnn.rnn.fp32_precision``, which the older ``torch.backends.cudnn.allow_tf32`` sets too.
    """
    global _tf32_allowed
    allowed = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if allowed != _tf32_allowed:
        torch.ops.rnnkern.cuda_allow_tf32(allowed)
        _tf32_allowed = allowed


def _operator(name: str) -> Any:
    if extension.unavailable() or extension.cuda_unavailable():

        def missing(*args: Any) -> Any:
            raise RuntimeError(unavailable())

        return missing
    operator = getattr(torch.ops.rnnkern, name).default

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            _allow_tf32_as_pytorch_does()
        return operator(*args)

    return call


CUDA = Backend(
    name="cuda",
    unavailable=unavailable,
    refuses=_refuses,
    recurrence=_operator("recurrence"),
    recurrence_=_operator("recurrence_"),
    recurrence_backward=_operator("recurrence_backward"),
    recurrence_backward_stats=_operator("recurrence_backward_stats"),
    unproven="kernels a few small changes older have run on an H100, these on the CPU twin; nothing on other GPUs",
)
