"""A record as a few scalars with fixed names, and the loggers that take them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnnkern.gradflow.record import ModuleRecord

#: name of the scalar -> attribute of ModuleRecord, (layers, directions) or not there
ATTRIBUTES = {
    "log10_first": "log10_first",
    "log10_last": "log10_last",
    "slope": "slope",
    "horizon": "horizon",
    "saturation": "mean_saturation_factor",
    "gain": "mean_gain",
    "zeros": "zeros",
    "nonfinite": "nonfinite",
}


def scalars(record: ModuleRecord) -> dict[str, float]:
    """``gradflow/<module>/l<layer>[_reverse]/<name>`` for what is a finite number, over the batch."""
    record = dataclasses.replace(record, per_sample=False)
    found = {}
    for name, attribute in ATTRIBUTES.items():
        values = getattr(record, attribute, None)
        if values is None:
            continue
        for (layer, direction), value in ((index, float(values[index])) for index in _indices(values)):
            if math.isfinite(value):
                found[f"gradflow/{record.name}/l{layer}{'_reverse' if direction else ''}/{name}"] = value
    return found


def _indices(values: Any) -> list[tuple[int, int]]:
    layers, directions = values.shape
    return [(layer, direction) for layer in range(layers) for direction in range(directions)]


def sender(writer: Any) -> Callable[[dict[str, float], int], object]:
    """What writes scalars at a step to ``writer``.

    Raises:
        TypeError: it has none of the methods that are known.
    """
    if _takes(writer, "log_metrics", {}, step=0):
        return lambda found, step: writer.log_metrics(found, step=step)
    if _takes(writer, "add_scalar", "", 0.0, global_step=0):
        return lambda found, step: [writer.add_scalar(name, value, global_step=step) for name, value in found.items()]
    # Many things have a log(): only one that takes a dict and a step is a run.
    if _takes(writer, "log", {}, step=0):
        return lambda found, step: writer.log(found, step=step)
    raise TypeError(
        f"writer must be a TensorBoard SummaryWriter (add_scalar(tag, value, global_step=)), a W&B run "
        f"(log(dict, step=)) or a Lightning logger (log_metrics(dict, step=)), got {type(writer).__name__}"
    )


def _takes(writer: Any, method: str, *args: Any, **kwargs: Any) -> bool:
    function = getattr(writer, method, None)
    if isinstance(writer, type) or not callable(function):
        return False
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True
