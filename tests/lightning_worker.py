"""What the Lightning callback logs in two processes under DDP. test_gradflow_distributed.py compares with one process.

    python tests/lightning_worker.py DIRECTORY

Each rank writes what its cases have logged, and how they ended, to DIRECTORY/rank{r}.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from gradflow_worker import attempt
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rnnkern
from rnnkern.gradflow import GradientFlow

SIZES, T, STEPS = (3, 2), 6, 4  # samples of each rank's batches, steps of training
OVERFLOWS = 1  # the step at which the second rank's loss does


def batches(rank: int) -> Tensor:
    """(STEPS, B, T, 3)."""
    return torch.randn(STEPS, SIZES[rank], T, 3, generator=torch.Generator().manual_seed(rank))


class Trained(pl.LightningModule):
    """Its weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = rnnkern.RNN(3, 5, 2), nn.Linear(5, 1)
        self.overflows = False

    def loss(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[1][-1]).square().mean()

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self.loss(x) * (1e38 if self.overflows and index == OVERFLOWS and dist.get_rank() == 1 else 1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(batches(dist.get_rank()), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Memory(pl.loggers.logger.Logger):
    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged += [(step, metrics)] if any(name.startswith("gradflow/") for name in metrics) else []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(callback: GradientFlow, model: Trained | None = None, logger: Any = None, **options: Any) -> Any:
    """What this rank has logged, and the number of steps that its Flow has seen."""
    memory = Memory() if logger is None else logger
    callbacks = [callback, *options.pop("callbacks", [])]
    pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=callbacks, use_distributed_sampler=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, logger=memory, **options,
    ).fit(model or Trained())  # fmt: skip
    assert "closed" in repr(callback.flow)
    return memory.logged if memory else [], callback.flow.steps


def own() -> Any:
    return fit(GradientFlow(every=2))


def all_ranks() -> Any:
    return fit(GradientFlow(every=2, all_ranks=True))


def accumulated() -> Any:
    return fit(GradientFlow(every=1, all_ranks=True), accumulate_grad_batches=2)


def without_a_logger_on_rank_1() -> Any:
    return fit(GradientFlow(every=2, all_ranks=True), logger=False if dist.get_rank() else Memory())


def overflow() -> Any:
    """On one rank, so the averaged gradients are finite on neither."""
    model, callback, seen = Trained(), GradientFlow(every=1, all_ranks=True), []
    model.overflows = True

    class Reader(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            record = callback.flow.read()
            seen.append((record.step, record.scale, record.skipped))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.forward_context = torch.enable_grad  # in float32, whose numbers are compared
    logged, _ = fit(callback, model, callbacks=[Reader()], plugins=[plugin])
    assert "step" not in vars(scaler)
    return logged, seen


CASES: tuple[Callable[[], Any], ...] = (own, all_ranks, accumulated, without_a_logger_on_rank_1, overflow)


def main(rank: int, directory: Path) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # as a launcher tells Lightning
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    store = f"file://{directory / 'store'}"  # no port that another process might take
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    answers = {case.__name__: attempt(case) for case in CASES}
    torch.save(answers, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # forked, as importing Lightning takes most of the time
    torch.multiprocessing.start_processes(main, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
