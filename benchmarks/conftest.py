"""Collects what the benchmarks measured and prints it as one table a mode, at the end of the run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rnnkern

Cell = tuple[str, str, int, int, int, dict[str, float]]
_cells: list[Cell] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the table to this file too")


@pytest.fixture
def record_cell(benchmark) -> Callable[..., None]:
    def record(mode: str, dtype: str, B: int, H: int, T: int, seconds: dict[str, float]) -> None:
        benchmark.extra_info.update(mode=mode, dtype=dtype, B=B, H=H, T=T, seconds=seconds)
        _cells.append((mode, dtype, B, H, T, seconds))

    return record


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    bound = os.environ.get("OMP_PROC_BIND", "not set")
    isa = torch.ops.rnnkern.cpu_isa()
    return (
        f"{model}, {torch.get_num_threads()} threads (OMP_PROC_BIND {bound}), kernels for {isa}\n"
        f"rnnkern {rnnkern.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def table() -> str:
    lines = [machine(), "medians, µs a step; every round of ours follows one of the peer", ""]
    for mode in dict.fromkeys(cell[0] for cell in _cells):
        lines.append(f"{mode:<8}{'dtype':>6}{'B':>5}{'H':>6}{'peer':>11}{'peer µs':>10}{'ours µs':>10}{'ratio':>8}")
        for _, dtype, B, H, T, seconds in (cell for cell in _cells if cell[0] == mode):
            for peer in (name for name in seconds if name != "rnnkern"):
                theirs, ours = (seconds[name] / T * 1e6 for name in (peer, "rnnkern"))
                lines.append(
                    f"{'':<8}{dtype:>6}{B:>5}{H:>6}{peer:>11}{theirs:>10.2f}{ours:>10.2f}{theirs / ours:>7.2f}x"
                )
        lines.append("")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _cells:
        return
    text = table()
    terminalreporter.write_line("")
    terminalreporter.write_line(text)
    path = config.getoption("--table")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
