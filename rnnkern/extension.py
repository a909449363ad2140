"""Loads the C++ library that defines the operators and the CPU kernels, and beside it the one of the CUDA kernels."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


def _load() -> str | None:
    if not _LIBRARY.exists():
        return f"the C++ library is not built ({_LIBRARY} is missing): run `pip install --no-build-isolation .`"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ library does not load into torch {torch.__version__} (needs 2.10 or later): {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not _CUDA_LIBRARY.exists():
        return f"the CUDA library is not built ({_CUDA_LIBRARY} is missing): build rnnkern where nvcc is"
    if _problem is not None:
        return _problem
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA library does not load into torch {torch.__version__}: {error}"
    return None


_problem = _load()
_cuda_problem = _load_cuda()


def unavailable() -> str | None:
    """None where the operators are registered, else why not and what to do."""
    return _problem


def cuda_unavailable() -> str | None:
    """None where the operators have their CUDA kernels, else why not and what to do."""
    return _cuda_problem
