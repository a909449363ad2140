"""Triton's interpreter where the tests need more of it: bfloat16 as devices have it, and calls that cost less.

It truncates where it makes a bfloat16 of a float32, and a subnormal bfloat16 becomes another number on its way to
float32. Devices round to nearest, ties to even, and widen exactly.

At each call of a device function it puts its own functions in the place of Triton's, and looks for them among all
members of the modules and classes: a third of the time that our kernels take in it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def convert_as_devices_do() -> None:
    """Let the interpreter convert between bfloat16 and float32 as devices do."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = source.data.view(np.uint32)
            rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
            data = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded)
        elif kinds == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return interpreted(self, source, target)
        return TensorHandle(data, target.scalar)

    InterpreterBuilder.cast_impl = cast


def look_for_builtins_once() -> None:
    """Let the interpreter remember the names of what it replaces. What it does to them stays the same."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def names(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]

    def patch_builtin(place: Any, *others: Any) -> None:
        for name in names(place):
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # and not replaced already, for the caller
                interpreter._patch_attr(place, name, member, *others)

    interpreter._patch_builtin = patch_builtin
