"""Grids by name: ours, and those that other projects have published, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from rnnkern.bench.cells import RECORDING, Cell
from rnnkern.bench.timing import MOST_ROUNDS

#: (B, H) of the project's own tables, T = 256, input size = H
OURS = ((1, 64), (1, 256), (1, 1024), (16, 64), (16, 256), (64, 128), (64, 256), (64, 512), (128, 1024))
OURS_T = 256


@dataclass(frozen=True)
class Grid:
    """Cells, the peers that are left out where the user names none, and the seconds that it may take.

    ``cell_seconds`` is for the rounds of one cell; preparing and comparing come on top, within ``total_seconds``.
    """

    about: str
    cells: Callable[[str], Iterator[Cell]]  # of the device
    cell_seconds: float
    total_seconds: float
    without: tuple[str, ...] = ()
    most_rounds: int = MOST_ROUNDS


def _quick(device: str) -> Iterator[Cell]:
    for B, H in ((1, 64), (16, 128), (64, 256)):
        for mode in ("infer", "train", "last", "watch"):
            yield Cell(mode, OURS_T, B, H)


def _ours(device: str) -> Iterator[Cell]:
    for (B, H), mode in product(OURS, ("infer", "train", "last", "watch", "record")):
        yield Cell(mode, OURS_T, B, H)


def _halves(device: str) -> Iterator[Cell]:
    for dtype in ("bf16", "tf32", "fp16") if device == "cuda" else ("bf16",):
        for (B, H), mode in product(OURS, ("infer", "train", "last", "record")):
            yield Cell(mode, OURS_T, B, H, dtype=dtype)


def _cpu(device: str) -> Iterator[Cell]:
    for dtype, (B, H), mode in product(("fp32", "bf16"), OURS, ("infer", "train", "last", "record")):
        yield Cell(mode, OURS_T, B, H, dtype=dtype)


def _watching(device: str) -> Iterator[Cell]:
    for mode in ("record", "watch", "figures"):
        yield Cell(mode, OURS_T, 64, 256)


def _flashrnn(device: str) -> Iterator[Cell]:
    dtype = "bf16" if device == "cuda" else "fp32"
    sizes = [(1024, 16, d, n) for d, n in ((16, 48), (32, 24), (64, 12), (128, 6), (256, 3), (384, 2), (768, 1))]
    for d, n in ((64, 12), (768, 1)):
        sizes += [(1024, B, d, n) for B in (2, 4, 8, 32, 64, 128, 256)]
        sizes += [(T, 16, d, n) for T in (256, 512, 2048)]
    for (T, B, d, n), mode in product(sizes, ("infer", "train")):
        yield Cell(mode, T, B, d, dtype=dtype, heads=n)


def _haste(device: str) -> Iterator[Cell]:
    hidden = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
    for H, B, width, mode in product(hidden, (1, 16, 32, 64, 128), (64, 128, 256, 512), ("infer", "train")):
        yield Cell(mode, 50, B, H, width)


def _flaggems(device: str) -> Iterator[Cell]:
    for T, B, H in ((16, 4, 32), (32, 8, 64), (64, 16, 128)):
        yield Cell("infer", T, B, H)


def _scaling(device: str) -> Iterator[Cell]:
    """One size at a time; the other sizes are those of a middling net."""
    for T in (64, 256, 1024, 4096, 16384, 65536):
        yield Cell("train", T, 8, 128, series="T")
    for B in (1, 4, 16, 64, 256):
        yield Cell("train", 256, B, 128, series="B")
    for H in (32, 64, 128, 256, 512, 1024):
        yield Cell("train", 256, 16, H, series="H")
    if device == "cpu":
        for threads in _counts(torch.get_num_threads()):
            yield Cell("train", 256, 64, 256, threads=threads, series="threads")
    for chunk in (64, 512, 4096, 16384):
        yield Cell("bptt", 16384, 8, 128, chunk=chunk, series="chunk")
    for layers, directions in ((1, 1), (2, 1), (1, 2), (2, 2)):
        yield Cell("train", 256, 16, 256, layers=layers, directions=directions, series="net")
    for T in (4096, 16384, 65536):
        yield Cell("train", T, 8, 128, series="T", quantity="memory")
    for chunk in (512, 4096, 16384):
        yield Cell("bptt", 16384, 8, 128, chunk=chunk, series="chunk", quantity="memory")


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})


def _tiny(device: str) -> Iterator[Cell]:
    """Shows that everything works; its times mean nothing."""
    for mode in ("infer", "train", "last", *RECORDING):
        yield Cell(mode, 8, 2, 16)
    yield Cell("infer", 8, 2, 16, dtype="bf16")
    for T in (8, 16, 32):
        yield Cell("train", T, 2, 16, series="T")
    for chunk in (4, 8):
        yield Cell("bptt", 8, 2, 16, chunk=chunk, series="chunk")
    yield Cell("train", 8, 2, 16, layers=2, directions=2, series="net")
    yield Cell("train", 8, 2, 16, heads=2)


def _thinned(grid: Callable[[str], Iterator[Cell]], keep: Callable[[Cell], bool]) -> Callable[[str], Iterator[Cell]]:
    def cells(device: str) -> Iterator[Cell]:
        return (cell for cell in grid(device) if keep(cell))

    return cells


#: torch.compile takes seconds for every cell, the loop is for what measuring costs
_LONG = ("torch.compile", "cell loop")

GRIDS: dict[str, Grid] = {
    "quick": Grid("three sizes, every mode and peer: what `make bench` runs", _quick, 2.5, 170),
    "ours": Grid("the project's own sizes, every mode, fp32", _ours, 2.0, 600, ("torch.compile",)),
    "halves": Grid("the project's own sizes in bf16, and on a GPU in tf32 and fp16", _halves, 2.0, 600, _LONG),
    "cpu": Grid(
        "the project's own sizes on a CPU, fp32 and bf16, in one table: what `make bench-cpu` runs",
        _cpu,
        2.0,
        1200,
        _LONG,
    ),
    "watching": Grid("what recording adds at B = 64, H = 256, in many rounds", _watching, 60.0, 240, _LONG[:1], 150),
    "scaling": Grid("time and memory against T, B, H, threads, chunks, layers", _scaling, 3.0, 420, (*_LONG, "GEMM")),
    "flashrnn": Grid("FlashRNN's published grid", _flashrnn, 20.0, 3600, _LONG),
    "flashrnn-small": Grid(
        "of FlashRNN's grid what a small machine can do: T ≤ 1024, B 2 and 16, up to 12 heads",
        _thinned(_flashrnn, lambda cell: cell.T <= 1024 and cell.B in (2, 16) and cell.heads in (1, 3, 12)),
        3.0,
        150,
        _LONG,
    ),
    "haste": Grid("Haste's published grid", _haste, 10.0, 3600, _LONG),
    "haste-small": Grid(
        "of Haste's grid what a small machine can do: H ≤ 1024, input size 128, B 1, 16, 64",
        _thinned(_haste, lambda cell: cell.H in (128, 256, 512, 1024) and cell.I == 128 and cell.B in (1, 16, 64)),
        1.0,
        180,
        _LONG,
    ),
    "flaggems": Grid("FlagGems' published grid, forward", _flaggems, 3.0, 120),
    "tiny": Grid("seconds, to see that everything works; its times mean nothing", _tiny, 0.02, 60),
}


def cells_of(name: str, device: str, modes: tuple[str, ...] = ()) -> list[Cell]:
    """The cells of a grid, of the modes asked for, each once."""
    cells = list(dict.fromkeys(GRIDS[name].cells(device)))
    return [cell for cell in cells if not modes or cell.mode in modes]
