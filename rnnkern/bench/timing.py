"""Times that can be compared: in every round each peer has one turn, and rounds begin with another peer each.

So whatever else the machine does falls on all alike, and the ratio of two peers can be taken round by round. Before its
turn a peer makes untimed calls: its threads wake and its memory comes back into the caches, and what the threads of the
peer before still do (most thread pools go on spinning for a while) falls into them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

Call = Callable[[int], Any]

#: seconds of untimed calls before a turn; a call that takes so many times as long needs none
SETTLE, LONG = 3e-3, 20
#: seconds that a turn takes at least: short calls are repeated in it
TURN = 2e-3
#: of a cell
LEAST_ROUNDS, MOST_ROUNDS = 5, 30  # the latter where the grid says nothing else


@dataclass(frozen=True)
class Times:
    """Seconds of a call in each round (the mean of a turn's calls), and how many calls a turn had.

    ``complete`` is False where the peer was too slow for rounds: then there is one time, of one call.
    """

    seconds: list[float]
    calls: int
    complete: bool = True


def interleaved(
    calls: Mapping[str, Call], budget: float, device: str = "cpu", most_rounds: int = MOST_ROUNDS
) -> dict[str, Times]:
    """Rounds of all calls within about ``budget`` seconds, or the least number of them; a call that alone takes longer
    than that has no rounds, but one time.

    All have been called before: nothing compiles or allocates for the first time here.
    """
    turn = _turn_on_gpu if device == "cuda" else _turn
    once = {name: _once(turn, call, budget) for name, call in calls.items()}
    slow = {name for name, seconds in once.items() if seconds > budget}
    repeats = {name: max(1, round(TURN / seconds)) for name, seconds in once.items() if name not in slow}
    cost = sum(once[name] * repeats[name] + _settling(once[name]) for name in repeats)
    rounds = min(max(int(budget / cost), LEAST_ROUNDS), most_rounds) if repeats else 0
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    names = list(repeats)
    with _undisturbed():
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                _settle(calls[name], once[name])
                seconds[name].append(turn(calls[name], repeats[name], number))
    times = {name: Times(seconds[name], repeats[name]) for name in names}
    return {name: times.get(name, Times([once[name]], 1, complete=False)) for name in calls}


def _once(turn: Callable[[Call, int, int], float], call: Call, budget: float) -> float:
    """Of one call: the best of three where they are short, as the first may fall into what another peer still does."""
    first = turn(call, 1, 0)
    return first if first > max(budget / LEAST_ROUNDS, 0.1) else min(first, turn(call, 1, 0), turn(call, 1, 0))


def _settling(seconds: float) -> float:
    return 0.0 if seconds > LONG * SETTLE else max(SETTLE, seconds)


def _settle(call: Call, seconds: float) -> None:
    if not _settling(seconds):
        return
    end = perf_counter() + SETTLE
    while True:
        call(0)
        if perf_counter() >= end:
            return


def _turn(call: Call, repeats: int, number: int) -> float:
    start = perf_counter()
    for i in range(repeats):
        call(i)
    return (perf_counter() - start) / repeats


def _turn_on_gpu(call: Call, repeats: int, number: int) -> float:
    """Between CUDA events, on inputs that go round and are together larger than the second cache."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for i in range(repeats):
        call(number * repeats + i)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Python's garbage collector, as in timeit."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
