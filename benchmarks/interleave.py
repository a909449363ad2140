"""Times that can be compared: every round of ours follows a round of each peer, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

#: what one cell of the grid may take, in seconds
BUDGET = 4.0
MIN_ROUNDS, MAX_ROUNDS = 5, 60


def compare(benchmark: Any, ours: Callable[[], object], peers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of ``ours`` (key "rnnkern", as pytest-benchmark measured it) and of each peer."""
    times: dict[str, list[float]] = {name: [] for name in peers}

    def one_of_each_peer() -> None:
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            times[name].append(time.perf_counter() - start)

    one_of_each_peer()  # warm caches, thread teams and the allocator
    ours()
    start = time.perf_counter()
    one_of_each_peer()
    ours()
    rounds = int(BUDGET / (time.perf_counter() - start))
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(ours, setup=one_of_each_peer, rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    return {"rnnkern": benchmark.stats.stats.median, **medians}
