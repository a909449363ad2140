"""The model: symbols become vectors, an RNN reads them, a linear layer answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.train.options import Options
from rnnkern.train.tasks import Task

EMBEDDING = 64  # numbers that stand for a character


class Model(nn.Module):
    """One recurrent net between the task's inputs and outputs."""

    def __init__(self, task: Task, options: Options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.inputs, EMBEDDING) if task.embedded else None
        self.rnn = _rnn(EMBEDDING if task.embedded else task.inputs, options)
        self.head = nn.Linear(options.hidden_size, task.outputs)

    def forward(self, inputs: Tensor, last: bool = False) -> Tensor:
        """(T, B, inputs) or (T, B) int64 -> (T, B, outputs), or (B, outputs) of the ``last`` step alone."""
        output, _ = self.rnn(inputs if self.embedding is None else self.embedding(inputs))
        answers: Tensor = self.head(output[-1] if last else output)
        return answers


def new_model(task: Task, options: Options) -> Model:
    """With the same seed, models with different ``init`` have the same values but for what that sets."""
    torch.manual_seed(options.seed)
    model = Model(task, options)
    if options.init == "orthogonal":
        rnnkern.init.orthogonal_(model.rnn)
    elif options.init == "identity":
        rnnkern.init.identity_(model.rnn)
    elif not isinstance(options.init, str):
        rnnkern.init.spectral_radius_(model.rnn, options.init)
    return model


def _rnn(inputs: int, options: Options) -> nn.RNNBase:
    H, layers = options.hidden_size, options.layers
    if options.cell == "lstm":
        return nn.LSTM(inputs, H, layers)
    if options.cell == "gru":
        return nn.GRU(inputs, H, layers)
    return rnnkern.RNN(inputs, H, layers, nonlinearity=options.cell)
