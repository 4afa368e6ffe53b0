"""The command line: ``jadam demo`` and ``jadam plan``, also as ``python -m jadam``."""

import argparse
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
    """Reports a bad argument in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Version(argparse.Action):
    """Prints what a report of a fault should have in it."""

    def __call__(self, parser, namespace, values, option_string=None):
        packages = ("jax", "jaxlib", "optax", "numpy")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        print(f"jadam {jadam.__version__}\nPython {platform.python_version()}, {versions}")
        for name, backend in jadam.backends().items():
            print(f"{name}: {backend}")
        parser.exit()


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}; try 1e-3")
    return value


def _is_unsharded(smallest: int, largest: int):
    def whole(text: str) -> int:
        if not (len(text) <= 20 and text.removeprefix("-").isdecimal() and smallest <= int(text) <= largest):
            raise argparse.ArgumentTypeError(f"must be a whole number in [{smallest}, {largest}], got {text!r}")
        return int(text)

    return whole


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jadam", description="Adam for JAX, by the paper.")
    about = "versions, and what serves jadam.step on each platform"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a Flax model on real handwritten digits with SGD, optax.adam and jadam.adam",
        description="Train a Flax NNX classifier on scikit-learn's 1,797 handwritten digits with SGD, optax.adam and "
        "jadam.adam, from the same start and with the same batches; print a table, draw the learning curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--lr", type=_learning_rate, default=1e-3, help="learning rate of both Adams")
    demo.add_argument("--sgd-lr", type=_learning_rate, default=0.1, help="learning rate of SGD")
    demo.add_argument("--steps", type=_is_unsharded(1, 10**6), default=1000, help="training steps, of 64 digits each")
    demo.add_argument(
        "--seed", type=_is_unsharded(0, 2**31 - 1), default=0, help="of the start, the split and the batches"
    )
    demo.add_argument("--out", type=Path, default=Path("jadam-demo.png"), help="the picture to write")
    plan = commands.add_parser(
        "plan",
        help="how many bytes training a known model takes on each device of a mesh",
        description="Print and draw what parameters, gradients and AdamW's state take on each device, in every format, "
        "the state divided over an axis of a mesh (ZeRO-1). Nothing is allocated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.add_argument("--model", choices=sorted(MODELS), default="gpt2", help="whose parameters")
    plan.add_argument("--mesh", type=_mesh, default="data=8", help="its axes, such as data=4,model=64")
    plan.add_argument("--axis", default="data", help="the axis to divide the state over")
    plan.add_argument(
        "--params-axis", help="the axis over which parameters are divided; by default they are whole on every device"
    )
    plan.add_argument("--out", type=Path, default=Path("jadam-plan.png"), help="the picture to write")
    return parser


def _mesh(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(
        name.isidentifier() and size.isdecimal() and len(size) <= 20 and int(size) > 0 for name, _, size in pairs
    ):
        raise argparse.ArgumentTypeError(f"must be axes with their sizes, got {text!r}; try data=4,model=64")
    mesh = {name: int(size) for name, _, size in pairs}
    if len(mesh) < len(pairs):
        raise argparse.ArgumentTypeError(f"must name each axis once, got {text!r}")
    return mesh


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input or nowhere to write, 130 interrupted."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    problem = lambda text: print(f"jadam {command}: {' '.join(text.split())}", file=sys.stderr)
    try:
        importlib.import_module(f"jadam._cli.{command}").run(**options)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        problem(f"error: {package} is missing; pip install 'jadam[demo]'")
        return 2
    except CommandError as error:
        problem(f"error: {error}")
        return 2
    except OSError as error:  # of standard output, on a full disk
        problem(f"error: cannot print: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # what was torn up in the middle may complain when it is collected
        problem("interrupted, no picture written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
