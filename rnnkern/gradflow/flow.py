"""watch(): taps into every RNN of a model, and the Flow by which the user reads and ends them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from torch import nn
from torch.amp import GradScaler

from rnnkern.gradflow import gated, scaling
from rnnkern.gradflow.history import History
from rnnkern.gradflow.record import ModuleRecord, Order, Record
from rnnkern.gradflow.recorder import Recorder, close_recorder, open_recorder
from rnnkern.gradflow.scalars import sender
from rnnkern.gradflow.taps import ModuleTaps
from rnnkern.modules import RNN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def watch(
    model: nn.Module,
    every: int | Callable[[int], bool] = 1,
    keep: int = 1,
    *,
    cell_states: bool = False,
    scaler: GradScaler | None = None,
) -> Flow:
    """Record ‖∂L/∂h_t‖ of every recurrent module in ``model`` while it trains; the training loop stays as it is.

    In :class:`rnnkern.RNN` the backward kernel sums the squares while it computes the gradients, so nothing is computed
    twice, and the outputs and gradients of the model keep their bits. nn.LSTM, nn.GRU, nn.RNN and the cells are
    recorded too, the slow way: a step that is sampled runs them as a Python loop, equal to rounding; see
    ``docs/gated.md``. Steps that are not sampled cost nothing.

    Args:
        model: a module that contains recurrent modules, or is one.
        every: sample the steps whose number is a multiple of this, or for which this callable says True. It is asked
            once a step, when the step begins; steps are numbered from 0 when the watching begins.
        keep: how many sampled steps stay on the device for :meth:`Flow.history`, for loops that read rarely. Of more
            than 1 GiB the oldest go first.
        cell_states: record ‖∂L/∂c_t‖ of every LSTM too, as a module of its own: ``record["lstm.c"]``.
        scaler: the GradScaler that scales the loss, of any kind (``torch.amp``, FSDP's ShardedGradScaler). The scale at
            each backward is then divided out of the norms, and a step that the scaler skips ends like any other and is
            marked: ``Record.skipped``. Without it norms carry the scale, and what comes after a skipped step still
            belongs to it.

    Returns:
        The :class:`Flow` to read from. It is a context manager. The watching ends with ``close()``, with the ``with``
        block, or when nobody holds the Flow any more. Copies and pickles of a watched model are not watched.

    Raises:
        TypeError: ``model`` is not a module, or ``scaler`` not a torch.amp.GradScaler.
        ValueError: there is no recurrent module in it, one is already watched, ``every`` is neither a positive int
            nor callable, or ``keep`` is not a positive int.

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
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be a positive int, got {keep!r}")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    modules = {name or "rnn": m for name, m in model.named_modules() if isinstance(m, RNN) or gated.is_served(m)}
    if not modules:
        raise ValueError(
            f"there is no recurrent module in this {type(model).__name__}: none of rnnkern.RNN, nn.LSTM, nn.GRU, "
            "nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell"
        )
    for name, module in modules.items():
        if gated.is_watched(module) if not isinstance(module, RNN) else module.tap is not None:
            raise ValueError(f"{name!r} is already watched: close() the earlier Flow first")
    return Flow(model, modules, every, keep, cell_states, scaler)


class Flow:
    """The gradient flow of a watched model; made by :func:`watch`.

    What a step is: everything between two steps of an optimizer that holds a parameter of the model. Within it
    micro-batches, repeated forwards and several losses are rows of one record: their squares add. A step counts only
    if a watched module has run forward (with gradients) since the last one, so two optimizers that step one after the
    other count once. Optimizers of torch.optim are noticed by themselves; any other loop calls :meth:`step`. Where a
    GradScaler skips a step, it ends all the same, if :func:`watch` knows the scaler; if not, the next iteration still
    belongs to it.

    A forward belongs to the step in which it ran; its gradients go there whenever its backward comes. Two backwards
    through one graph (``retain_graph=True``) add their squares in the rows of its one forward.

    Statistics stay on their device until they are read: 32·T·B bytes per layer and direction, for each of the ``keep``
    newest steps. A step whose statistics reach 1 GiB records no further forwards, and warns: most likely nobody has
    told it of its end.

    Of every step that is read the norm by lag stays on the host, for :meth:`plot` and :meth:`report`: up to 2,000
    steps and 64 MiB; of more, every second one goes, all over the run.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        every: int | Callable[[int], bool],
        keep: int,
        cell_states: bool,
        scaler: GradScaler | None,
    ) -> None:
        self._every = every
        self._curves = History()
        shapes: dict[str, tuple[int, int]] = {}
        self._gated: set[str] = set()
        self._logged: int | None = None  # the step that was logged last
        for name, module in modules.items():
            names = [name, *([f"{name}.c"] if cell_states and gated.has_cell_state(module) else [])]
            shapes.update(dict.fromkeys(names, _shape(module)))
            if gated.has_gates(module):
                self._gated.update(names)
        self._recorder = Recorder(model, shapes, every, keep, scaler)
        for name, module in modules.items():
            if isinstance(module, RNN):
                module.tap = ModuleTaps(self._recorder, name, module._weights()[0][1].device)
            else:
                gated.attach(module, self._recorder, name, f"{name}.c" if f"{name}.c" in shapes else None)
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

        This waits for the device, as :meth:`history` and what is built on the two does, and nothing else. It is local,
        never a collective: every rank may read or not.

        Args:
            per_sample: keep the samples apart, as the last axis of everything in the record.
            order: the order of the T axis, see :class:`ModuleRecord`: "processing", "input" or "lag".

        Raises:
            ValueError: an unknown order, or chunks of a sequence that do not fit together.
        """
        records = self._read(1, per_sample, order)
        return records[0] if records else None

    def history(self, per_sample: bool = False, order: Order = "processing") -> list[Record]:
        """The newest sampled steps that have statistics, oldest first: as many as ``watch(keep=)`` says, at most.

        As :meth:`read` in everything else; its last is what that returns. Of statistics beyond 1 GiB the oldest steps
        are gone.
        """
        return self._read(self._recorder.keep, per_sample, order)

    def _read(self, newest: int, per_sample: bool = False, order: Order = "processing") -> list[Record]:
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
        records = []
        for step in self._recorder.read(newest):
            scale, skipped = scaling.on_host(step.scale), step.outcome.skipped()
            options: dict[str, Any] = dict(order=order, per_sample=per_sample, scale=scale, skipped=skipped)
            modules = [
                ModuleRecord(name, *squares, is_gated=name in self._gated, **options)
                for name, squares in step.squares(self._recorder.modules).items()
            ]
            records.append(Record(step.index, self.modules, modules))
            self._curves.add(records[-1], step.outcome)
        return records

    def plot(self, module: str | None = None, ax: Axes | Sequence[Axes] | None = None) -> Figure:
        """How the norms have changed: a heat map of lag against training step, a panel for each layer and direction.

        Columns are the steps that were read, and those that :meth:`history` has. Colours are log10 of the root mean
        square of ‖∂L/∂h‖ over the samples, relative to the largest of the same training step, on a scale that is the
        same in every picture: -12 to 0, and less is as dark as -12. So neither the batch size nor the scale of the
        loss matter. What is exactly 0 (underflow, or no way from the loss to there), what is not finite, and lags that
        a step does not have stand out in colours of their own. The white line is :attr:`ModuleRecord.horizon`. A mark
        above a column says that the GradScaler has skipped the step.

        Args:
            module: the name of one; None draws all.
            ax: where to draw: one matplotlib Axes for each panel. None makes a figure, outside of pyplot.

        Returns:
            The matplotlib Figure; ``.savefig("flow.png")`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError: no module of that name is watched.
            ValueError: the number of Axes is not that of the panels.
            RuntimeError: nothing has been recorded yet.
        """
        from rnnkern.gradflow import plots

        if module is not None and module not in self.modules:
            raise KeyError(f"{module!r} is not watched; there is {', '.join(map(repr, self.modules))}")
        self.history()
        return plots.heat_map(self._curves, self.modules if module is None else [module], ax)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded as one HTML page, which opens without a network, also on a phone.

        It holds the figures of the newest record, its curve, the heat map of :meth:`plot` and a verdict, with what
        each of them says. ``path`` holds a whole page or what it held before.

        Raises:
            ImportError: matplotlib or jinja2 is not installed.
            RuntimeError: nothing has been recorded yet.
            OSError: the file cannot be written.
        """
        from rnnkern.gradflow import report

        records = self._read(self._recorder.keep, order="lag")
        name = self._recorder.model_name
        report.write(report.page(name, self.modules, self._every, self.steps, self._curves, records), path)

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


def _shape(module: nn.Module) -> tuple[int, int]:
    """Layers and directions."""
    return (module.num_layers, 2 if module.bidirectional else 1) if isinstance(module, nn.RNNBase) else (1, 1)


def _release(recorder: Recorder, modules: Sequence[weakref.ref[nn.Module]]) -> None:
    close_recorder(recorder)
    for ref in modules:
        module = ref()
        if isinstance(module, RNN):
            module.__dict__.pop("tap", None)
        elif module is not None:
            gated.detach(module)
