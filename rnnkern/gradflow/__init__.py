"""‖∂L/∂h_t‖ for every step of a training run: watch() a model, read() a Record.

``GradientFlow`` is the Lightning callback and ``GradientNorm`` the torchmetrics metric; each needs its package.
"""

from typing import Any

from rnnkern.gradflow.distributed import all_reduce
from rnnkern.gradflow.flow import Flow, watch
from rnnkern.gradflow.penalty import omega_penalty
from rnnkern.gradflow.record import ModuleRecord, Record
from rnnkern.gradflow.states import Saturation, saturation
from rnnkern.gradflow.verdict import Symptom, Verdict

__all__ = [
    "Flow",
    "ModuleRecord",
    "Record",
    "Saturation",
    "Symptom",
    "Verdict",
    "all_reduce",
    "omega_penalty",
    "saturation",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "GradientFlow":
        from rnnkern.gradflow.lightning import GradientFlow

        return GradientFlow
    if name == "GradientNorm":
        from rnnkern.gradflow.metric import GradientNorm

        return GradientNorm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
