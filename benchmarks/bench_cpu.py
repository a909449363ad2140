"""rnnkern.RNN against torch.nn.RNN on a CPU, one layer, input size = H; the other peers are those of `make bench`.

infer    forward without gradients
train    forward, and backward from a given gradient at every step to x and all weights
last     the same with a loss on the last step alone
watched  train, with rnnkern.watch() recording every step, against train without
T=1 ...  infer with short sequences, B = 1, as in streaming: mostly what a call costs in Python
both     train, with both directions
deep     train, two layers with both directions, against twice a single one of the same input size: what a layer costs
product  the recurrence operator's product against one GEMM over all steps: the share of the machine's GEMM rate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from interleave import compare

import rnnkern
from rnnkern.bench.cells import Cell
from rnnkern.bench.engine import prepared_and_compared
from rnnkern.bench.grids import OURS, OURS_T
from rnnkern.bench.peers import PEERS
from rnnkern.bench.problem import Problem

OUR_PEER = "rnnkern cpu"


@contextmanager
def calls(*tasks: tuple[str, Cell]) -> Iterator[list[Callable[[], object]]]:
    """What each peer's cell computes, once it has been compared with the truth."""
    works = []
    try:
        for peer, cell in tasks:
            row: dict[str, object] = {}
            work = prepared_and_compared(PEERS[peer], Problem(cell, torch.get_num_threads()), row)
            assert work is not None, f"{peer}, {cell}: {row}"
            works.append(work)
        yield [lambda work=work: work.call(0) for work in works]
    finally:
        for work in works:
            work.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("B", "H"), OURS)
@pytest.mark.parametrize("mode", ["infer", "train", "last"])
def test_against_nn_rnn(benchmark, record_cell, mode, B, H, dtype):
    cell = Cell(mode, OURS_T, B, H, dtype=dtype)
    with calls((OUR_PEER, cell), ("nn.RNN", cell)) as (ours, theirs):
        record_cell(mode, dtype, B, H, OURS_T, compare(benchmark, ours, {"nn.RNN": theirs}))


@pytest.mark.parametrize(("B", "H"), OURS)
def test_watched(benchmark, record_cell, B, H):
    watched, plain = (Cell(mode, OURS_T, B, H) for mode in ("record", "train"))
    with calls((OUR_PEER, watched), (OUR_PEER, plain)) as (ours, unwatched):
        record_cell("watched", "fp32", B, H, OURS_T, compare(benchmark, ours, {"unwatched": unwatched}))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_short(benchmark, record_cell, steps):
    times = 200  # calls a round

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def calling() -> None:
            for _ in range(times):
                call()

        return calling

    cell = Cell("infer", steps, 1, 64)
    with calls((OUR_PEER, cell), ("nn.RNN", cell)) as (ours, theirs):
        seconds = compare(benchmark, repeated(ours), {"nn.RNN": repeated(theirs)})
    record_cell(f"T={steps}", "fp32", 1, 64, steps * times, seconds)


def training(cls: type[torch.nn.Module], B: int, H: int, I: int, layers: int = 1) -> Callable[[], None]:
    """A training step of an RNN with both directions."""
    module = cls(I, H, layers, bidirectional=True)
    x, grad = torch.randn(OURS_T, B, I, requires_grad=True), torch.randn(OURS_T, B, 2 * H)

    def step() -> None:
        module.zero_grad()
        x.grad = None
        module(x)[0].backward(grad)

    return step


DIRECTIONS = [(1, 64), (1, 256), (16, 64), (16, 256), (64, 128), (64, 256)]


@pytest.mark.parametrize(("B", "H"), DIRECTIONS)
def test_both(benchmark, record_cell, B, H):
    ours, theirs = (training(cls, B, H, H) for cls in (rnnkern.RNN, torch.nn.RNN))
    record_cell("both", "fp32", B, H, OURS_T, compare(benchmark, ours, {"nn.RNN": theirs}))


@pytest.mark.parametrize(("B", "H"), DIRECTIONS)
def test_deep(benchmark, record_cell, B, H):
    two_layers, one_layer = (training(rnnkern.RNN, B, H, 2 * H, layers) for layers in (2, 1))

    def twice() -> None:
        one_layer()
        one_layer()

    record_cell("deep", "fp32", B, H, OURS_T, compare(benchmark, two_layers, {"twice one": twice}))


@pytest.mark.parametrize(("B", "H"), OURS)
def test_product(benchmark, record_cell, B, H):
    z, h0 = torch.randn(OURS_T, B, H) / H, torch.zeros(B, H)
    w = Problem(Cell("infer", 1, 1, H), 1).weights[0]["weight_hh_l0"]
    seconds = compare(
        benchmark,
        lambda: torch.ops.rnnkern.recurrence(z, h0, w, None, False, "tanh"),
        {"GEMM": lambda: torch.nn.functional.linear(z, w)},
    )
    record_cell("product", "fp32", B, H, OURS_T, seconds)
