"""OpenVINO: a model of one RNNSequence between transpositions, which its CPU plugin takes out again.

The operator is batch-first, its CPU kernel time-first. With these transpositions, which are those of the ONNX importer,
the compiled graph has reshapes alone around the kernel; without them it reorders input and output.
"""

from __future__ import annotations

import sys
from typing import ClassVar

import numpy as np
import torch

from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem


class OpenVino(Peer):
    name = "OpenVINO"
    needs: ClassVar[dict[str, str]] = {"openvino": "openvino"}
    modes = ("infer",)

    def unavailable(self, device: str) -> str | None:
        # Importing OpenVINO would start a process that reports the use of it; without its module nothing does.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        return super().unavailable(device)

    def refuses_cell(self, cell: Cell) -> str | None:
        if cell.dtype == "fp32":
            return super().refuses_cell(cell)
        from openvino import Core

        capabilities = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if cell.dtype.upper() not in capabilities:
            return f"computes {', '.join(capabilities)} on this processor, not {cell.dtype}"
        return super().refuses_cell(cell)

    def prepare(self, problem: Problem) -> Work:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": problem.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[problem.cell.dtype],
        }
        compiled = openvino.Core().compile_model(_model(problem), "CPU", settings)
        request = compiled.create_infer_request()
        # numbers of bf16 are float32's too, and the plugin rounds back to them without loss
        x = problem.inputs[0].float().numpy()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        output = request.get_output_tensor().data

        def call(i: int, shared: np.ndarray = x) -> None:  # the request does not keep its input
            request.infer()

        def answers(result: None) -> Answers:
            return {"output": torch.from_numpy(np.array(output, np.float64)).squeeze(1)}

        return Work(call, answers, "latency hint, one stream, input shared")


def _model(problem: Problem) -> object:
    import openvino
    from openvino import opset13 as ops

    cell, w = problem.cell, {name.removesuffix("_l0"): v.float() for name, v in problem.weights[0].items()}
    x = ops.parameter([cell.T, cell.B, cell.I], np.float32, name="x")
    sequence = ops.rnn_sequence(
        ops.transpose(x, ops.constant(np.array([1, 0, 2]))),
        ops.constant(np.zeros((cell.B, 1, cell.H), np.float32)),
        ops.constant(np.full(cell.B, cell.T, np.int64)),
        ops.constant(w["weight_ih"][None].numpy()),
        ops.constant(w["weight_hh"][None].numpy()),
        ops.constant((w["bias_ih"] + w["bias_hh"])[None].numpy()),
        cell.H,
        "forward",
        ["tanh"],
    )
    y = ops.transpose(sequence.output(0), ops.constant(np.array([2, 1, 0, 3])))  # (T, 1, B, H) of (B, 1, T, H)
    return openvino.Model([y.output(0)], [x], "rnn")
