"""DDP, FSDP2 and distributed checkpoints: two processes do what one does with the whole batch, to rounding."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from distributed_worker import Model, adam, batches, train
from helpers import same_bits, threads
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import rnnkern

pytestmark = [
    pytest.mark.cpu_only("two processes over gloo, where NCCL wants a GPU for each"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

#: In float64, of weights of size 1: sums in another order, five times.
ROUNDING = dict(rtol=0, atol=100 * torch.finfo(torch.float64).eps)
SECONDS = 120

Answers = list[dict[str, Any]]  # of each rank


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are, and what the two processes have written."""
    directory = tmp_path_factory.mktemp("distributed")
    model = Model(nn.RNN)
    optimizer = adam(model)
    train(model, batches()[:2], optimizer)
    save(model, optimizer, directory / "plain")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={worker.WORLD}",
         worker.__file__, str(directory)],
        env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and its workers
        pytest.fail(f"no end after {SECONDS} s: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return directory


@pytest.fixture(scope="module")
def answers(directory: Path) -> Answers:
    return [torch.load(directory / f"rank{r}.pt", weights_only=False) for r in range(worker.WORLD)]


def answer(answers: Answers, case: str) -> list[Any]:
    """Of each rank; fails with the traceback of those that failed."""
    failed = [f"rank {rank}: {a[case]}" for rank, a in enumerate(answers) if isinstance(a[case], str)]
    assert not failed, "\n".join(failed)
    return [a[case] for a in answers]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint_id: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint_id)


@functools.cache
def weights_of_one(frozen: bool = False, kind: type[nn.RNNBase] = nn.RNN) -> dict[str, Tensor]:
    """What one process has after training on the whole batch."""
    model = Model(kind)
    model.rnn.requires_grad_(not frozen)
    with threads(1):
        train(model, batches())
    return worker.weights(model)


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **ROUNDING, msg=lambda m, name=name: f"{name}: {m}")


TRAINED = [
    case.__name__ for case in worker.CASES if not case.__name__.endswith(("mixed_precision", "in_place", "saves"))
]


@pytest.mark.parametrize("kind", [rnnkern.RNN, nn.RNN], ids=["rnnkern", "torch"])
@pytest.mark.parametrize("case", TRAINED)
def test_trains_as_one_process(answers: Answers, case: str, kind: type[nn.RNNBase]) -> None:
    expected = weights_of_one(frozen=case == "ddp_frozen", kind=kind)
    start = worker.weights(Model())
    for found in answer(answers, case):
        found = found[0] if case.endswith("watched") else found
        assert_weights(found, expected)
        for name, value in found.items():
            assert torch.equal(value, start[name]) == (case == "ddp_frozen" and name.startswith("rnn.")), name


@pytest.mark.parametrize("case", ["ddp_watched", "fsdp_watched"])
def test_norms_of_ranks_add_up(answers: Answers, case: str) -> None:
    """Each rank records its own samples. Its loss is the mean over them, a share of the whole batch's: so its
    gradients are ``world`` times those of one process, and squares add over the ranks."""
    model = Model()
    with rnnkern.watch(model) as flow:
        expected = train(model, batches(), flow=flow)
    assert len(expected) == worker.STEPS
    of_ranks = [norms for _, norms in answer(answers, case)]
    for one, *parts in zip(expected, *of_ranks, strict=True):
        assert one.shape == (2 * 2 + 1, worker.T, worker.B) and one[:4].all()
        torch.testing.assert_close(torch.cat(parts, -1) / worker.WORLD, one, **ROUNDING)
        over_batch = [part.square().sum(-1) for part in parts]
        torch.testing.assert_close(sum(over_batch).sqrt() / worker.WORLD, one.square().sum(-1).sqrt(), **ROUNDING)


def test_mixed_precision(answers: Answers) -> None:
    """FSDP2's bfloat16 weights reach the kernels: the bits of a bfloat16 module, and float32 gradients."""
    shares = batches()[0].float().chunk(worker.WORLD, dim=1)
    module = copy.deepcopy(Model().rnn).float().bfloat16()
    gradients = []
    for x, (output, h_n, _) in zip(shares, answer(answers, "fsdp_mixed_precision"), strict=True):
        module.zero_grad()
        expected = module(x.bfloat16())
        assert output.dtype == torch.bfloat16 and same_bits([output, h_n], expected)
        expected[0].float().square().sum().backward()
        gradients.append([p.grad.float() for p in module.parameters()])
    mean = [sum(g) / worker.WORLD for g in zip(*gradients, strict=True)]
    for *_, found in answer(answers, "fsdp_mixed_precision"):
        assert all(g.dtype == torch.float32 for g in found)
        torch.testing.assert_close(found, mean)


def test_in_place_on_outputs(answers: Answers) -> None:
    expected = worker.gradients_of_h_n_in_place(worker.batch_first(nn.RNN), batches()[0])
    for found in answer(answers, "fsdp_in_place"):
        torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize("kind", [rnnkern.RNN, nn.RNN], ids=["rnnkern", "torch"])
def test_sharded_checkpoint_into_one_process(answers: Answers, directory: Path, kind: type[nn.RNNBase]) -> None:
    """Model and optimizer: training goes on as if nothing had been."""
    model = Model(kind)
    optimizer = adam(model)
    worker.load(model, optimizer, directory / "sharded")
    for saved in answer(answers, "fsdp_saves"):
        assert same_bits(worker.weights(model).values(), saved.values())
    train(model, batches()[2:], optimizer)
    assert_weights(worker.weights(model), weights_of_one())


@pytest.mark.parametrize("kinds", [(nn.RNN, rnnkern.RNN), (rnnkern.RNN, nn.RNN)], ids=["from torch", "to torch"])
def test_checkpoint_between_classes(tmp_path: Path, kinds: tuple[type[nn.RNNBase], type[nn.RNNBase]]) -> None:
    model = Model(kinds[0])
    optimizer = adam(model)
    train(model, batches()[:2], optimizer)
    save(model, optimizer, tmp_path)
    other = Model(kinds[1])
    optimizer = adam(other)
    worker.load(other, optimizer, tmp_path)
    assert same_bits(worker.weights(other).values(), worker.weights(model).values())
    train(other, batches()[2:], optimizer)
    assert_weights(worker.weights(other), weights_of_one())
