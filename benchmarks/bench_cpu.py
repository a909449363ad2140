"""rnnkern.RNN against torch.nn.RNN on a CPU, one layer, input size = H.

infer    forward without gradients
train    forward, and backward from a given gradient at every step to x and all weights
last     the same with a loss on the last step alone
watched  train, with rnnkern.watch() recording every step, against train without
T=1 ...  infer with short sequences, B = 1, as in streaming: mostly what a call costs in Python
product  the recurrence operator's product against one GEMM over all steps: the share of the machine's GEMM rate
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleave import compare
from torch import nn

import rnnkern

T = 256
#: (B, H)
GRID = [(1, 64), (1, 256), (1, 1024), (16, 64), (16, 256), (64, 128), (64, 256), (64, 512), (128, 1024)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(kind: type, H: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind(H, H, dtype=dtype)


def infer(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def train(model: nn.Module, x: torch.Tensor, last: bool = False) -> Callable[[], object]:
    gradient = torch.randn(x.shape[1:] if last else x.shape, dtype=x.dtype) / x.numel()

    def run() -> None:
        model.zero_grad()
        x.grad = None
        output, _ = model(x)
        torch.autograd.backward(output[-1] if last else output, gradient)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H"), GRID)
@pytest.mark.parametrize("mode", ["infer", "train", "last"])
def test_against_nn_rnn(benchmark, record_cell, mode, B, H, dtype):
    x = torch.randn(T, B, H, dtype=DTYPES[dtype], requires_grad=mode != "infer")
    ours, theirs = (build(kind, H, DTYPES[dtype]) for kind in (rnnkern.RNN, nn.RNN))
    run = infer if mode == "infer" else train
    options = {"last": True} if mode == "last" else {}
    seconds = compare(benchmark, run(ours, x, **options), {"nn.RNN": run(theirs, x, **options)})
    record_cell(mode, dtype, B, H, T, seconds)


@pytest.mark.parametrize(("B", "H"), GRID)
def test_watched(benchmark, record_cell, B, H):
    x = torch.randn(T, B, H, requires_grad=True)
    watched, plain = build(rnnkern.RNN, H, torch.float32), build(rnnkern.RNN, H, torch.float32)
    with rnnkern.watch(watched) as flow:
        step = train(watched, x)

        def ours() -> None:
            step()
            flow.step()

        seconds = compare(benchmark, ours, {"unwatched": train(plain, x)})
        assert flow.read() is not None
    record_cell("watched", "fp32", B, H, T, seconds)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_short(benchmark, record_cell, steps):
    calls = 200  # a round

    def repeated(run: Callable[[], object]) -> Callable[[], None]:
        def calling() -> None:
            for _ in range(calls):
                run()

        return calling

    x = torch.randn(steps, 1, 64)
    ours, theirs = (repeated(infer(build(kind, 64, torch.float32), x)) for kind in (rnnkern.RNN, nn.RNN))
    record_cell(f"T={steps}", "fp32", 1, 64, steps * calls, compare(benchmark, ours, {"nn.RNN": theirs}))


@pytest.mark.parametrize(("B", "H"), GRID)
def test_product(benchmark, record_cell, B, H):
    z, h0 = torch.randn(T, B, H) / H, torch.zeros(B, H)
    w = build(nn.RNN, H, torch.float32).weight_hh_l0.detach()
    seconds = compare(
        benchmark,
        lambda: torch.ops.rnnkern.recurrence(z, h0, w, None, False, "tanh"),
        {"GEMM": lambda: torch.nn.functional.linear(z, w)},
    )
    record_cell("product", "fp32", B, H, T, seconds)
