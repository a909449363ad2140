"""rec.all_reduce() over two processes gives what one process finds on all samples."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradflow_worker as worker
import lightning_worker
import numpy as np
import pytest
import torch
from distributed_worker import Model

import rnnkern
from rnnkern.gradflow import Record

ROOT = Path(__file__).resolve().parent.parent
WORLD, SECONDS = 2, 120
#: In float64, of norms up to size 1 over a few hundred operations.
ROUNDING = dict(rtol=1e-12, atol=0)
EXAMPLE = ["--steps=5", "--every=2", "--length=12", "--hidden=8", "--lr=0.05", "--dtype=float64"]


def run(*command: str) -> str:
    """What the command prints; it and its children are gone when this returns."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {SECONDS} s: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


def torchrun(*command: str) -> str:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", *command)


def of_ranks(directory: Path, start: Callable[..., str], script: str) -> list[dict[str, Any]]:
    """What the ranks of a script have written there; one process of the tests runs it, the others wait."""
    directory.mkdir(exist_ok=True)
    files = [directory / f"rank{rank}.pt" for rank in range(WORLD)]
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(file.exists() for file in files):
            start(script, str(directory))
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def answers(shared_path: Path) -> list[dict[str, Any]]:
    return of_ranks(shared_path / "gradflow", torchrun, worker.__file__)


def answer(answers: list[dict[str, Any]], case: str) -> list[Any]:
    """Of each rank; fails with the traceback of those that failed."""
    failed = [str(a[case]) for a in answers if isinstance(a[case], Exception)]
    assert not failed, "\n".join(failed)
    return [a[case] for a in answers]


def one_process(share: float = 1 / WORLD, losses: tuple[int, ...] = (0, 1), **options: Any) -> Record:
    """All ranks' losses in one graph, each times ``share``: their samples are those of one record."""
    model = Model()
    with rnnkern.watch(model) as flow:
        sum(share * worker.loss(model, rank, **options.pop(f"rank{rank}", {})) for rank in losses).backward()
    return flow.read(**options)


def assert_same(found: dict[str, Any], expected: Record) -> None:
    assert tuple(found) == expected.modules
    for name, (squares, lengths, norm) in found.items():
        assert np.array_equal(lengths, expected[name].lengths)
        assert expected[name].squares[0].any()
        np.testing.assert_allclose(squares, expected[name].squares, **ROUNDING)
        np.testing.assert_allclose(norm, expected[name].norm, **ROUNDING)


@pytest.mark.parametrize("case", ["ddp", "fsdp", "ddp_per_sample"])
def test_is_the_record_of_one_process(answers: list[dict[str, Any]], case: str) -> None:
    """With other lengths and numbers of samples on each rank."""
    expected = one_process(order="lag", per_sample=case == "ddp_per_sample")
    assert expected["rnn"].lengths.tolist() == [6, 6, 6, 4]
    for found in answer(answers, case):
        assert_same(found, expected)


def test_summed_losses(answers: list[dict[str, Any]]) -> None:
    for found in answer(answers, "summed"):
        assert_same(found, one_process(share=1))


def test_module_without_statistics_on_a_rank(answers: list[dict[str, Any]]) -> None:
    expected = one_process(rank0={"both": False})
    assert expected["rnn"].samples == 4 and expected["last"].samples == 1
    for found in answer(answers, "module_missing_on_rank_0"):
        assert_same(found, expected)


def test_rank_without_a_record(answers: list[dict[str, Any]]) -> None:
    """It counts in the mean over the ranks all the same."""
    for found in answer(answers, "nothing_on_rank_1"):
        assert_same(found, one_process(losses=(0,)))


def test_group(answers: list[dict[str, Any]]) -> None:
    for own, found, message in answer(answers, "a_group_of_one"):
        for name in own:
            assert all(np.array_equal(a, b) for a, b in zip(own[name], found[name], strict=True))
        assert "not in this group" in message


def test_records_that_do_not_fit(answers: list[dict[str, Any]]) -> None:
    """Every rank is told; none waits."""
    for message in answer(answers, "other_steps"):
        assert "got step 0 on rank 0, 1 on rank 1" in message
    for message in answer(answers, "other_layers"):
        assert "same (layers, directions) on every rank, got (1, 1) and (2, 1)" in message
    for message in answer(answers, "other_scales"):
        assert "got loss scale 1.0 on rank 0, 2.0 on rank 1" in message


def test_loss_scale(answers: list[dict[str, Any]]) -> None:
    """It is divided out; a step that the scaler has skipped is skipped on all ranks."""
    for found in answer(answers, "scaled"):
        assert [kept[:3] for kept in found] == [(0, 2.0**10, False), (1, 2.0**10, True)]
        assert_same(found[0][3], one_process(order="lag"))
        by_lag = np.isfinite(found[1][3]["rnn"][2]).any((0, 1))
        assert by_lag.tolist() == [False] * 4 + [True] * 2  # the overflow of the rank whose sequences are shorter


def test_metric_over_ranks(answers: list[dict[str, Any]]) -> None:
    """Rank 1 has given its record twice: squares and samples add."""
    records = [one_process(share=1, losses=(rank,), order="lag", per_sample=True)["rnn"] for rank in (0, 1, 1)]
    squares, samples = np.zeros((2, 2, 5)), np.zeros((2, 2, 5))
    for record in records:
        norm = record.norm[:, :, :5]
        squares[:, :, : norm.shape[2]] += np.square(norm).sum(-1)
        samples[:, :, : norm.shape[2]] += norm.shape[-1]
    assert samples[0, 0].tolist() == [5, 5, 5, 5, 3]
    for found in answer(answers, "metric"):
        np.testing.assert_allclose(found, np.sqrt(squares / samples), **ROUNDING)


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        one_process().all_reduce()


@pytest.fixture(scope="module")
def logged(shared_path: Path) -> list[dict[str, Any]]:
    return of_ranks(shared_path / "lightning", run, lightning_worker.__file__)


def scalars(*steps: int, ranks: tuple[int, ...] = (0, 1)) -> dict[str, float]:
    """Of one process, whose loss is the mean over the ranks and over steps."""
    model = lightning_worker.Trained()
    parts = [(rank, step) for step in steps for rank in ranks]
    with rnnkern.watch(model) as flow:
        for rank, step in parts:
            (model.loss(lightning_worker.batches(rank)[step]) / len(parts)).backward()
    return flow.read().scalars()


def test_lightning_logs_what_rank_0_has(logged: list[dict[str, Any]]) -> None:
    (first, steps), (second, others) = answer(logged, "own")
    assert second == [] and steps == others == lightning_worker.STEPS
    assert [step for step, _ in first] == [1, 3]
    for (_, found), step in zip(first, (0, 2), strict=True):
        assert found == pytest.approx(scalars(step, ranks=(0,)))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("all_ranks", {1: (0,), 3: (2,)}),
        ("accumulated", {1: (0, 1), 2: (2, 3)}),
        ("without_a_logger_on_rank_1", {1: (0,), 3: (2,)}),
    ],
)
def test_lightning_logs_what_all_ranks_have(
    logged: list[dict[str, Any]], case: str, expected: dict[int, tuple[int, ...]]
) -> None:
    (first, _), (second, _) = answer(logged, case)
    assert second == []
    assert [step for step, _ in first] == list(expected)
    for (_, found), steps in zip(first, expected.values(), strict=True):
        assert found == pytest.approx(scalars(*steps))


def test_lightning_under_amp(logged: list[dict[str, Any]]) -> None:
    """An overflow on one rank: a step on both, and what one process finds in the others."""
    (first, seen), (_, others) = answer(logged, "overflow")
    assert seen == others == [(0, 1024, False), (1, 1024, True), (2, 512, False), (3, 512, False)]
    assert [step for step, _ in first] == [1, 2, 3, 4]
    assert first[1][1]["gradflow/rnn/l0/nonfinite"] == lightning_worker.T * lightning_worker.SIZES[1]
    for step in (0, 2, 3):
        assert first[step][1] == pytest.approx(scalars(step))


@pytest.mark.parametrize("batch", [6, 5], ids=["even", "uneven"])
def test_example(tmp_path: Path, batch: int) -> None:
    script = str(ROOT / "examples" / "train_ddp.py")
    run(script, *EXAMPLE, f"--batch={batch}", f"--out={tmp_path / 'one.pt'}")
    output = torchrun(script, *EXAMPLE, f"--batch={batch}", f"--out={tmp_path / 'two.pt'}")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.shape == (3, 1, 1, 12) and one.all()
    # Five steps of Adam part the weights by rounding; the norms are of size 1e-3 to 1.
    torch.testing.assert_close(two, one, rtol=1e-10, atol=0)
    assert output.count(f"module.rnn  (T=12, {batch} samples)") == 3
