"""Compares `jadam.step` with another commit in one process: ``python -m benchmarks core --against COMMIT``.

The other commit's package is built and imported under another name, with another FFI target. Each version is measured
twice a round; four sides take turns. The ratio of a round is that of the sums, and the ratio of the other version's two
sides is the noise. Arrays that are allocated first are a few percent slower, so every second process starts with the
other version. Reported are the median over processes of each one's median, and the extremes.
"""

import importlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from benchmarks.speed import in_fresh_process, shapes, stepper

PROCESSES = 4  # an even number
ROUNDS = {"2^22": 41, "2^25": 15, "2^27": 9}
EARLIER = "earlier_jadam"
FORMATS = ["float32", "bfloat16", "int8"]
CASES = [*((moments, False) for moments in FORMATS), ("bfloat16", True), ("int8", True)]


def build(commit: str, folder: Path) -> None:
    """Builds the package of ``commit`` with its extension, as `EARLIER` in ``folder``."""
    top = Path(__file__).parent.parent
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "-C", top, "archive", commit], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "built", source]
    subprocess.run(pip, check=True)
    package = (folder / "built" / "jadam").rename(folder / EARLIER)
    for file in package.rglob("*.py"):
        text = file.read_text().replace('"jadam_step"', '"earlier_step"')
        for word in ("from jadam", "import jadam"):
            text = text.replace(word, word.replace("jadam", EARLIER))
        file.write_text(text)


def one_process(folder: str, case: str, moments: str, exact: bool, first: int) -> dict[str, list[float]]:
    """Seconds of each side in every round; ``exact`` is `exact_bf16` with bfloat16 weights."""
    sys.path.insert(0, folder)
    earlier = importlib.import_module(EARLIER)
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if exact else jnp.float32
    (shape,) = shapes(case)
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype)]
    params = [jnp.zeros_like(g) for g in grads]

    def side(package):
        if package.backends()["cpu"].kernel is None:
            raise RuntimeError(f"{package.__name__} has no kernel: {package.backends()['cpu'].reason}")
        tx = package.adam(1e-3, moments=moments)
        tx = package.exact_bf16(tx) if exact else tx
        step = lambda params, state, grads: package.step(tx, grads, state, params)
        return stepper(step, params, tx.init(params), grads)

    packages = {"this": jadam, "other": earlier}
    names = ["this", "other"][::-1] if first else ["this", "other"]
    sides = {name + again: side(packages[name]) for again in ("", " again") for name in names}
    seconds = {name: [] for name in sides}
    for i in range(ROUNDS[case] + 2):  # the first two warm up
        order = list(sides)[i % 4 :] + list(sides)[: i % 4]
        for name in order:
            spent = sides[name]()
            seconds[name] += [spent] if i > 1 else []
    return seconds


def run(options) -> dict:
    """Runs every size and format."""
    if options.against is None:
        print("core: left out, --against COMMIT not given", file=sys.stderr)
        return {}
    result: dict = {"against": options.against, "backend": str(jadam.backends()["cpu"].kernel), "cases": {}}
    table = Table("parameters", "moments", "ms", "this / other", "(least, most)", "other / other", "(least, most)")
    with tempfile.TemporaryDirectory() as folder:
        build(options.against, Path(folder))
        for case in ROUNDS:
            for moments, exact in track(CASES, description=f"core: {case}"):
                args = ("benchmarks.core", "one_process", folder, case, moments, exact)
                processes = [in_fresh_process(*args, k % 2) for k in range(PROCESSES)]
                row = summary(processes)
                name = moments + ", bf16 weights" * exact
                result["cases"][f"{case}, {name}"] = row
                cells = [str(x) for x in (*_shown(row["this over other"]), *_shown(row["other over other"]))]
                table.add_row(case, name, f"{row['ms'][0]:.2f}", *cells)
    Console().print(table)
    return result


def _shown(extremes) -> tuple[float, tuple[float, float]]:
    middle, least, most = extremes
    return middle, (least, most)


def summary(processes) -> dict[str, list[float]]:
    """Median, minimum and maximum over processes of each one's median."""

    def total(x, name):
        return np.add(x[name], x[f"{name} again"])

    columns = {
        "ms": [1e3 * np.median(total(x, "this")) / 2 for x in processes],
        "this over other": [np.median(total(x, "this") / total(x, "other")) for x in processes],
        "other over other": [np.median(np.divide(x["other again"], x["other"])) for x in processes],
    }
    return {k: [round(float(f(v)), 4) for f in (statistics.median, min, max)] for k, v in columns.items()}
