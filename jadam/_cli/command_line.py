"""The arguments, errors and exit codes of ``jadam demo`` and ``jadam plan``."""

import argparse
import contextlib
import importlib
import importlib.metadata
import math
import platform
import sys
from pathlib import Path
from typing import NoReturn

import jadam
from jadam._cli.output import CommandError
from jadam._diagnostics.models import MODELS


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage message."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Version(argparse.Action):
    """Prints the versions and kernels to include in a bug report."""

    def __call__(self, parser, namespace, values, option_string=None):
        versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jax", "jaxlib", "optax", "numpy"))
        print(f"jadam {jadam.__version__}\nPython {platform.python_version()}, {versions}")
        for name, backend in jadam.backends().items():
            print(f"{name}: {backend}")
        parser.exit()


def _learning_rate(text: str) -> float:
    """Parse a number > 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}; try 1e-3")


def _int_between(low: int, high: int):
    """Return an argparse type for integers in ``[low, high]``."""

    def parse(text: str) -> int:
        if not (len(text) <= 20 and text.removeprefix("-").isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be an integer in [{low}, {high}], got {text!r}")
        return int(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    """Build the parser of ``jadam demo`` and ``jadam plan``."""
    parser = _Parser(prog="jadam", description="Adam (Kingma & Ba 2015) for JAX.")
    version_help = "print versions, and the kernel of jadam.step on each platform"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=version_help)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a classifier of handwritten digits with SGD, optax.adam and jadam.adam",
        description="Train a Flax NNX classifier on scikit-learn's 1,797 handwritten digits with SGD, optax.adam and "
        "jadam.adam, from the same initial weights and on the same batches. Print a table and plot learning curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--lr", type=_learning_rate, default=1e-3, help="learning rate of optax.adam and jadam.adam")
    demo.add_argument("--sgd-lr", type=_learning_rate, default=0.1, help="learning rate of SGD")
    demo.add_argument("--steps", type=_int_between(1, 10**6), default=1000, help="training steps, each on 64 digits")
    demo.add_argument(
        "--seed", type=_int_between(0, 2**31 - 1), default=0, help="seed of initial weights, test split and batches"
    )
    demo.add_argument("--out", type=Path, default=Path("jadam-demo.png"), help="file for the plot")
    plan = commands.add_parser(
        "plan",
        help="compute the memory per device for training a well-known model",
        description="Print and plot the memory that parameters, gradients and AdamW's state take on each device of a "
        "mesh, for every format of the state. The state is sharded over one axis (ZeRO-1). Nothing is allocated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.add_argument("--model", choices=sorted(MODELS), default="gpt2", help="model to train")
    plan.add_argument("--mesh", type=_mesh, default="data=8", help="mesh axes and sizes, such as data=4,model=64")
    plan.add_argument("--axis", default="data", help="mesh axis to shard the state over")
    plan.add_argument(
        "--params-axis",
        default=argparse.SUPPRESS,
        help="mesh axis to shard parameters and gradients over: the data axis for FSDP, a model axis for tensor "
        "parallelism (default: replicated)",
    )
    plan.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="file for the plot (default: jadam-plan.png, and no plot where matplotlib is not installed)",
    )
    return parser


def _mesh(text: str) -> dict[str, int]:
    """Parse ``data=4,model=64`` into a dict from axis names to sizes, for argparse."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(
        name.isidentifier() and size.isdecimal() and len(size) <= 20 and int(size) > 0 for name, _, size in pairs
    ):
        raise argparse.ArgumentTypeError(f"must be axes and sizes > 0, got {text!r}; try data=4,model=64")
    mesh = {name: int(size) for name, _, size in pairs}
    if len(mesh) < len(pairs):
        raise argparse.ArgumentTypeError(f"must name each axis once, got {text!r}")
    return mesh


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 success, 2 bad input or output not writable."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    report = lambda text: print(f"jadam {command}: {' '.join(text.split())}", file=sys.stderr)
    try:
        importlib.import_module(f"jadam._cli.{command}").run(**options)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        report(f"error: {package} is not installed; run: pip install flax matplotlib rich scikit-learn")
        return 2
    except CommandError as error:
        report(f"error: {error}")
        return 2
    except OSError as error:  # writing to standard output, for example on a full disk
        report(f"error: cannot print: {error.strerror or error}")
        return 2
    return 0
