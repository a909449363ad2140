"""torch.compile(fullgraph=True) and torch.export: one graph, any T and B, the numbers of eager mode, watched or not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from gradflow_helpers import Classifier, read
from helpers import pack, threads
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence

import rnnkern
from rnnkern.backends import Backend

pytestmark = pytest.mark.everywhere

compilers = pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of an earlier test, and none of an earlier run: its guards would come along."""
    torch.compiler.reset()
    cold = torch._functorch.config.patch(enable_autograd_cache=False)
    with threads(1), torch._inductor.config.patch(fx_graph_cache=False), cold:
        yield


def train(call: Callable[..., Any], module: nn.Module, x: Tensor, hx: Tensor) -> list[Tensor]:
    module.zero_grad()
    x, hx = x.detach().requires_grad_(), hx.detach().requires_grad_()
    output, h_n = call(x, hx)
    (output.square().sum() + h_n.sum()).backward()
    return [output, h_n, x.grad, hx.grad, *(p.grad for p in module.parameters())]


@pytest.mark.float64
@compilers
def test_compile(backend: Backend, device: str, compiler: str) -> None:
    """One graph, forward and backward, with the numbers of eager mode; other lengths and batches too."""
    if compiler == "inductor" and backend.name == "reference":
        pytest.skip("an unrolled loop is slow to compile, and nothing of ours is in it")
    module = rnnkern.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64, device=device)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    sizes = {"inductor": [(4, 2)], "aot_eager": [(4, 2), (4, 3) if backend.name == "reference" else (7, 3)]}
    for T, B in sizes[compiler]:
        x = torch.randn(T, B, 3, dtype=torch.float64, device=device)
        hx = torch.randn(4, B, 5, dtype=torch.float64, device=device)
        torch.testing.assert_close(train(compiled, module, x, hx), train(module, module, x, hx))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, hx), module(x, hx))


@compilers
def test_default_settings(compiler: str) -> None:
    """Any T and B: compiled twice, the second time for all sizes."""
    module = rnnkern.RNN(3, 5, 2, bidirectional=True)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T, B in [(4, 2), (7, 3), (5, 5), (12, 2), (2, 9), (70, 4)]:
        x, hx = torch.randn(T, B, 3), torch.randn(4, B, 5)
        torch.testing.assert_close(train(compiled, module, x, hx), train(module, module, x, hx))
    assert counter.frame_count == 2


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_is_kept(backend: Backend, device: str, p: float) -> None:
    """torch.nn.RNN loses the dropout between layers when it is compiled."""
    module = rnnkern.RNN(3, 5, 2, dropout=p, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(4, 2, 3, device=device), torch.randn(2, 2, 5, device=device)
    results = []
    for call in (compiled, module):
        torch.manual_seed(1)
        results.append(train(call, module, x, hx))
    torch.testing.assert_close(*results)
    assert torch.equal(compiled(x)[0], results[0][0]) is False
    if p == 1.0:
        assert not module.weight_ih_l1.grad.any() and not module.weight_hh_l0.grad.isnan().any()


@pytest.mark.parametrize("sorted_", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "zeros"])
def test_packed(sorted_: bool, with_hx: bool) -> None:
    """Other numbers of rows, steps and samples compile nothing new after the second time."""
    module = rnnkern.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64)
    counter = CompileCounterWithBackend("inductor" if with_hx else "aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)

    def run(call: Callable[..., Any], packed: PackedSequence, hx: Tensor | None) -> list[Tensor]:
        module.zero_grad()
        output, h_n = call(packed, hx)
        (output.data.square().sum() + h_n.sum()).backward()
        return [output.data, h_n, *(p.grad.clone() for p in module.parameters())]

    for lengths in ([5, 3, 2], [4, 4], [7, 6, 3, 3, 2], [3, 2, 2]):
        sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (lengths if sorted_ else lengths[::-1])]
        packed = pack(sequences, enforce_sorted=sorted_)
        hx = torch.randn(4, len(lengths), 5, dtype=torch.float64) if with_hx else None
        torch.testing.assert_close(run(compiled, packed, hx), run(module, packed, hx))
    assert counter.frame_count == 2


def test_packed_with_a_wrong_state_is_refused() -> None:
    compiled = torch.compile(rnnkern.RNN(3, 5), fullgraph=True, backend="aot_eager")
    packed = pack([torch.randn(n, 3) for n in (4, 2, 2)])
    with pytest.raises(RuntimeError, match=r"h0 must have batch_sizes\[0\] = 3 rows, got 2"):
        compiled(packed, torch.zeros(1, 2, 5))


@pytest.mark.parametrize(
    "options",
    [
        dict(clip=0.1, residual=True, layer_norm="input", bidirectional=True),
        dict(layer_norm="preactivation", recurrent_dropout=0.3, clip=0.1),
    ],
    ids=["kernel", "loop"],
)
def test_options(options: dict[str, Any]) -> None:
    module = rnnkern.RNN(3, 5, 2, dtype=torch.float64, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    hx = torch.randn(2 * (2 if module.bidirectional else 1), 2, 5, dtype=torch.float64)
    results = []
    for call in (compiled, module):
        torch.manual_seed(1)
        results.append(train(call, module, x, hx))
    torch.testing.assert_close(*results)
    states = torch.compile(lambda: module.eval()(x, hx, return_states=True), fullgraph=True, backend="aot_eager")()[2]
    torch.testing.assert_close(states, module(x, hx, return_states=True)[2])


@compilers
def test_accumulation(compiler: str) -> None:
    """Inductor gives gradients that are equal the same memory; the two biases' have to stay apart."""
    module = rnnkern.RNN(3, 5)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    grads = []
    for call in (compiled, module):
        module.zero_grad()
        for i in range(3):
            torch.manual_seed(i)
            call(torch.randn(4, 2, 3))[0].square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    torch.testing.assert_close(*grads)


def test_autocast_and_checkpoint() -> None:
    module = rnnkern.RNN(3, 5, 2)
    x, hx = torch.randn(4, 2, 3), torch.randn(2, 2, 5)
    place = x.device.type

    def call(x: Tensor, hx: Tensor) -> Any:
        with torch.autocast(place, dtype=torch.bfloat16):
            output, h_n = torch.utils.checkpoint.checkpoint(module, x, hx, use_reentrant=False)
            assert output.dtype == h_n.dtype == torch.bfloat16
            return output.float(), h_n.float()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(train(compiled, module, x, hx), train(call, module, x, hx))


# Watched


class Twice(nn.Module):
    """Two RNNs, of which one runs twice in a forward, on independent inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = rnnkern.RNN(3, 4, bidirectional=True), rnnkern.RNN(8, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[0] + self.encoder(x.flip(0))[0])[1].square().sum()


@compilers
def test_watched(compiler: str, nothing_stays: None) -> None:
    """The records of eager mode, in one graph for sampled steps and one for the others."""
    model = Twice()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    with rnnkern.watch(model, every=2) as flow, rnnkern.watch(twin, every=2) as of_compiled:
        for step in range(5):
            x = torch.randn(4 + step % 3, 2 + step % 2, 3)
            for call, optimizer in zip((model, compiled), optimizers, strict=True):
                for micro_batch in x.split(1, 1):
                    call(micro_batch.repeat(1, 2, 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
            expected, got = read(flow, per_sample=True), read(of_compiled, per_sample=True)
            assert expected.step == got.step == step // 2 * 2
            for name in ("encoder", "decoder"):
                np.testing.assert_array_equal(got[name].lengths, expected[name].lengths)
                np.testing.assert_allclose(got[name].norm, expected[name].norm, rtol=1e-4)
        assert flow.steps == of_compiled.steps == 5
    frames = counter.frame_count
    assert frames <= 4  # for one size, then for all, sampled and not
    compiled(x)
    assert counter.frame_count == frames + 1  # no longer watched


def test_watched_packed(nothing_stays: None) -> None:
    module = rnnkern.RNN(3, 5, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    packed = pack([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    records = []
    for call in (module, compiled):
        with rnnkern.watch(module) as flow:
            call(packed)[1].sum().backward()
            records.append(read(flow, per_sample=True))
    assert records[1].lengths.tolist() == [2, 5, 3]
    np.testing.assert_allclose(records[1].norm, records[0].norm, rtol=1e-5)


def test_watched_without_steps(nothing_stays: None) -> None:
    """A loop that never steps: read() does its work, also where only every second step is sampled."""
    model, x = Classifier(), torch.randn(4, 2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with rnnkern.watch(model, every=2) as flow:
        seen = []
        for _ in range(5):
            compiled(x).sum().backward()
            seen.append(read(flow).step)
    assert seen == [0, 0, 2, 2, 4]


def test_watched_graphs_without_a_backward(nothing_stays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards whose backward never comes are forgotten in the end, and a late one still counts."""
    model, x = Classifier(), torch.randn(4, 2, 3)
    monkeypatch.setattr(rnnkern.gradflow.recorder, "MAX_HELD", 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with rnnkern.watch(model) as flow:
        losses = [compiled(x).sum() for _ in range(6)]
        assert len(flow._recorder.held) == 3
        for loss in losses:
            loss.backward()
        assert read(flow).samples == 6  # two of each of the last three
        with torch.no_grad():
            compiled(x)
        late = compiled(x).sum()
    late.backward()  # the Flow is closed, and still there
    assert (read(flow).step, read(flow).samples) == (1, 2)


def test_watched_before_it_was_moved(nothing_stays: None) -> None:
    module, device = rnnkern.RNN(3, 5, device="meta"), torch.get_default_device()
    with rnnkern.watch(module):
        module.to_empty(device=device)
        with pytest.raises(
            Exception, match=rf"'rnn' was on meta when rnnkern\.watch was called, and its input is on {device.type}"
        ):
            torch.compile(module, fullgraph=True, backend="eager")(torch.randn(4, 2, 3))


# torch.fx and torch.export


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.cell, self.head = rnn, rnnkern.RNNCell(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, hx: Tensor) -> Tensor:
        output, h_n = self.rnn(x, hx)
        return self.head(output) + self.head(self.cell(h_n[-1]))


def test_symbolic_trace(nothing_stays: None) -> None:
    """A leaf of the graph, as torch.nn's modules are: with all its options, for any T and B, watched through it."""
    model = Tagger(rnnkern.RNN(3, 5, 2))
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "head", "cell", "head"]
    for T, B in ((4, 2), (1, 3)):
        x, hx = torch.randn(T, B, 3), torch.randn(2, B, 5)
        assert torch.equal(traced(x, hx), model(x, hx))
    with rnnkern.watch(traced) as flow:
        traced(x, hx).sum().backward()
        assert read(flow).modules == ("rnn", "cell")
    traced = torch.fx.symbolic_trace(rnnkern.convert(Tagger(nn.RNN(3, 5, 2))))
    assert traced(x, hx).shape == (1, 3, 2)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_export(cpu_library: None, strict: bool, batch_first: bool, nothing_stays: None) -> None:
    """T and B are dynamic; one operator per layer and direction; the program runs, saves and loads."""
    module = rnnkern.RNN(3, 5, 2, bidirectional=True, batch_first=batch_first).eval()
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    dynamic = {"input": {0: B, 1: T} if batch_first else {0: T, 1: B}, "hx": {1: B}}
    example = torch.randn(6, 4, 3) if batch_first else torch.randn(4, 6, 3)
    with torch.no_grad():
        program = torch.export.export(module, (example, torch.randn(4, 6, 5)), dynamic_shapes=dynamic, strict=strict)
        calls = [str(n.target) for n in program.graph.nodes if "rnnkern" in str(n.target)]
        assert len(calls) == 4 and not [c for c in calls if "recurrence" not in c]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        with torch.device("cpu"):  # torch.export.load fails where another device is the default (torch 2.13)
            loaded = torch.export.load(file)
        for ours in (program.module(), loaded.module()):
            x, hx = torch.randn(3, 9, 3), torch.randn(4, 3 if batch_first else 9, 5)
            torch.testing.assert_close(ours(x, hx), module(x, hx))


def test_export_of_a_watched_model(cpu_library: None, nothing_stays: None) -> None:
    """A program is not watched."""
    module = rnnkern.RNN(3, 5)
    with rnnkern.watch(module):
        program = torch.export.export(module, (torch.randn(4, 2, 3),))
    assert not [n for n in program.graph.nodes if "taps" in str(n.target) or "deliver" in str(n.target)]


def test_aot_inductor(cpu_library: None, tmp_path: Path) -> None:
    """A compiled package, which calls the operators of the library that is loaded."""
    module = rnnkern.RNN(3, 5, 2, bidirectional=True).eval()
    dynamic = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(4, 6, 3),), dynamic_shapes=dynamic)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "rnn.pt2"))
        x = torch.randn(9, 3, 3)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), module(x))
