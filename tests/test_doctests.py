"""Every example in a docstring runs, and every public function has one, with its arguments, result and errors."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import jadam

MODULES = [f"jadam.{m.name}" for m in pkgutil.iter_modules(jadam.__path__)]
FUNCTIONS = [name for name, value in vars(jadam).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented(name):
    text = inspect.getdoc(getattr(jadam, name))
    for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
        assert part in text, f"jadam.{name} has no {part}"
