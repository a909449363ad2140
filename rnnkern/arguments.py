"""Types of command line arguments, and whether what a command needs is installed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from importlib import import_module


def missing(needs: Mapping[str, str]) -> list[str]:
    """Of module -> distribution, the distributions that are not installed here."""
    return [distribution for module, distribution in needs.items() if not _imports(module)]


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def positive_int(text: str) -> int:
    """At least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """Above 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def seed(text: str) -> int:
    """What torch.manual_seed takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {value}")
    return value


# argparse names the type in its message where a number cannot be read.
positive_int.__name__ = seed.__name__ = "integer"
positive_float.__name__ = "number"
