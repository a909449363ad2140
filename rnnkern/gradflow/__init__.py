"""‖∂L/∂h_t‖ for every step of a training run: watch() a model, read() a Record."""

from rnnkern.gradflow.direct import OutputGradient
from rnnkern.gradflow.flow import Flow, watch
from rnnkern.gradflow.penalty import omega_penalty
from rnnkern.gradflow.record import ModuleRecord, Record
from rnnkern.gradflow.states import Saturation, saturation
from rnnkern.gradflow.verdict import Symptom, Verdict

__all__ = [
    "Flow",
    "ModuleRecord",
    "OutputGradient",
    "Record",
    "Saturation",
    "Symptom",
    "Verdict",
    "omega_penalty",
    "saturation",
    "watch",
]
