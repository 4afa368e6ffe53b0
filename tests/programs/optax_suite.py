"""A pytest plugin: Optax's own installed tests, only the rows about Adam's family, jadam's functions in Optax's place.

``PYTHONPATH=tests python -m pytest -p programs.optax_suite --pyargs optax._src.alias_test ...``; with
``OPTAX_SUITE=optax`` Optax is left in place, to see what passes without jadam.
"""

import os
import re

import optax
from optax._src import alias, transform

import jadam

NAMES = ["adam", "adamw", "adamax", "adamaxw", "nadam", "nadamw", "amsgrad", "radam"]
NAMES += [f"scale_by_{name}" for name in ("adam", "adamax", "amsgrad", "radam")]
ROW = re.compile("'({0})'|_({0})( |$)|match_adam".format("|".join(NAMES)))  # a parameter, or the end of a test's name


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
