"""Run benchmarks by name, or all of them: ``python -m benchmarks [NAME ...]``."""

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path

import jax
import numpy
import optax

import jadam

NAMES = ["accuracy", "aot", "claims", "core", "cuda", "fits", "gpu", "lean", "mesh", "mutation", "record", "speed"]
RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Date, machine and versions, for the results file."""
    info = Path("/proc/cpuinfo")
    names = [line for line in (info.read_text() if info.exists() else "").splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    packages = {module.__name__: module.__version__ for module in (jax, optax, numpy, jadam)}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu}, {jax.default_backend()}",
        "python": platform.python_version(),
        **packages,
    }


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
    parser.add_argument("--quick", action="store_true", help="aot, cuda, fits: the essential rows; writes nothing")
    parser.add_argument("--against", metavar="COMMIT", help="core: the commit to compare with")
    parser.add_argument("--torch-python", help="a Python interpreter with PyTorch, to compare with")
    parser.add_argument("--minutes", type=float, default=5.0, help="gpu: the run ends within this time; default: 5")
    parser.add_argument("--cpu", action="store_true", help="gpu: run on a CPU, with small sizes")
    parser.add_argument("--out", metavar="FILE", help="gpu: the results; default: benchmarks/results/gpu-CARD.json")
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
        mesh = options.mesh if name == "aot" else None
        out = RESULTS / (f"{name}-{mesh.replace(':', '-')}.json" if mesh else f"{name}.json")
        command = f"python -m benchmarks {name}" + (f" --mesh {mesh} --model {options.model}" if mesh else "")
        command += f" --against {options.against}" if name == "core" else ""
        out.write_text(json.dumps({"command": command, **machine(), **result}, indent=1) + "\n")
        print(f"{name}: written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
