"""A pytest plugin that runs Optax's installed tests of Adam and its relatives with jadam's functions.

``PYTHONPATH=tests python -m pytest -p programs.optax_suite --pyargs optax._src.alias_test ...``; With
``OPTAX_SUITE=optax`` they run with Optax's own functions, for comparison.
"""

import os
import re

import optax
from optax._src import alias, transform

import jadam

NAMES = ["adam", "adamw", "adamax", "adamaxw", "nadam", "nadamw", "amsgrad", "radam"]
NAMES += [f"scale_by_{name}" for name in ("adam", "adamax", "amsgrad", "radam")]
ROW = re.compile(
    "'({0})'|_({0})( |$)|match_adam".format("|".join(NAMES))
)  # a test parameter, or the end of the test's name


def pytest_configure(config):
    if os.environ.get("OPTAX_SUITE") == "optax":
        return
    for module in (optax, alias, transform):
        for name in NAMES:
            if hasattr(module, name):
                setattr(module, name, getattr(jadam, name))


def pytest_collection_modifyitems(config, items):
    selected = []
    for item in items:
        function = getattr(item.parent.obj, item.originalname or item.name, None)
        if ROW.search(f"{item.name} {getattr(function, '__x_params_repr__', '')}"):
            selected.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
