"""What is made of times: medians, spread, ratios round by round, the cost of measuring, exponents."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of no values: NaN."""
    if not values:
        return Spread(*[float("nan")] * 3)
    low, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.75))
    return Spread(float(low), median(values), float(high))


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a over b, round by round; where one of them has a single call, all by that."""
    if len(a) != len(b):
        a, b = [median(a)], [median(b)]
    return [x / y for x, y in zip(a, b)]


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a minus b, likewise."""
    if len(a) != len(b):
        a, b = [median(a)], [median(b)]
    return [x - y for x, y in zip(a, b)]


class Exponent(NamedTuple):
    """Of a power law: over all points by least squares of the logarithms, and over the two largest sizes alone."""

    overall: float
    at_the_end: float


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Exponent | None:
    """None for fewer than three sizes: a line goes through any two points."""
    if len(sizes) < 3:
        return None
    order = np.argsort(sizes)
    x, y = np.log(np.asarray(sizes, np.float64)[order]), np.log(np.asarray(values, np.float64)[order])
    slope = np.polyfit(x, y, 1)[0]
    return Exponent(float(slope), float((y[-1] - y[-2]) / (x[-1] - x[-2])))
