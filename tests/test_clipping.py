"""Thresholds from measured norms: what they let pass, and what they touch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradflow_helpers import read
from torch import Tensor, nn

import rnnkern
from rnnkern.clipping import clip_from, max_norm_from
from rnnkern.gradflow import ModuleRecord, Record

pytestmark = pytest.mark.usefixtures("nothing_stays")


def record(norms: np.ndarray) -> ModuleRecord:
    """‖g_t‖ (layers, directions, T, B)."""
    squares = np.stack([np.square(norms)] * 3)
    return ModuleRecord("rnn", squares, np.full(norms.shape[3], norms.shape[2]))


def test_the_quantile_of_each_sequences_largest_norm() -> None:
    """100 sequences of two layers whose largest norms are 1 … 100, in the last step alone: the rest has vanished."""
    norms = np.full((2, 1, 1000, 100), 1e-9)
    norms[0, 0, -1] = np.arange(1, 101) / 2
    norms[1, 0, -1] = np.random.default_rng(0).permutation(np.arange(1, 101))
    norms[0, 0, -1] = norms[1, 0, -1] / 2
    for quantile in (0.01, 0.5, 0.95, 1.0):
        assert clip_from(record(norms), quantile) == pytest.approx(100 * quantile)
    halves = [record(norms[..., :50]), record(norms[..., 50:])]
    assert clip_from(halves, 0.9) == clip_from(record(norms), 0.9)


def test_what_exploded_or_is_zero_does_not_count() -> None:
    norms = np.ones((1, 1, 3, 6))
    norms[0, 0, :, :4] = np.array([[2, 3, math.inf, math.nan], [1, 1, 1, 1], [0, 0, 0, 0]])
    norms[..., 4] = 0
    assert clip_from(record(norms), 1.0) == 3
    with pytest.raises(ValueError, match="records must hold a gradient that is finite and not zero, got 6 without"):
        clip_from(record(np.zeros((1, 1, 3, 6))))


def gradients(rnn: rnnkern.RNN, x: Tensor, scale: Tensor) -> list[Tensor]:
    rnn.zero_grad()
    (rnn(x)[0].sum(-1) * scale).sum().backward()
    return [p.grad.clone() for p in rnn.parameters()]  # type: ignore[union-attr]


def test_the_clip_touches_at_most_that_share_of_the_sequences() -> None:
    """In real backward passes: with the threshold no sequence up to the quantile has another gradient."""
    B, quantile = 20, 0.8
    rnn = rnnkern.RNN(3, 8, 2, dtype=torch.float64)
    x, scale = torch.randn(15, B, 3, dtype=torch.float64), torch.logspace(-2, 2, B, dtype=torch.float64)
    with rnnkern.watch(rnn) as flow:
        gradients(rnn, x, scale)
        clip = clip_from(read(flow), quantile)
    touched = 0
    for b in range(B):
        rnn.clip = math.inf
        free = gradients(rnn, x[:, b : b + 1], scale[b : b + 1])
        rnn.clip = clip
        clipped = gradients(rnn, x[:, b : b + 1], scale[b : b + 1])
        touched += any(not torch.equal(p, q) for p, q in zip(free, clipped))
    assert 0 < touched <= round((1 - quantile) * B)


def test_max_norm_from_what_clip_grad_norm_returned() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    norms: list[Any] = []
    for size in (3.0, 1.0, 2.0, 5.0, 4.0):
        parameters[0].grad = torch.tensor([0.0, size])
        norms.append(nn.utils.clip_grad_norm_(parameters, math.inf))
    assert [max_norm_from(norms, q) for q in (0.2, 0.6, 0.8, 0.81, 1.0)] == [1, 3, 4, 5, 5]
    assert max_norm_from([*norms, math.inf, math.nan, 0.0], 1.0) == 5
    with pytest.raises(ValueError, match="norms must hold a gradient"):
        max_norm_from([])


@pytest.mark.parametrize("quantile", [0, 1.1, math.nan])
def test_a_quantile_that_is_none(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"quantile must be in \(0, 1\], got"):
        max_norm_from([1.0], quantile)


def test_of_several_modules_ask_one() -> None:
    records = [record(np.ones((1, 1, 2, 2))), record(np.ones((1, 1, 2, 2)))]
    with pytest.raises(AttributeError, match="2 modules are watched"):
        clip_from(Record(0, ["a", "b"], records))
