"""Which implementation computes the operators: a literal table, tried from the top.

A backend answers ``refuses(device_type, dtype, hidden_size)`` with None or with a reason in words. ``auto`` takes the
first that does not refuse. A backend that the caller has named is never replaced: where it cannot serve, that raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rnnkern.backends.base import Backend
from rnnkern.backends.cpu import CPU
from rnnkern.backends.cuda import CUDA
from rnnkern.backends.reference import REFERENCE
from rnnkern.backends.triton import TRITON

__all__ = ["BACKENDS", "Backend", "available", "select", "use_backend"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CUDA, CPU, TRITON, REFERENCE)}

_log = logging.getLogger("rnnkern")
_told: set[str] = set()


def _checked(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return name


_chosen: str = os.environ.get("RNNKERN_BACKEND") or "auto"  # checked when used, so that a bad name can be reported


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every forward inside the block on the named backend, and its backward too, wherever that runs.

    ``name`` is a key of :data:`BACKENDS` or ``"auto"``. The choice holds for the whole process, as the environment
    variable ``RNNKERN_BACKEND`` does.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: at the call, where the named backend cannot serve the device, dtype or hidden size.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name)
    try:
        yield
    finally:
        _chosen = before


def is_named(other_than: str = "auto") -> bool:
    """Whether the caller has named a backend, ``other_than`` this one, instead of leaving the choice to ``auto``."""
    return _chosen not in ("auto", other_than)


def select(z: Tensor) -> Backend:
    """The backend for a recurrence over ``z`` (.., H)."""
    device, dtype, hidden_size = z.device.type, z.dtype, z.shape[-1]
    if _chosen != "auto":
        backend = BACKENDS[_checked(_chosen)]
        reason = backend.refuses(device, dtype, hidden_size)
        if reason is not None:
            raise RuntimeError(f"backend {_chosen!r} was asked for but cannot serve this call: {reason}")
        return backend
    for backend in BACKENDS.values():
        if backend.refuses(device, dtype, hidden_size) is None:
            break
    if backend is REFERENCE and not torch.compiler.is_compiling():
        tell_once(f"device {device}, {dtype}: no kernel serves this; the plain PyTorch reference runs instead")
    return backend


def require_reference(feature: str) -> None:
    """Say once that a feature runs in plain PyTorch, as no kernel computes it.

    Raises:
        RuntimeError: the caller has named a backend, which therefore cannot serve.
    """
    if _chosen not in ("auto", REFERENCE.name):
        raise RuntimeError(
            f"backend {_checked(_chosen)!r} was asked for but cannot serve this call: no kernel computes {feature}, "
            "only the plain PyTorch reference does"
        )
    if not torch.compiler.is_compiling():
        tell_once(f"{feature}: no kernel computes this; the plain PyTorch reference runs instead")


def tell_once(message: str) -> None:
    """Log at INFO what runs on the reference, once per message and process."""
    if message not in _told:
        _told.add(message)
        _log.info(message)


def available() -> dict[str, str | None]:
    """For each backend None where it runs on this machine, else the reason why not and what to do."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}
