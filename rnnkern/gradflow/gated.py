"""watch() on torch.nn's own LSTM, GRU, RNN and their cells: the honest slow path.

A module is left as it is up to the one operator that computes its recurrence (torch.lstm, torch.gru_cell, ...). While
a forward is sampled, a TorchFunctionMode puts the loop of ``unrolled`` in the operator's place, so everything around it
stays: checks, packing, hooks, parametrizations, what a subclass does before and after.

The mode is entered by a ``forward`` on the instance, which goes when the watching ends. Two more attributes of the
instance see to it that copies, files and replicas of nn.DataParallel do not get it.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from rnnkern.gradflow.recorder import Forward, Recorder, Step
from rnnkern.gradflow.standin import StandIn
from rnnkern.gradflow.taps import ModuleTaps
from rnnkern.gradflow.unrolled import RECURRENT, Call, Weights, observed, requires_grad, step, unrolled

log = logging.getLogger("rnnkern")

SEQUENCES = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
OPERATORS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
CELL_OPERATORS = tuple(f"{name}_cell" for name in OPERATORS)


def is_served(module: nn.Module) -> bool:
    """Whether the slow path serves a module."""
    return isinstance(module, SEQUENCES + CELLS)


def has_cell_state(module: nn.Module) -> bool:
    """Whether it has a c beside its h."""
    return isinstance(module, (nn.LSTM, nn.LSTMCell))


def has_gates(module: nn.Module) -> bool:
    """Whether its step is another than f(z + W_hh h)."""
    return isinstance(module, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell))


def is_watched(module: nn.Module) -> bool:
    """Whether a Flow is open on it."""
    watched = Watched.of(module)
    return watched is not None and watched.recorder is not None


def attach(module: nn.Module, recorder: Recorder, name: str, c_name: str | None) -> None:
    """Watch a module under that name, and its c under the other."""
    Watched(module, recorder, name, c_name).stand_in()


def detach(module: nn.Module) -> None:
    """Watch it no longer: it is what it was before."""
    watched = Watched.of(module)
    if watched is not None:
        watched.recorder = watched.chain = None
        watched.give_back(vars(module))


@dataclass(eq=False)
class Chain:
    """The calls of a cell so far that are the time steps of one sequence."""

    step: Step
    forward: Forward | None  # of h
    c_forward: Forward | None
    tap: Tensor | None = None  # (3, B), of the newest h
    c_tap: Tensor | None = None
    returned: tuple[weakref.ref[Tensor], ...] = ()  # the newest state, as the caller has it


class Watched(StandIn[nn.Module]):
    """What stands in for some methods of one module while it is watched; without a recorder it only passes on."""

    METHODS: ClassVar[dict[str, str]] = {
        "forward": "forward",
        "__getstate__": "state",
        "_replicate_for_data_parallel": "replicate",
    }

    def __init__(self, module: nn.Module, recorder: Recorder | None, name: str, c_name: str | None) -> None:
        super().__init__(module)
        self.recorder, self.name, self.c_name = recorder, name, c_name
        self.chain: Chain | None = None
        self._has_run = self._has_warned = False

    def __repr__(self) -> str:
        return f"rnnkern.watch on {self.name!r}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; with the loop in it where that is to be recorded."""
        own = self.own("forward")
        traced = any(isinstance(x, torch.fx.Proxy) for x in args)
        return own(*args, **kwargs) if traced or not self._is_wanted() else self._slowly(own, args, kwargs)

    def _is_wanted(self) -> bool:
        recorder = self.recorder
        if recorder is None or not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        if torch.compiler.is_compiling():  # guards on this alone
            recorder.has_forward = True
            return recorder.sampled
        return recorder.wants_forward()

    @torch.compiler.disable(reason="rnnkern.watch records this module by a Python loop, which is not compiled")
    def _slowly(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._has_run:
            self._has_run = True
            log.info(
                "%r is a %s: steps that are sampled run it as a Python loop, which is slow; the others run as "
                "always. docs/gated.md",
                self.name,
                type(self.owner).__name__,
            )
        with InPlaceOfOperator(self, args, kwargs) as mode:
            result = own(*args, **kwargs)
        if not mode.has_run:
            self._warn(f"the forward of {self.name!r} did not call the operator of torch.nn: it is not recorded")
        if mode.chain is not None:
            mode.chain.returned = tuple(weakref.ref(x) for x in _tensors(result))
            self.chain = mode.chain
        return result

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def continued(self, state: Any) -> Chain | None:
        """The sequence that goes on with a call on ``state``, as the caller gave it; None where one begins."""
        chain, recorder = self.chain, self.recorder
        if chain is None or recorder is None or chain.forward is None or chain.step is not recorder.step:
            return None
        if not recorder.is_in_chunk(chain.forward):
            return None
        given = _tensors(state)
        if (
            given
            and len(given) == len(chain.returned)
            and all(x is ref() for x, ref in zip(given, chain.returned, strict=True))
        ):
            return chain
        if chain.forward.T == 1 and any(x.grad_fn is not None for x in given):
            self._warn(
                f"the state given to {self.name!r} is not the one that it returned last, so a sequence begins at every "
                "call and its record has T=1: pass the state on as it is, or use the module that takes whole sequences"
            )
        return None

    def replicate(self) -> Any:
        """For nn.DataParallel, whose replicas are not watched: a forward knows one module alone."""
        replica = self.own("_replicate_for_data_parallel")()
        self.give_back(vars(replica))
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        """Where torch copies a module with parametrizations attribute by attribute: what only passes on."""
        copied = Watched(memo.get(id(self.owner), self.owner), None, self.name, self.c_name)
        copied.replaced = copy.deepcopy(self.replaced, memo)
        return copied


class InPlaceOfOperator(TorchFunctionMode):
    """During one forward of a watched module: its operator is a loop with taps."""

    def __init__(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.watched = watched
        self.input = args[0] if args else kwargs.get("input")
        self.state = args[1] if len(args) > 1 else kwargs.get("hx")
        self.chain: Chain | None = None
        self.has_run = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        result = None
        try:
            if name in OPERATORS and any(x is getattr(self.watched.owner, "_flat_weights", None) for x in args):
                result = self._sequence(name, args)
            elif name in CELL_OPERATORS and isinstance(self.watched.owner, CELLS):
                result = self._cell(name.removesuffix("_cell"), args)
        except RuntimeError:
            func(*args, **(kwargs or {}))  # what it says of its arguments is what the module says
            raise
        return func(*args, **(kwargs or {})) if result is None else result

    def _sequence(self, kind: str, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        self.has_run = True
        call = Call.parse(kind, args)
        if call.T == 0:
            return None  # the operator says what is wrong
        unsorted_indices = self.input.unsorted_indices if isinstance(self.input, PackedSequence) else None

        def taps(name: str | None) -> Any:
            if name is None or self.watched.recorder is None:
                return None
            factory = ModuleTaps(self.watched.recorder, name, call.input.device)
            return factory(call.input, call.T, call.B, call.batch_sizes, unsorted_indices)

        return unrolled(call, taps(self.watched.name), taps(self.watched.c_name))

    def _cell(self, kind: str, args: tuple[Any, ...]) -> Any:
        """One time step of a sequence, which begins here or goes on."""
        self.has_run = True
        recorder = self.watched.recorder
        input, state, w_ih, w_hh, b_ih, b_hh = args
        h, c = state if kind == "lstm" else (state, None)
        if recorder is None or not requires_grad(input, h, c, w_ih, w_hh, b_ih, b_hh):
            return None
        if h.shape != (len(input), w_hh.shape[1]) or (c is not None and c.shape != h.shape):
            return None  # the operator says what is wrong
        chain = self.watched.continued(self.state) if self.chain is None else None
        if chain is None:
            B = h.shape[0]
            chain = Chain(
                recorder.step,
                recorder.open_growing(self.watched.name, B),
                None if self.watched.c_name is None or c is None else recorder.open_growing(self.watched.c_name, B),
            )
        h, c = observed(h, chain.tap, RECURRENT), None if c is None else observed(c, chain.c_tap, RECURRENT)
        chain.tap = _leaf(recorder, chain.step, chain.forward, h.device)
        chain.c_tap = _leaf(recorder, chain.step, chain.c_forward, h.device)
        self.chain = chain
        z = torch.nn.functional.linear(input, w_ih, b_ih)
        h, c = step(kind, z, h, c, Weights(w_ih, w_hh, b_ih, b_hh, None), chain.tap, chain.c_tap)
        return h if c is None else (h, c)


def _leaf(recorder: Recorder, step: Step, forward: Forward | None, device: torch.device) -> Tensor | None:
    """The tap (3, B) of the next time step of a cell's sequence; see ``taps._leaf``.

    It has no row for the direct part: what a cell returns is output and state at once.
    """
    if forward is None:
        return None
    t = forward.T
    forward.T += 1

    def receive(leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if grad is not None:
            recorder.receive_at(step, forward, t, grad.detach())

    tap = torch.empty_strided((3, forward.B), (0, 0), dtype=torch.float64, device=device, requires_grad=True)
    tap.register_post_accumulate_grad_hook(receive)
    return tap


def _tensors(state: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in (state if isinstance(state, (tuple, list)) else (state,)) if isinstance(x, Tensor))
