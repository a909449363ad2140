"""rnnkern.RNN on a GPU against torch.nn.RNN (cuDNN): one layer, input size = H, T steps.

    python benchmarks/bench_gpu.py --out results.json [--backends triton,cuda] [--dtypes bf16,fp16,tf32,fp32]
                                   [--hidden 64,...] [--batch 1,...] [--steps 1024]

infer    forward without gradients
train    forward, and backward from a given gradient at every step to x and all weights
watched  train, with the norm of the gradient at every step from inside the kernel

Every round runs each contender once, in turn (A B C A B C ...), between CUDA events; what is kept is the median. The
answers of all are compared with nn.RNN's in float64 before anything is timed: a contender whose output or gradients
are off by more than the dtype explains is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import rnnkern
from rnnkern.backends import BACKENDS, triton

#: name -> (dtype, whether PyTorch's switch lets an RNN use TF32, largest relative error that the dtype explains)
PRECISIONS = {
    "bf16": (torch.bfloat16, True, 5e-2),
    "fp16": (torch.float16, True, 1e-2),
    "tf32": (torch.float32, True, 1e-2),
    "fp32": (torch.float32, False, 1e-4),
}
HIDDEN = "64,128,256,384,512,768,1024,2048,4096"
BATCH = "1,8,16,64,128,256,1024"
#: How many rounds a cell has at least and at most.
ROUNDS = (5, 30)
MODES = ("infer", "train", "watched")


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs a GPU that torch can use")
    console = Console(width=110, force_terminal=sys.stdout.isatty())
    cells = [(p, H, B) for p in options.dtypes for H in options.hidden for B in options.batch]
    results = []
    for precision, H, B in track(cells, "benchmarks", console=console, disable=not sys.stdout.isatty()):
        results += cell(precision, options.steps, B, H, options.backends, options.seconds)
        save(options.out, results)
    print_table(console, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = (lambda s: s.split(",")), (lambda s: [int(n) for n in s.split(",")])
    here = [name for name in ("cuda", "triton") if name in BACKENDS and BACKENDS[name].unavailable() is None]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", type=words, default=here)
    parser.add_argument("--dtypes", type=words, default=list(PRECISIONS))
    parser.add_argument("--hidden", type=numbers, default=numbers(HIDDEN))
    parser.add_argument("--batch", type=numbers, default=numbers(BATCH))
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.5, help="that the rounds of one cell and mode may take")
    return parser.parse_args()


def cell(precision: str, T: int, B: int, H: int, names: list[str], seconds: float) -> list[dict[str, Any]]:
    """One row for each contender and mode."""
    dtype, tf32, tolerance = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.manual_seed(0)
    theirs = nn.RNN(H, H, device="cuda", dtype=dtype)
    models: dict[str, nn.RNN] = {"nn.RNN": theirs}
    for name in names:
        models[name] = rnnkern.RNN(H, H, device="cuda", dtype=dtype)
        models[name].load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x) / T
    what = {"dtype": precision, "T": T, "B": B, "H": H}
    rows: list[dict[str, Any]] = []
    errors = compare(theirs, models, x, gradient, names)
    for mode in MODES:
        runs: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            if name == "nn.RNN" and mode == "watched":
                continue
            if errors[name] is None or errors[name] > tolerance:
                rows.append({**what, "mode": mode, "contender": name, "error": errors[name], "us_per_step": None})
            else:
                runs[name] = run(mode, name, model, x, gradient)
        for name, times in measure(runs, seconds).items():
            median, low, high = (times[int(q * (len(times) - 1))] for q in (0.5, 0.1, 0.9))
            row = {**what, "mode": mode, "contender": name, "error": errors[name], "rounds": len(times)}
            row.update(us_per_step=median / T, low=low / T, high=high / T)
            if name == "triton":
                row["plan"] = str(triton.plan_for(dtype, H, B, x.device))
            rows.append(row)
    return rows


def run(mode: str, name: str, model: nn.RNN, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def infer() -> None:
        with torch.no_grad():
            model(x)

    def train() -> None:
        model.zero_grad()
        x.grad = None
        model(x)[0].backward(gradient)

    def watched() -> None:
        with rnnkern.watch(model):
            train()

    chosen = {"infer": infer, "train": train, "watched": watched}[mode]
    if name == "nn.RNN":
        return chosen

    def with_backend() -> None:
        with rnnkern.use_backend(name):
            chosen()

    return with_backend


def answers(model: nn.RNN, x: Tensor, gradient: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)[0]
    return [v.double() for v in (y, *torch.autograd.grad(y, [x, *model.parameters()], gradient))]


def compare(
    theirs: nn.RNN, models: dict[str, nn.RNN], x: Tensor, gradient: Tensor, names: list[str]
) -> dict[str, float | None]:
    """Each contender's largest relative error over 64 steps, or None where it fails."""
    x, gradient = x.detach()[:64, :64], gradient[:64, :64]
    truth_model = nn.RNN(x.shape[2], x.shape[2], device="cuda", dtype=torch.float64)
    truth_model.load_state_dict(theirs.state_dict())
    truth = answers(truth_model, x.double(), gradient.double())

    def error(name: str, model: nn.RNN) -> float | None:
        try:
            with rnnkern.use_backend(name if name in names else "auto"):
                found = answers(model, x, gradient)
        except RuntimeError as raised:
            print(f"{name} fails at H = {x.shape[2]}, {x.dtype}: {str(raised).splitlines()[0]}", file=sys.stderr)
            return None
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))

    return {name: error(name, model) for name, model in models.items()}


def measure(runs: dict[str, Callable[[], object]], limit: float) -> dict[str, list[float]]:
    """Sorted microseconds of each, in turns."""

    def one(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        return start, end

    events: dict[str, list[Any]] = {name: [] for name in runs}
    for call in runs.values():
        call()
    warm = [one(call) for call in runs.values()]
    torch.cuda.synchronize()
    seconds = sum(a.elapsed_time(b) for a, b in warm) / 1e3
    for _ in range(min(max(int(limit / max(seconds, 1e-6)), ROUNDS[0]), ROUNDS[1])):
        for name, call in runs.items():
            events[name].append(one(call))
    torch.cuda.synchronize()
    return {name: sorted(a.elapsed_time(b) * 1e3 for a, b in pairs) for name, pairs in events.items()}


def save(path: Path, results: list[dict[str, Any]]) -> None:
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    machine = {
        "device": properties.name,
        "driver": driver.stdout.strip(),
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.version("triton"),
        "python": platform.python_version(),
        "rnnkern": rnnkern.__version__,
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "cells": results}, indent=0) + "\n")


def commit() -> str:
    """The commit that is measured, "+" behind it where files differ from it."""
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    return (head.stdout.strip() + ("+" if changed.stdout.strip() else "")) or "unknown"


def print_table(console: Console, results: list[dict[str, Any]]) -> None:
    """Microseconds a step, and nn.RNN's over ours; watched against train of the same backend."""
    table = Table("dtype", "H", "B", "mode", "contender", "µs/step", "ratio")
    times = {(r["dtype"], r["H"], r["B"], r["mode"], r["contender"]): r["us_per_step"] for r in results}
    for (dtype, H, B, mode, name), us in times.items():
        peer = times.get((dtype, H, B, "train", name) if mode == "watched" else (dtype, H, B, mode, "nn.RNN"))
        ratio = f"{peer / us:.2f}x" if us and peer else ""
        table.add_row(dtype, str(H), str(B), mode, name, f"{us:.3f}" if us else "wrong or failed", ratio)
    console.print(table)


if __name__ == "__main__":
    main()
