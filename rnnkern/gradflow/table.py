"""A record as text: one line for each layer and direction, with a sparkline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rnnkern.gradflow.record import Floats, ModuleRecord, Record

WIDTH = 24  # of a curve, in characters
BARS = "▁▂▃▄▅▆▇█"
HEADER = (
    f"{'':<12}{'log10 first':>12}{'log10 last':>12}{'slope':>9}{'horizon':>9}{'zeros':>8}{'nonfinite':>10}  first→last"
)


def scaling(record: Record) -> list[str]:
    """What a GradScaler has done to the step, in words; empty without one."""
    return [
        *(["skipped by the GradScaler"] if record.skipped else []),
        *([f"loss scale {record.scale:.10g} divided out"] if record.scale != 1 else []),
    ]


def rows(record: ModuleRecord) -> list[str]:
    """The module's name with its size, and a line for each layer and direction; curves share one scale."""
    with np.errstate(divide="ignore"):
        curves = np.log10(record.rms_by_lag[:, :, ::-1])
    layers, directions, T = curves.shape
    lines = [f"{record.name}  (T={T}, {record.samples} samples)"]
    finite = curves[np.isfinite(curves)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    columns = (record.log10_first, record.log10_last, record.slope, record.horizon, record.zeros, record.nonfinite)
    for layer in range(layers):
        for direction in range(directions):
            first, last, slope, horizon, zeros, nonfinite = (column[layer, direction] for column in columns)
            label = f"l{layer}" + (" reverse" if direction else "")
            curve = sparkline(curves[layer, direction], low, high)
            lines.append(
                f"  {label:<10}{first:>12.2f}{last:>12.2f}{_number(slope, '+.3f'):>9}{_number(horizon, '.0f'):>9}"
                f"{zeros:>8}{nonfinite:>10}  {curve}"
            )
    return lines


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def sparkline(curve: Floats, low: float, high: float) -> str:
    """At most WIDTH bars for a curve of logarithms; ``·`` where all of a bar is -inf, ``!`` where any is NaN or inf."""
    bars = []
    for part in np.array_split(curve, min(WIDTH, len(curve))):
        finite = part[np.isfinite(part)]
        if np.isnan(part).any() or np.isposinf(part).any():
            bars.append("!")
        elif not finite.size:
            bars.append("·")
        else:
            share = (finite.mean() - low) / (high - low) if high > low else 1.0
            bars.append(BARS[round(share * (len(BARS) - 1))])
    return "".join(bars)
