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


def _positive_number(example: str):
    """Return an argparse type for numbers > 0."""

    def parse(text: str) -> float:
        """Parse a number > 0."""
        with contextlib.suppress(ValueError):
            if 0 < (value := float(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}; try {example}")

    return parse


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
        help="train with float32 weights, bf16 weights and optax.adam, and bf16 weights and jadam",
        description="Train a Flax NNX classifier on scikit-learn's 1,797 handwritten digits, from the same initial "
        "weights and on the same batches, with float32 weights and optax.adam, bf16 weights and optax.adam, and bf16 "
        "weights and jadam (exact_bf16, int8 moments, jadam.flax.Optimizer). Measure the bytes per parameter and the "
        "time of a step. Print a table and save a plot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--lr", type=_positive_number("1e-3"), default=1e-4, help="learning rate of all three")
    demo.add_argument("--steps", type=_int_between(1, 10**6), default=2000, help="training steps, each on 64 digits")
    demo.add_argument(
        "--seed", type=_int_between(0, 2**31 - 1), default=0, help="seed of initial weights, test split and batches"
    )
    demo.add_argument("--out", type=Path, default=Path("jadam-demo.png"), help="file for the plot")
    plan = commands.add_parser(
        "plan",
        help="compute the memory per device for training a model",
        description="Print and plot the memory that parameters, gradients and AdamW's state take on each device of a "
        "mesh, for every format of the state. The state is sharded over one axis (ZeRO-1). Nothing is allocated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = plan.add_mutually_exclusive_group()
    what.add_argument("--model", choices=sorted(MODELS), default="gpt2", help="model to train")
    what.add_argument(
        "--shapes",
        default=argparse.SUPPRESS,
        metavar="SOURCE",
        help="shapes of any other model: a .safetensors file or its index (.json), a .json file such as "
        '{"kernel": [64, 128]}, or module:function, which returns parameters or a model and is not run',
    )
    plan.add_argument("--mesh", type=_mesh, default="data=8", help="mesh axes and sizes, such as data=4,model=64")
    plan.add_argument(
        "--axis",
        default=argparse.SUPPRESS,
        help="mesh axis to shard the state over (default: data, fsdp, or the first of the mesh)",
    )
    plan.add_argument(
        "--params-axis",
        type=lambda text: tuple(text.split(",")),
        default=argparse.SUPPRESS,
        metavar="AXES",
        help="mesh axes to shard parameters and gradients over: the data axis for FSDP, a model axis for tensor "
        "parallelism, or both, separated by a comma (default: fsdp if the mesh has it, else replicated)",
    )
    plan.add_argument(
        "--memory",
        type=_positive_number("80"),
        default=argparse.SUPPRESS,
        metavar="GIB",
        help="GiB of memory of a device; prints which formats fit",
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
