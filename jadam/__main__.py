"""The command line: ``jadam demo``, also ``python -m jadam demo``."""

import argparse
import math
import sys
from pathlib import Path
from typing import NoReturn

import jadam


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text}; try 1e-3")
    return value


def _whole(smallest: int, largest: int):
    def whole(text: str) -> int:
        if not (text.removeprefix("-").isdecimal() and smallest <= int(text) <= largest):
            raise argparse.ArgumentTypeError(f"must be a whole number in [{smallest}, {largest}], got {text}")
        return int(text)

    return whole


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jadam", description="Adam for JAX, by the paper.")
    parser.add_argument("--version", action="version", version=f"jadam {jadam.__version__}")
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
    demo.add_argument("--steps", type=_whole(1, 10**6), default=1000, help="training steps, of 64 digits each")
    demo.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, help="of the start, the split and the batches")
    demo.add_argument("--out", type=Path, default=Path("jadam-demo.png"), help="the picture to write")
    return parser


def _demo(options) -> int:
    try:
        from jadam import _demo
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        print(f"jadam demo: error: {package} is missing; pip install 'jadam[demo]'", file=sys.stderr)
        return 2
    try:
        _demo.run(options.lr, options.sgd_lr, options.steps, options.seed, options.out)
    except _demo.OutputError as error:
        print(f"jadam demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except KeyboardInterrupt:
        print("jadam demo: interrupted, no picture written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
