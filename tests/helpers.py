"""What several test files need."""

import itertools
from collections.abc import Collection, Iterable, Mapping

import pytest


def rows(axis: str, values: Mapping | Iterable, default: Collection[str]):
    """``pytest.mark.parametrize`` over ``values``; the names in ``default`` run by default, all others are slow.

    A value's name is its key in a mapping, else its ``str``.
    """
    return grid({axis: values}, default)


def grid(axes: Mapping[str, Mapping | Iterable], default: Collection[str]):
    """``pytest.mark.parametrize`` over the product of ``axes``; the same, with the names joined by ``-``."""
    named = [_named(values) for values in axes.values()]
    products = {"-".join(names): names for names in itertools.product(*named)}
    if unknown := set(default) - set(products):
        raise ValueError(f"default must name rows of the grid, got {sorted(unknown)}; there are {sorted(products)}")
    params = [
        pytest.param(
            *(values[name] for values, name in zip(named, names, strict=True)),
            id=row,
            marks=() if row in default else pytest.mark.slow,
        )
        for row, names in products.items()
    ]
    return pytest.mark.parametrize(tuple(axes), params)


def _named(values) -> dict:
    return dict(values) if isinstance(values, Mapping) else {getattr(x, "__name__", str(x)): x for x in values}
