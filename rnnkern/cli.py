"""The command ``rnnkern``: doctor, demo, bench.

Exit codes: 0 all is well, 1 something does not work here, 2 the command cannot start as it was called, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import rnnkern
from rnnkern import doctor
from rnnkern.bench import command as bench

#: what `rnnkern demo` imports, and the distribution that brings it
DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit code.

    Raises:
        SystemExit: from argparse, after --help and --version (0) and for arguments that it does not take (2).
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


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
    command.add_argument("--epochs", type=_positive_int, default=40, metavar="N", help="of each of the two runs")
    command.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help="of the weights and of the order of the data"
    )
    command.add_argument("--hidden-size", type=_positive_int, default=128, metavar="H", help="units of the RNN")
    command.add_argument("--batch-size", type=_positive_int, default=64, metavar="B", help="images in a step")
    command.add_argument(
        "--lr",
        type=_positive_float,
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
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    missing = [distribution for module, distribution in DEMO_NEEDS.items() if not _imports(module)]
    if missing:
        return _fail(2, f'needs {", ".join(missing)}, not installed here. Run: pip install "rnnkern[demo]"')
    try:
        machine = doctor.in_one_line()
    except (RuntimeError, ValueError) as error:
        return _fail(1, f"{error}\n`rnnkern doctor` says more.")

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


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def _fail(code: int, message: str) -> int:
    print(f"rnnkern demo: {message}", file=sys.stderr)
    return code


def _picture(text: str) -> Path:
    """A PNG that can be written: asked before the training, not after it."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from None
    return path


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {value}")
    return value


# argparse names the type in its message where a number cannot be read.
_positive_int.__name__ = _seed.__name__ = "integer"
_positive_float.__name__ = "number"
