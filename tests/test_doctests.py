"""Every example in a docstring runs, and every public function has one, with its arguments, result and errors."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import jadam

MODULES = [m.name for m in pkgutil.walk_packages(jadam.__path__, "jadam.") if "._cpu" not in m.name]
FUNCTIONS = [name for name, value in vars(jadam).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented(name):
    function = getattr(jadam, name)
    text = inspect.getdoc(function)
    for part in ("Args:",) * bool(inspect.signature(function).parameters) + ("Returns:", "Raises:", "Example:", ">>> "):
        assert part in text, f"jadam.{name} has no {part}"
