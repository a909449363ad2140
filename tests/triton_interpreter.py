"""Triton's interpreter truncates where it makes a bfloat16 of a float32; devices round to nearest, ties to even."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_to_nearest() -> None:
    """Let the interpreter round as devices do."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return interpreted(self, source, target)
        bits = source.data.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), target.scalar)

    for name in ("cast_impl", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast)
