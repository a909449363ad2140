"""Modules of PyTorch whose call is a CUDA graph, replayed: what is left when nothing is launched by hand.

Not yet run: there was no GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.peers.torch_modules import TorchModule
from rnnkern.bench.problem import Answers, Problem

#: Inputs that get a graph of their own, each with all its memory.
MOST_GRAPHS = 4
WARM_UP = 3


class Graphed(Peer):
    """Another peer, captured once for each of a few inputs."""

    devices = ("cuda",)
    modes = ("infer", "train", "last")

    def __init__(self, peer: TorchModule) -> None:
        self.peer = peer
        self.name = f"{peer.name} (graph)"  # type: ignore[misc]

    def unavailable(self, device: str) -> str | None:
        return super().unavailable(device) or self.peer.unavailable(device)

    def refuses(self, problem: Problem) -> str | None:
        return super().refuses(problem) or self.peer.refuses(problem)

    def refuses_cell(self, cell: Cell) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Work:
        work = self.peer.prepare(problem)
        graphs: list[torch.cuda.CUDAGraph] = []
        results: list[Any] = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capturing needs a stream of its own, and calls before it that allocate
            for _ in range(WARM_UP):
                work.call(0)
        torch.cuda.current_stream().wait_stream(side)
        # The first input comes last: the gradients that PyTorch then holds are those of its graph.
        for i in reversed(range(min(len(problem.inputs), MOST_GRAPHS))):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = work.call(i)
            graphs.insert(0, graph)
            results.insert(0, result)

        def call(i: int) -> Any:
            graphs[i % len(graphs)].replay()
            return results[i % len(graphs)]

        def answers(result: Any) -> Answers:
            torch.cuda.synchronize()
            return work.answers(result)

        return Work(call, answers, f"CUDA graph, {len(graphs)} inputs in turn", work.close)
