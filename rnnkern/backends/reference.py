"""Plain PyTorch, for everything that no kernel serves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rnnkern import contract, reference
from rnnkern.backends.base import Backend


def _recurrence(*args: Any) -> Tensor:
    contract.check_recurrence(*args)
    return reference.recurrence(*args)


def _recurrence_(z: Tensor, *args: Any) -> None:
    z.copy_(_recurrence(z, *args))


def _recurrence_backward(*args: Any) -> tuple[Tensor, Tensor]:
    contract.check_recurrence_backward(*args)
    return reference.recurrence_backward(*args)


def _recurrence_backward_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    contract.check_recurrence_backward(*args)
    return reference.recurrence_backward_stats(*args)


REFERENCE = Backend(
    name="reference",
    unavailable=lambda: None,
    refuses=lambda device, dtype, hidden_size: None,
    recurrence=_recurrence,
    recurrence_=_recurrence_,
    recurrence_backward=_recurrence_backward,
    recurrence_backward_stats=_recurrence_backward_stats,
)
