"""What JAX's tree functions leave to be said more than once."""

from collections.abc import Callable
from typing import Any

import jax


def find_states(tree, kind: type | tuple[type, ...] | Callable[[Any], bool]) -> list:
    """The nodes of ``tree`` that are of a type, or of which a function is true; not looking inside of them."""
    matches = (lambda x: isinstance(x, kind)) if isinstance(kind, (type, tuple)) else kind
    return [x for x in jax.tree.leaves(tree, is_leaf=matches) if matches(x)]
