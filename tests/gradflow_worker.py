"""What rec.all_reduce() makes of two processes' records. test_gradflow_distributed.py compares with one process.

    torchrun --standalone --nproc-per-node=2 tests/gradflow_worker.py DIRECTORY

Each rank writes what its cases return, or their traceback, to DIRECTORY/rank{r}.pt.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed_worker import Model, batches, sharded
from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import rnnkern
from rnnkern.gradflow import ModuleRecord, Record, all_reduce

LENGTHS, SIZES = (6, 4), (3, 1)  # T and B of each rank


def shares() -> list[Tensor]:
    """(T, B, 3) of each rank."""
    x = batches(1)[0]
    return [part[:T] for T, part in zip(LENGTHS, x.split(SIZES, dim=1), strict=True)]


def loss(model: torch.nn.Module, rank: int, both: bool = True) -> Tensor:
    """The mean over the rank's samples; without ``both`` only of model.rnn."""
    x = shares()[rank]
    return model(x).square().mean() if both else model.rnn(x)[1].square().mean()


def content(record: Record) -> dict[str, Any]:
    return {name: (record[name].squares, record[name].lengths, record[name].norm) for name in record.modules}


def of_model(model: torch.nn.Module, per_sample: bool) -> dict[str, Any]:
    with rnnkern.watch(model) as flow:
        loss(model, dist.get_rank()).backward()
    record = flow.read(per_sample=per_sample, order="lag")
    before = record[record.modules[0]].squares.copy()
    found = record.all_reduce()
    assert np.array_equal(record[record.modules[0]].squares, before)
    return {name.removeprefix("module."): value for name, value in content(found).items()}


def ddp() -> Any:
    return of_model(DistributedDataParallel(Model()), per_sample=False)


def ddp_per_sample() -> Any:
    return of_model(DistributedDataParallel(Model()), per_sample=True)


def fsdp() -> Any:
    return of_model(sharded(Model()), per_sample=False)


def summed() -> Any:
    model = Model()
    with rnnkern.watch(model) as flow:
        loss(model, dist.get_rank()).backward()
    return content(flow.read().all_reduce(averaged=False))


def module_missing_on_rank_0() -> Any:
    model = Model()
    with rnnkern.watch(model) as flow:
        loss(model, dist.get_rank(), both=dist.get_rank() == 1).backward()
    return content(flow.read().all_reduce())


def nothing_on_rank_1() -> Any:
    model = Model()
    with rnnkern.watch(model) as flow:
        if dist.get_rank() == 0:
            loss(model, 0).backward()
    found = all_reduce(flow.read())
    assert all_reduce(None) is None
    return content(found)


def a_group_of_one() -> Any:
    model = Model()
    groups = [dist.new_group([rank]) for rank in range(2)]
    with rnnkern.watch(model) as flow:
        loss(model, dist.get_rank()).backward()
    record = flow.read()
    try:
        record.all_reduce(groups[1 - dist.get_rank()])
    except ValueError as error:
        return content(record), content(record.all_reduce(groups[dist.get_rank()])), str(error)


def other_steps() -> Any:
    model = Model()
    with rnnkern.watch(model) as flow:
        for _ in range(1 + dist.get_rank()):
            loss(model, 0).backward()
            flow.step()
    try:
        flow.read().all_reduce()
    except ValueError as error:
        return str(error)


def other_layers() -> Any:
    layers = 1 + dist.get_rank()
    module = ModuleRecord("rnn", np.ones((3, layers, 1, 2, 1)), np.array([2]))
    try:
        Record(0, ["rnn"], [module]).all_reduce()
    except ValueError as error:
        return str(error)


def other_scales() -> Any:
    module = ModuleRecord("rnn", np.ones((3, 1, 1, 2, 1)), np.array([2]), scale=2.0 ** dist.get_rank())
    try:
        Record(0, ["rnn"], [module]).all_reduce()
    except ValueError as error:
        return str(error)


def scaled() -> Any:
    """The loss of one rank overflows in the second step: FSDP's scaler tells the other."""
    model, scaler = sharded(Model()), ShardedGradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    with rnnkern.watch(model, scaler=scaler) as flow:
        for step in range(2):
            overflows = step == 1 and dist.get_rank() == 1
            scaler.scale(loss(model, dist.get_rank()) * (torch.inf if overflows else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            record = flow.read(order="lag").all_reduce()
            found.append((record.step, record.scale, record.skipped, content(record)))
    return found


def metric() -> Any:
    from rnnkern.gradflow import GradientNorm

    norm = GradientNorm(lags=5, layers=2, directions=2)
    model = Model()
    with rnnkern.watch(model) as flow:
        for _ in range(1 + dist.get_rank()):
            loss(model, dist.get_rank()).backward()
            norm.update(flow.read()["rnn"])
    return norm.compute()


CASES = (
    ddp, ddp_per_sample, fsdp, summed, module_missing_on_rank_0, nothing_on_rank_1, a_group_of_one, other_steps,
    other_layers, other_scales, scaled, metric,
)  # fmt: skip


def attempt(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception:
        return RuntimeError(traceback.format_exc())


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    answers = {case.__name__: attempt(case) for case in CASES}
    torch.save(answers, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
