"""What watching adds to a training step at B = 64, H = 256, T = 256, in paired rounds of everybody in turn.

    python benchmarks/watching.py [SECONDS]

plain     a training step of rnnkern.RNN
watched   the same, recorded by rnnkern.watch and not read
full      the same, with every figure and the verdict read after the step
nn.RNN    a training step of torch.nn.RNN
loop      what people write by hand: nn.RNNCell step by step, retain_grad() on every state, the norms at the end
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import rnnkern

T, B, H = 256, 64, 256


def main(seconds: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(T, B, H, requires_grad=True)
    gradient = torch.randn(T, B, H) / (T * B)
    models = {name: kind(H, H) for name, kind in (("plain", rnnkern.RNN), ("watched", rnnkern.RNN), ("nn", nn.RNN))}
    cell = nn.RNNCell(H, H)
    for model in models.values():
        model.load_state_dict(models["plain"].state_dict())
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in models["plain"].state_dict().items()})

    def step(name: str) -> None:
        models[name].zero_grad()
        x.grad = None
        models[name](x)[0].backward(gradient)

    def watched() -> None:
        step("watched")
        flow.step()

    def full() -> None:
        watched()
        record = flow.read()
        assert record is not None
        _ = record.gain, record.cosine, record.horizon, record.slope, record.omega, record.zeros, record.verdict()

    def loop() -> Tensor:
        cell.zero_grad()
        x.grad = None
        h, states = None, []
        for x_t in x:
            h = cell(x_t, h)
            h.retain_grad()
            states.append(h)
        torch.stack(states).backward(gradient)
        return torch.stack([h.grad for h in states]).norm(dim=(1, 2))

    with rnnkern.watch(models["watched"]) as flow:
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda: step("plain"),
            "watched": watched,
            "full": full,
            "nn.RNN": lambda: step("nn"),
            "loop": loop,
        }
        times = in_turns(calls, seconds)
    print(
        f"{len(times['plain'])} rounds, medians in ms: "
        + ", ".join(f"{n} {np.median(t):.1f}" for n, t in times.items())
    )
    for name, base in (("watched", "plain"), ("full", "plain"), ("loop", "nn.RNN")):
        added = times[name] - times[base]
        low, middle, high = np.quantile(added, [0.25, 0.5, 0.75])
        share = np.quantile(added / times[base], [0.25, 0.5, 0.75])
        percent = " ".join(f"{100 * s:+.1f}" for s in share)
        print(f"{name} over {base}: {middle:+.2f} ms ({low:+.2f} to {high:+.2f}); quartiles in % {percent}")


def in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    """Milliseconds of each; every round begins with another one."""
    names, times = list(calls), {name: list[float]() for name in calls}
    for call in calls.values():
        call()
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - begin))
        turn += 1
    return {name: np.array(t) for name, t in times.items()}


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
