"""The yardstick: one product over all steps at once, which no recurrence can beat."""

from __future__ import annotations

import torch
from torch import nn

from rnnkern.bench.cells import MODES, Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Problem


class Gemm(Peer):
    name = "GEMM"
    devices = ("cpu", "cuda")
    compared = False
    modes = tuple(mode for mode in MODES if mode != "bptt")

    def refuses_cell(self, cell: Cell) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Work:
        """(T·B, H) by (H, H). It answers nothing, as it computes something else; its rate is all that is used."""
        cell = problem.cell
        rows = torch.rand(cell.T * cell.B, cell.H, device=problem.device).to(cell.precision.dtype)
        w = problem.weights[0]["weight_hh_l0"]

        def call(i: int) -> torch.Tensor:
            with torch.no_grad():
                return nn.functional.linear(rows, w)

        return Work(call, lambda result: {})
