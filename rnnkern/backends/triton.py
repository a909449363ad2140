"""The Triton kernels of rnnkern/kernels, launched through operators of their own.

``rnnkern::triton_recurrence`` and its backwards have the schemas of csrc/ops.cpp; they need no C++ library. On a CPU
they run where Triton interprets its kernels (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

from rnnkern import contract
from rnnkern.backends import devices
from rnnkern.backends.base import Backend
from rnnkern.kernels.plan import Device, Plan, plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: By what names packages bring the module ``triton``: its own, Windows', and those of PyTorch's builds.
DISTRIBUTIONS = (
    "triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu",
)  # fmt: skip
#: Looks at a count before a wait is given up: seconds, where a step takes microseconds.
LIMIT = 1 << 23
#: Bytes of the statistics' partial sums that one launch of the grid kernel may leave.
PARTIAL_BYTES = 1 << 26
#: Overrules the ladder: "resident", "grid" or "step". For tests and measurements.
regime: str | None = None


def interprets() -> bool:
    """Whether Triton runs its kernels in Python here, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def installed() -> str | None:
    """The version of the installed Triton, by whichever name it came."""
    return next((found.version for name in DISTRIBUTIONS for found in distributions(name=name)), None)


def _find_lack() -> str | None:
    """What is wrong with the installed Triton, if anything."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    found = installed()
    if found is None:
        return f"there is a module named triton, but none of {', '.join(DISTRIBUTIONS)} is installed"
    major, minor = (int(number) for number in found.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"Triton {found} is too old: 3.6 or later is needed"


_LACK = _find_lack()


def unavailable() -> str | None:
    """None where the kernels can run on this machine, else why not and what to do."""
    if _LACK is not None or interprets():
        return _LACK
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels in Python, for tests)"
    return devices.too_old()


def _refuses(device: str, dtype: torch.dtype, hidden_size: int) -> str | None:
    if device != ("cpu" if interprets() else "cuda"):
        return f"it computes on {'the CPU, interpreted' if interprets() else 'a GPU'}, and the tensors are on {device}"
    if dtype not in _DTYPES:
        return f"it has no kernel for {dtype} (only for float32, bfloat16, float16)"
    return unavailable()


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: TF32 where PyTorch's switch for RNNs allows it, else to float32's precision.
    "tf32" for other types, whose products tensor cores make as they are."""
    if interprets() or (dtype == torch.float32 and torch.version.hip):  # one of AMD's processors has TF32
        return "ieee"
    if dtype != torch.float32 or torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee"


@cache
def device_of(device: torch.device) -> Device:
    """What the ladder asks of it."""
    if device.type == "cpu":
        return Device(processors=1, shared=1 << 17, cooperative=False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or (1 << 16)
    registers = getattr(properties, "regs_per_multiprocessor", 65536)
    # Triton's barrier does not wait for the stores of the program's other waves on AMD's GPUs, so that a release would
    # not cover them; and it caps no registers there, so that nobody knows how many programs run at once.
    return Device(properties.multi_processor_count, shared, registers, cooperative=torch.version.hip is None)


def plan_for(dtype: torch.dtype, H: int, B: int, device: torch.device, packed: bool = False) -> Plan:
    """How a recurrence of this size runs."""
    return plan(dtype.itemsize, precision(dtype) == "tf32" or interprets(), H, B, device_of(device), regime, packed)


def choices(dtype: torch.dtype, device: torch.device, B: int = 16) -> str:
    """What the ladder chooses for each H up to 8192, in words."""
    spans: list[tuple[str, int]] = []
    for H in (*range(16, 513, 16), *range(640, 8193, 128)):
        p = plan_for(dtype, H, B, device)
        word = f"{p.regime} {'on chip' if p.resident else 'streamed'}" if p.regime == "grid" else p.regime
        if spans and spans[-1][0] == word:
            spans[-1] = (word, H)
        else:
            spans.append((word, H))
    return ", ".join(f"{word} to H = {H}" for word, H in spans)


class Walk:
    """Time as the kernels see it: visit v looks at step start + v·walk."""

    def __init__(self, rows: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.T, self.B = rows.shape[0] if batch_sizes is None else batch_sizes.shape[0], h0.shape[0]
        self.start, self.walk = (self.T - 1, -1) if reverse else (0, 1)
        self.packed = batch_sizes is not None
        self.rows = rows
        if batch_sizes is not None:  # (2, T): rows of each step, and those before it
            table = torch.stack([batch_sizes, batch_sizes.cumsum(0) - batch_sizes])
            self.rows = (table.pin_memory() if rows.is_cuda else table).to(rows.device, non_blocking=True)


def strides(x: Tensor) -> tuple[int, int]:
    """(from step to step, from row to row) of (T, B, H) or (N, H)."""
    return (x.stride(0) if x.dim() == 3 else 0), x.stride(-2)


def side_by_side(x: Tensor) -> Tensor:
    """x, or a copy of it, with the elements of a row side by side, as the kernels want them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@cache
def _error_word(device: torch.device) -> tuple[Tensor, Any]:
    """(gave up, visit, slice, tile), which a kernel writes and the host reads without waiting for the kernel: as the
    tensor, and as the array through which reading is quick."""
    word = torch.zeros(4, dtype=torch.int32, device="cpu", pin_memory=device.type != "cpu")
    return word, word.numpy()


def raise_if_a_wait_ran_out(device: torch.device) -> None:
    """Raise what an earlier launch on the device has to tell."""
    _, word = _error_word(device)
    if word[0]:
        _, visit, part, tile = word.tolist()
        word[:] = 0
        raise RuntimeError(
            f"an earlier call of the Triton grid kernel on {device} waited in vain at visit {visit} (slice {part}, "
            f"tile {tile}): its programs did not all run at once. What it returned is NaN from there on"
        )


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise RuntimeError(f"{name} must be float32, bfloat16 or float16 for the Triton kernels, got {x.dtype}")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launches(
    p: Plan, visits: int, w: Walk, device: torch.device, at_most: int | None = None
) -> list[tuple[int, int, Tensor, dict[str, Any]]]:
    """(first, last, ready, options) of each launch that the grid kernel needs for so many visits."""
    length = 1 if p.regime == "step" else min(visits, at_most or visits)
    options: dict[str, Any] = {"num_warps": p.warps}
    if p.regime == "grid":
        options["launch_cooperative_grid"] = True
        if not torch.version.hip:
            options["maxnreg"] = p.registers
    tiles = -(-w.B // p.batch)
    ready = torch.zeros(-(-visits // length), tiles, dtype=torch.int32, device=device)
    firsts = range(0, visits, length)
    return [(first, min(first + length, visits), ready[i], options) for i, first in enumerate(firsts)]


def _forward(
    z: Tensor, h0: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, reverse: bool, nonlinearity: str, h: Tensor
) -> None:
    from rnnkern.kernels import grid, resident

    H, device = z.shape[-1], z.device
    if z.numel() == 0:
        return
    _check_dtype("z", z)
    raise_if_a_wait_ran_out(device)
    w = Walk(z, h0, batch_sizes, reverse)
    p = plan_for(z.dtype, H, w.B, device, w.packed)
    z, h0 = side_by_side(z), side_by_side(h0)
    sizes = (w.T, w.B, w.start, w.walk, *strides(z), h0.stride(0), *w_hh.stride(), *strides(h))
    constants = dict(NONLINEARITY=nonlinearity, PACKED=w.packed, PRECISION=precision(z.dtype))
    with _on(device):
        if p.regime == "resident":
            resident.forward[(p.groups,)](
                z, h0, w_hh, h, w.rows, *sizes,
                H=H, HIDDEN=p.hidden, BATCH=p.batch, **constants, num_warps=p.warps,
            )  # fmt: skip
            return
        for first, last, ready, options in _launches(p, w.T, w, device):
            grid.forward[(p.slices, p.groups)](
                z, h0, w_hh, h, w.rows, ready, _error_word(device)[0], first, last, LIMIT, *sizes,
                H=H, HIDDEN=p.hidden, BATCH=p.batch, DEPTH=p.depth, WARPS=p.warps, RESIDENT=p.resident,
                **constants, **options,
            )  # fmt: skip


def _backward(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from rnnkern.kernels import grid, resident

    contract.check_recurrence_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip)
    H, device = h.shape[-1], h.device
    w = Walk(h, h0, batch_sizes, not reverse)
    delta = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad_h0 = torch.empty_like(h0, memory_format=torch.contiguous_format)
    stats = torch.zeros((w.T, w.B, 4) if with_stats else (0,), dtype=torch.float64, device=device)
    if h.numel() == 0:
        return delta, grad_h0.zero_() if grad_hn is None else grad_h0.copy_(grad_hn), stats
    _check_dtype("h", h)
    raise_if_a_wait_ran_out(device)
    p = plan_for(h.dtype, H, w.B, device, w.packed)
    grad_h, h = side_by_side(grad_h), side_by_side(h)
    given = grad_hn is not None
    grad_hn = h0 if grad_hn is None else side_by_side(grad_hn)
    sizes = (w.T, w.B, w.start, w.walk, clip, *strides(grad_h), grad_hn.stride(0), *strides(h), *w_hh.stride())
    constants = dict(
        H=H, HIDDEN=p.hidden, BATCH=p.batch, NONLINEARITY=nonlinearity, PACKED=w.packed,
        PRECISION=precision(h.dtype), HAS_GRAD_HN=given, STATS=with_stats,
    )  # fmt: skip
    with _on(device):
        if p.regime == "resident":
            resident.backward[(p.groups,)](
                grad_h, grad_hn, h, w_hh, delta, grad_h0, stats, w.rows, *sizes, **constants, num_warps=p.warps
            )
            return delta, grad_h0, stats
        at_most = max(1, PARTIAL_BYTES // (p.slices * w.B * 32)) if with_stats else None
        for first, last, ready, options in _launches(p, w.T + 1, w, device, at_most):
            partial = stats
            if with_stats:
                partial = torch.zeros(last - first, p.slices, w.B, 4, dtype=torch.float64, device=device)
            grid.backward[(p.slices, p.groups)](
                grad_h, grad_hn, h, w_hh, delta, grad_h0, partial, w.rows, ready, _error_word(device)[0],
                first, last, LIMIT, *sizes,
                **constants, DEPTH=p.depth, WARPS=p.warps, RESIDENT=p.resident, **options,
            )  # fmt: skip
            if with_stats:
                seen = min(last, w.T) - first  # the last visit sees no step
                low = first if w.walk == 1 else w.T - first - seen
                sums = partial[:seen].sum(1)
                stats[low : low + seen] = sums if w.walk == 1 else sums.flip(0)
    return delta, grad_h0, stats


# --- the operators ---------------------------------------------------------------------------------------------------


def recurrence(
    z: Tensor, h0: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, reverse: bool, nonlinearity: str
) -> Tensor:
    contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
    h = torch.empty_like(z, memory_format=torch.contiguous_format)
    _forward(z, h0, w_hh, batch_sizes, reverse, nonlinearity, h)
    return h


def recurrence_(
    z: Tensor, h0: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, reverse: bool, nonlinearity: str
) -> None:
    contract.check_recurrence(z, h0, w_hh, batch_sizes, reverse, nonlinearity)
    contract.check_writable("z", z)
    h = side_by_side(z)
    _forward(h, h0, w_hh, batch_sizes, reverse, nonlinearity, h)
    if h is not z:
        z.copy_(h)


def recurrence_backward(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
) -> tuple[Tensor, Tensor]:
    return _backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, with_stats=False)[:2]


def recurrence_backward_stats(
    grad_h: Tensor,
    grad_hn: Tensor | None,
    h: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    delta, grad_h0, stats = _backward(
        grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, with_stats=True
    )
    return delta, grad_h0, stats.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


_library = torch.library.Library("rnnkern", "FRAGMENT")


def _operator(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """The function as rnnkern::triton_<its name>."""
    name = f"triton_{function.__name__}"
    _library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.rnnkern, name).default


TRITON = Backend(
    name="triton",
    unavailable=unavailable,
    refuses=_refuses,
    recurrence=_operator(recurrence),
    recurrence_=_operator(recurrence_, mutates=("z",)),
    recurrence_backward=_operator(recurrence_backward),
    recurrence_backward_stats=_operator(recurrence_backward_stats),
    unproven="kernels a few small changes older have run on an H100, these in the interpreter; nothing on other GPUs",
)
