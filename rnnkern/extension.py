"""Loads the C++ library that defines the operators and the CPU kernels."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_cpu.so")


def _load() -> str | None:
    if not _LIBRARY.exists():
        return f"the C++ library is not built ({_LIBRARY} is missing): run `pip install --no-build-isolation .`"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ library does not load into torch {torch.__version__} (needs 2.10 or later): {error}"
    return None


_problem = _load()


def unavailable() -> str | None:
    """None where the operators are registered, else why not and what to do."""
    return _problem
