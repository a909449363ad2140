"""lengths beside a padded input, and sequences without a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern.backends import Backend

pytestmark = pytest.mark.everywhere

LENGTHS = [4, 1, 6, 4, 2]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_as_a_packed_sequence(backend: Backend, device: str, batch_first: bool, with_hx: bool, kind: Any) -> None:
    rnn = rnnkern.RNN(3, 5, 2, batch_first=batch_first, bidirectional=True, device=device)
    x = torch.randn((5, 7, 3) if batch_first else (7, 5, 3), device=device, requires_grad=True)
    hx = torch.randn(4, 5, 5, device=device) if with_hx else None
    output, h_n = rnn(x, hx, lengths=kind(LENGTHS))
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS, device="cpu"), batch_first, enforce_sorted=False)
    rows, last = rnn(packed, hx)
    padded = pad_packed_sequence(rows, batch_first, total_length=7)[0]
    assert same_bits([output, h_n], [padded, last])
    grads = [torch.autograd.grad(y.square().sum() + h.sum(), x)[0] for y, h in ((output, h_n), (padded, last))]
    assert same_bits(*[[g] for g in grads])
    for b, length in enumerate(LENGTHS):
        beyond = output[b, length:] if batch_first else output[length:, b]
        assert not beyond.any()


def test_each_sample_is_as_alone(backend: Backend, device: str) -> None:
    rnn = rnnkern.RNN(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(7, 5, 3, device=device)
    output, h_n, states = rnn(x, lengths=LENGTHS, return_states=True)
    for b, length in enumerate(LENGTHS):
        alone, last, layers = rnn(x[:length, b], return_states=True)
        torch.testing.assert_close(output[:length, b], alone)
        torch.testing.assert_close(h_n[:, b], last)
        for state, layer in zip(states, layers, strict=True):
            torch.testing.assert_close(state[:length, b], layer)
            assert not state[length:, b].any()


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0, 0], [0, 2, 0]], ids=str)
def test_samples_without_a_step(backend: Backend, device: str, with_hx: bool, lengths: list[int]) -> None:
    """Their output is 0 and their final state is the initial one; the others are as without them."""
    rnn = rnnkern.RNN(3, 5, 2, bidirectional=True, allow_empty=True, device=device)
    x = torch.randn(5, 3, 3, device=device, requires_grad=True)
    hx = torch.randn(4, 3, 5, device=device, requires_grad=True) if with_hx else None
    output, h_n = rnn(x, hx, lengths=lengths)
    assert output.shape == (5, 3, 10) and h_n.shape == (4, 3, 5)
    for b, length in enumerate(lengths):
        if length == 0:
            assert not output[:, b].any()
            assert torch.equal(h_n[:, b], torch.zeros_like(h_n[:, b]) if hx is None else hx[:, b])
        else:
            alone, last = rnn(x[:length, b], None if hx is None else hx[:, b])
            torch.testing.assert_close(output[:length, b], alone)
            torch.testing.assert_close(h_n[:, b], last)
    if hx is not None:
        (grad,) = torch.autograd.grad(h_n.sum(), hx)
        for b, length in enumerate(lengths):
            assert length or torch.equal(grad[:, b], torch.ones_like(grad[:, b]))


@pytest.mark.parametrize("with_hx", [False, True])
def test_no_step_at_all(backend: Backend, device: str, with_hx: bool) -> None:
    rnn = rnnkern.RNN(3, 5, 2, bidirectional=True, allow_empty=True, device=device)
    hx = torch.randn(4, 2, 5, device=device, requires_grad=True) if with_hx else None
    output, h_n = rnn(torch.randn(0, 2, 3, device=device), hx)
    assert output.shape == (0, 2, 10)
    assert torch.equal(h_n, torch.zeros(4, 2, 5, device=device) if hx is None else hx)
    (output.sum() + 2 * h_n.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in rnn.parameters())
    if hx is not None:
        assert hx.grad is not None and (hx.grad == 2).all() and h_n.data_ptr() != hx.data_ptr()
    assert rnn(torch.randn(0, 3, device=device))[0].shape == (0, 10)
    with rnnkern.watch(rnn) as flow:
        rnn(torch.randn(0, 2, 3, device=device), hx)[1].sum().backward()
        assert flow.read() is None


def test_empty_is_an_error_unless_chosen() -> None:
    for module in (rnnkern.RNN(3, 5), nn.RNN(3, 5)):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            module(torch.randn(0, 2, 3))


def test_watched_like_a_packed_sequence() -> None:
    rnn, x = rnnkern.RNN(3, 5), torch.randn(7, 5, 3)
    norms = []
    with rnnkern.watch(rnn) as flow:
        rnn(x, lengths=LENGTHS)[1].sum().backward()
        record = flow.read(per_sample=True)
        assert record is not None and record.lengths.tolist() == LENGTHS
        norms.append(record.norm)
        rnn(pack_padded_sequence(x, torch.tensor(LENGTHS, device="cpu"), enforce_sorted=False))[1].sum().backward()
        record = flow.read(per_sample=True)
        assert record is not None
        norms.append(record.norm)
    assert same_bits(*[[torch.from_numpy(n)] for n in norms])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], r"lengths must have shape \(B,\) = \(3,\), got \(2,\)"),
        ([[1, 2, 3]], r"lengths must have shape \(B,\) = \(3,\), got \(1, 3\)"),
        ([1.0, 2.0, 3.0], r"lengths must be integers, got torch\.float32"),
        ([True, True, False], r"lengths must be integers, got torch\.bool"),
        ([1, 6, 3], r"lengths must be in \[1, 5\], got 6 for sample 1"),
        ([1, 2, 0], r"lengths must be in \[1, 5\], got 0 for sample 2 \(allow_empty=True allows 0\)"),
        ([1, 2, -1], r"lengths must be in \[1, 5\], got -1 for sample 2$"),
    ],
    ids=str,
)
def test_errors(lengths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rnnkern.RNN(3, 5)(torch.randn(5, 3, 3), lengths=lengths)


def test_lengths_where_they_have_no_place() -> None:
    rnn, x = rnnkern.RNN(3, 5), torch.randn(5, 3, 3)
    with pytest.raises(ValueError, match="lengths must be None for an unbatched input"):
        rnn(x[:, 0], lengths=[5])
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence"):
        rnn(pack_padded_sequence(x, torch.tensor([5, 3, 2], device="cpu")), lengths=[5, 3, 2])
