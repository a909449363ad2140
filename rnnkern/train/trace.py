"""What is kept of the gradient flow of a run that may be interrupted: the curves of all samples, the newest record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rnnkern.gradflow import ModuleRecord, Record
from rnnkern.gradflow.history import History


class Trace:
    """The records of one run under its own step numbers, of one Flow after the other.

    Attributes:
        watched: names of the modules.
        history: the curves, for the heat maps.
        newest: the record of the newest sampled step, in the order "lag"; None before the first.
    """

    def __init__(self, watched: Sequence[str]) -> None:
        self.watched = tuple(watched)
        self.history = History()
        self.newest: Record | None = None

    def add(self, step: int, modules: Sequence[ModuleRecord]) -> None:
        """What was recorded in that step of the run."""
        self.newest = Record(step, self.watched, modules)
        self.history.add(self.newest)

    def state_dict(self) -> dict[str, Any]:
        """In tensors and plain values, so that ``torch.load(weights_only=True)`` takes it."""
        newest = None
        if self.newest is not None:
            modules = [self.newest[name] for name in self.newest.modules]
            newest = {"step": self.newest.step, "modules": [_packed(module) for module in modules]}
        return {"history": self.history.state_dict(), "newest": newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])
        newest = state["newest"]
        self.newest = newest and Record(newest["step"], self.watched, [_unpacked(m) for m in newest["modules"]])


def _packed(record: ModuleRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "squares": torch.from_numpy(np.array(record.squares)),  # a copy, as the record's own is read-only
        "lengths": torch.from_numpy(np.array(record.lengths)),
        "is_gated": record.is_gated,
    }


def _unpacked(state: dict[str, Any]) -> ModuleRecord:
    arrays = {name: state[name].numpy() for name in ("squares", "lengths")}
    return ModuleRecord(state["name"], **arrays, order="lag", is_gated=state["is_gated"])


def renamed(record: Record, ending: str = "") -> list[ModuleRecord]:
    """The record's modules, the ending put to their names."""
    return [dataclasses.replace(record[name], name=name + ending) for name in record.modules]
