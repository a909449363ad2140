"""A torchmetrics metric: ‖g‖ by lag over many records and all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnkern.gradflow.record import ModuleRecord, Record

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "rnnkern.gradflow.GradientNorm needs torchmetrics: pip install 'rnnkern[torchmetrics]'"
    ) from error


class GradientNorm(Metric):
    """Root mean square of ‖∂L/∂h_t‖ by lag, over the samples of all records that it was given, on all ranks.

    Its states are the sums of squares and the numbers of samples for each lag, so that epochs, batches of any size and
    ranks are weighed by their samples; norms are never averaged. A rank gives its own records, and g is the gradient of
    its own loss: under DDP that of the averaged loss is 1/world of it.

    Args:
        lags: how many lags are kept, from 0 on; longer ones of a record are left out.
        layers: of the RNN.
        directions: of the RNN, 1 or 2.
        **options: of torchmetrics.Metric.

    Attributes:
        squares: Σ ‖g‖² (layers, directions, lags) float64, over what is finite.
        samples: (layers, directions, lags) int64, how many have the lag and are finite.
        nonfinite: (layers, directions) int64, how many (lag, sample) rows were not finite and are left out.

    Example::

        norm = rnnkern.gradflow.GradientNorm(lags=64)
        norm.update(flow.read())  # in the loop
        norm.compute()  # (layers, directions, lags); a collective where torch.distributed is initialised
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    squares: Tensor
    samples: Tensor
    nonfinite: Tensor

    def __init__(self, lags: int, layers: int = 1, directions: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.shape = (layers, directions, lags)
        if min(self.shape) < 1:
            raise ValueError(f"lags, layers and directions must be positive, got {lags}, {layers} and {directions}")
        self.add_state("squares", torch.zeros(self.shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(self.shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.zeros(layers, directions, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, record: ModuleRecord | Record) -> None:
        """Add the samples of a record, of whatever order; of a Record where one RNN is watched, else ``rec[name]``.

        Raises:
            ValueError: it has other layers or directions, or several modules.
        """
        if isinstance(record, Record):
            if len(record.modules) > 1:
                raise ValueError(f"record must be of one module, got {', '.join(record.modules)}: give rec[name]")
            record = record[record.modules[0]]
        if record.squares.shape[1:3] != self.shape[:2]:
            raise ValueError(
                f"record must have {self.shape[:2]} layers and directions, got {record.squares.shape[1:3]}"
            )
        squares = record._squares_in("lag")
        exists = np.arange(squares.shape[2])[:, None] < record.lengths
        used = exists & np.isfinite(squares)
        kept = min(self.shape[2], squares.shape[2])
        self.squares[:, :, :kept] += self._here(np.where(used, squares, 0).sum(-1)[:, :, :kept])
        self.samples[:, :, :kept] += self._here(used.sum(-1)[:, :, :kept])
        self.nonfinite += self._here((exists & ~used)[:, :, :kept].sum((2, 3)))

    def compute(self) -> Tensor:
        """(layers, directions, lags) float64; NaN for a lag that no sample has."""
        return (self.squares / self.samples).sqrt()

    def _here(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self.squares.device)
