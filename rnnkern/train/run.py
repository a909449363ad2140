"""The course of ``rnnkern flow``: train with a progress bar, keep a checkpoint, write the report, say what came out."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rnnkern.gradflow import report
from rnnkern.train import interrupt, text
from rnnkern.train.checkpoint import Checkpoint, beside, broken
from rnnkern.train.options import InputError, Options
from rnnkern.train.tasks import Adding, Copying, Task, TemporalOrder
from rnnkern.train.training import Training

SECONDS_BETWEEN_CHECKPOINTS = 60.0
GENERATED: dict[str, Callable[[int], Task]] = {
    "adding": Adding,
    "copying": Copying,
    "temporal-order": TemporalOrder,
}


def run(given: dict[str, Any], out: Path, resume: bool, machine: str) -> int:
    """Train, report, and return the exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        given: the options that the user gave, as in :class:`Options`.
        out: the report to write.
        resume: whether to go on from the checkpoint beside it.
        machine: what computes here, to be printed.

    Raises:
        InputError: something that was given cannot be used. Nothing has been written then.
        OSError: the checkpoint or the report cannot be written.
    """
    begin = perf_counter()
    console = Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with _resumed(given, beside(out)) if resume else _begun(given) as training:
        with interrupt.noticed() as asked:
            say("\n".join([machine, *_described(training)]) + "\n")
            _train(training, beside(out), console, asked)
        figures = training.evaluate()
    record = training.trace.newest
    if record is not None:
        with console.status("writing the report"):
            _write_report(training, figures, out)
        say(f"\n{record!r}\n{record.verdict(training.task.needs)}")
    console.print(_outcome(training, figures))
    say(f"{beside(out)} {'' if record is None else f'and {out} '}written; {perf_counter() - begin:.0f} s in all")
    if asked.signal is not None:
        say(f"interrupted after {training.done} of {training.options.steps} steps; to go on:")
        say(f"rnnkern flow --resume --out {shlex.quote(str(out))}")
    return asked.code


def _begun(given: dict[str, Any]) -> Training:
    options = Options(**given)
    return Training(options, _task(options))


def _resumed(given: dict[str, Any], path: Path) -> Training:
    checkpoint = Checkpoint.read(path)
    options = checkpoint.options.resumed(given)
    task = _task(options)
    if task.digest != checkpoint.digest:
        name = "the sources of Python's library" if options.text is None else repr(options.text)
        raise InputError(
            f"the text must be what the run in {str(path)!r} learnt from, got other characters from {name}"
        )
    try:
        training = Training(options, task, checkpoint.state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise InputError(broken(path)) from None
    if training.done > options.steps:
        training.close()
        raise InputError(f"--steps must be at least {training.done}, as many are done already, got {options.steps}")
    return training


def _task(options: Options) -> Task:
    if options.task != "text":
        return GENERATED[options.task](options.length)
    if options.text is None:
        return text.Text(text.library_sources(), "the sources of Python's library", options.length)
    return text.Text(text.read(Path(options.text)), repr(options.text), options.length)


def _train(training: Training, checkpoint: Path, console: Console, asked: interrupt.Interrupt) -> None:
    """To the end or to the first signal; the checkpoint stands when this returns."""
    options = training.options
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps  {task.fields[shown]} "),
        TimeRemainingColumn(elapsed_when_finished=True),
    )

    def save() -> float:
        Checkpoint(options, training.task.digest, training.state_dict()).write(checkpoint)
        return perf_counter()

    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.steps, completed=training.done, shown="")
        saved = perf_counter()
        while training.done < options.steps and asked.signal is None:
            training.advance()
            horizon = "" if math.isnan(training.horizon) else f"  horizon {training.horizon:.0f}"
            progress.update(bar, completed=training.done, shown=f"loss {training.loss:.4f}{horizon}")
            if perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                saved = save()
        save()


def _described(training: Training) -> list[str]:
    options = training.options
    cell = f"{options.cell} RNN" if options.cell in ("tanh", "relu") else options.cell.upper()
    layers = "" if options.layers == 1 else f", {options.layers} layers"
    init = f"{options.init} init" if isinstance(options.init, str) else f"spectral radius {options.init:g} at first"
    clip = f", norm of the gradient clipped to {options.clip:g}" if options.clip < math.inf else ""
    return [
        training.task.title,
        f"{cell}, H={options.hidden_size}{layers}, {init}; Adam, lr {options.lr:g}{clip}; B={options.batch_size}, "
        f"seed {options.seed}; gradient flow every {options.every} steps",
    ]


def _outcome(training: Training, figures: dict[str, float]) -> Table:
    table = Table(f"after {training.done} steps", "", "trivial level", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}", f"{training.task.trivial[name]:.4g}")
    return table


def _write_report(training: Training, figures: dict[str, float], out: Path) -> None:
    trace, options, task = training.trace, training.options, training.task
    assert trace.newest is not None
    notes = _described(training)
    for name, value in figures.items():
        notes.append(f"After {training.done} steps, {name}: {value:.4g}. Trivial level: {task.trivial[name]:.4g}.")
    if not task.at_end:
        notes.append(
            "Here a loss at many steps hides how far back one reaches. “last loss”: the gradient of the loss at the "
            "last step alone, with the same weights and batch."
        )
    name, records = f"{options.cell} on {options.task}", [trace.newest]
    page = report.page(
        name, trace.watched, options.every, training.done, trace.history, records, needs=task.needs, notes=notes
    )
    report.write(page, out)
