"""Runs the tests of Adam and its relatives in the installed Optax, with jadam's functions in place of Optax's.

``PYTHONPATH=tests python -m programs.optax_suite``; with ``OPTAX_SUITE=optax`` they run with Optax's own functions, for
comparison. Further arguments are pytest's. As a pytest plugin this module replaces the functions and chooses the tests.
"""

import ast
import functools
import inspect
import os
import re
import sys
from pathlib import Path

import optax
import optax.contrib
import pytest
from family import FAMILY

import jadam

ROOT = Path(optax.__file__).parent
NAMES = [name for m in FAMILY for name in (m.name, f"scale_by_{m.name}") if hasattr(optax, name)]
ROW = re.compile("'({0})'|_({0})$".format("|".join(NAMES)), re.MULTILINE)  # an argument, or the end of a test's name


def names_family(code: ast.AST) -> bool:
    """Whether code, comments and docstrings aside, names an optimizer of the family."""
    return any(getattr(x, "attr", getattr(x, "value", None)) in NAMES for x in ast.walk(code))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def tests_code_of_family(path: Path) -> bool:
    """Whether the module that ``path`` tests calls the family, as Muon's does."""
    module = path.with_name(path.name.replace("_test", ""))
    return path.parent.name == "contrib" and module.exists() and names_family(parse(module))


def is_of_family(item) -> bool:
    """Whether a test names the family, or names no optimizer and tests code that calls the family."""
    arguments = getattr(getattr(item.cls, item.name), "__x_params_repr__", "")
    if ROW.search(f"{item.name}\n{arguments}"):
        return True
    tests = [x for x in ast.walk(parse(item.path)) if item.name.startswith(getattr(x, "name", None) or "-")]
    return "opt_name=" not in arguments and (any(map(names_family, tests)) or tests_code_of_family(item.path))


def pytest_configure(config):
    if os.environ.get("OPTAX_SUITE") == "optax":
        return
    ours = {id(getattr(optax, name)): getattr(jadam, name) for name in NAMES}
    for function in ours.values():  # with types instead of their names: a test runs if learning_rate may be a schedule
        function.__signature__ = inspect.signature(function.__wrapped__, eval_str=True)
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "optax"]:
        for name, value in list(vars(module).items()):
            if id(value) in ours:
                setattr(module, name, ours[id(value)])


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if is_of_family(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


if __name__ == "__main__":
    paths = [x for x in sorted(ROOT.rglob("*_test.py")) if names_family(parse(x)) or tests_code_of_family(x)]
    print(len(paths), "modules:", *(path.relative_to(ROOT) for path in paths))
    options = f"-p programs.optax_suite -p no:cacheprovider -c {os.devnull} -n 2 -rfEs --tb=line -q".split()
    sys.exit(pytest.main([*options, f"--rootdir={ROOT}", *map(str, paths), *sys.argv[1:]]))
