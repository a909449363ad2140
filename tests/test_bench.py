"""The benchmarks: who may be timed, and in which order. No test asserts how long anything takes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import threads

from rnnkern import cli
from rnnkern.bench import engine, memory, results, table, timing
from rnnkern.bench.cells import Cell
from rnnkern.bench.engine import Options, prepared_and_compared
from rnnkern.bench.grids import GRIDS, Grid, cells_of
from rnnkern.bench.peers import PEERS, jax, torch_compile
from rnnkern.bench.peers.base import Work
from rnnkern.bench.peers.torch_modules import TorchRNN
from rnnkern.bench.problem import Problem
from rnnkern.bench.results import Run

QUICK = Options(grid="test", cell_seconds=1e-3, total_seconds=60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells of the grid "test", to be filled."""
    cells: list[Cell] = []
    monkeypatch.setitem(GRIDS, "test", Grid("for a test", lambda device: iter(cells), 1e-3, 60))
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.0)
    return cells


def of(run: Run, peer: str, cell: Cell) -> dict[str, Any]:
    return results.rows_by_cell(run)[cell][peer]


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [name for name in PEERS if PEERS[name].compared])
def test_every_peer_computes_the_truth(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = PEERS[peer].unavailable("cpu")
    if reason is not None:
        pytest.skip(f"{peer}: {reason}")
    monkeypatch.setattr(torch_compile, "UNROLLED", 2)
    monkeypatch.setattr(jax, "UNROLL", (1,))
    modes = ("train",) if peer == "torch.compile" else PEERS[peer].modes  # compiling takes seconds
    for mode in modes:
        row: dict[str, Any] = {}
        work = prepared_and_compared(
            PEERS[peer], Problem(Cell(mode, 4, 3, 8, 5, chunk=2), torch.get_num_threads()), row
        )
        assert work is not None, f"{mode}: {row}"
        assert row["error"] < 1e-5
        work.close()


@pytest.mark.parametrize("shape", [{"heads": 3}, {"layers": 2, "directions": 2}, {"dtype": "bf16"}])
@pytest.mark.parametrize("peer", ["rnnkern cpu", "nn.RNN"])
def test_heads_layers_directions_and_bf16(peer: str, shape: dict[str, Any], cpu_library: None) -> None:
    row: dict[str, Any] = {}
    assert prepared_and_compared(PEERS[peer], Problem(Cell("train", 4, 3, 8, **shape), 1), row), row
    assert row["error"] > 0


def test_peers_say_what_they_cannot_do() -> None:
    two = Problem(Cell("infer", 2, 1, 4, layers=2), 1)
    assert PEERS["cell loop"].refuses(two) == "is written here for one of: layers"
    assert PEERS["ONNX Runtime"].refuses(Problem(Cell("train", 2, 1, 4), 1)) == "has no train"
    assert "float32" in (PEERS["ONNX Runtime"].refuses(Problem(Cell("infer", 2, 1, 4, dtype="bf16"), 1)) or "")
    assert "threads" in (PEERS["JAX"].refuses(Problem(Cell("infer", 2, 1, 4, threads=2), 1)) or "")
    assert PEERS["nn.RNN (graph)"].unavailable("cpu") == "does not compute on cpu"


def test_problems_are_the_same_for_all_and_for_every_mode() -> None:
    a, b = (Problem(Cell(mode, 3, 2, 4), 1) for mode in ("train", "watch"))
    assert torch.equal(a.inputs[0], b.inputs[0]) and torch.equal(a.gradient, b.gradient)
    assert all(torch.equal(a.weights[0][name], b.weights[0][name]) for name in a.weights[0])
    torch.testing.assert_close(a.truth["grad weight_hh_l0"], b.truth["grad weight_hh_l0"])


class Altered(TorchRNN):
    """nn.RNN with something wrong about it."""

    def __init__(self, name: str, wrong: str) -> None:
        self.name, self.wrong, self.calls = name, wrong, 0  # type: ignore[misc]

    def prepare(self, problem: Problem) -> Work:
        if self.wrong == "raises":
            raise RuntimeError("no such kernel\nwith a long trace")
        work = super().prepare(problem)

        def call(i: int) -> Any:
            self.calls += 1
            return work.call(i)

        def answers(result: Any) -> dict[str, torch.Tensor]:
            found = work.answers(result)
            if self.wrong == "value":
                found["grad weight_hh_l0"] = found["grad weight_hh_l0"] * 1.001
            if self.wrong == "nan":
                found["output"][0, 0, 0] = float("nan")
            if self.wrong == "shape":
                found["output"] = found["output"].transpose(0, 1)
            if self.wrong == "missing":
                del found["grad x"]
            return found

        return Work(call, answers)


@pytest.mark.parametrize(
    ("wrong", "status", "reason"),
    [
        ("value", "wrong", "relative error 1.0e-03, fp32 explains 1e-04"),
        ("nan", "failed", "output is not finite"),
        ("shape", "failed", "output has shape (2, 4, 8), not (4, 2, 8)"),
        ("missing", "failed", "returns no grad x"),
        ("raises", "failed", "RuntimeError: no such kernel"),
    ],
)
def test_what_computes_something_else_is_reported_and_not_timed(
    wrong: str, status: str, reason: str, grid: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Altered("altered", wrong)
    monkeypatch.setitem(PEERS, "altered", peer)
    cell = Cell("train", 4, 2, 8)
    grid.append(cell)
    run = engine.run(Options(**{**vars(QUICK), "peers": ("nn.RNN", "altered")}))
    row = of(run, "altered", cell)
    assert (row["status"], "seconds" in row) == (status, False)
    assert reason in row["reason"] and "\n" not in row["reason"]
    assert peer.calls <= 1
    assert of(run, "nn.RNN", cell)["status"] in ("timed", "one call")
    assert any("altered" in line and reason in line for line in table.untimed(run))


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.0)
    log: list[str] = []
    calls = {name: lambda i, name=name: log.append(name) for name in "abc"}
    times = timing.interleaved(calls, 1e9)  # type: ignore[arg-type]
    assert [len(t.seconds) for t in times.values()] == [timing.MOST_ROUNDS] * 3
    turns = log[-3 * timing.MOST_ROUNDS :]
    assert ["".join(turns[k : k + 3]) for k in range(0, len(turns), 3)] == ["abc", "bca", "cab"] * 10


def test_what_is_too_slow_for_rounds_has_one_call() -> None:
    counts: Counter[str] = Counter()

    def slow(i: int) -> None:
        counts["slow"] += 1
        torch.randn(300, 300) @ torch.randn(300, 300)

    times = timing.interleaved({"slow": slow, "quick": lambda i: counts.update(quick=1)}, 1e-5)
    assert not times["slow"].complete and len(times["slow"].seconds) == 1
    assert counts["slow"] <= 3


def test_on_a_gpu_turns_lie_between_events_and_inputs_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert (log[0], log[-2]) == (self, end)
            return 6000.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait") if log else None)
    assert timing._turn_on_gpu(log.append, 3, 2) == 2.0
    assert log[1:4] == [6, 7, 8] and log[-1] == "wait"


def test_every_cell_and_peer_has_a_row(grid: list[Cell], cpu_library: None) -> None:
    grid += [Cell("watch", 4, 2, 8), Cell("infer", 4, 2, 8), Cell("bptt", 4, 2, 8, chunk=2, series="chunk")]
    peers = ("rnnkern cpu", "nn.RNN", "cell loop", "GEMM")
    run = engine.run(Options(**{**vars(QUICK), "peers": peers, "cell_seconds": 0.05}))
    plain = {f"{name} (unwatched)" for name in ("rnnkern cpu", "nn.RNN", "cell loop")}
    rows = results.rows_by_cell(run)
    assert set(rows[grid[0]]) == {"rnnkern cpu", "cell loop", "GEMM"} | plain
    assert set(rows[grid[1]]) == set(peers)
    assert set(rows[grid[2]]) == {"rnnkern cpu", "nn.RNN"}
    assert {row["status"] for row in run["rows"]} <= {"timed", "one call"}
    assert set(table.cost_of_measuring(rows[grid[0]])) == {"rnnkern", "loop", "loop alone"}


def test_what_does_not_fit_is_said(grid: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    grid += [Cell("train", 10**5, 1, 8), Cell("train", 10**9, 64, 1024), Cell("infer", 2, 1, 4)]
    run = engine.run(Options(**{**vars(QUICK), "peers": ("nn.RNN",)}))
    slow, large, small = run["rows"]
    assert slow["status"] == large["status"] == "skipped"
    assert "would take about" in slow["reason"] and "GiB of memory" in large["reason"]
    assert small["status"] in ("timed", "one call")
    monkeypatch.setattr(engine._Session, "_left", lambda self: -1.0)
    assert {row["reason"] for row in engine.run(Options(**vars(QUICK)))["rows"][-1:]} == {
        "the 60 s of the whole run were over"
    }


def test_a_peer_that_was_slow_is_not_called_where_no_time_is_left(
    grid: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its best rate so far: a smaller cell is computed still, and so is what other peers do."""
    grid += [Cell("infer", 8, 2, 8), Cell("infer", 8, 2, 16), Cell("infer", 2, 1, 1)]

    def slow(calls: dict, *_: object) -> dict:
        return {name: timing.Times([20.0 if name == "nn.RNN" else 1e-6], 1) for name in calls}

    monkeypatch.setattr(engine, "interleaved", slow)
    monkeypatch.setattr(engine._Session, "_left", lambda self: 50.0)
    monkeypatch.setattr(engine, "_gemm_rate", lambda device: 1e12)
    run = engine.run(Options(**{**vars(QUICK), "peers": ("nn.RNN", "GEMM")}))
    (first, _), (second, other), (third, _) = (run["rows"][i : i + 2] for i in (0, 2, 4))
    assert first["status"] != "skipped" and third["status"] != "skipped" and other["status"] != "skipped"
    assert second["reason"] == "would take about 160 s, there are 50 s"


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_of_memory(cpu_library: None) -> None:
    """rnnkern: output, gradient of x, and delta.

    nn.RNN has no bound from above: it keeps blocks of every time step, which two threads allocate and free, and what
    the C library's fragments add differs from run to run (in all, 6.7 or 8.5 were seen).
    """
    cell = Cell("train", 2048, 8, 64)
    ours, theirs = (memory.peak(peer, cell, 1) / (cell.T * cell.B * cell.H * 4) for peer in ("rnnkern cpu", "nn.RNN"))
    assert 2.5 < ours < 4 < theirs


def test_memory_says_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="killed"):
        memory.peak("nn.RNN", Cell("train", 2, 1, 4), 1)


def test_grids_are_those_that_were_published() -> None:
    sizes = {name: {(c.T, c.B, c.H, c.heads) for c in cells_of(name, "cpu")} for name in GRIDS}
    assert {(1024, 16, 16, 48), (1024, 16, 768, 1), (1024, 256, 64, 12), (2048, 16, 768, 1)} <= sizes["flashrnn"]
    assert sizes["flaggems"] == {(16, 4, 32, 1), (32, 8, 64, 1), (64, 16, 128, 1)}
    assert len({(c.B, c.H, c.I) for c in cells_of("haste", "cpu")}) == 5 * 9 * 4
    assert max(c.T for c in cells_of("scaling", "cpu")) == 65536
    for small in ("flashrnn", "haste"):
        assert sizes[f"{small}-small"] and sizes[f"{small}-small"] <= sizes[small]


def test_bench_runs_writes_and_compares(
    cpu_library: None, grid: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid += [Cell("train", 4, 2, 8), Cell("infer", 4, 2, 8)]
    run = ["bench", "--grid", "test", "--cell-seconds", "0.05", "--peers", "rnnkern cpu,nn.RNN", "--out"]
    assert cli.main([*run, str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"test.json", "test.png"}
    printed = capsys.readouterr().out
    for word in ("rnnkern cpu", "nn.RNN", "µs a step", "quartiles", "test.json"):
        assert word in printed
    earlier = folder / "test.json"
    assert cli.main(["bench", "--compare", str(earlier), "--later", str(earlier)]) == 0
    assert "0 of 2 are worse" in capsys.readouterr().out
    assert cli.main([*run, str(tmp_path), "--compare", str(earlier)]) == 2
    assert "would overwrite" in capsys.readouterr().err
