"""What happens while a model is watched: taps at its forwards, statistics at its backwards, and where a step ends.

A tap is kept alive by the autograd graph of its forward, and by nothing else: where no backward comes, it goes with
the graph. When a backward has brought its gradient, a hook takes that away into the step of the forward.

    graph -> tap -> hook -> recorder, step, forward        recorder -> newest step -> its forwards -> statistics

No arrow leads back to the graph or to the model, so nothing waits for the garbage collector.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from rnnkern.functional import Taps

#: of one module in one step: squares (3, layers, directions, T, B) float64 in input order, lengths (B,) int64
Squares = tuple[NDArray[np.float64], NDArray[np.int64]]

#: Statistics of one step that are kept on the device. What reaches this is a loop whose steps nobody has told of.
MAX_BYTES = 1 << 30


@dataclass(eq=False)
class Forward:
    """One forward of one module, and what backward has brought for it."""

    module: str
    number: int  # among the forwards of its step
    T: int
    B: int
    batch_sizes: Tensor | None  # (T,) int64 on the CPU
    unsorted_indices: Tensor | None  # (B,) int64
    stats: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # layer, direction -> (3, T, B)

    def lengths(self) -> NDArray[np.int64]:
        """Steps that each sample has, (B,), in the order of the statistics' rows."""
        if self.batch_sizes is None:
            return np.full(self.B, self.T, np.int64)
        return (self.batch_sizes.numpy()[:, None] > np.arange(self.B)).sum(0, dtype=np.int64)


@dataclass(eq=False)
class Step:
    """The statistics of one step."""

    index: int
    sampled: bool
    forwards: int = 0
    bytes: int = 0
    received: list[Forward] = field(default_factory=list)
    on_host: dict[str, Squares] | None = None

    def receive(self, forward: Forward, layer: int, direction: int, stats: Tensor) -> None:
        """Statistics (3, T, B) of one backward; a second backward through the same forward adds its squares."""
        if not forward.stats:
            self.received.append(forward)
        earlier = forward.stats.get((layer, direction))
        if earlier is None:
            self.bytes += stats.nbytes
        forward.stats[layer, direction] = stats if earlier is None else earlier + stats
        self.on_host = None

    def squares(self, modules: dict[str, tuple[int, int]]) -> dict[str, Squares]:
        """The statistics of each module that has some; waits for the device."""
        if self.on_host is None:
            forwards = sorted(self.received, key=lambda forward: forward.number)
            of_module = {name: [f for f in forwards if f.module == name] for name in modules}
            self.on_host = {name: _joined(of_module[name], *modules[name]) for name in modules if of_module[name]}
        return self.on_host


def _joined(forwards: list[Forward], layers: int, directions: int) -> Squares:
    """The samples of all forwards side by side, each forward's in the order of its batch, aligned at t = 0."""
    T, B = max(f.T for f in forwards), sum(f.B for f in forwards)
    squares, lengths = np.zeros((3, layers, directions, T, B)), np.zeros(B, np.int64)
    end = 0
    for f in forwards:
        start, end = end, end + f.B
        order = slice(None) if f.unsorted_indices is None else f.unsorted_indices.cpu().numpy()
        lengths[start:end] = f.lengths()[order]
        for (layer, direction), stats in f.stats.items():
            squares[:, layer, direction, : f.T, start:end] = stats.cpu().numpy()[:, :, order]
    squares.setflags(write=False)  # later reads share them
    lengths.setflags(write=False)
    return squares, lengths


class Recorder:
    """Keeps the newest step that has statistics, for one Flow."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, tuple[int, int]],  # name -> (layers, directions)
        every: int | Callable[[int], bool],
    ) -> None:
        self.modules = modules
        self.index = 0
        self._is_sampled = every if callable(every) else lambda step: step % every == 0
        self._model = weakref.ref(model)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those known to train the model
        self._current: Step | None = None  # None until its first forward
        self._newest: Step | None = None
        self._has_stepped = self._was_read = self._warned = False

    @torch.compiler.disable(reason="rnnkern.watch makes its taps in eager mode")
    def taps(
        self,
        module: str,
        T: int,
        B: int,
        batch_sizes: Tensor | None,
        unsorted_indices: Tensor | None,
        device: torch.device,
    ) -> Taps | None:
        """A TapFactory for the module of that name: None where no backward will come, or nobody wants it."""
        if not torch.is_grad_enabled():
            return None
        if self._was_read and not self._has_stepped:
            self._begin_next()
        step = self._current
        if step is None:
            step = self._current = Step(self.index, bool(self._is_sampled(self.index)))
        if not step.sampled or self._is_full(step):
            return None
        forward = Forward(module, step.forwards, T, B, batch_sizes, unsorted_indices)
        step.forwards += 1
        return functools.partial(self._tap, step, forward, device)

    def end_step(self) -> None:
        """A step ends here, if a watched module has run forward in it."""
        self._has_stepped = True
        self._begin_next()

    def read(self) -> tuple[int, dict[str, Squares]] | None:
        """Number and statistics of the newest step that has some."""
        self._was_read = True
        return None if self._newest is None else (self._newest.index, self._newest.squares(self.modules))

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

    @torch.compiler.disable(reason="rnnkern.watch makes its taps in eager mode")
    def _tap(self, step: Step, forward: Forward, device: torch.device, layer: int, direction: int) -> Tensor:
        """The tap of one recurrence: a (3, T, B) float64 leaf, of which only the gradient takes memory."""

        def receive(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            if grad is not None:
                step.receive(forward, layer, direction, grad.detach())
                if self._newest is None or step.index >= self._newest.index:
                    self._newest = step

        shape = (3, forward.T, forward.B)
        tap = torch.empty_strided(shape, (0, 0, 0), dtype=torch.float64, device=device, requires_grad=True)
        tap.register_post_accumulate_grad_hook(receive)
        return tap

    def _begin_next(self) -> None:
        self._was_read = False
        if self._current is not None:
            self._current = None
            self.index += 1

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


# One hook hears the steps of all optimizers, for as long as a Flow is open.
_open: set[Recorder] = set()
_hook: RemovableHandle | None = None


def open_recorder(recorder: Recorder) -> None:
    """Tell the recorder of its optimizers' steps from now on."""
    global _hook
    _open.add(recorder)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_optimizer_stepped)


def close_recorder(recorder: Recorder) -> None:
    """Tell it no more."""
    global _hook
    _open.discard(recorder)
    if not _open and _hook is not None:
        _hook.remove()
        _hook = None


def _optimizer_stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for recorder in tuple(_open):
        if recorder.is_trained_by(optimizer):
            recorder.end_step()
