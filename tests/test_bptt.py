"""Truncated BPTT: the state goes on, the graph ends, and the norms of all chunks are one record."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradflow_helpers import read
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import TruncatedBPTT

pytestmark = [pytest.mark.usefixtures("nothing_stays"), pytest.mark.everywhere]


def test_chunks_are_views_and_the_state_goes_on() -> None:
    rnn, x = rnnkern.RNN(3, 4, 2), torch.randn(11, 2, 3)
    bptt, outputs, starts = TruncatedBPTT(4), [], []
    for part, numbers in bptt.chunks(x, torch.arange(11)):
        starts.append(numbers.tolist())
        assert part.data_ptr() == x[numbers[0]].data_ptr()
        output, bptt.hx = rnn(part, bptt.hx)
        outputs.append(output)
    assert starts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    expected, h_n = rnn(x)
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(bptt.hx, h_n)


def test_the_graph_ends_with_the_chunk() -> None:
    """The gradient of a chunk's loss is that with the state as a constant."""
    rnn, x = rnnkern.RNN(3, 4, batch_first=True, dtype=torch.float64), torch.randn(2, 10, 3, dtype=torch.float64)
    bptt, state = TruncatedBPTT(5, dim=1), None
    for (part,) in bptt.chunks(x):
        output, bptt.hx = rnn(part, bptt.hx)
        (grad,) = torch.autograd.grad(output.square().sum(), rnn.weight_hh_l0)
        output, state = rnn(part, None if state is None else state.detach().clone())
        (expected,) = torch.autograd.grad(output.square().sum(), rnn.weight_hh_l0)
        assert torch.equal(grad, expected)


def test_state_goes_on_until_reset() -> None:
    rnn, x = nn.LSTM(3, 4), torch.randn(6, 2, 3)  # the state is a tuple
    bptt = TruncatedBPTT(3)
    for half in x.split(3):
        for (part,) in bptt.chunks(half):
            _, bptt.hx = rnn(part, bptt.hx)
    torch.testing.assert_close(bptt.hx, rnn(x)[1])
    bptt.reset()
    assert bptt.hx is None
    bptt.reset(rnn(x)[1])
    for (part,) in bptt.chunks(x):
        assert not any(h.requires_grad for h in bptt.hx)
        _, bptt.hx = rnn(part, bptt.hx)


def chunked(rnn: rnnkern.RNN, x: Tensor, steps: int, flow: rnnkern.gradflow.Flow, every_chunk: bool = True) -> None:
    """Train on x: an optimizer's step after each chunk."""
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.0)
    bptt = TruncatedBPTT(steps, flow=flow)
    for (part,) in bptt.chunks(x):
        output, bptt.hx = rnn(part, bptt.hx)
        if every_chunk or part.shape[0] < steps:
            output[-1].sum().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_norms_of_all_chunks_are_one_record(bidirectional: bool) -> None:
    rnn, x = rnnkern.RNN(3, 4, 2, bidirectional=bidirectional), torch.randn(11, 2, 3)
    with rnnkern.watch(rnn, every=2) as flow:
        chunked(rnn, x, 4, flow)
        rec = read(flow, order="input", per_sample=True)
        assert (rec.step, flow.steps) == (0, 1)
        assert rec.lengths.tolist() == [11, 11]
        chunked(rnn, x, 4, flow)  # not sampled
        assert (read(flow).step, flow.steps) == (0, 2)
        chunked(rnn, x, 4, flow)
        assert read(flow).step == 2
    expected, hx = [], None
    for part in x.split(4):
        with rnnkern.watch(rnn) as flow:
            output, hx = rnn(part, hx)
            output[-1].sum().backward()
            hx = hx.detach()
            expected.append(read(flow, order="input", per_sample=True).norm)
    np.testing.assert_array_equal(rec.norm, np.concatenate(expected, 2))


def test_chunks_without_a_loss_take_their_time() -> None:
    rnn, x = rnnkern.RNN(3, 4), torch.randn(10, 2, 3)
    with rnnkern.watch(rnn) as flow:
        chunked(rnn, x, 4, flow, every_chunk=False)
        norm = read(flow).norm[0, 0]
    assert norm.shape == (10,)
    assert (norm[:8] == 0).all() and (norm[8:] > 0).all()


def test_a_sequence_is_closed_whatever_happens() -> None:
    rnn, x = rnnkern.RNN(3, 4), torch.randn(8, 2, 3)
    with rnnkern.watch(rnn) as flow:
        bptt = TruncatedBPTT(4, flow=flow)
        for (part,) in bptt.chunks(x):
            output, bptt.hx = rnn(part, bptt.hx)
            output.sum().backward()
            break
        assert (flow.steps, read(flow).norm.shape) == (1, (1, 1, 4))
        with flow.sequence(), pytest.raises(RuntimeError, match="cannot be nested"):
            next(bptt.chunks(x))
        apart = TruncatedBPTT(4)
        for (part,) in apart.chunks(x):  # not joined: a step each, as ever
            output, apart.hx = rnn(part, apart.hx)
            output.sum().backward()
            flow.step()
        assert flow.steps == 3


def test_packed_chunks() -> None:
    """Samples may end in any chunk, and then have no steps in later ones; in none may one go on that has ended."""
    rnn, x = rnnkern.RNN(3, 4, allow_empty=True), torch.randn(8, 2, 3)
    with rnnkern.watch(rnn) as flow:
        with flow.sequence() as next_chunk:
            next_chunk()
            rnn(pack_padded_sequence(x[:4], torch.tensor([4, 2], device="cpu")))[0].data.sum().backward()
        assert read(flow).lengths.tolist() == [4, 2]
        with flow.sequence() as next_chunk:
            next_chunk()
            rnn(pack_padded_sequence(x[:4], torch.tensor([4, 2], device="cpu")))[0].data.sum().backward()
            next_chunk()
            rnn(x[4:])[0].sum().backward()
        with pytest.raises(ValueError, match="a sample of 'rnn' has ended in one chunk of its sequence and goes on"):
            flow.read()
        with flow.sequence() as next_chunk:
            for B in (2, 1):
                next_chunk()
                rnn(x[:4, :B])[0].sum().backward()
        with pytest.raises(ValueError, match="one batch size: 'rnn' had 2, then 1"):
            flow.read()


def test_errors() -> None:
    for steps in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="steps must be a positive int, got"):
            TruncatedBPTT(steps)  # type: ignore[arg-type]
    bptt = TruncatedBPTT(2)
    with pytest.raises(ValueError, match=r"sequences must have one length along dim 0, got \[\]"):
        bptt.chunks()
    with pytest.raises(ValueError, match=r"sequences must have one length along dim 0, got \[4, 5\]"):
        bptt.chunks(torch.zeros(4, 1), torch.zeros(5, 1))
    chunks = bptt.chunks(torch.zeros(4, 1))
    next(chunks)
    with pytest.raises(RuntimeError, match="the state was not carried on: assign hx in every chunk"):
        next(chunks)
    with rnnkern.watch(rnnkern.RNN(2, 2)) as flow, pytest.raises(RuntimeError, match="there is no open sequence"):
        flow._recorder.next_chunk()
