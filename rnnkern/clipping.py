"""Thresholds for gradient clipping from what was measured, instead of from a table of usual values.

Both take a quantile of what training shows while it goes well, so that clipping touches the outliers and nothing else.
The rule is that of Pascanu, Mikolov & Bengio (2013), who set it from the norms of a number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rnnkern.gradflow.record import ModuleRecord, Record


def clip_from(records: ModuleRecord | Record | Sequence[ModuleRecord | Record], quantile: float = 0.99) -> float:
    """A value for ``rnnkern.RNN(clip=...)``, which clamps every element of ∂L/∂h_t on its way back through time.

    It is the quantile, over the measured sequences, of the largest ‖∂L/∂h_t‖ that each has at any step, layer and
    direction. No element is larger than the norm it belongs to: so at most a share of 1 - quantile of the measured
    sequences would have been touched by this clip at all. Steps where the gradient has vanished do not lower it. It is
    on the loose side: a gradient whose H elements are all alike passes untouched up to √H times the threshold.

    Args:
        records: of :func:`rnnkern.watch`, one or several; the norms in them are those before clipping. Of a model with
            several RNNs give each its own, from ``rec[name]``. Sequences whose gradient is not finite are left out, and
            those whose gradient is zero everywhere.
        quantile: in (0, 1].

    Returns:
        The threshold, in units of L / h. With a loss that is a mean over the batch these are proportional to 1/B:
        measure with the batch size that you train with. Under a GradScaler the clamp meets scaled gradients: where the
        records are of ``watch(scaler=)``, multiply by the scale.

    Raises:
        ValueError: quantile is not in (0, 1], or no sequence has a gradient that is finite and not zero.
        AttributeError: a Record of several modules.
    """
    given = [records] if isinstance(records, (ModuleRecord, Record)) else list(records)
    largest = [np.sqrt(record.squares[0].max(axis=(0, 1, 2), initial=0)) for record in given]
    return _quantile("records", np.concatenate([np.empty(0), *largest]), quantile)


def max_norm_from(norms: Iterable[float | Tensor], quantile: float = 0.99) -> float:
    """A value for the ``max_norm`` of :func:`torch.nn.utils.clip_grad_norm_`: a quantile of the norms it has returned.

    It would have scaled down at most a share of 1 - quantile of those steps.

    Args:
        norms: total norms of the parameters' gradients, one for each step of training, as
            ``clip_grad_norm_(parameters, inf)`` returns them. What is not finite or zero is left out. Tensors on a GPU
            are waited for.
        quantile: in (0, 1].

    Raises:
        ValueError: quantile is not in (0, 1], or no norm is finite and not zero.

    Example::

        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))  # max_norm = inf to begin with
        if len(norms) == 1000:
            max_norm = rnnkern.clipping.max_norm_from(norms)
    """
    return _quantile("norms", np.array([float(norm) for norm in norms]), quantile)


def _quantile(name: str, values: NDArray[np.float64], quantile: float) -> float:
    """The smallest value that at least a share ``quantile`` of them do not exceed, of those finite and not zero."""
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile!r}")
    used = np.sort(values[np.isfinite(values) & (values > 0)])
    if not len(used):
        raise ValueError(f"{name} must hold a gradient that is finite and not zero, got {len(values)} without one")
    return float(used[max(0, math.ceil(quantile * len(used)) - 1)])
