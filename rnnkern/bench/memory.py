"""The peak of a training step's memory.

On a CPU a child process makes model and input, runs the step once on two time steps (libraries, thread teams), hands
free memory back to the system, resets the kernel's high-water mark of its resident set, and runs the step once.
Reported is the mark less what was resident before: output, what backward needs, gradients and workspaces, whoever
allocated them. The C library is told to give freed blocks back at once, so that memory which it merely keeps for later
does not count. On a GPU it is the high-water mark of PyTorch's allocator, likewise.

    python -m rnnkern.bench.memory PEER THREADS CELL-AS-JSON
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from rnnkern.bench.cells import Cell
from rnnkern.bench.problem import Problem

STATUS, MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PATIENCE = 300.0  # seconds
#: glibc's: blocks from 64 KiB on are maps of their own, which end when they are freed
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def unavailable() -> str | None:
    """None where this system has the high-water mark, else why not."""
    return None if MARKS.exists() else "memory on a CPU is measured by Linux's /proc"


def available() -> int:
    """Bytes that this machine can still give; where the system does not say, half of all."""
    info = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return 1024 * int(found[1]) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak(peer: str, cell: Cell, threads: int, device: str = "cpu") -> int:
    """Bytes.

    Raises:
        RuntimeError: the child process failed; its last words say why.
    """
    if device == "cuda":
        return _on_gpu(peer, cell, threads)
    command = [sys.executable, "-m", "rnnkern.bench.memory", peer, str(threads), json.dumps(cell.as_dict())]
    try:
        environment = {**os.environ, **RETURN_AT_ONCE}
        child = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {PATIENCE:.0f} s") from None
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or ["killed"])[-1])
    return int(child.stdout.split()[-1])


def _in_child(peer: str, cell: Cell, threads: int) -> int:
    from rnnkern.bench.peers import PEERS

    torch.set_num_threads(threads)
    reason = PEERS[peer].unavailable("cpu")
    if reason:
        raise RuntimeError(reason)
    small = PEERS[peer].prepare(Problem(dataclasses.replace(cell, T=2, chunk=min(cell.chunk, 2)), threads))
    small.call(0)
    work = PEERS[peer].prepare(Problem(cell, threads))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    MARKS.write_text("5")  # see proc(5): resets VmHWM to what is resident now
    before = _kilobytes("VmRSS")
    work.call(0)
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{STATUS} has no {name}"
    return int(found[1])


def _on_gpu(peer: str, cell: Cell, threads: int) -> int:
    from rnnkern.bench.peers import PEERS

    work = PEERS[peer].prepare(Problem(cell, threads, "cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.call(0)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    work.close()
    return found


if __name__ == "__main__":
    print(_in_child(sys.argv[1], Cell(**json.loads(sys.argv[3])), int(sys.argv[2])))
