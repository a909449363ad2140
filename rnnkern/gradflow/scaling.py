"""A GradScaler as a Flow knows it: the loss scale of each backward, and the steps that the scaler has skipped.

Nothing here waits for the device. The scale, and what the scaler has found in the gradients, are copied on the device
and read together with the record.

A step that is skipped calls no hook of the optimizer, so the scaler's own ``step`` is heard. What does that stands on
the instance, and goes with the last Flow that listens; copies and files of the scaler do not get it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from rnnkern.gradflow.standin import StandIn

if TYPE_CHECKING:
    from rnnkern.gradflow.recorder import Recorder


class LossScale:
    """The scale of a scaler, in copies that its later updates leave alone."""

    def __init__(self, scaler: GradScaler | None) -> None:
        self._scaler = None if scaler is None else weakref.ref(scaler)
        self._copied: tuple[Tensor, int] | None = None  # the scaler's own tensor, and the version of it
        self._copy: Tensor | None = None

    @property
    def scaler(self) -> GradScaler | None:
        """None where there is none, or no longer."""
        return None if self._scaler is None else self._scaler()

    def now(self) -> Tensor | None:
        """() float32, the same object until the scale is updated; None where no loss has been scaled."""
        scaler = self.scaler
        scale = None if scaler is None or not scaler.is_enabled() else scaler._scale
        if scale is None:
            return None
        if self._copied is None or self._copied[0] is not scale or self._copied[1] != scale._version:
            self._copied, self._copy = (scale, scale._version), scale.detach().clone()
        return self._copy


def converted(stats: Tensor, scale: Tensor | None, to: Tensor | None) -> Tensor:
    """Squares of gradients of a loss times ``scale`` as those of the loss times ``to``; None is 1."""
    if scale is to:
        return stats
    before, after = (
        stats.new_ones(()) if x is None else x.to(stats.device, stats.dtype, non_blocking=True) for x in (scale, to)
    )
    return stats * (after / before).square()


def on_host(scale: Tensor | None) -> float:
    """The scale as a number; waits for the device."""
    return 1.0 if scale is None else float(scale)


class Outcome:
    """Whether a scaler has skipped a step, which the device knows first."""

    def __init__(self, skipped: bool | None = None) -> None:
        self._found: list[Tensor | bool] | None = None if skipped is None else [skipped]

    def add(self, found: Iterable[Tensor]) -> None:
        """Take what the scaler has found for one optimizer: () tensors, none of them > 0 where it let it step."""
        self._found = [*(self._found or []), *found]

    def skipped(self) -> bool | None:
        """Whether any optimizer's step was skipped; None before there was one. Waits for the device."""
        if self._found is None:
            return None
        self._found = [any(bool(found) for found in self._found)]
        return bool(self._found[0])


class Listener(StandIn[GradScaler]):
    """What stands in for some methods of one scaler while recorders listen; without one it only passes on."""

    METHODS: ClassVar[dict[str, str]] = {"step": "step", "__getstate__": "state"}

    def __init__(self, scaler: GradScaler) -> None:
        super().__init__(scaler)
        self.recorders: list[Recorder] = []

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The scaler's own step, which may skip that of the optimizer: in either case a step of training ends."""
        outcomes = [(recorder, recorder.outcome()) for recorder in self.recorders if recorder.is_trained_by(optimizer)]
        result = self.own("step")(optimizer, *args, **kwargs)
        for recorder, outcome in outcomes:
            recorder.end_step()
            if outcome is not None:
                outcome.add(_found(self.owner, optimizer))
        return result


def listen(recorder: Recorder) -> None:
    """Tell the recorder of the steps of its scaler from now on, where it has one."""
    scaler = recorder.loss_scale.scaler
    if scaler is None:
        return
    listener = Listener.of(scaler)
    if listener is None:
        listener = Listener(scaler)
        listener.stand_in()
    listener.recorders.append(recorder)


def forget(recorder: Recorder) -> None:
    """Tell it no more."""
    scaler = recorder.loss_scale.scaler
    listener = None if scaler is None else Listener.of(scaler)
    if scaler is None or listener is None or recorder not in listener.recorders:
        return
    listener.recorders.remove(recorder)
    if not listener.recorders:
        listener.give_back(vars(scaler))


def _found(scaler: GradScaler, optimizer: Optimizer) -> list[Tensor]:
    """Copies, as ``update`` adds what it has found for all optimizers to that of the first."""
    if not scaler.is_enabled():
        return []
    with torch.no_grad():
        return [found.clone() for found in scaler._found_inf_per_device(optimizer).values()]
