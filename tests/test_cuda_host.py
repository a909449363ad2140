"""The CUDA kernels' own source without a GPU: compiled by g++ over a twin of csrc/cuda/ptx.cuh, its threads are fibers.

It finds wrong indices, missing waits and stores that are taken for granted; it says nothing of speed, and nothing of
what only hardware does. Each check is shown to be able to fail: with a wait removed, cases that passed no longer do.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Answers, Problem, assert_same_nonfinite, check, make_problem, truth, ulps
from torch import Tensor

ROOT = Path(__file__).parent.parent
KINDS = {"bfloat16": 0, "float16": 1, "tensorfloat32": 2, "float32": 3, "float64": 4}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tensorfloat32": torch.float32}
REGIMES = {"cta": 0, "cluster": 1, "grid": 2, "step": 3, "best": -1}
MUTATIONS = {"none": 0, "block barrier": 1, "wait for data": 2, "wait for copies": 3, "fence": 4, "mute block": 5}
PATIENCE = 10_000_000  # turns of the scheduler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Failed(Exception):
    """What the kernels told the host, or why they could not run."""


@pytest.fixture(scope="session")
def twin(shared_path: Path) -> ctypes.CDLL:
    folder = shared_path / "twin"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "twin.so").exists():
            compile_twin(folder)
    library = ctypes.CDLL(str(folder / "twin.so"))
    library.twin_run.restype = ctypes.c_longlong
    return library


def compile_twin(folder: Path) -> None:
    kernels = [ROOT / "csrc/cuda" / f"{kind}.cu" for kind in KINDS]
    host = [*(ROOT / "csrc/cuda" / f for f in ("plan.cpp", "job.cpp")), *(ROOT / "tests/cuda_host").glob("*.cpp")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", f"-I{ROOT}/tests/cuda_host", f"-I{ROOT}/csrc"]

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        subprocess.run(["g++", *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*kernels, *host]))
    subprocess.run(["g++", "-shared", "-o", folder / "twin.so", *objects], check=True)


def run(
    twin: ctypes.CDLL,
    p: Problem,
    kind: str,
    regime: str,
    seed: int = 0,
    mutation: str = "none",
    patience: int = PATIENCE,
) -> Answers:
    T, (B, H) = len(p.sizes), p.h0.shape
    assert H % 4 == 0, "the bindings pad what is not"
    offsets = None
    if p.batch_sizes is not None:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), p.batch_sizes.cumsum(0)])

    def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
        assert tensor is None or tensor.is_contiguous()
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def call(backward: bool, *tensors: Tensor | None) -> None:
        message = ctypes.create_string_buffer(200)
        failure = twin.twin_run(
            KINDS[kind], REGIMES[regime], int(backward), T, B, H, *map(pointer, tensors), pointer(offsets),
            pointer(p.w_hh), int(p.reverse), int(p.nonlinearity == "relu"), ctypes.c_double(p.clip),
            ctypes.c_longlong(patience), ctypes.c_ulonglong(seed), MUTATIONS[mutation], message,
        )  # fmt: skip
        if failure:
            raise Failed(message.value.decode() if failure == -1 else f"gave up: {failure:#x}")

    out = Answers(
        torch.full_like(p.z, 7), torch.full_like(p.z, 7), torch.full_like(p.h0, 7),
        torch.zeros(4, T, B, dtype=torch.float64),
    )  # fmt: skip
    call(False, p.z, None, out.h, p.h0, None, None)
    call(True, p.grad_h, p.h, out.delta, p.grad_hn, out.grad_h0, out.stats)
    return out


class Case(NamedTuple):
    size: dict[str, Any]
    regime: str
    kind: str


SIZES: list[tuple[str, dict[str, Any]]] = [
    ("cta", {"T": 5, "B": 9, "H": 36}),
    ("cta", {"T": 3, "B": 70, "H": 32}),  # two tiles of rows in a block
    ("cluster", {"T": 5, "B": 3, "H": 68}),
    ("cluster", {"T": 3, "B": 40, "H": 132}),  # more clusters than run at once
    ("grid", {"T": 6, "B": 3, "H": 72}),
    ("grid", {"T": 3, "B": 70, "H": 100}),  # several groups, several tiles each
    ("grid", {"T": 70, "B": 2, "H": 36}),  # more than twice around the ring
    ("step", {"T": 3, "B": 5, "H": 40}),
    ("step", {"T": 2, "B": 40, "H": 40}),
    ("best", {"T": 2, "B": 3, "H": 288}),
]
CASES = [Case(size, regime, kind) for regime, size in SIZES for kind in ("bfloat16", "tensorfloat32", "float32")]
CASES += [Case({"T": 3, "B": 3, "H": 40}, regime, "float16") for regime in ("cta", "cluster", "grid", "step")]
CASES += [Case({"T": 3, "B": 3, "H": 40}, "step", "float64")]
CASES += [
    Case({"lengths": lengths, "H": 40, "reverse": reverse}, regime, kind)
    for lengths in ([4, 4, 2, 1], [3] * 9 + [1] * 3)
    for reverse in (False, True)
    for regime in ("cta", "cluster", "grid", "step")
    for kind in ("bfloat16", "float32")
]


def name(case: Case) -> str:
    return f"{case.regime}-{case.kind}-" + "-".join(map(str, case.size.values())).replace(" ", "")


def judge(p: Problem, ours: Answers, kind: str) -> None:
    if kind != "tensorfloat32":
        check(p, ours)
        return
    for x, y in zip(ours[:3], truth(p)[:3], strict=True):
        assert ulps(x, y, torch.bfloat16) < 1  # bfloat16 has two bits less than TF32


@pytest.mark.parametrize("case", CASES, ids=name)
def test_against_truth(twin: ctypes.CDLL, case: Case) -> None:
    dtype = DTYPES.get(case.kind) or getattr(torch, case.kind)
    for seed, nonlinearity, clip, with_grad_hn in ((0, "tanh", float("inf"), True), (1, "relu", 0.5, False)):
        p = make_problem(**case.size, dtype=dtype, nonlinearity=nonlinearity, clip=clip, with_grad_hn=with_grad_hn)
        ours = run(twin, p, case.kind, case.regime, seed)
        judge(p, ours, case.kind)
        for t, n in enumerate(p.sizes):
            assert not ours.stats[:, t, n:].any()


@pytest.mark.parametrize(
    ("regime", "H"),
    [("cta", 96), ("cta", 36), ("cluster", 384), ("cluster", 68), ("grid", 96), ("grid", 36), ("step", 36)],
)
def test_infinite_states(twin: ctypes.CDLL, regime: str, H: int) -> None:
    """They stay infinite: a warp whose chunks are fewer than its registers meets nobody else's with its zeros."""
    p = make_problem(4, 2, H, torch.bfloat16, nonlinearity="relu")
    z = p.z.clone()
    z[1, 0, H // 2] = float("inf")
    p = p.replace(z=z, w_hh=p.w_hh.abs() + 2.0**-10)
    p = p.replace(h=truth(p).h.bfloat16())
    assert p.h[2:, 0].isposinf().all() and p.h[:, 1].isfinite().all()
    grad_h = p.grad_h.abs()
    grad_h[2, 1, H // 2] = float("inf")
    p = p.replace(grad_h=grad_h)
    for name, ours, true in zip(Answers._fields, run(twin, p, "bfloat16", regime), truth(p), strict=True):
        assert_same_nonfinite(name, ours, true)


@pytest.mark.parametrize("regime", ["cta", "cluster", "grid"])
def test_the_order_of_things_does_not_matter(twin: ctypes.CDLL, regime: str) -> None:
    p = make_problem(12, 3, 72, torch.bfloat16)
    first = run(twin, p, "bfloat16", regime)
    for seed in range(1, 12):
        assert all(torch.equal(x, y) for x, y in zip(run(twin, p, "bfloat16", regime, seed), first, strict=True))


@pytest.mark.parametrize(
    ("regime", "mutation"),
    [
        ("cta", "block barrier"), ("cta", "wait for copies"),
        ("cluster", "block barrier"), ("cluster", "wait for data"), ("cluster", "wait for copies"),
        ("grid", "block barrier"), ("grid", "wait for data"), ("grid", "wait for copies"), ("grid", "fence"),
    ],
)  # fmt: skip
def test_a_missing_wait_is_seen(twin: ctypes.CDLL, regime: str, mutation: str) -> None:
    # The fence matters where the ring comes round.
    p = make_problem(60 if mutation == "fence" else 12, 3, 72, torch.bfloat16)
    expected = run(twin, p, "bfloat16", regime)
    for seed in range(20):
        try:
            ours = run(twin, p, "bfloat16", regime, seed, mutation)
        except Failed:
            return
        if not all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True)):
            return
    pytest.fail("nobody noticed")


@pytest.mark.parametrize("regime", ["cluster", "grid"])
def test_a_mute_block_is_told(twin: ctypes.CDLL, regime: str) -> None:
    p = make_problem(4, 3, 72, torch.bfloat16)
    with pytest.raises(Failed, match=f"gave up: {REGIMES[regime] + 1:#x}"):
        run(twin, p, "bfloat16", regime, mutation="mute block", patience=20_000)


GPUS = {
    "A100": (108, 163, 0),
    "RTX 3090": (82, 99, 0),
    "H100": (132, 227, 1),
    "H200": (132, 227, 1),
    "MIG": (16, 227, 1),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_plans_fit_their_device(twin: ctypes.CDLL, gpu: str, kind: str) -> None:
    multiprocessors, kilobytes, clusters = GPUS[gpu]
    for H in (*range(4, 600, 4), *range(600, 9000, 212)):
        for B in (1, 8, 9, 64, 65, 300, 5000):
            for backward in (0, 1):
                out = (ctypes.c_int * 10)()
                device = (multiprocessors, kilobytes * 1024, 1, clusters)
                assert twin.twin_plan(*device, KINDS[kind], B, H, backward, out) == 0
                regime, KC, NT, slabs, parts, chunks, members, groups, tiles, shared = out
                assert shared <= kilobytes * 1024
                assert slabs * parts <= 8 and members * slabs * 32 >= H
                assert parts * chunks * 64 >= H * {"bfloat16": 2, "float16": 2, "float64": 8}.get(kind, 4)
                assert tiles * NT * 8 >= B and 0 < groups <= tiles
                if regime == REGIMES["grid"]:
                    assert members * groups <= multiprocessors and parts == 8
                if regime == REGIMES["cluster"]:
                    assert clusters and members in (2, 4, 8) and parts >= 2 and chunks <= KC
