"""Mutation testing with cosmic-ray: do the tests detect each small change of the code?

A mutant is killed if a test fails or exceeds its time. Each runs in a fork of a process that has imported JAX but not
used it. Survivors are listed with the reason; without one they are a gap in the tests. Mutants that were killed before
are not tried again as long as their line is unchanged.
"""

import difflib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from rich.progress import Progress

TOP = Path(__file__).parent.parent
KILLED = TOP / "benchmarks" / "results" / "mutation.partial.json"
# {mutated module: its own tests, which run first}. Of those, tests with the mutated function's name come first.
MODULES = {
    "jadam/_core/numerics.py": ["numerics"],
    "jadam/_optimizers/adam.py": ["rules", "adam"],
    "jadam/_moments/formats.py": ["storage", "formats"],
}
TESTS = [
    "numerics",
    "rules",
    "storage",
    "adam",
    "checks",
    "formats",
    "family",
    "contract",
    "exact_bf16",
    "describe",
    "doctests",
    "step",
]
SECONDS = 200  # limit of CPU time; the tests take a minute and a half
BAR = 0.985

# {part of the mutated line: why no test can detect it}
SURVIVE = {
    "<< 16 ^ start": "the halves have no bit in common, so or equals xor",
    "x == 0, 2, root": "the outer where discards that quotient",
    "<= wide.type(info": "the smallest normal number is rounded to itself",
    "info.bits == 32": "float64 is rounded to float64",
    "info.bits > 32": "float32 is rounded to float32",
    "info.bits >= 33": "float32 is rounded to float32",
    "info.bits >= 31": "no dtype has 31 bits",
    "hp.t // hp.t": "t is whole and at least 1: both are 1",
    'eps_mode <= "hat"': "the only other valid value, paper, sorts after hat",
    "dtype <= np.float32": "the dtype is float32 or wider",
    "stored[1].dtype <=": "only int8's codes would match too, and int8 is tried first",
    'name >= "int8"': "the other valid names sort before int8",
    'whose > "moments"': "whose is moments or starts with it",
    "looks_ahead=False": "changes statistics of NAdam: tests/diagnostics/test_statistics.py detects it",
    "dithers = False": "leaves get one seed: tests/test_golden.py detects it",
    "dithers = True": "same values, from one program for each leaf",
}


def mutants(module: str, scratch: Path) -> list[dict]:
    """All mutants of a module."""
    source, found = (TOP / module).read_text(), []
    with use_db(str(scratch / f"{Path(module).stem}.sqlite")) as database:
        init([TOP / module], database, {})
        changes = [change for item in database.work_items for change in item.mutations]
    for change in changes:
        operator = get_operator(change.operator_name)(**change.operator_args)
        code = mutate_code(source, operator, change.occurrence)
        lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0))[2:]
        was, became = (" ".join(x[1:].strip() for x in lines if x[0] == sign) for sign in "-+")
        key = f"{module}: {was} -> {became}"
        key += f" ({sum(x['key'].startswith(key) for x in found)})"
        found.append(
            {
                "key": key,
                "module": module,
                "was": was,
                "became": became,
                "code": code,
                "function": change.definition_name or "no_function",
            }
        )
    return found


def test(mutant: dict, tree: Path) -> int:
    """Forks a process that tests a mutant in a copy of the code; returns its id."""
    (tree / mutant["module"]).write_text(mutant["code"])
    if child := os.fork():
        return child
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    import pytest

    own = MODULES[mutant["module"]]
    others = [name for name in TESTS if name not in own]
    for names, select in ((own, ["-k", mutant["function"]]), (own, []), (others, [])):
        files = [str(next(Path("tests").rglob(f"test_{name}.py"))) for name in names]
        code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *select, *files]) if files else 0
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            os._exit(code)
    os._exit(0)


def try_all(scratch: Path) -> dict:
    """Tests all mutants of ``MODULES``, two at a time."""
    everything = [mutant for module in MODULES for mutant in mutants(module, scratch)]
    killed = set(json.loads(KILLED.read_text())) if KILLED.exists() else set()
    left = [mutant for mutant in everything if mutant["key"] not in killed][::-1]
    survivors, running, free = [], {}, [scratch / "copy0", scratch / "copy1"]
    for tree in free:
        for part in ("jadam", "tests", "benchmarks", "notebooks"):
            shutil.copytree(TOP / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(TOP / part, tree)
    first = next(iter(MODULES))
    untouched = {"module": first, "code": (TOP / first).read_text(), "function": "no_function"}
    if os.waitpid(test(untouched, free[0]), 0)[1]:
        sys.exit("The tests must pass before a mutant can fail them.")
    with Progress() as progress:
        bar = progress.add_task("mutants", total=len(left))
        while left or running:
            while left and free:
                mutant, tree = left.pop(), free.pop()
                running[test(mutant, tree)] = mutant, tree
            child, status = os.wait()
            mutant, tree = running.pop(child)
            shutil.copy(TOP / mutant["module"], tree / mutant["module"])
            free.append(tree)
            if status:
                killed.add(mutant["key"])
                KILLED.write_text(json.dumps(sorted(killed), indent=0))
            else:
                why = next((why for part, why in SURVIVE.items() if part in mutant["became"]), "")
                survivors.append(
                    {"module": mutant["module"], "was": mutant["was"], "became": mutant["became"], "why": why}
                )
            progress.advance(bar)
    return {"mutants": len(everything), "killed": len(everything) - len(survivors), "survivors": survivors}


def run(options) -> dict:
    """Runs in a new process, which has not imported jadam."""
    del options
    with tempfile.TemporaryDirectory() as scratch:
        keep_compiled = {
            "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment = {**keep_compiled, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu", **os.environ}
        subprocess.run([sys.executable, "-m", "benchmarks.mutation", scratch], check=True, cwd=TOP, env=environment)
        result = json.loads((Path(scratch) / "result.json").read_text())
    print(f"{result['mutants']} mutants, {result['killed'] / result['mutants']:.1%} killed; bar {BAR:.0%}")
    for survivor in result["survivors"]:
        print(*survivor.values(), sep="\n  ")
    return {"bar": BAR, **result}


if __name__ == "__main__":
    import flax.nnx  # noqa: F401  shared by the forks, with JAX and Optax

    assert "jadam" not in sys.modules
    (Path(sys.argv[1]) / "result.json").write_text(json.dumps(try_all(Path(sys.argv[1]))))
