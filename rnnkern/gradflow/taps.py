"""The taps of a watched module: made at its forwards, they bring the recorder what backward computes.

A tap is a node of the graph, which has no value and hands its "gradient" to the recorder. A layer that is one node
hands its statistics over itself. Under torch.func a tap is a leaf instead, whose gradient a hook takes away. In a graph
that a compiler traces two operators lead out of it and into the recorder:

    open_taps      at the forward: notes it, and returns a handle, a () int64 tensor that the graph keeps for backward.
                   It takes the handle of the forward before, so that no compiler changes their order or joins two
    deliver        at the backward: takes statistics to the forward of that handle; a gradient of 0 is what remains

A tap's own input is a leaf, ``ModuleTaps.anchor``: so ``backward()`` comes by, and ``autograd.grad`` does not; and no
compiler drops the operator whose result is the gradient of that leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnkern.autograd import is_transformed
from rnnkern.functional import Taps
from rnnkern.gradflow.recorder import Forward, Recorder, Step, recorders
from rnnkern.layer_function import ReceivingTaps


class ModuleTaps:
    """The TapFactory of one watched module: see there for arguments and result."""

    def __init__(self, recorder: Recorder, module: str, device: torch.device) -> None:
        self.recorder, self.module = recorder, module
        self.anchor = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)

    def __call__(
        self, input: Tensor, T: int, B: int, batch_sizes: Tensor | None, unsorted_indices: Tensor | None
    ) -> Taps | None:
        if not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            return self._in_a_graph(T, B, batch_sizes, unsorted_indices, input.device)
        opened = self.recorder.open_forward(self.module, T, B, batch_sizes, unsorted_indices)
        if opened is None:
            return None
        return _ForwardTaps(self.anchor, self.recorder, *opened, input.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a watched module is not watched."""

    def _in_a_graph(
        self, T: int, B: int, batch_sizes: Tensor | None, unsorted_indices: Tensor | None, device: torch.device
    ) -> Taps | None:
        """The same for a compiler, which guards on ``sampled``: two graphs serve a whole training run."""
        if torch.compiler.is_exporting():
            return None
        self.recorder.has_forward = True
        if not self.recorder.sampled:
            return None
        if self.anchor.device != device:
            raise RuntimeError(
                f"{self.module!r} was on {self.anchor.device} when rnnkern.watch was called, and its input is on "
                f"{device}: to compile it, move the model first and watch it then"
            )
        key, anchor = self.recorder.key, self.anchor
        before = self.recorder.last_handle
        handle = torch.ops.rnnkern.open_taps(before, batch_sizes, unsorted_indices, key, self.module, T, B)
        self.recorder.last_handle = handle

        def tap(layer: int, direction: int) -> Tensor:
            return _Node.apply(anchor, handle, key, T, B, layer, direction)

        return tap


class _ForwardTaps(ReceivingTaps):
    """The taps of one forward, outside of a compiler's graph."""

    __slots__ = ("_device", "_forward", "_recorder", "_step")

    def __init__(self, anchor: Tensor, recorder: Recorder, step: Step, forward: Forward, device: torch.device) -> None:
        self.anchor, self._recorder, self._step, self._forward, self._device = anchor, recorder, step, forward, device

    def receiver(self, layer: int, direction: int) -> Callable[[Tensor], None]:
        return functools.partial(self._recorder.receive, self._step, self._forward, layer, direction)

    def __call__(self, layer: int, direction: int) -> Tensor:
        make = _leaf if is_transformed() else _Tap.apply
        shape = (4, self._forward.T, self._forward.B)
        tap: Tensor = make(self.anchor, self.receiver(layer, direction), shape, self._device)
        return tap


class _Tap(torch.autograd.Function):
    """A (4, T, B) float64 tensor without memory, of which only the gradient is of use.

    The autograd graph of its forward keeps it alive, and nothing else does: where no backward comes, it goes with the
    graph. No reference leads from it to the graph or to the model, so nothing waits for the garbage collector.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, receive: Callable[[Tensor], None], shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        ctx.receive = receive
        return torch.empty_strided(shape, (0, 0, 0), dtype=torch.float64, device=device)

    @staticmethod
    def backward(ctx: Any, stats: Tensor) -> tuple[None, ...]:
        ctx.receive(stats.detach())
        return None, None, None, None


def _leaf(anchor: Tensor, receive: Callable[[Tensor], None], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same under torch.func, which has rules for operators and leaves alone."""

    def take(leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if grad is not None:
            receive(grad.detach())

    tap = torch.empty_strided(shape, (0, 0, 0), dtype=torch.float64, device=device, requires_grad=True)
    tap.register_post_accumulate_grad_hook(take)
    return tap


class _Node(torch.autograd.Function):
    """A tap in a traced graph: its value is never read."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, handle: Tensor, key: int, T: int, B: int, layer: int, direction: int
    ) -> Tensor:
        ctx.save_for_backward(handle)
        ctx.place = key, layer, direction
        return anchor.new_zeros(()).expand(4, T, B)

    @staticmethod
    def backward(ctx: Any, stats: Tensor) -> tuple[Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        return torch.ops.rnnkern.deliver(stats, handle, *ctx.place), None, None, None, None, None, None


_library = torch.library.Library("rnnkern", "FRAGMENT")
_tags = (torch.Tag.cudagraph_unsafe,)  # they run Python, which a replayed graph would not
_library.define(
    "open_taps(Tensor before, Tensor? batch_sizes, Tensor? unsorted_indices, SymInt recorder, str module, SymInt T, "
    "SymInt B) -> Tensor",
    tags=_tags,
)
_library.define("deliver(Tensor stats, Tensor handle, SymInt recorder, int layer, int direction) -> Tensor", tags=_tags)


def _open_taps(
    before: Tensor,
    batch_sizes: Tensor | None,
    unsorted_indices: Tensor | None,
    recorder: int,
    module: str,
    T: int,
    B: int,
) -> Tensor:
    watching = recorders.get(recorder)
    opened = None if watching is None else watching.open_forward(module, T, B, batch_sizes, unsorted_indices)
    handle = -1 if watching is None or opened is None else watching.hold(*opened)
    return torch.tensor(handle, device="cpu")


def _deliver(stats: Tensor, handle: Tensor, recorder: int, layer: int, direction: int) -> Tensor:
    watching = recorders.get(recorder)
    held = None if watching is None else watching.held.get(int(handle))
    if watching is not None and held is not None:
        watching.receive(*held, layer, direction, stats.detach().clone())  # a compiler may use its memory again
    return stats.new_zeros(())


_library.impl("open_taps", _open_taps, "CompositeExplicitAutograd")
_library.impl("deliver", _deliver, "CompositeExplicitAutograd")


@torch.library.register_fake("rnnkern::open_taps", lib=_library)
def _(before: Tensor, *rest: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("rnnkern::deliver", lib=_library)
def _(stats: Tensor, *rest: Any) -> Tensor:
    return stats.new_empty(())
