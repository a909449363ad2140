"""What is kept while a model is watched: forwards, the statistics of their backwards, and where a step ends.

    graph -> tap -> recorder, step, forward        recorder -> newest steps -> their forwards -> statistics

No arrow leads back to the graph or to the model, so nothing waits for the garbage collector.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from rnnkern.gradflow import scaling

#: of one module in one step: squares (4, layers, directions, T, B) float64 in input order, lengths (B,) int64; of
#: a cell (3, ...), without the direct part
Squares = tuple[NDArray[np.float64], NDArray[np.int64]]

#: Statistics that are kept on the device, of all steps. One step that reaches this is a loop whose steps nobody has
#: told of.
MAX_BYTES = 1 << 30

#: Forwards of compiled graphs that are remembered until their backward comes; those without one are forgotten.
MAX_HELD = 4096


@dataclass(eq=False, slots=True)
class Forward:
    """One forward of one module, and what backward has brought for it."""

    module: str
    number: int  # among the forwards of its step
    T: int
    B: int
    batch_sizes: Tensor | None  # (T,) int64 on the CPU
    unsorted_indices: Tensor | None  # (B,) int64
    chunk: int = 0  # of its sequence, where the step is one
    stats: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # layer, direction -> (4, T, B)
    scale: Tensor | None = None  # of the loss whose statistics these are, ()

    def lengths(self) -> NDArray[np.int64]:
        """Steps that each sample has, (B,), in the order of the statistics' rows."""
        if self.batch_sizes is None:
            return np.full(self.B, self.T, np.int64)
        return (self.batch_sizes.numpy()[:, None] > np.arange(self.B)).sum(0, dtype=np.int64)

    def alike(self, stats: Tensor, scale: Tensor | None) -> Tensor:
        """Statistics of a backward whose loss had that scale, as they add to those of the first backward."""
        if not self.stats:
            self.scale = scale
            return stats
        return scaling.converted(stats, scale, self.scale)


@dataclass(eq=False, slots=True)
class Step:
    """The statistics of one step.

    Its forwards are samples side by side; where it is a sequence, its chunks follow one another in time.
    """

    index: int
    is_sequence: bool = False
    forwards: int = 0
    bytes: int = 0
    received: list[Forward] = field(default_factory=list)
    opened: list[Forward] = field(default_factory=list)  # all of a sequence: those without statistics take their time
    scale: Tensor | None = None  # of the newest backward's loss, ()
    outcome: scaling.Outcome = field(default_factory=scaling.Outcome)
    on_host: dict[str, Squares] | None = None

    def receive(self, forward: Forward, layer: int, direction: int, stats: Tensor, scale: Tensor | None) -> None:
        """Statistics (4, T, B) of one backward; a second backward through the same forward adds its squares."""
        stats, self.scale = forward.alike(stats, scale), scale
        if not forward.stats:
            self.received.append(forward)
        earlier = forward.stats.get((layer, direction))
        if earlier is None:
            self.bytes += stats.nbytes
        forward.stats[layer, direction] = stats if earlier is None else earlier + stats
        self.on_host = None

    def receive_at(self, forward: Forward, t: int, stats: Tensor, scale: Tensor | None) -> None:
        """Statistics (3, B) of one time step of a forward that grows step by step; later squares add."""
        stats, self.scale = forward.alike(stats, scale), scale
        whole = forward.stats.get((0, 0))
        if whole is None or whole.shape[1] <= t:
            grown = stats.new_zeros(stats.shape[0], forward.T, forward.B)
            if whole is None:
                self.received.append(forward)
            else:
                grown[:, : whole.shape[1]] = whole
            self.bytes += grown.nbytes - (0 if whole is None else whole.nbytes)
            forward.stats[0, 0] = whole = grown
        whole[:, t] += stats
        self.on_host = None

    def squares(self, modules: dict[str, tuple[int, int]]) -> dict[str, Squares]:
        """The statistics of each module that has some; waits for the device."""
        if self.on_host is None:
            self.on_host = {}
            for name, (layers, directions) in modules.items():
                kinds = next((len(s) for f in self.received if f.module == name for s in f.stats.values()), 0)
                if kinds:
                    seen = self.opened if self.is_sequence else sorted(self.received, key=lambda f: f.number)
                    forwards = [f for f in seen if f.module == name]
                    chunks = [_joined([*f], kinds, layers, directions) for _, f in groupby(forwards, lambda f: f.chunk)]
                    self.on_host[name] = chunks[0] if len(chunks) == 1 else _in_time(name, chunks)
        return self.on_host


def _joined(forwards: list[Forward], kinds: int, layers: int, directions: int) -> Squares:
    """The samples of all forwards side by side, each forward's in the order of its batch, aligned at t = 0."""
    T, B = max(f.T for f in forwards), sum(f.B for f in forwards)
    squares, lengths = np.zeros((kinds, layers, directions, T, B)), np.zeros(B, np.int64)
    end = 0
    for f in forwards:
        start, end = end, end + f.B
        order = slice(None) if f.unsorted_indices is None else f.unsorted_indices.cpu().numpy()
        lengths[start:end] = f.lengths()[order]
        scale = np.float64(scaling.on_host(f.scale))
        for (layer, direction), stats in f.stats.items():
            with np.errstate(invalid="ignore", divide="ignore"):  # a scale may have fallen to 0
                unscaled = stats.cpu().numpy()[:, :, order] / np.square(scale)
            squares[:, layer, direction, : stats.shape[1], start:end] = unscaled
    return _frozen(squares, lengths)


def _in_time(name: str, chunks: list[Squares]) -> Squares:
    """Chunks of one sequence, each behind the one before: the same samples in all of them."""
    B, start = len(chunks[0][1]), 0
    total = np.zeros(B, np.int64)
    for squares, lengths in chunks:
        if len(lengths) != B:
            raise ValueError(f"chunks of a sequence must have one batch size: {name!r} had {B}, then {len(lengths)}")
        if (total[lengths > 0] != start).any():
            raise ValueError(f"a sample of {name!r} has ended in one chunk of its sequence and goes on in another")
        start += squares.shape[3]
        total = total + lengths
    return _frozen(np.concatenate([squares for squares, _ in chunks], 3), total)


def _frozen(squares: NDArray[np.float64], lengths: NDArray[np.int64]) -> Squares:
    squares.setflags(write=False)  # later reads share them
    lengths.setflags(write=False)
    return squares, lengths


class Recorder:
    """Keeps the newest steps that have statistics, for one Flow: ``keep`` of them, in MAX_BYTES.

    Attributes:
        sampled: whether the step that is open now is to be recorded.
        step: what is open now.
        has_forward: whether a watched module has run forward in it.
        key: by which operators find it in ``recorders``.
        loss_scale: of the scaler that the user has named.
        held: forwards of compiled graphs, by the handle that the graph has.
        last_handle: of the newest of them, () int64.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, tuple[int, int]],  # name -> (layers, directions)
        every: int | Callable[[int], bool],
        keep: int = 1,
        scaler: GradScaler | None = None,
    ) -> None:
        self.modules = modules
        self.loss_scale = scaling.LossScale(scaler)
        self.keep = keep
        self.model_name = type(model).__name__
        self.index = 0
        self._is_sampled = every if callable(every) else lambda step: step % every == 0
        self._model = weakref.ref(model)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those known to train the model
        self._kept: list[Step] = []  # those that have statistics, oldest first
        self._ended: scaling.Outcome | None = None  # of the step before this one, where that was recorded
        self._has_stepped = self._was_read = self._warned = False
        self._chunk: int | None = None  # of the sequence that is open
        self.held: OrderedDict[int, tuple[Step, Forward]] = OrderedDict()
        self.last_handle = torch.tensor(-1, device="cpu")
        self._handles = itertools.count()
        self.key = next(_keys)
        recorders[self.key] = self
        self._open_step()

    def _open_step(self) -> None:
        self.sampled = bool(self._is_sampled(self.index))
        self.has_forward = False
        self.step = Step(self.index, self._chunk is not None)

    def wants_forward(self) -> bool:
        """Whether a forward that begins now is to be recorded: the step that it belongs to is open from here on."""
        if self._was_read and not self._has_stepped and self._chunk is None:
            self._begin_next()
        self.has_forward = True
        return self.sampled and not self._is_full(self.step)

    def open_forward(
        self, module: str, T: int, B: int, batch_sizes: Tensor | None, unsorted_indices: Tensor | None
    ) -> tuple[Step, Forward] | None:
        """Note a forward of the module of that name; None where nobody wants its statistics."""
        if not self.wants_forward():
            return None
        step = self.step
        forward = Forward(module, step.forwards, T, B, batch_sizes, unsorted_indices, self._chunk or 0)
        step.forwards += 1
        if step.is_sequence:
            step.opened.append(forward)
        return step, forward

    def open_growing(self, module: str, B: int) -> Forward | None:
        """Note a forward that comes one time step at a time: whoever takes one counts it in ``T``."""
        opened = self.open_forward(module, 0, B, None, None)
        return None if opened is None else opened[1]

    def is_in_chunk(self, forward: Forward) -> bool:
        """Whether what comes now belongs to the same chunk of a sequence as that forward; yes, where none is open."""
        return forward.chunk == (self._chunk or 0)

    def hold(self, step: Step, forward: Forward) -> int:
        """A handle for a forward: for graphs, which carry numbers only."""
        handle = next(self._handles)
        self.held[handle] = step, forward
        if len(self.held) > MAX_HELD:
            self.held.popitem(last=False)
        return handle

    def receive(self, step: Step, forward: Forward, layer: int, direction: int, stats: Tensor) -> None:
        """Statistics (4, T, B) of one backward through that forward."""
        step.receive(forward, layer, direction, stats, self.loss_scale.now())
        self._has_received(step)

    def receive_at(self, step: Step, forward: Forward, t: int, stats: Tensor) -> None:
        """Statistics (3, B) of one backward through time step t of that growing forward."""
        step.receive_at(forward, t, stats, self.loss_scale.now())
        self._has_received(step)

    def _has_received(self, step: Step) -> None:
        kept = self._kept
        if not kept or kept[-1].index < step.index:
            kept.append(step)
        elif step not in kept:
            insort(kept, step, key=lambda other: other.index)
        while len(kept) > self.keep or (len(kept) > 1 and sum(s.bytes for s in kept) > MAX_BYTES):
            del kept[0]

    def end_step(self) -> None:
        """A step ends here, if a watched module has run forward in it and no sequence is open."""
        self._has_stepped = True
        if self._chunk is None:
            self._begin_next()

    def outcome(self) -> scaling.Outcome | None:
        """Of the step whose gradients an optimizer takes now: the open one, or the last, which another has ended.

        None where it is not recorded.
        """
        if not self.has_forward:
            return self._ended
        return self.step.outcome if self.step.forwards else None

    def begin_sequence(self) -> None:
        """All that comes until end_sequence is one step, in chunks that follow one another in time."""
        if self._chunk is not None:
            raise RuntimeError("a sequence is open already: sequences of one Flow cannot be nested")
        self._begin_next()
        self._chunk, self.step.is_sequence = -1, True

    def next_chunk(self) -> None:
        """Forwards that come now belong to the next chunk of the sequence."""
        if self._chunk is None:
            raise RuntimeError("there is no open sequence that a chunk could belong to")
        self._chunk += 1

    def end_sequence(self) -> None:
        """The sequence is over, and its step with it."""
        self._chunk = None
        self.step.is_sequence = self.has_forward
        self._has_stepped = True
        self._begin_next()

    def read(self, newest: int = 1) -> list[Step]:
        """So many of the steps that have statistics, oldest first."""
        self.newest()
        return self._kept[-newest:]

    def newest(self) -> int | None:
        """Number of the newest step that has statistics; for loops that never step it counts as a read."""
        self._was_read = True
        if not self._has_stepped and not self.sampled and self._chunk is None:
            self._begin_next()  # here, as a compiled forward that is not sampled comes by unseen
        return self._kept[-1].index if self._kept else None

    def is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds a parameter of the model."""
        if optimizer in self._optimizers:
            return True
        model = self._model()
        if model is None:
            return False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in model.parameters()):
            self._optimizers.add(optimizer)
            return True
        return False

    def _begin_next(self) -> None:
        self._was_read = False
        if self.has_forward:
            self._ended = self.outcome()
            self.index += 1
            self._open_step()

    def _is_full(self, step: Step) -> bool:
        if step.bytes < MAX_BYTES:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"rnnkern.watch: the statistics of step {step.index} take {step.bytes >> 20} MiB after "
                f"{step.forwards} forwards; the rest of the step is not recorded. If the model is trained without a "
                "torch.optim optimizer, call flow.step() after every update.",
                RuntimeWarning,
                stacklevel=2,
            )
        return True


#: Recorders by their key.
recorders: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()
_keys = itertools.count()

# One hook hears the steps of all optimizers, for as long as a Flow is open.
_open: set[Recorder] = set()
_hook: RemovableHandle | None = None


def open_recorder(recorder: Recorder) -> None:
    """Tell the recorder of its optimizers' steps from now on."""
    global _hook
    _open.add(recorder)
    scaling.listen(recorder)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_optimizer_stepped)


def close_recorder(recorder: Recorder) -> None:
    """Tell it no more."""
    global _hook
    _open.discard(recorder)
    scaling.forget(recorder)
    if not _open and _hook is not None:
        _hook.remove()
        _hook = None


def _optimizer_stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for recorder in tuple(_open):
        if recorder.is_trained_by(optimizer):
            recorder.end_step()
