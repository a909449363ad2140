"""A Lightning callback that watches a LightningModule while it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from rnnkern.gradflow.distributed import all_reduce
from rnnkern.gradflow.flow import Flow, watch
from rnnkern.gradflow.record import Record


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
    the micro-batches of gradient accumulation are in one record. ``trainer.global_step`` is where it is put. The
    GradScaler of the trainer's precision plugin, where it has one, is that of the watching.

    Args:
        every: which steps are sampled, as in :func:`rnnkern.watch`.
        all_ranks: log the record of all ranks' samples, with DDP and FSDP: rank 0 logs, and all ranks meet in
            :func:`rnnkern.gradflow.all_reduce` after each step that is sampled. They agree on it without a word, by the
            trainer's own count of steps, so each rank must run the watched modules in every step.

    Raises:
        ValueError: all_ranks with an ``every`` that is callable: ranks might answer differently, and wait for ever.

    Attributes:
        flow: the Flow; None before the first fit. It is closed after the fit, and can still be read.

    Example::

        Trainer(callbacks=[rnnkern.gradflow.GradientFlow(every=50)]).fit(model, data)
    """

    def __init__(self, every: int | Callable[[int], bool] = 50, *, all_ranks: bool = False) -> None:
        super().__init__()
        if all_ranks and callable(every):
            raise ValueError("every must be an int with all_ranks=True: all ranks must sample the same steps")
        self.every, self.all_ranks = every, all_ranks
        self.flow: Flow | None = None
        self._ended = 0  # steps of the flow; with all_ranks of the trainer, which are the same on every rank
        self._global_step = 0
        self._sent: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._close()
        scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
        self.flow, self._ended, self._sent = watch(pl_module, self.every, scaler=scaler), 0, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._global_step = trainer.global_step  # a fit may go on where another has ended

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.flow is None:
            return
        if self.all_ranks and trainer.world_size > 1:
            self._log_all_ranks(self.flow, trainer)
        elif trainer.is_global_zero and self.flow.steps != self._ended:
            self._ended = self.flow.steps
            if trainer.loggers:
                self.flow.log(_All(trainer.loggers), trainer.global_step)

    def _log_all_ranks(self, flow: Flow, trainer: Any) -> None:
        """Whether to meet depends on nothing that one rank alone knows."""
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        step, self._ended = self._ended, self._ended + 1
        assert isinstance(self.every, int)
        if step % self.every == 0:
            record = all_reduce(self._unsent(flow))
            if record is not None and trainer.is_global_zero:
                _All(trainer.loggers).log_metrics(record.scalars(), trainer.global_step)

    def _unsent(self, flow: Flow) -> Record | None:
        record = flow.read()
        if record is None or record.step == self._sent:
            return None
        self._sent = record.step
        return record

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
