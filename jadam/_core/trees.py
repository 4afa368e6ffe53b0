"""Helpers for trees."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def find_states(tree, kind: type | tuple[type, ...] | Callable[[Any], bool]) -> list:
    """The outermost nodes of ``tree`` that are of type ``kind``, or for which the function ``kind`` is true."""
    matches = (lambda x: isinstance(x, kind)) if isinstance(kind, (type, tuple)) else kind
    return [x for x in jax.tree.leaves(tree, is_leaf=matches) if matches(x)]


def trained(params, grads) -> tuple[Any, Callable[[list], Any]]:
    """The parameters that have a gradient, and the function that puts new ones in their places.

    What has None for its gradient may be anything: a function, a string, an array that is not trained.
    """
    whole = jax.tree.structure(params)
    if params is None or grads is None or whole == jax.tree.structure(grads):
        return params, whole.unflatten
    flat, structure = jax.tree.flatten(grads, is_leaf=lambda x: x is None)
    try:
        parts = structure.flatten_up_to(params)
    except ValueError:  # another tree; the checks say where it differs
        return params, whole.unflatten
    has = [g is not None for g in flat]

    def put(leaves):
        new = iter(leaves)
        return structure.unflatten([next(new) if on else part for on, part in zip(has, parts, strict=True)])

    return structure.unflatten([part if on else None for on, part in zip(has, parts, strict=True)]), put


class _Name(str):
    """A key of `Named`, which `jax.tree_util.keystr` takes as it is."""


@jax.tree_util.register_pytree_with_keys_class
class Named:
    """Leaves by their paths' names: a tree of some leaves of another one, without its classes."""

    def __init__(self, names: Sequence[str], leaves: Sequence[Any]):
        """As many names as leaves."""
        self.names, self.leaves = tuple(names), list(leaves)

    def tree_flatten_with_keys(self):
        """For JAX."""
        return list(zip(map(_Name, self.names), self.leaves, strict=True)), self.names

    @classmethod
    def tree_unflatten(cls, names, leaves) -> "Named":
        """For JAX."""
        return cls(names, leaves)
