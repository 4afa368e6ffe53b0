"""Pytrees: names of leaves, parameters without gradients, states matched to parameters."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def leaf_name(path: Any) -> str:
    """``jax.tree_util.keystr(path)`` without the ``.value`` that Flax NNX appends at `init` only."""
    return jax.tree_util.keystr(path).removesuffix(".value")


def find_states(tree, kind: type | tuple[type, ...] | Callable[[Any], bool]) -> list:
    """The outermost nodes of ``tree`` of type ``kind``, or for which the predicate ``kind`` is true."""
    matches = (lambda x: isinstance(x, kind)) if isinstance(kind, (type, tuple)) else kind
    return [x for x in jax.tree.leaves(tree, is_leaf=matches) if matches(x)]


def params_with_gradients(params, grads) -> tuple[Any, Callable[[list], Any]]:
    """The parameters that have a gradient, and a function that puts new leaves into the full tree.

    A parameter whose gradient is None may be of any type: a function, a string, an array that is not trained.
    """
    full = jax.tree.structure(params)
    if params is None or grads is None or full == jax.tree.structure(grads):
        return params, full.unflatten
    flat, structure = jax.tree.flatten(grads, is_leaf=lambda x: x is None)
    try:
        parts = structure.flatten_up_to(params)
    except ValueError:  # the trees differ; the checks report where
        return params, full.unflatten
    has_gradient = [g is not None for g in flat]

    def put(leaves):
        """Return the whole tree with ``leaves`` in place of the parameters that have gradients."""
        new = iter(leaves)
        return structure.unflatten([next(new) if has else part for has, part in zip(has_gradient, parts, strict=True)])

    return structure.unflatten([part if has else None for has, part in zip(has_gradient, parts, strict=True)]), put


class _VerbatimKey(str):
    """A key that `jax.tree_util.keystr` prints unchanged."""


@jax.tree_util.register_pytree_with_keys_class
class NamedLeaves:
    """Leaves of a tree with the names of their paths, without the tree's classes."""

    def __init__(self, names: Sequence[str], leaves: Sequence[Any]):
        self.names, self.leaves = tuple(names), list(leaves)

    def tree_flatten_with_keys(self):
        return list(zip(map(_VerbatimKey, self.names), self.leaves, strict=True)), self.names

    @classmethod
    def tree_unflatten(cls, names, leaves) -> "NamedLeaves":
        return cls(names, leaves)


def match_state_to_params(state, params) -> list[tuple[str | None, str | None]]:
    """For each leaf of ``state``, its parameter's name and its field of the state, or ``(None, None)``."""
    named = {_keys(path): (leaf_name(path), p) for path, p in jax.tree_util.tree_leaves_with_path(params)}
    spans_all = lambda x: getattr(x, "belongs_to_no_param", False)
    candidates = []
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=spans_all):
        candidates += [{}] * len(jax.tree.leaves(x)) if spans_all(x) else [_candidates(path, x, named)]
    num_matches = Counter(tree for matches in candidates for tree in matches)
    # The subtree that matches the most parameters. Ties: the first, which has the longest parameter path.
    best = [max(matches, key=num_matches.__getitem__, default=None) for matches in candidates]
    return [(None, None) if tree is None else x[tree] for x, tree in zip(candidates, best, strict=True)]


def _candidates(path, x, params) -> dict[tuple[str, ...], tuple[str, str | None]]:
    """For each subtree of the state in which ``x`` has a parameter's path: that parameter's name, and the field."""
    keys, found = _keys(path), {}
    for i in range(len(keys) + 1):
        name, p = params.get(keys[i:], (None, None))
        fields = [key.name for key in path[:i] if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value"]
        field = fields[-1] if fields else None
        if name is not None and jnp.ndim(p) == jnp.ndim(x) and field not in ("count", "version"):
            found[keys[:i]] = name, field
    return found


def _keys(path) -> tuple[str, ...]:
    """The keys of a path as strings, without the ``.value`` of Flax NNX."""
    keys = tuple(map(str, path))
    return keys[:-1] if keys[-1:] == (".value",) else keys
