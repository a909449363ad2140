"""A run as JSON: which machine, which versions, which commit, and for each cell and peer all times, round by round."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern import extension
from rnnkern.bench.cells import Cell

FORMAT = 1
#: whose versions are kept
DISTRIBUTIONS = ("numpy", "triton", "jax", "jaxlib", "onnxruntime", "openvino", "flashrnn")

#: A run: "format", "grid", "machine", "versions", "commit", "settings", "started", "took" and "rows".
Run = dict[str, Any]
#: A row: what a cell has, and "peer", "status", "reason", "error", "seconds", "calls", "bytes", "prepared", "settings".
Row = dict[str, Any]

#: what a row's status says
STATUSES = {
    "timed": "in rounds, in turns with the others",
    "one call": "too slow for rounds: one call",
    "measured": "memory",
    "wrong": "computes something else: not timed",
    "refused": "cannot compute this",
    "failed": "raised an error",
    "skipped": "did not fit into the time or the memory that there was",
}


def machine(device: str) -> dict[str, Any]:
    """What it ran on; ``name`` serves as a folder's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": torch.ops.rnnkern.cpu_isa() if extension.unavailable() is None else "none",
        "memory_gib": round(memory / 2**30),
        "system": platform.platform(),
    }
    parts = [found["cpu"], found["isa"], f"{found['processors']}-processors"]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found.update(gpu=properties.name, cudnn=torch.backends.cudnn.version(), cuda=torch.version.cuda)
        parts = [properties.name]
    return {"name": re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-"), **found}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return re.sub(r"\((R|TM)\)", "", found[1]).strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"rnnkern": rnnkern.__version__, "torch": torch.__version__, "python": platform.python_version()}
    others = {name: _version(name) for name in DISTRIBUTIONS}
    return found | {name: version for name, version in others.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the source tree that is measured, "+" behind it where files differ from it; else "unknown"."""
    root = Path(rnnkern.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "rnnkern", "csrc"])
        )
    except OSError:
        return "unknown"
    return (head + ("+" if changed else "")) or "unknown"


def path_of(run: Run, folder: Path) -> Path:
    """``folder``/machine/grid.json."""
    return folder / str(run["machine"]["name"]) / f"{run['grid']}.json"


def write(run: Run, path: Path) -> None:
    """A row a line, so that two runs can be told apart by diff; ``path`` holds a whole run or what it held before."""
    head = {key: value for key, value in run.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in run["rows"])
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{rows}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> Run:
    """A run that :func:`write` wrote.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a run of `rnnkern bench` in format {FORMAT}")
    return run


def rows_by_cell(run: Run) -> dict[Cell, dict[str, Row]]:
    """For each cell, in the grid's order, its rows by peer."""
    found: dict[Cell, dict[str, Row]] = {}
    for row in run["rows"]:
        found.setdefault(Cell.of(row), {})[row["peer"]] = row
    return found


def has_times(row: Row) -> bool:
    return row["status"] in ("timed", "one call")


def ours(rows: dict[str, Row]) -> str | None:
    """The rnnkern peer that the others are compared with: of those that have times the one that `auto` prefers."""
    return next((name for name in rows if is_ours(name) and has_times(rows[name])), None)


def is_ours(peer: str) -> bool:
    return peer.startswith("rnnkern") and not peer.endswith(UNWATCHED)


#: behind the name of a peer that takes a step without recording, beside those that record
UNWATCHED = " (unwatched)"
