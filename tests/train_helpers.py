"""Runs of ``rnnkern flow`` that are small, and how they are compared."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rnnkern.train.options import Options
from rnnkern.train.tasks import Adding, Copying, Task, TemporalOrder
from rnnkern.train.text import Text

ABC = "abcdefghij" * 200


def options(**given: Any) -> Options:
    return Options(**{"length": 10, "hidden_size": 8, "batch_size": 4, "every": 2, "seed": 3, **given})


def task_of(options: Options) -> Task:
    generated = {"adding": Adding, "copying": Copying, "temporal-order": TemporalOrder}
    return Text(ABC, "abc", options.length) if options.task == "text" else generated[options.task](options.length)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
