"""What a recurrent layer does to a small change of its state, without a loss: ∂h_t/∂h_s, its norms and spectra.

Everything is computed in float64 from the weights as they are, at the states that they give for an input. The module
is left as it was: its mode, gradients, buffers and watches, and the global random number generators.
"""

from rnnkern.jacobian.longrun import contraction, lyapunov_exponents
from rnnkern.jacobian.norms import frobenius_norms, singular_values, spectral_norms, spectral_radius
from rnnkern.jacobian.results import Contraction, LyapunovExponents, ProductNorms, SingularValues

__all__ = [
    "Contraction",
    "LyapunovExponents",
    "ProductNorms",
    "SingularValues",
    "contraction",
    "frobenius_norms",
    "lyapunov_exponents",
    "singular_values",
    "spectral_norms",
    "spectral_radius",
]
