"""‖∂L/∂h_t‖ for every step of a training run: watch() a model, read() a Record."""

from rnnkern.gradflow.flow import Flow, watch
from rnnkern.gradflow.record import ModuleRecord, Record

__all__ = ["Flow", "ModuleRecord", "Record", "watch"]
