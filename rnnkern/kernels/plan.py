"""Which Triton kernel runs a recurrence, and how it cuts it: a ladder, without trials at run time.

Measured on an H100 (2026-11, docs/triton-kernels.md). T is in no plan, and B chooses between two widths of a tile at
most: a kernel is compiled once for each, and never again for another T or B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Device(NamedTuple):
    """What the ladder asks of a device."""

    processors: int  #: streaming multiprocessors, compute units
    shared: int  #: bytes of shared memory of one
    registers: int = 65536  #: 32-bit registers of one
    #: whether all programs of a launch can be made to run at once, so that they may wait for each other
    cooperative: bool = True


@dataclass(frozen=True)
class Plan:
    """The constants of a launch, named as in the kernels."""

    regime: str  #: "resident", "grid" (one launch for all steps), or "step" (the grid kernel, one launch a step)
    hidden: int  #: hidden units of a program
    batch: int  #: samples of a tile
    warps: int
    depth: int = 0  #: grid, step: what one warp takes of a product's long side at a time
    resident: bool = False  #: grid: whether a program's slice of W_hh stays on chip
    slices: int = 1  #: programs that share a tile
    groups: int = 1  #: teams of programs; team g takes the tiles g, g + groups, ...
    registers: int | None = None  #: registers that a thread may use, so that
    together: int = 1  #: so many programs fit on a processor


#: Widths of a tile among which B chooses.
BATCH_CHOICES = 2
#: Of a processor's shared memory, what W_hh and the states beside it may fill where one program has it all.
FILL = 0.85
#: As many programs as a launch may have along its second axis; each takes several tiles where there are more.
MOST_GROUPS = 65535
#: Without tensor cores a product's factors are registers of every thread: what of the long side still fits.
SCALAR_DEPTH = 32


@lru_cache(maxsize=1024)
def plan(
    size: int, tensor_cores: bool, H: int, B: int, device: Device, regime: str | None = None, packed: bool = False
) -> Plan:
    """The plan for H hidden units and B samples, of a packed sequence or not.

    ``size`` is that of an element in bytes; ``tensor_cores`` whether they make the product (float32 to its full
    precision is made without). ``regime`` overrules the ladder, for tests and measurements.

    Raises:
        ValueError: ``regime`` cannot serve this H on this device.
    """
    if regime in (None, "resident"):
        found = _resident(size, tensor_cores, H, B, device)
        if found or regime:
            return found or _refuse("resident", f"W_hh of H = {H} does not fit on one processor")
    if regime in (None, "grid") and device.cooperative:
        found = _grid(size, tensor_cores, H, B, device, packed)
        if found or regime:
            return found or _refuse("grid", f"H = {H} has more slices than the device has processors")
    if regime == "grid":
        _refuse("grid", "programs cannot wait for each other here")
    depth = _depth(size, tensor_cores)
    while _shared(size, 32, 16, 4, depth, False, packed) > device.shared and depth > 16:
        depth //= 2
    return Plan("step", 32, 16, 4, depth, False, _tiles(H, 32), min(_tiles(B, 16), MOST_GROUPS))


def _resident(size: int, tensor_cores: bool, H: int, B: int, device: Device) -> Plan | None:
    hidden, batch = max(16, _power_of_two(H)), 8
    if size * hidden * (hidden + 2 * batch) > FILL * device.shared or not (tensor_cores or hidden <= 64):
        return None
    return Plan("resident", hidden, batch, 8 if hidden >= 256 else 4, groups=_tiles(B, batch))


def _grid(size: int, tensor_cores: bool, H: int, B: int, device: Device, packed: bool) -> Plan | None:
    hidden = next((n for n in (16, 32, 64) if _tiles(H, n) <= device.processors), None)
    if hidden is None:
        return None
    found = {batch: _cut(size, tensor_cores, H, B, hidden, batch, device, packed) for batch in (8, 16)}
    narrow, wide = found[8], found[16]
    if narrow is None or wide is None:
        return narrow
    # The narrow tile is the quicker one while all tiles are under way at once; then it counts how many samples are.
    if _tiles(B, 8) * narrow.slices <= device.processors or _at_once(narrow, device) > _at_once(wide, device):
        return narrow
    return wide


def _cut(
    size: int, tensor_cores: bool, H: int, B: int, hidden: int, batch: int, device: Device, packed: bool
) -> Plan | None:
    """The grid kernel for tiles of so many hidden units and samples."""
    warps, slices = 4, _tiles(H, hidden)
    whole = max(16 * warps, _power_of_two(H))  # the long side, padded
    resident = size * whole * (hidden + batch) <= FILL * device.shared
    resident = resident and (tensor_cores or whole <= SCALAR_DEPTH * warps)
    depth = whole // warps if resident else _depth(size, tensor_cores)
    while (need := _shared(size, hidden, batch, warps, depth, resident, packed)) > device.shared and depth > 16:
        depth //= 2
    if need > device.shared:
        return None
    together = min(4, device.shared // need)
    registers = min(255, device.registers // (32 * warps * together) // 8 * 8)
    groups = min(_tiles(B, batch), device.processors * together // slices)
    return Plan("grid", hidden, batch, warps, depth, resident, slices, groups, registers, together)


def _shared(size: int, hidden: int, batch: int, warps: int, depth: int, resident: bool, packed: bool) -> int:
    """Bytes of a program: W_hh and the states beside it, turns ahead where they stream; and what the driver takes."""
    at_once = 1 if resident else 3
    columns = at_once * (hidden + batch)
    if packed and not resident:  # two streams of states, of which one begins: what Triton 3.7 lays out for them
        columns = max(columns, 2 * hidden + 5 * batch)
    return size * warps * depth * columns + 1024


def _at_once(p: Plan, device: Device) -> int:
    """Samples that can be under way at once."""
    return device.processors * p.together // p.slices * p.batch


def _depth(size: int, tensor_cores: bool) -> int:
    return 128 // size if tensor_cores else SCALAR_DEPTH


def _refuse(regime: str, reason: str) -> Plan:
    raise ValueError(f"the regime {regime!r} was asked for: {reason}")


def _tiles(n: int, width: int) -> int:
    return -(-n // width)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
