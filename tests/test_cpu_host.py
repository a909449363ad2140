"""The CPU kernels' own source for bfloat16 products and tiles, where the processor has neither: compiled over a twin of
csrc/cpu/bfloat16.inc.

It finds wrong indices and shapes; it says nothing of speed, and nothing of how the instructions themselves round. Where
the processor has them, tests/test_isa.py runs the real ones.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    Answers,
    Problem,
    assert_as_good,
    assert_same_nonfinite,
    check,
    drawn,
    make_problem,
    same_bits,
    truth,
    ulps,
)
from torch import Tensor

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "g++")
Run = Callable[..., Answers]
IN_STEPS, BETWEEN_STEPS = 1, 2  # RowProductKind


@pytest.fixture(scope="session")
def library(shared_path: Path) -> ctypes.CDLL:
    """The kernels on tiles."""
    return compiled(shared_path / "cpu_host", tiles=True)


@pytest.fixture(scope="session")
def vectors(shared_path: Path) -> ctypes.CDLL:
    """Those on vectors."""
    return compiled(shared_path / "cpu_host", tiles=False)


def compiled(folder: Path, tiles: bool) -> ctypes.CDLL:
    folder.mkdir(exist_ok=True)
    target = folder / f"{'tiles' if tiles else 'vectors'}.so"
    with target.with_suffix(".lock").open("w") as lock:  # one process compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_library(target, tiles)
    return ctypes.CDLL(str(target))


def compile_library(target: Path, tiles: bool) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-shared", *os.environ.get("CXXFLAGS", "").split()]
    flags.append(f"-DHOST_TILES={int(tiles)}")
    includes = [f"-I{ROOT}/tests/cpu_host", f"-I{ROOT}/csrc"]
    sources = [
        ROOT / "tests/cpu_host/bfloat16.cpp",
        *(ROOT / f"csrc/cpu/{name}.cpp" for name in ("recurrence", "weight_gradient")),
    ]
    alone = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler is slow with a sanitizer in it
    subprocess.run([CXX, *flags, *includes, *sources, "-o", target], check=True, env=alone)


@pytest.fixture
def run(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The answers of the kernels on so many threads."""
    monkeypatch.setenv("RNNKERN_CPU_ISA", "amx")  # the only one that a library has
    return run_of(library)


@pytest.fixture
def run_on_vectors(vectors: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("RNNKERN_CPU_ISA", "amx")
    return run_of(vectors)


def run_of(library: ctypes.CDLL) -> Run:
    def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
        assert tensor is None or tensor.is_contiguous()
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def answers(
        p: Problem,
        threads: int,
        x: Tensor | None = None,
        w_ih: Tensor | None = None,
        grad_x: Tensor | None = None,
        projection: int = BETWEEN_STEPS,
    ) -> Answers:
        assert p.z.dtype == torch.bfloat16
        T, (B, H) = len(p.sizes), p.h0.shape
        offsets = None if p.batch_sizes is None else p.batch_sizes.cumsum(0) - p.batch_sizes
        out = Answers(
            torch.full_like(p.z, 7), torch.full_like(p.z, 7), torch.full_like(p.h0, 7),
            torch.zeros(4, T, B, dtype=torch.float64),
        )  # fmt: skip

        def call(backward: bool, kind: int, rows: Tensor | None, *tensors: Tensor | None) -> None:
            left = library.host_run(
                int(backward), *map(ctypes.c_int64, (T, B, H)), *map(pointer, (p.batch_sizes, offsets)),
                *map(pointer, tensors), pointer(p.w_hh), int(p.reverse), int(p.nonlinearity == "relu"),
                ctypes.c_double(p.clip), kind if rows is not None else 0,
                ctypes.c_int64(0 if w_ih is None else w_ih.shape[1]), pointer(rows), pointer(w_ih), threads,
            )  # fmt: skip
            assert left == 0, "threads have kept their tiles" if left > 0 else "failed"

        call(False, projection, x, p.z, None, out.h, p.h0, None, None)
        call(True, BETWEEN_STEPS, grad_x, p.grad_h, p.h, out.delta, p.grad_hn, out.grad_h0, out.stats)
        return out

    return answers


#: A block has one tile of rows (up to 16) or two (up to 32), and
#: one panel of 32 columns or two.
SIZES = [
    {"T": 5, "B": 1, "H": 1},
    {"T": 5, "B": 2, "H": 33},
    {"T": 5, "B": 3, "H": 64},
    {"T": 5, "B": 4, "H": 31},
    {"T": 5, "B": 5, "H": 64},
    {"T": 4, "B": 16, "H": 96},
    {"T": 4, "B": 17, "H": 70},
    {"T": 4, "B": 31, "H": 32},
    {"T": 4, "B": 32, "H": 65},
    {"T": 3, "B": 33, "H": 128},
    {"T": 3, "B": 81, "H": 40},
    {"lengths": [6, 6, 5, 3, 2, 2, 1], "H": 48},
    {"lengths": [5] * 3 + [4] * 20 + [2] * 12 + [1] * 9, "H": 36},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_tiles(run: Run, size: dict) -> None:
    check_against_truth(run, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_vectors(run_on_vectors: Run, size: dict) -> None:
    check_against_truth(run_on_vectors, size)


def check_against_truth(run: Run, size: dict) -> None:
    for seed, (nonlinearity, clip, with_grad_hn) in enumerate((("tanh", float("inf"), True), ("relu", 0.5, False))):
        for reverse in (False, True):
            case = {"nonlinearity": nonlinearity, "clip": clip, "with_grad_hn": with_grad_hn, "reverse": reverse}
            p = make_problem(**size, dtype=torch.bfloat16, seed=seed, **case)
            others = [make_problem(**size, dtype=torch.bfloat16, seed=10 + i, **case) for i in range(3)]
            ours = run(p, 1)
            check(p, ours, others)
            for t, n in enumerate(p.sizes):
                assert not ours.stats[:, t, n:].any()


@pytest.mark.parametrize("B", [2, 6, 20])
def test_infinite_and_not_a_number(run: Run, B: int) -> None:
    """They are where the truth has them: what fills up the operands stays 0. (Plain PyTorch is no measure: oneDNN's
    products on AMX read beyond a row's end, where 0 times the next row's NaN is NaN.)"""
    p = make_problem(4, B, 37, torch.bfloat16, nonlinearity="relu")
    z = p.z.clone()
    z[1, 0, 3], z[1, 1, 36] = float("inf"), float("nan")
    p = p.replace(z=z, w_hh=p.w_hh.abs())  # no inf - inf
    p = p.replace(h=truth(p).h.bfloat16())
    assert p.h[3, 0].isposinf().all() and p.h[3, 1].isnan().all()
    for name, ours, true in zip(Answers._fields, run(p, 1), truth(p), strict=True):
        assert_same_nonfinite(name, ours, true)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("I", "kind"), [(1, BETWEEN_STEPS), (40, BETWEEN_STEPS), (64, BETWEEN_STEPS), (8, IN_STEPS), (40, IN_STEPS)]
)
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 8), (150, 1, 20), (9, 3, 33), (13, 20, 24), (3, 70, 40), (3, 3, 257)])
def test_projection_on_the_way(run: Run, T: int, B: int, H: int, I: int, kind: int, reverse: bool) -> None:
    """The product with W_ih, in steps or a few of them at a time, is what it is over all of them, forward and back."""
    p = make_problem(T, B, H, torch.bfloat16, reverse=reverse)
    x, w_ih = drawn(5, T, B, I).bfloat16(), (drawn(6, H, I) / I**0.5).bfloat16()
    grad_h = p.grad_h.clone()
    grad_h[T // 3 : T // 2] = 0
    p = p.replace(grad_h=grad_h, h=p.h)

    def computed(threads: int) -> list[Tensor]:
        grad_x = torch.full_like(x, 7)
        return [*run(p.replace(z=torch.full_like(p.z, 7), h=p.h), threads, x, w_ih, grad_x, kind), grad_x]

    def states(dtype: torch.dtype) -> Tensor:
        z, h, w_hh = x.to(dtype) @ w_ih.to(dtype).T, p.h0.to(dtype), p.w_hh.to(dtype)
        found = {}
        for t in reversed(range(T)) if reverse else range(T):
            found[t] = h = torch.tanh(z[t] + h @ w_hh.T)
        return torch.stack([found[t] for t in range(T)])

    h, delta, *_, grad_x = one = computed(1)
    assert_as_good("h", h, states(torch.bfloat16), states(torch.float64))
    assert_as_good("grad_x", grad_x, delta @ w_ih, delta.double() @ w_ih.double())
    for threads in (2, 5):
        assert same_bits(one, computed(threads))


def test_projection_of_nothing(run: Run) -> None:
    """Rows of zeros have no product, unless 0 times infinity asks for one."""
    p = make_problem(80, 2, 9, torch.bfloat16)
    p = p.replace(grad_h=torch.zeros_like(p.grad_h), grad_hn=None)
    w_ih, x = torch.ones(9, 5).bfloat16(), drawn(0, 80, 2, 5).bfloat16()
    for value in (1.0, float("inf")):
        w_ih[3, 4] = value
        grad_x = torch.full_like(x, 7)
        run(p, 1, x, w_ih, grad_x)
        assert (grad_x[..., :4] == 0).all() and (grad_x[..., 4].isnan() if value > 1 else grad_x[..., 4] == 0).all()


@pytest.mark.parametrize("B", [1, 40])
def test_products_are_on_tiles(library: ctypes.CDLL, run: Run, B: int) -> None:
    before = library.host_tile_products()
    run(make_problem(3, B, 64, torch.bfloat16), B)
    assert library.host_tile_products() > before


@pytest.mark.parametrize(
    "size", [{"T": 8, "B": 1, "H": 257}, {"T": 4, "B": 4, "H": 512}, {"T": 4, "B": 37, "H": 64}], ids=str
)
@pytest.mark.parametrize("gain", [1.0, 1e-8, 1e8])  # the squares of some steps leave the range of float32
def test_any_number_of_threads_has_the_same_bits(run: Run, size: dict, gain: float) -> None:
    p = make_problem(**size, dtype=torch.bfloat16, nonlinearity="relu", gain=gain, clip=1e30)
    p = p.replace(z=p.z / 8)
    one = run(p, 1)
    for threads in (2, 5):
        assert same_bits(one, run(p, threads))


@pytest.mark.parametrize("rows", [(0,), (1,), (8,), (9,), (130, 3), (5, 0, 271), (2049,), (700, 1400)], ids=str)
@pytest.mark.parametrize(
    ("H", "I"), [(1, (1, 0)), (8, (8, 8)), (9, (137, 3)), (40, (7, 40)), (150, (0, 8)), (7, (260, 7))], ids=str
)
def test_weight_gradient(library: ctypes.CDLL, run: Run, rows: tuple[int, ...], H: int, I: tuple[int, int]) -> None:
    """Rounded once, with rows that have gaps, and the same bits on any number of threads. A block has 8 rows and
    columns here; 64 rows and 128 columns are packed at once, and 2048 rows are summed in two parts."""
    deltas, *xs = ([drawn(i, n, width + 3).bfloat16()[:, :width] for i, n in enumerate(rows)] for width in (H, *I))
    true = [sum(d.double().T @ x.double() for d, x in zip(deltas, of_one)) for of_one in xs]

    def computed(threads: int) -> list[Tensor]:
        grads = [torch.full(size, 7, dtype=torch.bfloat16) for size in ((H, I[0]), (H, I[1]), (H,))]

        def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
            return (ctypes.c_void_p * len(tensors))(*(v.data_ptr() for v in tensors))

        def integers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
            return (ctypes.c_int64 * len(values))(*values)

        left = library.host_weight_gradient(
            ctypes.c_int64(len(rows)), integers(rows), *map(pointers, (deltas, *xs)), ctypes.c_int64(H + 3),
            integers((I[0] + 3, I[1] + 3)), ctypes.c_int64(H), integers(I), pointers(grads[:2]),
            ctypes.c_void_p(grads[2].data_ptr()), threads,
        )  # fmt: skip
        assert left == 0
        return grads

    one = computed(1)
    for found, exact in zip(one, (*true, sum(d.double().sum(0) for d in deltas))):
        assert found.numel() == 0 or ulps(found, exact, torch.bfloat16) <= 0.5 + sum(rows) * 2.0**-17
    for threads in (2, 5):
        assert same_bits(one, computed(threads))
