"""The command: what it prints, what it writes, and the exit code of every way to fail."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rnnkern
from rnnkern import backends, cli, doctor

TINY = ["--epochs", "1", "--hidden-size", "8", "--batch-size", "400"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m rnnkern`` in a process of its own, which reads the environment anew."""
    run = [sys.executable, "-m", "rnnkern", *arguments]
    return subprocess.run(run, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.fixture
def demo_needs() -> None:
    for module in cli.DEMO_NEEDS:
        pytest.importorskip(module)


# --- the command itself ----------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rnnkern {rnnkern.__version__}\n"


@pytest.mark.parametrize("command", [[], ["doctor"], ["demo"], ["bench"], ["flow"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command, "--help"])
    assert "usage: rnnkern" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "nonsense"]])
def test_unknown_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(arguments)
    assert "usage: rnnkern" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_a_reader_who_leaves() -> None:
    """As `rnnkern doctor | head -0`: no traceback."""
    command = [sys.executable, "-m", "rnnkern", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == ""


def test_doctor_names_every_backend_and_checks_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for word in ("rnnkern", "python", "torch", "numpy", "triton", "platform", "threads", "instruction set"):
        assert any(line.startswith(word) for line in lines), word
    section = lines[next(i for i, line in enumerate(lines) if line.startswith("backends")) :]
    for name, reason in backends.available().items():
        line = next(line for line in section if line.startswith(f"  {name} "))
        assert ("works" in line and "error" in line) if reason is None else reason in line


def test_doctor_says_why_a_backend_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"cpu": "not built: build it", "reference": None})
    monkeypatch.setattr(doctor, "_selected", lambda device: "reference")
    assert cli.main(["doctor"]) == 0
    assert "not built: build it" in capsys.readouterr().out


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_doctor_fails_where_numbers_are_wrong(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_error", lambda name, device, H: error)
    assert cli.main(["doctor"]) == 1
    assert "WRONG NUMBERS" in capsys.readouterr().out


def test_doctor_reports_an_unknown_instruction_set(cpu_library: None) -> None:
    result = command("doctor", RNNKERN_CPU_ISA="mmx", RNNKERN_BACKEND="auto")
    assert result.returncode == 1
    assert "RNNKERN_CPU_ISA  mmx" in result.stdout
    assert "fails: RNNKERN_CPU_ISA must be one of" in result.stdout


def test_doctor_reports_an_unknown_backend() -> None:
    result = command("doctor", RNNKERN_BACKEND="nonsense")
    assert result.returncode == 1
    assert "unknown backend 'nonsense': expected 'auto' or one of" in result.stdout + result.stderr


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo(
    demo_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rnnkern.demo.measure.ROUNDS", 5)
    picture = tmp_path / "demo.png"
    picture.write_bytes(b"an older picture")
    assert cli.main(["demo", "--out", str(picture), *TINY]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]
    printed = capsys.readouterr().out
    for word in ("default", "orthogonal", "test accuracy", "horizon", "decay per step", "torch.nn.RNN", "float64"):
        assert word in printed
    assert "256 of 256 time steps" in printed  # two runs, two training steps each, 64 time steps


@pytest.mark.parametrize("module", list(cli.DEMO_NEEDS))
def test_demo_names_what_is_missing(
    module: str, demo_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import fails
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 2
    captured = capsys.readouterr()
    assert cli.DEMO_NEEDS[module] in captured.err
    assert 'pip install "rnnkern[demo]"' in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/demo.png", "cannot write to"),
        ("file/demo.png", "cannot write to"),
        ("folder.png", "is a directory"),
        (None, "is a directory"),
        ("demo.pdf", "must end in .png"),
        ("", "must end in .png"),
    ],
)
def test_demo_refuses_a_path_before_training(
    out: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "demo.png").mkdir()  # the default
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["demo"] if out is None else ["demo", "--out", out])
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", "0"), ("--epochs", "x"), ("--lr", "nan"), ("--lr", "-1"), ("--seed", "-1"), ("--hidden-size", "0")],
)
def test_demo_refuses_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["demo", option, value])
    assert f"argument {option}" in capsys.readouterr().err


def test_demo_fails_before_training_where_its_backend_cannot_run(
    demo_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise RuntimeError("this processor does not support it")

    monkeypatch.setattr(doctor, "in_one_line", refuse)
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    captured = capsys.readouterr()
    assert "this processor does not support it" in captured.err
    assert not captured.out


# --- what the demo measures ------------------------------------------------------------------------------------------


def test_deviation_finds_wrong_norms_and_leaves_out_what_float32_cannot_hold(demo_needs: None) -> None:
    from rnnkern.demo import digits, measure

    options = digits.Options(hidden_size=8, batch_size=400, epochs=1, lr=1e-3, seed=0)
    run = digits.train("run", digits.new_model(options, True), digits.Digits.load(), options, lambda run, done: None)
    right = measure.deviation([run.first])
    assert right.largest < 1e-5
    assert (right.compared, right.excluded) == (digits.T, 0)

    norms = run.first.norms.copy()
    norms[40] *= 1.25
    assert measure.deviation([dataclasses.replace(run.first, norms=norms)]).largest == pytest.approx(0.25, rel=1e-4)
    norms[40] = np.nan
    assert np.isnan(measure.deviation([dataclasses.replace(run.first, norms=norms)]).largest)

    weights = {name: value * 0.01 if "weight_hh" in name else value for name, value in run.first.weights.items()}
    vanishing = dataclasses.replace(run.first, weights=weights)
    truth = measure.loop_over_cells(vanishing).square().sum((1, 2)).sqrt().float().double().numpy()
    found = measure.deviation([dataclasses.replace(vanishing, norms=truth)])
    assert found.largest < 1e-6
    assert found.excluded > 0 < found.compared
    assert found.compared + found.excluded == digits.T


def test_runs_differ_in_w_hh_alone(demo_needs: None) -> None:
    from rnnkern.demo import digits

    options = digits.Options(hidden_size=8, batch_size=400, epochs=1, lr=1e-3, seed=3)
    default, orthogonal = (digits.new_model(options, which).state_dict() for which in (False, True))
    assert [name for name in default if not default[name].equal(orthogonal[name])] == ["rnn.weight_hh_l0"]
    w_hh = orthogonal["rnn.weight_hh_l0"]
    assert (w_hh @ w_hh.T - w_hh.new_ones(8).diag()).abs().max() < 1e-5


def test_picture_keeps_the_old_file_where_drawing_fails(
    demo_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rnnkern.demo import digits, picture

    def fail(self: picture.Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    sample = digits.Sample(0, {}, *[rnnkern.RNN(1, 1).weight_hh_l0] * 2, np.logspace(0, -9, digits.T), 21, 0.7)
    run = digits.Run("default", [0.1, 0.2], [sample])
    path = tmp_path / "demo.png"
    path.write_bytes(b"an older picture")
    monkeypatch.setattr(picture.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        picture.write([run, run], path)
    assert path.read_bytes() == b"an older picture"
    assert list(tmp_path.iterdir()) == [path]
