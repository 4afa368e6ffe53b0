"""Run benchmarks by name, or all of them: ``python -m benchmarks [NAME ...]``."""

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path

import jadam
from benchmarks.running import machine

NAMES = [
    "accuracy",
    "aot",
    "claims",
    "core",
    "cuda",
    "fits",
    "gpu",
    "lean",
    "mesh",
    "mutation",
    "ppo",
    "record",
    "speed",
    "train",
]
RESULTS = Path(__file__).parent / "results"


def aot_mesh(text: str) -> str:
    """Checks that ``text`` is a TPU topology such as ``v5e:16x16``."""
    if not re.fullmatch(r"\w+:\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"must be a topology, got {text}; try v5e:16x16")
    return text


def main() -> int:
    """Runs the benchmarks; each writes one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--mesh", type=aot_mesh, help="aot: compile a step of --model for a TPU topology, e.g. v5e:16x16"
    )
    parser.add_argument("--model", default="llama-70b", help="aot --mesh: a model that `jadam plan` knows")
    quick = "aot, cuda, fits, ppo: less, and writes nothing; train: fewer steps, written to another file"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--against", metavar="COMMIT", help="core: the commit to compare with")
    parser.add_argument("--torch-python", help="a Python interpreter with PyTorch, to compare with")
    parser.add_argument("--minutes", type=float, help="gpu, train: end within this time; default: 5, 10 (--quick 4)")
    parser.add_argument("--cpu", action="store_true", help="gpu: run on a CPU, with small sizes")
    parser.add_argument("--out", metavar="FILE", help="gpu, train: the results; default: in benchmarks/results")
    parser.add_argument("--size", choices=["gpt2", "tiny"], default="gpt2", help="train: the model; default: gpt2")
    parser.add_argument("--aot", action="store_true", help="train: compile for an H100, which need not be there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if "fits" in options.names:  # the processes that it starts need the GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name, backend in jadam.backends().items():
        print(f"{name}: {backend}")
    for name in options.names or NAMES:
        result = importlib.import_module(f"benchmarks.{name}").run(options)
        if not result:
            continue
        RESULTS.mkdir(exist_ok=True)
        stem, command = name, f"python -m benchmarks {name}"
        if name == "aot" and options.mesh:
            stem += f"-{options.mesh.replace(':', '-')}"
            command += f" --mesh {options.mesh} --model {options.model}"
        if name == "core":
            command += f" --against {options.against}"
        if name == "train":  # without --aot it writes its results itself
            stem += f"-{options.size}-aot"
            command += f" --size {options.size} --aot" + " --quick" * options.quick
        out = RESULTS / f"{stem}.json"
        out.write_text(json.dumps({"command": command, **machine(), **result}, indent=1) + "\n")
        print(f"{name}: written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
