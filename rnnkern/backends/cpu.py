"""The C++ kernels of csrc/cpu, reached through the operators that the extension registers."""

from __future__ import annotations

from typing import Any

import torch

from rnnkern import extension
from rnnkern.backends.base import Backend

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _refuses(device: str, dtype: torch.dtype, hidden_size: int) -> str | None:
    if device != "cpu":
        return f"it computes on the CPU, and the tensors are on {device}"
    if dtype not in _DTYPES:
        return f"it has no kernel for {dtype} (only for float32, float64, bfloat16, float16)"
    return extension.unavailable()


def _operator(name: str) -> Any:
    if extension.unavailable() is None:
        return getattr(torch.ops.rnnkern, name).default

    def missing(*args: Any) -> Any:
        raise RuntimeError(extension.unavailable())

    return missing


CPU = Backend(
    name="cpu",
    unavailable=extension.unavailable,
    refuses=_refuses,
    recurrence=_operator("recurrence"),
    recurrence_=_operator("recurrence_"),
    recurrence_backward=_operator("recurrence_backward"),
    recurrence_backward_stats=_operator("recurrence_backward_stats"),
)
