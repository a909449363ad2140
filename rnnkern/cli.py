"""The command ``rnnkern``: doctor, demo, bench, flow.

Exit codes: 0 all is well, 1 something does not work here, 2 the command cannot start as it was called, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rnnkern
from rnnkern import doctor
from rnnkern.arguments import missing, positive_float, positive_int, seed
from rnnkern.bench import command as bench
from rnnkern.train.checkpoint import beside
from rnnkern.train.options import CELLS, INITS, TASKS, InputError, Options

#: what `rnnkern demo` imports, and the distribution that brings it
DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
#: the same for `rnnkern flow`
FLOW_NEEDS = {"matplotlib": "matplotlib", "jinja2": "jinja2", "rich": "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit code.

    Raises:
        SystemExit: from argparse, after --help and --version (0) and for arguments that it does not take (2).
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on, as in `rnnkern doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnnkern",
        description="Fused tanh and ReLU RNNs for PyTorch that measure the gradient at every time step.",
    )
    parser.add_argument("--version", action="version", version=f"rnnkern {rnnkern.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "doctor",
        help="say what runs on this machine, and what to do where something does not",
        description="Print versions, threads, instruction sets and environment variables; say of each backend whether "
        "it runs here and if not why; and check the gradients and recorded norms of a small RNN on each of them "
        "against the float64 reference.",
        epilog="Exit code: 0 where the backend that a call would get works, else 1.",
    )
    command.set_defaults(run=lambda arguments: doctor.run())

    command = commands.add_parser(
        "demo",
        help="train on digits read pixel by pixel, with default and with orthogonal init",
        description="Read scikit-learn's bundled digits pixel by pixel (64 steps, the loss at the end) and train the "
        "same tanh RNN twice, from PyTorch's default init and from an orthogonal W_hh, watching the gradient flow. "
        "Then time a training step against torch.nn.RNN, compare the recorded norms with a float64 loop over cells, "
        "and draw the norm against the lag.",
        epilog='Needs scikit-learn, matplotlib and rich: pip install "rnnkern[demo]". Downloads nothing.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--out", type=_picture, default="demo.png", metavar="FILE", help="the PNG to write")
    command.add_argument("--epochs", type=positive_int, default=40, metavar="N", help="of each of the two runs")
    command.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="of the weights and of the order of the data"
    )
    command.add_argument("--hidden-size", type=positive_int, default=128, metavar="H", help="units of the RNN")
    command.add_argument("--batch-size", type=positive_int, default=64, metavar="B", help="images in a step")
    command.add_argument(
        "--lr",
        type=positive_float,
        default=3e-3,
        metavar="X",
        help="Adam's learning rate, falling to 0 along a cosine",
    )
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "bench",
        help="time it against torch.nn.RNN, JAX, ONNX Runtime, OpenVINO and others on this machine",
        description="Give every peer that is installed the same weights and inputs, compare its output, gradients and "
        "norms with a float64 truth, and time those that are right in turns, round by round. Prints tables, writes "
        "all times as JSON and a picture.",
        epilog='Needs matplotlib and rich: pip install "rnnkern[bench]"; "rnnkern[peers]" brings the peers. Exit code '
        "1: something was slower than in the run that --compare names, or nothing could be timed.",
    )
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)
    _add_flow(commands)
    return parser


def _add_flow(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "flow",
        help="train on your text or on a task that asks for memory, and report how far back it learns",
        description="Train a recurrent net on the next character of a text, or on one of the generated tasks that ask "
        "for a long memory (adding, copying, temporal order), while its gradient flow is watched. Print the newest "
        "record with a verdict and the task's own figure beside its trivial level, and write a report, one HTML page, "
        "and a checkpoint beside it. Ctrl-C ends the run early, with both written.",
        epilog='Needs matplotlib, jinja2 and rich: pip install "rnnkern[flow]". Downloads nothing. With --resume the '
        "options are those of the run that goes on; only --steps, which counts from its beginning, may be another.",
        argument_default=argparse.SUPPRESS,  # what is not given is not there: --resume must know
    )

    def add(option: str, help: str, **more: Any) -> None:
        default = getattr(Options, option.lstrip("-").replace("-", "_"))
        command.add_argument(option, help=f"{help} (default: {default})", **more)

    command.add_argument(
        "text", nargs="?", metavar="TEXT", help="a text file in UTF-8 (default: the sources of Python's own library)"
    )
    add("--task", "what to learn", choices=TASKS)
    add("--cell", "rnnkern's tanh or ReLU RNN, or torch.nn's LSTM or GRU", choices=CELLS)
    add("--init", f"of W_hh: {', '.join(INITS)}, or its spectral radius, a number", type=_init, metavar="INIT")
    add("--length", "steps of a sequence; of the copying task, steps to remember", type=positive_int, metavar="T")
    add("--batch-size", "sequences in a training step", type=positive_int, metavar="B")
    add("--hidden-size", "units of a layer", type=positive_int, metavar="H")
    add("--layers", "of the net", type=positive_int, metavar="N")
    add("--lr", "Adam's learning rate", type=positive_float, metavar="X")
    add("--clip", "clip the norm of the gradient of all weights; inf: do not", type=_clip, metavar="X")
    add("--every", "record the gradient flow at every N-th training step", type=positive_int, metavar="N")
    add("--steps", "training steps in all", type=positive_int, metavar="N")
    add("--seed", "of the weights and of the data", type=seed, metavar="S")
    command.add_argument(
        "--out",
        type=_report,
        default="flow.html",
        metavar="FILE",
        help="the HTML page to write; the checkpoint is the file beside it that ends in .pt (default: flow.html)",
    )
    command.add_argument(
        "--resume", action="store_true", default=False, help="go on from that checkpoint, as if nothing had been"
    )
    command.set_defaults(run=_flow)


def _demo(arguments: argparse.Namespace) -> int:
    machine = _machine("demo", DEMO_NEEDS)
    if isinstance(machine, int):
        return machine

    from rnnkern import demo

    demo.run(
        demo.Options(
            hidden_size=arguments.hidden_size,
            batch_size=arguments.batch_size,
            epochs=arguments.epochs,
            lr=arguments.lr,
            seed=arguments.seed,
        ),
        arguments.out,
        machine,
    )
    return 0


def _flow(arguments: argparse.Namespace) -> int:
    machine = _machine("flow", FLOW_NEEDS)
    if isinstance(machine, int):
        return machine

    from rnnkern.train.run import run

    given = {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__}
    if "text" in given:
        given["text"] = str(Path(given["text"]).resolve())
    try:
        return run(given, arguments.out, arguments.resume, machine)
    except InputError as error:
        return _fail("flow", 2, str(error))
    except OSError as error:
        if error.filename is None:  # not a file's: stdout, say
            raise
        return _fail("flow", 1, f"{error.filename}: {error.strerror}")


def _machine(command: str, needs: dict[str, str]) -> str | int:
    """What computes here, in a line; or the exit code, where something that the command needs cannot be had."""
    lacking = missing(needs)
    if lacking:
        message = f'needs {", ".join(lacking)}, not installed here. Run: pip install "rnnkern[{command}]"'
        return _fail(command, 2, message)
    try:
        return doctor.in_one_line()
    except (RuntimeError, ValueError) as error:
        return _fail(command, 1, f"{error}\n`rnnkern doctor` says more.")


def _fail(command: str, code: int, message: str) -> int:
    print(f"rnnkern {command}: {message}", file=sys.stderr)
    return code


def _picture(text: str) -> Path:
    return _writable(text, ".png")


def _report(text: str) -> Path:
    path = _writable(text, ".html")
    _writable(str(beside(path)), ".pt")
    return path


def _writable(text: str, ending: str) -> Path:
    """A file that can be written: asked before the training, not after it."""
    path = Path(text)
    if path.suffix.lower() != ending:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {ending}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from None
    return path


def _clip(text: str) -> float:
    return math.inf if float(text) == math.inf else positive_float(text)


def _init(text: str) -> str | float:
    if text in INITS:
        return text
    try:
        return positive_float(text)
    except ValueError:
        expected = f"expected {', '.join(INITS)}, or a spectral radius"
        raise argparse.ArgumentTypeError(f"{text!r} is no init: {expected}") from None


_clip.__name__ = "number"
