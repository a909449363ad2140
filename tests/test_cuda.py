"""What only the CUDA backend promises: every regime, graphs, streams, the same bits, and an end to every wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import need
from helpers import INF, Answers, Problem, answers, check, make_problem, same_bits, truth, ulps
from torch import Tensor

from rnnkern.backends import BACKENDS

CUDA = BACKENDS["cuda"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = [(1, 1, 1), (5, 7, 13), (3, 5, 67), (40, 9, 72), (4, 33, 96), (3, 16, 256), (70, 12, 128)]
PACKED = [([1], 5), ([6, 5, 4, 2, 1], 31), ([40] * 3 + [20] * 9 + [2], 64)]
CASES = [{"T": T, "B": B, "H": H} for T, B, H in DENSE] + [{"lengths": lengths, "H": H} for lengths, H in PACKED]

regimes = pytest.mark.parametrize("regime", ["cta", "cluster", "grid", "step"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def full_accuracy() -> Iterator[None]:
    need("cuda")
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before
    torch.cuda.synchronize()


def moved(p: Problem, device: str = "cuda") -> Problem:
    """The same problem there; the sizes stay on the CPU."""
    there = {k: v.to(device) for k, v in vars(p).items() if isinstance(v, Tensor) and k != "batch_sizes"}
    return dataclasses.replace(p, **there)


def run(p: Problem) -> Answers:
    return Answers(*(x.cpu() for x in answers(CUDA, moved(p))))


def serve(monkeypatch: pytest.MonkeyPatch, regime: str, p: Problem) -> None:
    """Ask for the regime; skip where the device or the size has no room for it."""
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", regime)
    try:
        CUDA.recurrence(*moved(p).forward)
    except RuntimeError as error:
        if "cannot serve" not in str(error):
            raise
        pytest.skip(str(error))


@regimes
@dtypes
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_regimes(
    monkeypatch: pytest.MonkeyPatch, regime: str, dtype: torch.dtype, reverse: bool, nonlinearity: str, case: Any
) -> None:
    p = make_problem(**case, dtype=dtype, reverse=reverse, nonlinearity=nonlinearity)
    serve(monkeypatch, regime, p)
    ours = run(p)
    check(p, ours)
    q = moved(p)
    z = q.z.clone()
    CUDA.recurrence_(z, *q.forward[1:])
    without_stats = CUDA.recurrence_backward(*q.backward)
    assert same_bits([z.cpu(), *(x.cpu() for x in without_stats)], [ours.h, ours.delta, ours.grad_h0])


@dtypes
@pytest.mark.parametrize("size", [(40, 1024), (70, 768), (20, 2048), (3, 2100), (200, 512), (9, 4500)], ids=str)
def test_large(dtype: torch.dtype, size: tuple[int, int]) -> None:
    p = make_problem(3, *size, dtype)
    check(p, run(p))


@regimes
def test_tf32_where_pytorch_allows_it(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    p = make_problem(20, 12, 136)
    serve(monkeypatch, regime, p)
    exact, true = run(p), truth(p)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    fast = run(p)
    assert not same_bits(fast[:1], exact[:1])
    for x, y in zip(fast[:3], true[:3], strict=True):
        assert ulps(x, y, torch.bfloat16) < 1  # bfloat16 has two bits less than TF32
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert same_bits(run(p), exact)


@regimes
def test_same_bits_on_every_run(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    p = moved(make_problem(100, 20, 200, torch.bfloat16))
    serve(monkeypatch, regime, p)
    first = answers(CUDA, p)
    for _ in range(100):
        assert same_bits(answers(CUDA, p), first)


@regimes
def test_cuda_graph_on_another_stream(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    for case in ({"T": 30, "B": 10, "H": 100}, {"lengths": [600, 20, 7], "H": 36}):
        p = moved(make_problem(**case, dtype=torch.bfloat16))
        serve(monkeypatch, regime, p)
        expected = answers(CUDA, p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = answers(CUDA, p)
        for x in got:
            x.fill_(7)
        graph.replay()
        graph.replay()
        assert same_bits(got, expected)


def test_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "grid")
    ps = [moved(make_problem(200, 8, 512, torch.bfloat16, reverse=r, seed=int(r))) for r in (False, True)]
    expected = [answers(CUDA, p) for p in ps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in ps]
    for _ in range(20):
        got = []
        for p, stream in zip(ps, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(answers(CUDA, p))
        torch.cuda.synchronize()
        for x, y in zip(got, expected, strict=True):
            assert same_bits(x, y)


@pytest.mark.parametrize("regime", ["cluster", "grid"])
def test_a_wait_that_runs_out(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    p = moved(make_problem(50, 8, 512, torch.bfloat16))
    serve(monkeypatch, regime, p)
    expected = answers(CUDA, p)
    monkeypatch.setenv("RNNKERN_CUDA_PATIENCE", "-1")
    CUDA.recurrence(*p.forward)
    torch.cuda.synchronize()  # it has left
    monkeypatch.delenv("RNNKERN_CUDA_PATIENCE")
    with pytest.raises(RuntimeError, match=rf"regime '{regime}', block \d+ waited in vain for the state of step \d+"):
        CUDA.recurrence(*p.forward)
    assert same_bits(answers(CUDA, p), expected)


def test_unknown_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "warp")
    with pytest.raises(RuntimeError, match="expected cta, cluster, grid or step"):
        CUDA.recurrence(*moved(make_problem(1, 1, 4)).forward)


def test_out_of_memory_leaves_the_gpu_usable() -> None:
    one = torch.ones((), device="cuda", dtype=torch.bfloat16)
    H = 1 << 14
    with pytest.raises(RuntimeError, match=r"new_empty|out of memory"):
        CUDA.recurrence(one.expand(1 << 12, 1 << 12, H), one.expand(1 << 12, H), one.expand(H, H), None, False, "tanh")
    p = make_problem(5, 4, 64)
    check(p, run(p))


def test_clip() -> None:
    p = make_problem(6, 5, 36, clip=0.3)
    check(p, run(p))
    assert p.clip != INF
