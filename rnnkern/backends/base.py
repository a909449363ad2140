"""What a backend is: a name, two questions it answers in words, and the operators of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of the operators. Shapes and meaning of their arguments are those of ``csrc/ops.cpp``."""

    name: str
    #: None where it can run on this machine, else why not and what to do
    unavailable: Callable[[], str | None]
    #: (device type, dtype, H) -> None where it serves them, else why not
    refuses: Callable[[str, torch.dtype, int], str | None]
    recurrence: Callable[..., Tensor]
    recurrence_: Callable[..., None]
    recurrence_backward: Callable[..., tuple[Tensor, Tensor]]
    recurrence_backward_stats: Callable[..., tuple[Tensor, Tensor, Tensor]]
    #: what of it has not yet run on hardware, for rnnkern doctor; empty where nothing
    unproven: str = ""
