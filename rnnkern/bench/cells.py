"""What is measured: a cell is one task of one size, which every peer does in turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

#: name -> what a call does
MODES = {
    "infer": "forward without gradients",
    "train": "forward, and backward from a given gradient at every step to x and all weights",
    "last": "as train, with the gradient at the last step alone: a loss at the end",
    "watch": "as train, with the norm of ∂L/∂h_t at every step, read after each call",
    "record": "as watch, but read only once in the end",
    "figures": "as watch, with every figure of the record and its verdict computed after each call",
    "bptt": "as train, to the weights alone, in chunks of so many steps: truncated BPTT",
}


#: those that record norms
RECORDING = ("watch", "record", "figures")


@dataclass(frozen=True)
class Precision:
    """What is stored, whether a GPU may round products to TF32, and the largest relative error that this explains."""

    dtype: torch.dtype
    tf32: bool
    tolerance: float


PRECISIONS = {
    "fp32": Precision(torch.float32, False, 1e-4),
    "tf32": Precision(torch.float32, True, 1e-2),
    "bf16": Precision(torch.bfloat16, True, 5e-2),
    "fp16": Precision(torch.float16, True, 1e-2),
}


@dataclass(frozen=True)
class Cell:
    """One task. ``series`` names the line of a scaling plot that it belongs to, ``quantity`` what is measured.

    ``heads`` RNNs of hidden size H stand side by side, each with input size I: what others call a block-diagonal W_hh.
    ``chunk`` is the length after which mode "bptt" cuts the graph. ``threads`` 0 means those of the session.
    """

    mode: str
    T: int
    B: int
    H: int
    I: int = 0
    dtype: str = "fp32"
    layers: int = 1
    directions: int = 1
    heads: int = 1
    chunk: int = 0
    threads: int = 0
    series: str = ""
    quantity: str = "time"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {self.dtype!r}")
        if not self.I:
            object.__setattr__(self, "I", self.H)

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    @property
    def width(self) -> int:
        """Of the output."""
        return self.heads * self.directions * self.H

    @property
    def flop(self) -> float:
        """Of the matrix products alone, backward being twice the forward."""
        per_step = 0.0
        for layer in range(self.layers):
            wide = self.I if layer == 0 else self.directions * self.H
            per_step += 2.0 * self.heads * self.directions * self.B * self.H * (wide + self.H)
        return self.T * per_step * (1 if self.mode == "infer" else 3)

    @property
    def bytes(self) -> float:
        """A generous guess at what a training step in plain PyTorch and the float64 truth hold at once."""
        elements = self.T * self.B * (self.heads * self.I + 3 * self.layers * self.width)
        return elements * (3.0 * self.precision.dtype.itemsize + 8 * 3)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        """The cell of a row of results."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        text = f"{self.mode} {self.dtype} T={self.T} B={self.B} H={self.H}"
        for name, usual in (
            ("I", self.H),
            ("layers", 1),
            ("directions", 1),
            ("heads", 1),
            ("chunk", 0),
            ("threads", 0),
        ):
            if getattr(self, name) != usual:
                text += f" {name}={getattr(self, name)}"
        return text if self.quantity == "time" else f"{text} ({self.quantity})"
