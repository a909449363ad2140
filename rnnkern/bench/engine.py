"""Runs a grid: each peer prepares, is compared with the truth, and only then timed, in rounds with the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

import torch
from torch import nn

from rnnkern.bench import memory, results
from rnnkern.bench.cells import RECORDING, Cell
from rnnkern.bench.grids import GRIDS, cells_of
from rnnkern.bench.peers import PEERS
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Problem
from rnnkern.bench.results import UNWATCHED, Row, Run
from rnnkern.bench.timing import interleaved

#: how many cells are done, of how many, and what is being done now
Report = Callable[[int, int, str], None]

#: A cell that is expected to take this many times its rounds' seconds, with everything, is skipped.
TOLERATED = 30
#: microseconds of a step in plain PyTorch beside its products, without and with gradients: a guess for a slow machine
STEP_COST = {True: 30e-6, False: 150e-6}


@dataclass(frozen=True)
class Options:
    """What to run. None stands for what the grid says.

    ``subnormals``: "flush" makes PyTorch flush them to zero, nn.RNN's best setting; "keep" is PyTorch's default.
    """

    grid: str = "quick"
    peers: Sequence[str] | None = None
    modes: tuple[str, ...] = ()
    threads: int = 0
    device: str = "cpu"
    total_seconds: float | None = None
    cell_seconds: float | None = None
    subnormals: str = "flush"


def run(options: Options, report: Report = lambda done, of, what: None) -> Run:
    """Run a grid and return the run: every cell and peer has a row, also where nothing was timed."""
    with _threads(options.threads or torch.get_num_threads()), _subnormals(options.subnormals):
        return _Session(options, report).run()


class _Session:
    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report, self.grid = options, report, GRIDS[options.grid]
        self.threads = torch.get_num_threads()
        self.began = time.perf_counter()
        self.total = options.total_seconds or self.grid.total_seconds
        self.cell_seconds = options.cell_seconds or self.grid.cell_seconds
        names = options.peers or [name for name in PEERS if name not in self.grid.without]
        reasons = {name: PEERS[name].unavailable(options.device) for name in names}
        self.missing = {name: reason for name, reason in reasons.items() if reason}
        self.peers = [PEERS[name] for name in PEERS if name in names and name not in self.missing]
        self.cells = cells_of(options.grid, options.device, options.modes)
        self.rate = _gemm_rate(options.device)
        self.fastest: dict[tuple[str, str, bool], float] = {}  # FLOP a second of a peer, by dtype and whether it infers
        self.subnormals = "kept" if _keeps_subnormals() else "flushed to zero"

    def run(self) -> Run:
        load, started = _load(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows: list[Row] = []
        for number, cell in enumerate(self.cells):
            self._tell(number, cell, "begins")
            rows += self._cell(cell, partial(self._tell, number, cell))
        self.report(len(self.cells), len(self.cells), "done")
        return {
            "format": results.FORMAT,
            "grid": self.options.grid,
            "machine": results.machine(self.options.device),
            "versions": results.versions(),
            "commit": results.commit(),
            "started": started,
            "took": round(time.perf_counter() - self.began, 1),
            "settings": {
                "device": self.options.device,
                "threads": self.threads,
                "subnormals": self.subnormals,
                "cell_seconds": self.cell_seconds,
                "total_seconds": self.total,
                "load_before": load,
                "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "RNNKERN_", "XLA_FLAGS"))},
            },
            "missing": self.missing,
            "rows": rows,
        }

    def _tell(self, number: int, cell: Cell, what: str) -> None:
        self.report(number, len(self.cells), f"{cell}: {what}")

    def _cell(self, cell: Cell, tell: Callable[[str], None]) -> list[Row]:
        rows = {name: {**cell.as_dict(), "peer": name} for name in self._names(cell)}
        reason = self._too_large(cell)
        if reason:
            skipped = dict(status="skipped", reason=reason)
            return [{**row, **skipped} for row in rows.values()]
        with _threads(cell.threads or self.threads), _tf32(cell.precision.tf32):
            if cell.quantity == "memory":
                self._measure_memory(cell, rows, tell)
            else:
                self._measure_time(cell, rows, tell)
        return list(rows.values())

    def _names(self, cell: Cell) -> dict[str, tuple[Peer, Cell]]:
        """Who takes part. Where norms are recorded, the steps without them run in the same rounds."""
        names = {peer.name: (peer, cell) for peer in self.peers if _takes_part(peer, cell)}
        if cell.mode in RECORDING:
            plain = replace(cell, mode="train")
            for peer in self.peers:
                if (peer.name in names and peer.compared) or peer.name == "nn.RNN":
                    names[peer.name + UNWATCHED] = (peer, plain)
        return names

    def _too_large(self, cell: Cell) -> str | None:
        free = memory.available() if self.options.device == "cpu" else torch.cuda.mem_get_info()[0]
        if cell.bytes > 0.8 * free:
            return f"needs about {cell.bytes / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
        left = self._left()
        if left <= 0:
            return str(self._over()["reason"])
        chains = cell.T * cell.layers * cell.directions * cell.heads
        step = cell.flop / self.rate + chains * STEP_COST[cell.mode == "infer"]
        expected = step * (4 + len(self.peers))  # the truth in float64 takes about as long as four of them
        limit = min(left, TOLERATED * self.cell_seconds)
        if expected <= limit:
            return None
        return f"would take about {expected:.0f} s before any round, there are {limit:.0f} s"

    def _left(self) -> float:
        """Seconds of the whole run."""
        return self.total - (time.perf_counter() - self.began)

    def _over(self) -> Row:
        return {"status": "skipped", "reason": f"the {self.total:.0f} s of the whole run were over"}

    def _measure_time(self, cell: Cell, rows: dict[str, Row], tell: Callable[[str], None]) -> None:
        problems: dict[Cell, Problem] = {}
        works: dict[str, Work] = {}
        names = self._names(cell)
        try:
            for name, (peer, task) in names.items():
                if self._left() <= 0:
                    rows[name].update(self._over())
                    continue
                expected = 2 * task.flop / self.fastest.get(_kind(peer, task), float("inf"))  # compared, and timed once
                if expected > self._left():
                    reason = f"would take about {expected:.0f} s, there are {self._left():.0f} s"
                    rows[name].update(status="skipped", reason=reason)
                    continue
                if task not in problems:
                    problems[task] = Problem(task, self.threads, self.options.device)
                    tell("truth in float64")
                    _ = problems[task].truth
                tell(f"{name} prepares")
                self._set_subnormals()
                work = prepared_and_compared(peer, problems[task], rows[name])
                if work is not None:
                    works[name] = work
            tell("rounds")
            self._set_subnormals()
            calls = {name: work.call for name, work in works.items()}
            measured = interleaved(calls, self.cell_seconds, self.options.device, self.grid.most_rounds)
            for name, times in measured.items():
                kind, rate = _kind(*names[name]), names[name][1].flop / min(times.seconds)
                self.fastest[kind] = max(self.fastest.get(kind, 0.0), rate)
                rows[name].update(
                    status="timed" if times.complete else "one call",
                    seconds=[float(f"{s:.4g}") for s in times.seconds],
                    calls=times.calls,
                )
        finally:
            for work in works.values():
                work.close()

    def _set_subnormals(self) -> None:
        """Again and again, since some libraries set this thread's back when they begin (ONNX Runtime does)."""
        torch.set_flush_denormal(self.options.subnormals == "flush")

    def _measure_memory(self, cell: Cell, rows: dict[str, Row], tell: Callable[[str], None]) -> None:
        for name, (peer, _) in self._names(cell).items():
            if self._left() <= 0:
                rows[name].update(self._over())
                continue
            tell(f"{name}: memory")
            refusal = peer.refuses(Problem(replace(cell, T=2, chunk=min(cell.chunk, 2)), self.threads))
            reason = refusal or (memory.unavailable() if self.options.device == "cpu" else None)
            if reason:
                rows[name].update(status="refused", reason=reason)
                continue
            try:
                found = memory.peak(name, cell, cell.threads or self.threads, self.options.device)
                rows[name].update(status="measured", bytes=found)
            except Exception as error:
                rows[name].update(status="failed", reason=_first_line(error))


def prepared_and_compared(peer: Peer, problem: Problem, row: Row) -> Work | None:
    """The peer's work where it computes the right thing; None where not, and ``row`` says why."""
    reason = peer.refuses(problem)
    if reason:
        row.update(status="refused", reason=reason)
        return None
    began, work = time.perf_counter(), None
    try:
        work = peer.prepare(problem)
        result = work.call(0)
        row.update(prepared=round(time.perf_counter() - began, 2), settings=work.settings)
        if not peer.compared:
            return work
        error = problem.error(work.answers(result))
    except Exception as raised:  # whatever a peer raises is its result
        row.update(status="failed", reason=_first_line(raised))
        if work is not None:
            work.close()
        return None
    row["error"] = float(f"{error:.3g}")
    tolerance = problem.cell.precision.tolerance
    if error <= tolerance:
        return work
    row.update(status="wrong", reason=f"relative error {error:.1e}, {problem.cell.dtype} explains {tolerance:.0e}")
    work.close()
    return None


def _kind(peer: Peer, task: Cell) -> tuple[str, str, bool]:
    return peer.name, task.dtype, task.mode == "infer"


def _takes_part(peer: Peer, cell: Cell) -> bool:
    """A peer that has no such mode at all has no row; one that cannot do this cell has one that says so."""
    return cell.mode in peer.modes and not (cell.quantity == "memory" and not peer.in_memory)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _gemm_rate(device: str) -> float:
    """Floating-point operations a second, of one product of some size; to guess how long a cell will take."""
    a, b = torch.rand(512, 512, device=device), torch.rand(512, 512, device=device)
    calls = {"GEMM": lambda i: nn.functional.linear(a, b)}
    calls["GEMM"](0)
    return 2 * 512**3 / min(interleaved(calls, 0.05, device)["GEMM"].seconds)


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch may round the operands of float32 products on a GPU."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")}
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with cudnn.flags(**kept, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def _subnormals(what: str) -> Iterator[None]:
    """The setting is a thread's own; threads that are made later inherit it, so it holds for all in a fresh process."""
    if what == "flush":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if what == "flush":
            torch.set_flush_denormal(False)


def _keeps_subnormals() -> bool:
    """Whether any thread of PyTorch's does: looked at as bits, since comparing flushes too."""
    return bool((torch.full((1 << 20,), 3e-38) * 1e-3).view(torch.int32).any())
