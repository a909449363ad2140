"""A Lightning callback that watches a LightningModule while it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from rnnkern.gradflow.flow import Flow, watch


def _callback() -> Any:
    """Lightning's Callback, from either of the packages that it comes in."""
    try:
        return import_module("lightning.pytorch").Callback
    except ImportError:
        pass
    try:
        return import_module("pytorch_lightning").Callback
    except ImportError as error:
        raise ImportError(
            "rnnkern.gradflow.GradientFlow needs Lightning: pip install 'rnnkern[lightning]', or pytorch_lightning"
        ) from error


Callback: Any = _callback()


class GradientFlow(Callback):
    """Watches the model while it is fitted, and logs the scalars of each sampled step to every logger of the trainer.

    Every rank watches; rank 0 logs its own record, without a collective. A step is logged once it has ended, so that
    the micro-batches of gradient accumulation are in one record. ``trainer.global_step`` is where it is put.

    Args:
        every: which steps are sampled, as in :func:`rnnkern.watch`.

    Attributes:
        flow: the Flow; None before the first fit. It is closed after the fit, and can still be read.

    Example::

        Trainer(callbacks=[rnnkern.gradflow.GradientFlow(every=50)]).fit(model, data)
    """

    def __init__(self, every: int | Callable[[int], bool] = 50) -> None:
        super().__init__()
        self.every = every
        self.flow: Flow | None = None
        self._ended = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._close()
        scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
        self.flow, self._ended = watch(pl_module, self.every, scaler=scaler), 0

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.flow is None or not trainer.is_global_zero or self.flow.steps == self._ended:
            return
        self._ended = self.flow.steps
        if trainer.loggers:
            self.flow.log(_All(trainer.loggers), trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.flow is not None:
            self.flow.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "flow": None}  # a trainer that spawns pickles its callbacks


class _All:
    """Several loggers as one."""

    def __init__(self, loggers: list[Any]) -> None:
        self._loggers = loggers

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(metrics, step=step)
