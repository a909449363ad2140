"""Fused tanh and ReLU RNNs for PyTorch, with ‖∂L/∂h_t‖ for every step from inside the backward kernel."""

from importlib.metadata import PackageNotFoundError, version

from rnnkern import backends, clipping, functional, init, jacobian, reference
from rnnkern.backends import use_backend
from rnnkern.bptt import TruncatedBPTT
from rnnkern.convert import convert
from rnnkern.gradflow import watch
from rnnkern.modules import RNN, RNNCell

try:
    __version__ = version("rnnkern")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = [
    "RNN",
    "RNNCell",
    "TruncatedBPTT",
    "backends",
    "clipping",
    "convert",
    "functional",
    "init",
    "jacobian",
    "reference",
    "use_backend",
    "watch",
]
