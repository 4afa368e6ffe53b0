"""Docstring examples run; every public function documents arguments, result and errors and has an example."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path

import pytest
from helpers import parametrize

import jadam


def has_examples(name):
    origin = importlib.util.find_spec(name).origin
    return origin.endswith(".py") and ">>> " in Path(origin).read_text()


MODULES = [m.name for m in pkgutil.walk_packages(jadam.__path__, "jadam.") if has_examples(m.name)]
SLOW = {"jadam._checkpoints.convert", "jadam._diagnostics.plot"}  # an int8 conversion without jit, and a picture
FUNCTIONS = [name for name in dir(jadam) if inspect.isfunction(getattr(jadam, name))]


@parametrize("name", MODULES, default=[name for name in MODULES if name not in SLOW])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented(name):
    function = getattr(jadam, name)
    text = inspect.getdoc(function)
    for part in ("Args:",) * bool(inspect.signature(function).parameters) + ("Returns:", "Raises:", "Example:", ">>> "):
        assert part in text, f"jadam.{name} has no {part}"
