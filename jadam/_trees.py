"""Helpers for trees."""

from collections.abc import Callable
from typing import Any

import jax


def find_states(tree, kind: type | tuple[type, ...] | Callable[[Any], bool]) -> list:
    """The outermost nodes of ``tree`` that are of type ``kind``, or for which the function ``kind`` is true."""
    matches = (lambda x: isinstance(x, kind)) if isinstance(kind, (type, tuple)) else kind
    return [x for x in jax.tree.leaves(tree, is_leaf=matches) if matches(x)]
