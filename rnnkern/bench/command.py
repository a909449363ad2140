"""``rnnkern bench``: its arguments, progress while it runs, and what it prints and writes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from rnnkern.arguments import missing, positive_float, positive_int
from rnnkern.bench import results
from rnnkern.bench.cells import MODES
from rnnkern.bench.grids import GRIDS, cells_of
from rnnkern.bench.peers import PEERS
from rnnkern.bench.results import Run

#: what it imports, and the distribution that brings it
NEEDS = {"matplotlib": "matplotlib", "rich": "rich"}
WRONG, USAGE = 1, 2


class CannotRun(Exception):
    """The command cannot do what it was asked to; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rnnkern bench``."""
    parser.add_argument("--grid", choices=list(GRIDS), help="what to measure (default: quick)", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say which grids and peers there are, and run nothing")
    parser.add_argument("--peers", type=_names, metavar="A,B", help="only these, by the names that --list shows")
    parser.add_argument("--modes", type=_modes, default=(), metavar="A,B", help=f"only these of {', '.join(MODES)}")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="of every peer (default: PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument(
        "--seconds", type=positive_float, metavar="S", help="that the whole run may take (default: the grid's)"
    )
    parser.add_argument("--cell-seconds", type=positive_float, metavar="S", help="that the rounds of one cell may take")
    parser.add_argument(
        "--subnormals",
        choices=("flush", "keep"),
        default="flush",
        help="what PyTorch does with numbers that small: flush is best for nn.RNN, keep its default (default: flush)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("rnnkern-bench"), metavar="FOLDER", help="for MACHINE/GRID.json and .png"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="EARLIER.json", help="compare with an earlier run, by ratios; 1 where slower"
    )
    parser.add_argument(
        "--later", type=Path, metavar="LATER.json", help="with --compare: compare this run, run nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    try:
        return _run(arguments)
    except CannotRun as error:
        print(f"rnnkern bench: {error}", file=sys.stderr)
        return USAGE


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list(arguments.device)
    _check(arguments)
    from rich.console import Console

    # A table that goes into a file is not squeezed into what that would be as a terminal.
    console = Console(width=None if sys.stdout.isatty() else 150)
    earlier = None if arguments.compare is None else _read(arguments.compare)
    if arguments.later is not None:
        if earlier is None:
            raise CannotRun("--later needs --compare EARLIER.json")
        return _compare(earlier, _read(arguments.later), console)
    finished = _measure(arguments, earlier, console)
    if not any(map(results.has_times, finished["rows"])):
        print("rnnkern bench: nothing could be timed; the lines above say why", file=sys.stderr)
        return WRONG
    return WRONG if earlier is not None and _compare(earlier, finished, console) else 0


def _check(arguments: argparse.Namespace) -> None:
    lacking = missing(NEEDS)
    if lacking:
        raise CannotRun(f'needs {", ".join(lacking)}, not installed here. Run: pip install "rnnkern[bench]"')
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device cuda: there is no GPU that torch can use")
    if os.environ.get("OMP_PROC_BIND", "false").lower() not in ("false", "0"):
        raise CannotRun(
            "OMP_PROC_BIND is set. It pins this process's first thread to one processor, and the threads that JAX, "
            "ONNX Runtime and OpenVINO make later would all be pinned there with it. Unset it"
        )
    for name in arguments.peers or ():
        if name not in PEERS:
            raise CannotRun(f"--peers: there is no {name!r}; there is {', '.join(PEERS)}")
        reason = PEERS[name].unavailable(arguments.device)
        if reason:
            raise CannotRun(f"--peers: {name}: {reason}")
    if arguments.compare is not None and arguments.later is None:
        mine = arguments.out / str(results.machine(arguments.device)["name"]) / arguments.compare.name
        if mine.resolve() == arguments.compare.resolve():
            raise CannotRun(f"--out: the new run would overwrite {str(mine)!r}, which it is to be compared with")
    for folder in (arguments.out, *arguments.out.parents):
        if folder.exists():
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise CannotRun(f"--out: cannot write into {str(folder)!r}")
            break


def _measure(arguments: argparse.Namespace, earlier: Run | None, console: object) -> Run:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from rnnkern.bench import plots, table
    from rnnkern.bench.engine import Options
    from rnnkern.bench.engine import run as run_grid

    assert isinstance(console, Console)
    grid = arguments.grid or (str(earlier["grid"]) if earlier is not None else "quick")
    if grid not in GRIDS:
        raise CannotRun(f"--compare: that run is of the grid {grid!r}, which is not there any more")
    options = Options(
        grid,
        arguments.peers,
        arguments.modes,
        arguments.threads or 0,
        arguments.device,
        arguments.seconds,
        arguments.cell_seconds,
        arguments.subnormals,
    )
    if not cells_of(grid, options.device, options.modes):
        raise CannotRun(f"--modes: the grid {grid!r} has none of {', '.join(options.modes)}")
    errors = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # It is drawn between the measurements only: a thread that draws would be timed too.
    with Progress(*columns, console=errors, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(grid)

        def report(done: int, of: int, what: str) -> None:
            progress.update(task, completed=done, total=of, description=what)
            if errors.is_terminal:
                progress.refresh()

        finished = run_grid(options, report)
    table.show(finished, console)
    path = results.path_of(finished, arguments.out)
    try:
        results.write(finished, path)
        written = [path]
        if any(map(results.has_times, finished["rows"])):
            try:
                plots.write(finished, path.with_suffix(".png"))
                written.append(path.with_suffix(".png"))
            except ValueError as error:
                console.print(str(error), highlight=False)
    except OSError as error:
        raise CannotRun(f"--out: cannot write {str(path)!r}: {error.strerror}") from None
    console.print(
        f"{' and '.join(map(str, written))} written; {finished['took']:.0f} s", highlight=False, soft_wrap=True
    )
    return finished


def _compare(earlier: Run, later: Run, console: object) -> int:
    from rich.console import Console

    from rnnkern.bench import compare

    assert isinstance(console, Console)
    changes = compare.changes(earlier, later)
    for line in compare.not_compared(earlier, later):
        console.print(line, highlight=False, soft_wrap=True)
    if not changes:
        raise CannotRun("--compare: the two runs have no cell of rnnkern's in common")
    console.print(compare.table(changes), highlight=False)
    worse = sum(change.is_regression for change in changes)
    console.print(f"{worse} of {len(changes)} are worse than at commit {earlier['commit']}", highlight=False)
    return WRONG if worse else 0


def _list(device: str) -> int:
    print("grids")
    for name, grid in GRIDS.items():
        print(f"  {name:<16}{len(cells_of(name, device)):>4} cells, at most {grid.total_seconds:.0f} s: {grid.about}")
    print("\npeers")
    for name, peer in PEERS.items():
        reason = peer.unavailable(device)
        print(f"  {name:<24}{reason or 'runs here'}")
    return 0


def _read(path: Path) -> Run:
    try:
        return results.read(path)
    except ValueError as error:
        raise CannotRun(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _modes(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(MODES)}, got {text!r}")
    return names
