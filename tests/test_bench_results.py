"""What becomes of the benchmarks' times: JSON, ratios, comparisons, the page; and the command's ways to fail."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from rnnkern import cli
from rnnkern.bench import compare, results, stats, table
from rnnkern.bench.cells import Cell
from rnnkern.bench.grids import GRIDS
from rnnkern.bench.peers import PEERS
from rnnkern.bench.results import Run

ROOT = Path(__file__).resolve().parent.parent


def synthetic(times: dict[str, list[float]], **changes: Any) -> Run:
    """A run of one cell with these times."""
    rows = [
        {**Cell("train", 10, 4, 8).as_dict(), "peer": peer, "status": "timed", "error": 1e-7, "seconds": seconds}
        for peer, seconds in times.items()
    ]
    return {
        "format": results.FORMAT,
        "grid": "quick",
        "machine": {"name": "box", "cpu": "A processor", "isa": "avx2", "processors": 2},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "started": "2030-01-01T00:00:00+00:00",
        "took": 1.0,
        "settings": {"threads": 2, "subnormals": "flushed to zero", "load_before": 0.1},
        "missing": {"JAX": "jax is not installed"},
        "rows": rows,
    } | changes


BEFORE = synthetic({"rnnkern cpu": [1.0, 1.1, 1.0, 0.9], "nn.RNN": [2.0, 2.2, 2.0, 1.8], "GEMM": [0.1] * 4})


def test_a_run_comes_back_from_json(tmp_path: Path) -> None:
    path = results.path_of(BEFORE, tmp_path)
    results.write(BEFORE, path)
    assert path == tmp_path / "box" / "quick.json" and list(path.parent.iterdir()) == [path]
    assert results.read(path) == BEFORE
    assert len(path.read_text().splitlines()) > len(BEFORE["rows"])  # a row a line


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "is not JSON"), ("[1]", "not a run"), ('{"format": 0}', "not a")],
)
def test_what_is_no_run_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        results.read(path)


@pytest.mark.parametrize(
    ("factor", "machine_factor", "verdict"),
    [(1.0, 3.0, "same"), (1.3, 1.0, "slower"), (0.5, 2.0, "faster"), (1.03, 1, "same")],
)
def test_comparison_is_by_ratios(factor: float, machine_factor: float, verdict: str) -> None:
    after = copy.deepcopy(BEFORE)
    for row in after["rows"]:
        own = factor if row["peer"] == "rnnkern cpu" else 1.0
        row["seconds"] = [s * machine_factor * own for s in row["seconds"]]
    (change,) = compare.changes(BEFORE, after)
    assert (change.verdict, change.yardstick) == (verdict, "nn.RNN")
    assert change.factor == pytest.approx(factor)
    assert change.is_regression is (verdict == "slower")


def test_overlapping_spreads_are_no_change() -> None:
    before = synthetic({"rnnkern cpu": [1.0, 1.4, 1.2, 0.8], "nn.RNN": [2.0] * 4})
    after = synthetic({"rnnkern cpu": [1.1, 1.5, 1.3, 0.9], "nn.RNN": [2.0] * 4})
    (change,) = compare.changes(before, after)
    assert change.factor > compare.THRESHOLD and change.verdict == "same"


def test_comparison_says_what_differs() -> None:
    after = copy.deepcopy(BEFORE) | {"machine": {**BEFORE["machine"], "name": "another"}}
    after["rows"][1]["peer"] = "someone"
    after["rows"][2]["status"] = "one call"
    assert compare.changes(BEFORE, after) == []
    lines = compare.not_compared(BEFORE, after)
    assert any("box before, another after" in line for line in lines)
    assert any("not comparable: 1" in line and "rnnkern cpu" in line for line in lines)


def test_statistics() -> None:
    assert stats.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert stats.ratios([2.0, 6.0], [1.0, 2.0]) == [2.0, 3.0]
    assert stats.ratios([8.0], [1.0, 2.0, 3.0]) == [4.0]
    fit = stats.exponent([4, 1, 2], [48.0, 3.0, 12.0])
    assert fit is not None and fit == pytest.approx((2.0, 2.0))
    assert stats.exponent([1, 2], [1.0, 2.0]) is None
    ours, loop = stats.Spread(0.5, 1.0, 2.0), stats.Spread(9.0, 10.0, 11.0)
    assert table.times_cheaper(loop, ours) == "10"
    assert table.times_cheaper(loop, stats.Spread(-1.0, 1.0, 2.0)) == "> 5"
    assert table.times_cheaper(loop, stats.Spread(-3.0, -2.0, -1.0)) == "ours is lost in the noise"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import page

    return page


def test_the_page_shows_who_wins(page: Any, tmp_path: Path) -> None:
    run = synthetic({"rnnkern cpu": [2e-5] * 4, "nn.RNN": [4e-5] * 4, "JAX": [1e-5] * 4, "GEMM": [1e-6] * 4})
    run["rows"].append({**Cell("train", 10, 4, 8).as_dict(), "peer": "liar", "status": "wrong", "reason": "by 5"})
    results.write(run, results.path_of(run, tmp_path / "results"))
    (tmp_path / "results" / "notes.txt").write_text("of another form")
    runs, others = page.collect(tmp_path / "results")
    text = page.render(runs, others, tmp_path / "docs" / "results.md")
    assert "| 10, 4, 8 | 2 | 4<br>2.00x (2.00–2.00) | **1**<br>0.50x (0.50–0.50) | wrong |" in text
    assert "- wrong (computes something else: not timed): liar: by 5:" in text
    assert "- not here: JAX: jax is not installed" in text
    assert "(../results/box/quick.json)" in text and "../results/notes.txt" in text


def test_at_a_glance() -> None:
    """One table for all modes and dtypes, with the peers that each mode has."""
    times = {"rnnkern cpu": [2e-5] * 4, "nn.RNN": [6e-5] * 4, "GEMM": [1e-6] * 4}
    run = synthetic(times | {"nn.RNN (unwatched)": [1.0]})
    assert table.at_a_glance(results.rows_by_cell(run)) == []
    for mode, dtype, extra in (
        ("infer", "fp32", {"JAX": [1e-5] * 4}),
        ("infer", "bf16", {}),
        ("record", "bf16", {"rnnkern cpu (unwatched)": [1.6e-5] * 4}),
    ):
        named = {**Cell(mode, 10, 4, 8, dtype=dtype).as_dict(), "status": "timed", "error": 1e-7}
        run["rows"] += [{**named, "peer": peer, "seconds": seconds} for peer, seconds in (times | extra).items()]
    next(row for row in run["rows"] if row["mode"] == "infer" and row["peer"] == "nn.RNN")["status"] = "one call"
    (sheet,) = table.at_a_glance(results.rows_by_cell(run))
    assert sheet.head == [
        "dtype", "T, B, H", "infer, µs", "nn.RNN", "JAX", "of GEMM", "train, µs", "nn.RNN", "of GEMM", "recording adds",
    ]  # fmt: skip
    assert sheet.lines == [
        ["fp32", "10, 4, 8", "2", "≈ 3", "0.50", "10%", "2", "3.00", "30%", ""],
        ["bf16", "10, 4, 8", "2", "3.00", "", "10%", "", "", "", "+25.0%"],
    ]


def test_the_page_is_made_from_the_runs_that_are_kept(page: Any) -> None:
    runs, others = page.collect(ROOT / "benchmarks" / "results")
    path = ROOT / "docs" / "results.md"
    assert path.read_text() == page.render(runs, others, path), "run `make results`"


# --- the command -----------------------------------------------------------------------------------------------------


def test_bench_fails_where_something_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = copy.deepcopy(BEFORE)
    after["rows"][0]["seconds"] = [2.0] * 4
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, run in zip(paths, (BEFORE, after), strict=True):
        results.write(run, path)
    assert cli.main(["bench", "--compare", str(paths[0]), "--later", str(paths[1])]) == 1
    assert "1 of 1 are worse than at commit abc" in capsys.readouterr().out


def test_bench_lists_grids_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*GRIDS, *PEERS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "there is no 'nobody'"),
        (["--peers", "FlashRNN"], "FlashRNN: does not compute on cpu"),
        (["--grid", "quick", "--modes", "bptt"], "has none of bptt"),
        (["--later", "x.json"], "--later needs --compare"),
        (["--compare", "missing.json"], "cannot read 'missing.json'"),
        (["--out", "/dev/null"], "cannot write into"),
    ],
)
def test_bench_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(
    ("option", "value"),
    [("--grid", "x"), ("--modes", "x"), ("--threads", "0"), ("--seconds", "-1"), ("--seconds", "nan")],
)
def test_bench_refuses_values(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["bench", option, value])
    assert f"argument {option}" in capsys.readouterr().err


def test_bench_refuses_pinned_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert cli.main(["bench"]) == 2
    assert "OMP_PROC_BIND is set" in capsys.readouterr().err


def test_bench_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench"]) == 2
    assert 'needs matplotlib, not installed here. Run: pip install "rnnkern[bench]"' in capsys.readouterr().err
