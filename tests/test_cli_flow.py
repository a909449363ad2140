"""The command ``rnnkern flow``: what it prints and writes, how it is interrupted and resumed, every way to refuse."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn
from train_helpers import ABC, options, same

import rnnkern
from rnnkern import cli
from rnnkern.train import checkpoint
from rnnkern.train.text import Text
from rnnkern.train.training import Training

pytestmark = pytest.mark.usefixtures("nothing_stays")

SIZES = ["--length", "10", "--hidden-size", "8", "--batch-size", "4", "--every", "2"]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a terminal, also where the tests run in the background, and so ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def flow_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command imports; its pictures small, as nobody looks at them here."""
    monkeypatch.setattr("rnnkern.gradflow.report.DPI", 20)


def flow(*arguments: str | Path) -> int:
    return cli.main(["flow", *map(str, arguments)])


def stored(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def page(path: Path) -> str:
    """The report without the time at which it was written."""
    return re.sub(r"Written .*<", "", path.read_text(encoding="utf-8"))


def interrupt_after(steps: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a step the process gets that signal."""
    advance = Training.advance

    def advance_or_not(self: Training) -> None:
        if self.done == steps - 1:
            signal.raise_signal(number)
        advance(self)

    monkeypatch.setattr(Training, "advance", advance_or_not)


def test_a_run(flow_needs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a b.txt").write_text("Gefäß\r\n" * 40, encoding="utf-8")
    out = tmp_path / "flow.html"
    assert flow(tmp_path / "a b.txt", *SIZES, "--steps", "5", "--out", out, "--init", "orthogonal") == 0
    printed = capsys.readouterr().out
    for part in ("'a b.txt'", "280 characters, 7 different ones; T=10", "tanh RNN, H=8, orthogonal init", "5/5 steps"):
        assert part.strip("'") in printed
    for part in ("rnn (last loss) l0: learns", "there are 9", "bits per character", "trivial level", "written"):
        assert part in printed
    shown = page(out)
    for part in ("Gradient flow of tanh on text", "280 characters", "bits per character", "Trivial level: 2.807"):
        assert part in shown
    assert "loss at the last step alone" in shown
    assert shown.count("<img") == 3  # the curves, and a heat map for each loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.txt", "flow.html", "flow.pt"]
    assert stored(out.with_suffix(".pt"))["state"]["done"] == 5


def test_interrupted_and_resumed(
    flow_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "adding", *SIZES, "--steps", "7"]
    whole, part = tmp_path / "whole.html", tmp_path / "the part.html"
    assert flow(*arguments, "--out", whole) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_after(4, signal.SIGINT, patch)
        assert flow(*arguments, "--out", part) == 130
    printed = capsys.readouterr().out
    assert "interrupted after 4 of 7 steps; to go on:\n" in printed
    assert f"rnnkern flow --resume --out '{part}'\n" in printed
    assert "After 4 steps" in page(part)
    assert stored(part.with_suffix(".pt"))["state"]["done"] == 4

    assert flow("--resume", "--out", part) == 0
    assert "the loss needs 9" in capsys.readouterr().out
    assert same(stored(part.with_suffix(".pt")), stored(whole.with_suffix(".pt")))
    assert page(part) == page(whole)
    assert "the loss needs 9" in page(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_before_anything_was_recorded(
    number: int,
    code: int,
    flow_needs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is nothing to report, and no report."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path / "flow.html"
    monkeypatch.setattr("rnnkern.train.run._described", lambda training: [str(signal.raise_signal(number))])
    assert flow("--task", "adding", *SIZES, "--out", out) == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    printed = capsys.readouterr().out
    assert "flow.pt written" in printed
    assert "interrupted after 0 of 1000 steps" in printed
    assert not out.exists()
    assert stored(out.with_suffix(".pt"))["state"]["done"] == 0


def test_ctrl_c_in_a_terminal(flow_needs: None, tmp_path: Path) -> None:
    """The process as a whole gets what the key sends; then it goes on, here, for a few steps more."""
    run = [sys.executable, "-m", "rnnkern", "flow", "--out", "flow.html", "--task", "adding", *SIZES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rnnkern.__file__).parent.parent)}
    process = subprocess.Popen(
        [*run, "--steps", "1000000"],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert any("gradient flow every" in line for line in process.stdout)  # from here on the signal is noticed
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    done = stored(tmp_path / "flow.pt")["state"]["done"]
    assert f"interrupted after {done} of 1000000 steps" in printed
    assert flow("--resume", "--steps", done + 3, "--out", tmp_path / "flow.html") == 0
    assert stored(tmp_path / "flow.pt")["state"]["done"] == done + 3
    assert f"After {done + 3} steps" in page(tmp_path / "flow.html")


def test_what_ignores_ctrl_c_goes_on_ignoring_it(
    flow_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a command does that a shell script has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_after(1, signal.SIGINT, monkeypatch)
        monkeypatch.setattr("rnnkern.train.run._write_report", lambda *arguments: None)
        assert flow("--task", "adding", *SIZES, "--steps", "2", "--out", tmp_path / "flow.html") == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def finished(flow_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run of 2 steps on a text, without a report."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(ABC)
    asked = options(text=str(tmp_path / "text.txt"), steps=2)
    task = Text(ABC, "name", asked.length)
    with Training(asked, task) as training:
        training.advance(), training.advance()
        checkpoint.Checkpoint(asked, task.digest, training.state_dict()).write(tmp_path / "flow.pt")
    return tmp_path / "flow.pt"


def test_a_finished_run_resumes_to_the_same(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a job that is started again and again comes to an end."""
    before = stored(finished)
    assert flow("--resume", "text.txt", "--seed", "3", "--length", "10") == 0
    assert same(stored(finished), before)
    assert "2/2 steps" in capsys.readouterr().out
    assert "gradient flow every 2 steps" in page(finished.with_suffix(".html"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hidden-size", "9"], "--hidden-size was 8 in the run to be resumed, got 9"),
        (["--task", "adding"], "--task was text in the run to be resumed, got adding"),
        (["--every", "3"], "--every was 2 in the run to be resumed, got 3"),
        (["other.txt"], "the text was .*text.txt in the run to be resumed, got .*other.txt"),
        (["--steps", "1"], "--steps must be at least 2, as many are done already, got 1"),
    ],
)
def test_contradictions(given: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.read_bytes()
    assert flow("--resume", *given) == 2
    assert_refused(message, capsys)
    assert finished.read_bytes() == before


def test_the_text_has_changed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(ABC.swapcase())
    assert flow("--resume") == 2
    assert_refused(
        "the text must be what the run in 'flow.pt' learnt from, got other characters from .*text.txt'", capsys
    )


def assert_refused(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr."""
    captured = capsys.readouterr()
    assert re.fullmatch(f"rnnkern flow: .*{message}.*\n", captured.err), captured.err
    assert not captured.out


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint"),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-100] + bytes(100)),
        lambda path: torch.save(nn.Linear(1, 1).state_dict(), path),
        lambda path: torch.save({"rnnkern flow": Evil()}, path),
        lambda path: torch.save({**stored(path), "options": {"length": 10, "colour": "red"}}, path),
        lambda path: torch.save({**stored(path), "state": {**stored(path)["state"], "model": {}}}, path),
        lambda path: torch.save({key: value for key, value in stored(path).items() if key != "state"}, path),
    ],
    ids=["empty", "text", "half", "zeros", "weights", "evil", "options", "model", "without a state"],
)
def test_broken_checkpoints(spoil: Any, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(finished)
    assert flow("--resume") == 2
    assert_refused("--resume: 'flow.pt' is broken or something else, expected a checkpoint", capsys)
    assert not Path("executed").exists()


def test_other_checkpoints(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**stored(finished), "rnnkern flow": 2}, finished)
    assert flow("--resume") == 2
    assert_refused("checkpoint 'flow.pt' has format 2, expected 1", capsys)
    finished.unlink()
    assert flow("--resume") == 2
    assert_refused("checkpoint 'flow.pt' cannot be read: No such file or directory", capsys)


def test_a_full_disk_leaves_the_old_checkpoint(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.read_bytes()

    def save(content: Any, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save)
    assert flow("--resume", "--steps", "3") == 1
    assert "rnnkern flow: flow.pt: the checkpoint cannot be written: No space left" in capsys.readouterr().err
    assert finished.read_bytes() == before
    assert sorted(os.listdir()) == ["flow.pt", "text.txt"]


def test_a_checkpoint_reaches_the_disk_before_its_name(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1])
    checkpoint.Checkpoint.read(finished).write(finished)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_checkpoints_come_while_it_runs(flow_needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed outright loses a minute at most."""
    monkeypatch.setattr("rnnkern.train.run.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr("rnnkern.train.run._write_report", lambda *arguments: None)
    out = tmp_path / "flow.html"
    done: list[int] = []
    advance = Training.advance

    def looked_at(self: Training) -> None:
        if out.with_suffix(".pt").exists():
            done.append(stored(out.with_suffix(".pt"))["state"]["done"])
        advance(self)

    monkeypatch.setattr(Training, "advance", looked_at)
    assert flow("--task", "adding", *SIZES, "--steps", "4", "--out", out) == 0
    assert done == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the text: .*text.txt' cannot be read: No such file or directory; expected a text file"),
        ("folder", "the text: .*text.txt' cannot be read: Is a directory; expected a text file"),
        (b"", "the text: .*text.txt' is empty"),
        (b"\x7fELF\x00", r"the text: .*text.txt' is binary \(a NUL at byte 4\), expected a text file"),
        (b"abc\xff", r"the text: .*text.txt' is not UTF-8 \(0xff at byte 3\)"),
        (b"x" * 1009, "the text: .*text.txt' has 1009 characters, expected at least 1010 for --length 100"),
    ],
)
def test_texts_it_refuses(
    content: bytes | str | None,
    message: str,
    flow_needs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("text.txt").write_bytes(content)
    elif content:
        Path("text.txt").mkdir()
    assert flow("text.txt") == 2
    assert_refused(message, capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "adding", "text.txt"], "--task adding generates its data, and a text was given: .*text.txt"),
        (["--cell", "gru", "--init", "identity"], "--init identity must come with --cell tanh or relu, got gru"),
        (["--task", "adding", "--length", "1"], "--length must be at least 2 for --task adding, got 1"),
        (
            ["--task", "temporal-order", "--length", "9"],
            "--length must be at least 10 for --task temporal-order, got 9",
        ),
    ],
)
def test_options_it_refuses(
    given: list[str], message: str, flow_needs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flow(*given) == 2
    assert_refused(message, capsys)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cell", "elman", "invalid choice: 'elman'"),
        ("--task", "parity", "invalid choice: 'parity'"),
        ("--init", "xavier", "'xavier' is no init: expected default, orthogonal, identity, or a spectral radius"),
        ("--init", "-1", "must be positive and finite, got -1"),
        ("--clip", "0", "must be positive and finite, got 0"),
        ("--steps", "0", "must be at least 1, got 0"),
        ("--lr", "x", "invalid number value: 'x'"),
        ("--out", "flow.pdf", "'flow.pdf' must end in .html"),
        ("--out", "missing/flow.html", "cannot write to 'missing': No such file or directory"),
        ("--out", "folder.html", "'folder.html' is a directory"),
        ("--out", "full.html", "'full.pt' is a directory"),
    ],
)
def test_values_it_refuses(
    option: str,
    value: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("full.pt").mkdir()
    with pytest.raises(SystemExit, match=r"^2$"):
        flow(option, value)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"rnnkern flow: error: argument {option}: {message}")
    assert not captured.out


def test_clip_can_be_off() -> None:
    arguments = cli._parser().parse_args(["flow", "--clip", "inf"])
    assert arguments.clip == math.inf


@pytest.mark.parametrize("module", list(cli.FLOW_NEEDS))
def test_it_names_what_is_missing(
    module: str, flow_needs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import fails
    assert flow("--task", "adding") == 2
    assert_refused(rf'needs {cli.FLOW_NEEDS[module]}, .*pip install "rnnkern\[flow\]"', capsys)
