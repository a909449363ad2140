"""Digits read pixel by pixel: the data, the model, and a training run whose gradient flow is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rnnkern
from rnnkern.gradflow import Record

T = 64  # pixels of an image, one a step
CLASSES = 10
EVERY = 10  # of how many training steps one is sampled


@dataclass(frozen=True)
class Options:
    """What both runs have in common."""

    hidden_size: int
    batch_size: int
    epochs: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a fifth of them kept for the test."""

    train: Tensor  # (T, N, 1)
    train_labels: Tensor  # (N,)
    test: Tensor  # (T, N', 1)
    test_labels: Tensor  # (N',)

    @classmethod
    def load(cls) -> Digits:
        """The same split whatever the seed of a run; pixels normalised by mean and deviation of the training part."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        train, test, train_labels, test_labels = train_test_split(
            pixels, labels, test_size=0.2, stratify=labels, random_state=0
        )
        mean, deviation = train.mean(), train.std()

        def steps(images: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy((images - mean) / deviation).float().T.unsqueeze(-1).contiguous()

        return cls(steps(train), torch.from_numpy(train_labels), steps(test), torch.from_numpy(test_labels))


class Reader(nn.Module):
    """An RNN reads the pixels; its last state says which digit it was."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """(T, B, 1) -> logits (B, CLASSES)."""
        _, h_n = self.rnn(pixels)
        logits: Tensor = self.head(h_n[0])
        return logits


def training_step(model: Reader, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> None:
    """One update, the gradients of all weights clipped to the norm 1."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(pixels), labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@dataclass(frozen=True)
class Sample:
    """A training step whose gradient flow was recorded, with what it takes to compute it again."""

    step: int
    weights: dict[str, Tensor]
    pixels: Tensor  # (T, B, 1)
    labels: Tensor  # (B,)
    norms: NDArray[np.float64]  # (T,) by lag: the first is ‖∂L/∂h_T‖
    horizon: int
    decay: float  # 10**slope

    @classmethod
    def of(cls, record: Record, weights: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> Sample:
        """From a record in the order "lag"."""
        horizon, decay = int(record.horizon[0, 0]), float(10 ** record.slope[0, 0])
        return cls(record.step, weights, pixels, labels, record.norm[0, 0], horizon, decay)


@dataclass
class Run:
    """A training run: the test accuracy before it and after each epoch, and the sampled steps."""

    name: str
    accuracies: list[float]
    samples: list[Sample] = field(default_factory=list)

    @property
    def first(self) -> Sample:
        return self.samples[0]

    @property
    def last(self) -> Sample:
        return self.samples[-1]

    @property
    def reaches_all(self) -> int | None:
        """The first sampled training step from which the gradient always reached every pixel, None if never."""
        short = [i for i, sample in enumerate(self.samples) if sample.horizon < T - 1]
        begin = short[-1] + 1 if short else 0
        return self.samples[begin].step if begin < len(self.samples) else None


def new_model(options: Options, orthogonal: bool) -> Reader:
    """Of two models with equal options only W_hh differs: its orthogonal values are drawn after all others."""
    torch.manual_seed(options.seed)
    rnn = rnnkern.RNN(1, options.hidden_size)
    model = Reader(rnn)
    if orthogonal:
        nn.init.orthogonal_(rnn.get_parameter("weight_hh_l0"))
    return model


def train(name: str, model: Reader, digits: Digits, options: Options, progress: Callable[[Run, int], None]) -> Run:
    """Train with Adam, its rate falling to 0 along a cosine, and sample the gradient flow at every EVERY-th step.

    ``progress`` is called with the run and the number of steps done, after each step and after each epoch.
    """
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    order = torch.Generator().manual_seed(options.seed)
    run = Run(name, [accuracy(model, digits)])
    with rnnkern.watch(model, every=EVERY) as flow:
        for _ in range(options.epochs):
            for batch in torch.randperm(len(digits.train_labels), generator=order).split(options.batch_size):
                pixels, labels = digits.train[:, batch], digits.train_labels[batch]
                sampled = flow.steps % EVERY == 0
                weights = {key: value.clone() for key, value in model.state_dict().items()} if sampled else {}
                training_step(model, optimizer, pixels, labels)
                record = flow.read(order="lag") if sampled else None
                if record is not None:
                    run.samples.append(Sample.of(record, weights, pixels, labels))
                progress(run, flow.steps)
            schedule.step()
            run.accuracies.append(accuracy(model, digits))
            progress(run, flow.steps)
    return run


@torch.no_grad()
def accuracy(model: Reader, digits: Digits) -> float:
    """Share of the test images that the model reads right."""
    return (model(digits.test).argmax(-1) == digits.test_labels).double().mean().item()
