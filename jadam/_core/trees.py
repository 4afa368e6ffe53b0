"""Helpers for trees."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def leaf_name(path: Any) -> str:
    """A leaf's path as `jax.tree_util.keystr` has it, without the ``.value`` that Flax NNX has only at `init`."""
    return jax.tree_util.keystr(path).removesuffix(".value")


def find_states(tree, kind: type | tuple[type, ...] | Callable[[Any], bool]) -> list:
    """The outermost nodes of ``tree`` that are of type ``kind``, or for which the function ``kind`` is true."""
    matches = (lambda x: isinstance(x, kind)) if isinstance(kind, (type, tuple)) else kind
    return [x for x in jax.tree.leaves(tree, is_leaf=matches) if matches(x)]


def params_with_gradients(params, grads) -> tuple[Any, Callable[[list], Any]]:
    """The parameters that have a gradient, and a function that puts new ones into the whole tree.

    A parameter whose gradient is None may be anything: a function, a string, an array that is not trained.
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


class _VerbatimKey(str):
    """A key of `NamedLeaves`, which `jax.tree_util.keystr` prints unchanged."""


@jax.tree_util.register_pytree_with_keys_class
class NamedLeaves:
    """Some leaves of a tree, by the names of their paths, without the tree's own classes."""

    def __init__(self, names: Sequence[str], leaves: Sequence[Any]):
        """As many names as leaves."""
        self.names, self.leaves = tuple(names), list(leaves)

    def tree_flatten_with_keys(self):
        """For JAX."""
        return list(zip(map(_VerbatimKey, self.names), self.leaves, strict=True)), self.names

    @classmethod
    def tree_unflatten(cls, names, leaves) -> "NamedLeaves":
        """For JAX."""
        return cls(names, leaves)


def match_state_to_params(state, params) -> list[tuple[str | None, str | None]]:
    """For each leaf of ``state`` the parameter that it belongs to, and in which tree of the state it lies, or Nones."""
    named = {_keys(path): (leaf_name(path), p) for path, p in jax.tree_util.tree_leaves_with_path(params)}
    of_all = lambda x: getattr(x, "of_all_parameters", False)
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=of_all):
        found += [{}] * len(jax.tree.leaves(x)) if of_all(x) else [_matches(path, x, named)]
    like = Counter(
        tree for match_state_to_params in found for tree in match_state_to_params
    )  # how many of the parameters' paths a tree has
    best = [
        max(match_state_to_params, key=like.__getitem__, default=None) for match_state_to_params in found
    ]  # the first, the longest path, of equals
    return [(None, None) if tree is None else x[tree] for x, tree in zip(found, best, strict=True)]


def _matches(path, x, params) -> dict[tuple[str, ...], tuple[str, str | None]]:
    """For each tree of the state in which ``x`` lies at a parameter's path: that parameter, and the tree's field."""
    keys, found = _keys(path), {}
    for i in range(len(keys) + 1):
        name, p = params.get(keys[i:], (None, None))
        field = _field(path[:i])
        if name is not None and jnp.ndim(p) == jnp.ndim(x) and field not in ("count", "version"):
            found[keys[:i]] = name, field
    return found


def _keys(path) -> tuple[str, ...]:
    """Of a path, without the ``.value`` of Flax NNX."""
    keys = tuple(map(str, path))
    return keys[:-1] if keys[-1:] == (".value",) else keys


def _field(path):
    """The last field of a state's NamedTuple on the way to a tree."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value"]
    return names[-1] if names else None
