"""watch(): taps into every RNN of a model, and the Flow by which the user reads and ends them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, get_args

from torch import nn

from rnnkern.gradflow.record import ModuleRecord, Order, Record
from rnnkern.gradflow.recorder import Recorder, close_recorder, open_recorder
from rnnkern.gradflow.scalars import sender
from rnnkern.gradflow.taps import ModuleTaps
from rnnkern.modules import RNN


def watch(model: nn.Module, every: int | Callable[[int], bool] = 1) -> Flow:
    """Record ‖∂L/∂h_t‖ of every :class:`rnnkern.RNN` in ``model`` while it trains; the training loop stays as it is.

    The backward kernel sums the squares while it computes the gradients, so nothing is computed twice, and the
    outputs and gradients of the model keep their bits. Steps that are not sampled cost nothing.

    Args:
        model: a module that contains rnnkern.RNN modules, or is one.
        every: sample the steps whose number is a multiple of this, or for which this callable says True. It is asked
            once a step, when the step begins; steps are numbered from 0 when the watching begins.

    Returns:
        The :class:`Flow` to read from. It is a context manager. The watching ends with ``close()``, with the ``with``
        block, or when nobody holds the Flow any more. Copies and pickles of a watched model are not watched.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no rnnkern.RNN in it, one is already watched, or ``every`` is neither a positive int nor
            callable.

    What is recorded is what ``backward()`` sends through the RNNs: ``torch.autograd.grad``, ``backward(inputs=...)``
    and ``torch.func.grad`` leave the taps out, and record nothing. Neither do forwards without grad mode, so an
    evaluation in between disturbs nothing. What ``torch.func.vmap`` maps over shares a row: squares add.
    A compiled model is compiled again when the watching begins, once for steps that are sampled and once for the
    others; it stays one graph.

    Example::

        flow = rnnkern.watch(model, every=50)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(flow.read())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(every) and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every must be a positive int or a callable(step) -> bool, got {every!r}")
    modules = {name or "rnn": m for name, m in model.named_modules() if isinstance(m, RNN)}
    if not modules:
        raise ValueError(_nothing_to_watch(model))
    for name, module in modules.items():
        if module.tap is not None:
            raise ValueError(f"{name!r} is already watched: close() the earlier Flow first")
    return Flow(model, modules, every)


def _nothing_to_watch(model: nn.Module) -> str:
    others = [name or "the model" for name, m in model.named_modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
    if not others:
        return f"there is no rnnkern.RNN in this {type(model).__name__}"
    return (
        f"there is no rnnkern.RNN in this {type(model).__name__}; recurrent modules of other classes "
        f"({', '.join(others)}) cannot be watched yet. rnnkern.RNN takes the place of torch.nn.RNN: "
        "same arguments, same state_dict"
    )


class Flow:
    """The gradient flow of a watched model; made by :func:`watch`.

    What a step is: everything between two steps of an optimizer that holds a parameter of the model. Within it
    micro-batches, repeated forwards and several losses are rows of one record: their squares add. A step counts only
    if a watched module has run forward (with gradients) since the last one, so two optimizers that step one after the
    other count once. Optimizers of torch.optim are noticed by themselves; any other loop calls :meth:`step`. Where a
    GradScaler skips a step, the next iteration still belongs to it; norms carry the scale of the loss.

    A forward belongs to the step in which it ran; its gradients go there whenever its backward comes. Two backwards
    through one graph (``retain_graph=True``) add their squares in the rows of its one forward.

    Statistics stay on their device until they are read: 24·T·B bytes per layer and direction, for one step. A step
    whose statistics reach 1 GiB records no further forwards, and warns: most likely nobody has told it of its end.
    """

    def __init__(self, model: nn.Module, modules: dict[str, RNN], every: int | Callable[[int], bool]) -> None:
        self._every = every
        self._logged: int | None = None  # the step that was logged last
        self._recorder = Recorder(model, {name: _shape(module) for name, module in modules.items()}, every)
        for name, module in modules.items():
            module.tap = ModuleTaps(self._recorder, name, module._weights()[0][1].device)
        open_recorder(self._recorder)
        # The modules hold the recorder, not this Flow: a Flow that nobody holds is closed.
        self._finalizer = weakref.finalize(self, _release, self._recorder, [weakref.ref(m) for m in modules.values()])
        self._finalizer.atexit = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the watched modules, in the model's order; a model that is itself the RNN is called 'rnn'."""
        return tuple(self._recorder.modules)

    @property
    def steps(self) -> int:
        """How many steps have ended: the number of the step that is open now."""
        return self._recorder.index

    def step(self) -> None:
        """End the step: for loops without a torch.optim optimizer. After an optimizer's own step it does nothing."""
        self._recorder.end_step()

    @contextmanager
    def sequence(self) -> Iterator[Callable[[], None]]:
        """What runs in this block is one long sequence in chunks, and one step: its record has all chunks in time.

        Truncated BPTT steps the optimizer after each chunk; those steps end no step of the record. Call what the
        block yields before each chunk; :class:`rnnkern.TruncatedBPTT` does. ∂L/∂h_t is then the gradient of the losses
        in t's own chunk. Every chunk has the same samples in the same order.

        Raises:
            RuntimeError: a sequence is open already.
        """
        self._recorder.begin_sequence()
        try:
            yield self._recorder.next_chunk
        finally:
            self._recorder.end_sequence()

    def read(self, per_sample: bool = False, order: Order = "processing") -> Record | None:
        """The newest sampled step that has statistics, as far as it has come; None where there is none yet.

        The step need not have ended, and the same one is returned until a newer one has statistics: compare
        ``Record.step``. Reading changes nothing and may be done anywhere between backward and the next forward. One
        exception serves loops that never step: until the first step has been seen, a ``read()`` does its work, and
        the next forward begins a new one. So backward, read, backward, read gives each backward on its own.

        This is the only call that waits for the device. It is local, never a collective: every rank may read or not.

        Args:
            per_sample: keep the samples apart, as the last axis of everything in the record.
            order: the order of the T axis, see :class:`ModuleRecord`: "processing", "input" or "lag".

        Raises:
            ValueError: an unknown order, or chunks of a sequence that do not fit together.
        """
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
        newest = self._recorder.read()
        if newest is None:
            return None
        index, squares = newest
        records = [ModuleRecord(name, *s, order=order, per_sample=per_sample) for name, s in squares.items()]
        return Record(index, self.modules, records)

    def log(self, writer: Any, step: int) -> bool:
        """Log :meth:`Record.scalars` of the newest step, where it has not been logged; call it once an iteration.

        Without a new record this neither waits for the device nor writes. A step is logged once, as far as it has come:
        with micro-batches call it after the optimizer's step. It is local, never a collective.

        Args:
            writer: a TensorBoard SummaryWriter, a W&B run, a Lightning logger, or what has ``add_scalar(tag, value,
                global_step=)``, ``log(dict, step=)`` or ``log_metrics(dict, step=)`` as they have it.
            step: where the logger is to put it; ``Record.step`` counts from when the watching began.

        Returns:
            Whether a new record was logged.

        Raises:
            TypeError: ``writer`` has none of these methods.
        """
        send = sender(writer)
        newest = self._recorder.newest()
        if newest is None or newest == self._logged:
            return False
        record = self.read()
        assert record is not None
        self._logged = record.step
        send(record.scalars(), step)
        return True

    def close(self) -> None:
        """Stop watching, as often as called. What has been recorded can still be read."""
        self._finalizer()

    def __enter__(self) -> Flow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a Flow cannot be copied or pickled: keep it outside the model")

    def __repr__(self) -> str:
        state = f"step {self.steps}" if self._finalizer.alive else "closed"
        return f"<rnnkern Flow of {', '.join(self.modules)}: every {self._every}, {state}>"


def _shape(module: RNN) -> tuple[int, int]:
    return module.num_layers, 2 if module.bidirectional else 1


def _release(recorder: Recorder, modules: Sequence[weakref.ref[RNN]]) -> None:
    close_recorder(recorder)
    for ref in modules:
        module = ref()
        if module is not None:
            module.__dict__.pop("tap", None)
