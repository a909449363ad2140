"""``rnnkern demo``: the same tanh RNN trained from two inits, what its gradients do meanwhile, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from rnnkern.demo import measure, picture
from rnnkern.demo.digits import CLASSES, EVERY, Digits, Options, Run, T, new_model, train
from rnnkern.demo.measure import Deviation, StepTimes

__all__ = ["Options", "run"]


def run(options: Options, out: Path, machine: str) -> None:
    """Train, check, time; print the tables and write the picture. ``machine`` says on what."""
    begin = perf_counter()
    console = Console()
    digits = Digits.load()
    console.print(machine, highlight=False, soft_wrap=True)
    console.print(
        f"digits pixel by pixel: {T} steps, {CLASSES} classes, {len(digits.train_labels)} images to train on and "
        f"{len(digits.test_labels)} to test\n"
        f"tanh RNN, H={options.hidden_size}; Adam, lr {options.lr:g}, B={options.batch_size}, {options.epochs} epochs, "
        f"seed {options.seed}; gradient flow at every {EVERY}th step\n",
        highlight=False,
        soft_wrap=True,
    )
    runs = _train_both(console, digits, options)
    with console.status("comparing the recorded norms with a float64 loop over cells"):
        deviation = measure.deviation([sample for run in runs for sample in (run.first, run.last)])
    times = measure.step_times(runs[0].first)  # no spinner: its thread would be timed too
    picture.write(runs, out)
    console.print(_outcome(runs))
    console.print(_times(times, options))
    console.print(_said(deviation), highlight=False, soft_wrap=True)
    console.print(f"{out} written; {perf_counter() - begin:.0f} s in all", highlight=False, soft_wrap=True)


def _train_both(console: Console, digits: Digits, options: Options) -> list[Run]:
    steps = options.epochs * -(-len(digits.train_labels) // options.batch_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps  accuracy {task.fields[accuracy]:5.1%}  "),
        TextColumn("horizon {task.fields[horizon]:2d}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    runs = []
    with Progress(*columns, console=console) as progress:
        names = ("default", "orthogonal")
        tasks = [progress.add_task(name, total=steps, start=False, accuracy=0.0, horizon=0) for name in names]
        for name, task in zip(names, tasks):
            progress.start_task(task)

            def show(run: Run, done: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, accuracy=run.accuracies[-1], horizon=run.last.horizon)

            runs.append(train(name, new_model(options, name == "orthogonal"), digits, options, show))
    return runs


def _outcome(runs: Sequence[Run]) -> Table:
    table = Table("", *(f"{run.name} init" for run in runs), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    last = runs[0].last.step
    table.add_row("test accuracy", *(f"{run.accuracies[-1]:.1%}" for run in runs))
    table.add_row("horizon, training step 0", *(f"{run.first.horizon} of {T - 1} steps" for run in runs))
    table.add_row(f"horizon, training step {last}", *(f"{run.last.horizon} of {T - 1} steps" for run in runs))
    table.add_row(f"horizon {T - 1} from training step", *(_or_never(run.reaches_all) for run in runs))
    table.add_row("decay per step, training step 0", *(f"{run.first.decay:.2f}" for run in runs))
    table.add_row(f"decay per step, training step {last}", *(f"{run.last.decay:.2f}" for run in runs))
    return table


def _or_never(step: int | None) -> str:
    return "never" if step is None else str(step)


def _times(times: StepTimes, options: Options) -> Table:
    table = Table(f"training step, B={options.batch_size}, H={options.hidden_size}", "median", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    table.add_row("torch.nn.RNN, the same weights", f"{times.torch * 1e3:.2f} ms", "")
    table.add_row("rnnkern.RNN", f"{times.rnnkern * 1e3:.2f} ms", f"{times.torch / times.rnnkern:.2f}x as fast")
    cost = times.watched / times.rnnkern - 1
    table.add_row("rnnkern.RNN, this step watched", f"{times.watched * 1e3:.2f} ms", f"{cost:+.1%} for watching")
    return table


def _said(deviation: Deviation) -> str:
    compared, excluded = deviation.compared, deviation.excluded
    text = "Recorded norms against a float64 loop over cells, first and last sampled step of both runs:\n"
    if compared:
        text += f"at most {deviation.largest:.1e} off (relative) at {compared} of {compared + excluded} time steps"
    else:
        text += "not compared"
    if excluded:
        text += f";\n{excluded} left out, whose gradients are smaller than float32's normal numbers"
    return text + "."
