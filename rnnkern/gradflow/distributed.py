"""The record of all ranks from the records of each: squares add, norms don't."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from rnnkern.gradflow.record import ModuleRecord, Record

#: step, names of the watched modules, records of those that have statistics
Sent = tuple[int, tuple[str, ...], list[ModuleRecord]]


def all_reduce(record: Record | None, group: dist.ProcessGroup | None = None, averaged: bool = True) -> Record | None:
    """The record of all ranks' samples; a collective: every rank of the group must call it, with the same options.

    DDP and FSDP2 average the gradients of the weights, so that the loss they minimise is the mean of the ranks'
    losses, and a sample's gradient of it is 1/world of that of its own rank's loss:

        G(global) = sqrt(Σ_ranks Σ_b ‖g‖²) / world

    It is exact for any number of samples and steps on each rank: the samples are gathered, those of rank 0 first.

    Args:
        record: this rank's; None where it has none for this step.
        group: the ranks whose losses are averaged; None takes all. With tensor or pipeline parallelism beside it, the
            group of the data-parallel dimension.
        averaged: divide by the size of the group. False where the loss is the sum over the ranks.

    Returns:
        The same record on every rank, in the order and per sample as the rank's own; a module that has no statistics
        on some rank has the samples of the others. None where no rank has a record.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: this rank is not in the group; records of different steps, or modules of one name with other layers
            or directions, or other loss scales (on every rank, so that none waits for another).

    What travels is CPU data, by way of the current CUDA device with a group that has NCCL alone: call
    ``torch.cuda.set_device`` first, as always with NCCL.
    """
    own: Sent | None = None
    if record is not None:  # replace() drops what the properties have cached
        own = record.step, record._watched, [dataclasses.replace(record[name]) for name in record.modules]
    ranks = _gathered(own, group)
    present = {rank: sent for rank, sent in enumerate(ranks) if sent is not None}
    if not present:
        return None
    step = _same("step", {rank: step for rank, (step, _, _) in present.items()})
    _same("loss scale", {rank: parts[0].scale for rank, (_, _, parts) in present.items() if parts})
    watched = list(dict.fromkeys(name for _, names, _ in present.values() for name in names))
    everyone = [part for _, _, parts in present.values() for part in parts]
    like = own[2][0] if own else everyone[0]
    records = []
    for name in watched:
        parts = [part for part in everyone if part.name == name]
        if parts:
            records.append(_joined(parts, like, len(ranks) if averaged else 1))
    return Record(step, watched, records)


def _same(what: str, of_ranks: dict[int, Any]) -> Any:
    """What all ranks have in common."""
    values = set(of_ranks.values())
    if len(values) > 1:
        found = ", ".join(f"{value} on rank {rank}" for rank, value in of_ranks.items())
        raise ValueError(f"records must be of one {what}, got {what} {found}; a rank that has no record passes None")
    return next(iter(values), None)


def _gathered(own: Sent | None, group: dist.ProcessGroup | None) -> list[Sent | None]:
    """What each rank of the group has sent."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group() first")
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in this group: only its ranks may call all_reduce")
    ranks: list[Sent | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, own, group)  # sizes first, then what is padded to the largest
    return ranks


def _joined(parts: Sequence[ModuleRecord], like: ModuleRecord, share: int) -> ModuleRecord:
    """The samples of all parts side by side, aligned at t = 0, each gradient divided by ``share``."""
    name, shapes = parts[0].name, {part.squares.shape[1:3] for part in parts}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)))
        raise ValueError(f"{name!r} must have the same (layers, directions) on every rank, got {found}")
    T = max(part.squares.shape[3] for part in parts)
    padded = [np.pad(part.squares, (*[(0, 0)] * 3, (0, T - part.squares.shape[3]), (0, 0))) for part in parts]
    squares, lengths = np.concatenate(padded, 4) / share**2, np.concatenate([part.lengths for part in parts])
    skipped = {part.skipped for part in parts}
    return ModuleRecord(
        name,
        squares,
        lengths,
        order=like.order,
        per_sample=like.per_sample,
        is_gated=parts[0].is_gated,
        scale=parts[0].scale,
        skipped=True if True in skipped else None if None in skipped else False,
    )
