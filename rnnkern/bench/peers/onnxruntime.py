"""ONNX Runtime: a model of one RNN operator, input and output bound to memory that stays."""

from __future__ import annotations

from typing import ClassVar

import torch

from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem


class OnnxRuntime(Peer):
    name = "ONNX Runtime"
    needs: ClassVar[dict[str, str]] = {"onnx": "onnx", "onnxruntime": "onnxruntime"}
    modes = ("infer",)

    def refuses_cell(self, cell: Cell) -> str | None:
        if cell.dtype != "fp32":
            return "its CPU operator RNN is float32's"
        return super().refuses_cell(cell)

    def prepare(self, problem: Problem) -> Work:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads spin during a call, as by default, but not on into that of the next peer.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(_model(problem), options, providers=["CPUExecutionProvider"])
        cell, x = problem.cell, problem.inputs[0].numpy()
        output = ort.OrtValue.ortvalue_from_shape_and_type([cell.T, 1, cell.B, cell.H], x.dtype)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", output)

        def call(i: int) -> None:
            session.run_with_iobinding(binding)

        def answers(result: None) -> Answers:
            return {"output": torch.from_numpy(output.numpy()).double().squeeze(1)}

        return Work(call, answers, "input and output bound")


def _model(problem: Problem) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    cell = problem.cell
    w = {name.removesuffix("_l0"): value for name, value in problem.weights[0].items()}
    constants = {
        "w": w["weight_ih"][None],  # (1, H, I)
        "r": w["weight_hh"][None],  # (1, H, H)
        "b": torch.cat([w["bias_ih"], w["bias_hh"]])[None],  # (1, 2H)
    }
    node = helper.make_node(
        "RNN", ["x", *constants], ["y"], hidden_size=cell.H, direction="forward", activations=["Tanh"]
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [cell.T, cell.B, cell.I])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [cell.T, 1, cell.B, cell.H])
    values = [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "rnn", [x], [y], values)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model
