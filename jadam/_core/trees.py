"""Pytrees: names of leaves, Flax's objects as trees, parameters without gradients, states matched to parameters."""

import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks


def leaf_name(path: Any) -> str:
    """``jax.tree_util.keystr(path)`` without the ``.value`` that Flax NNX appends at `init` only."""
    return jax.tree_util.keystr(path).removesuffix(".value")


def leaf_names(tree) -> list[str]:
    """The `leaf_name` of each leaf, numbered where several have the same: ``.a``, ``.a (2)``."""
    names, seen = [], Counter()
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def state_tree(state):
    """Return the optimizer's state that Flax's ``Optimizer`` or ``TrainState`` holds; any other state unchanged.

    NNX variables are replaced by their arrays.
    """
    checks.check_not_transformation(state)
    return without_variables(getattr(state, "opt_state", state))


def params_tree(params):
    """Return the parameters of an NNX module or of Flax's ``TrainState``; any other tree unchanged.

    NNX variables are replaced by their arrays, so that a parameter has the same path as in the optimizer.
    """
    if hasattr(params, "opt_state") and not hasattr(params, "params"):
        raise TypeError(
            f"params must be a tree of parameters, got {type(params).__name__}. Pass the model, or "
            "nnx.state(model, nnx.Param)."
        )
    return without_variables(params.params if hasattr(params, "opt_state") else params)


def without_variables(tree):
    """``tree`` with NNX variables replaced by their arrays, and an NNX module by the tree of its parameters."""
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return tree
    if isinstance(tree, nnx.Module) and not isinstance(tree, nnx.Optimizer):
        tree = nnx.state(tree, nnx.Param)
    return (getattr(nnx, "as_pure", None) or nnx.pure)(tree)  # renamed in newer versions of Flax


def beside_params(tree) -> Any:
    """``tree`` has an array for each parameter, but not of its shape. Returns it such that none is sharded like one.

    Recipes that shard a state take an array for a parameter's if Flax's metadata is around it, or if
    `optax.tree.map_params` finds the parameters' tree. That calls ``init`` with a mark in place of the parameters, for
    which this returns an array.
    """
    return np.zeros([], np.int8) if isinstance(tree, _mark_of_map_params()) else without_metadata(tree)


@functools.cache
def _mark_of_map_params() -> type:
    """The type of what `optax.tree.map_params` passes to ``init``."""
    found = []

    def init(params) -> Any:
        found.append(type(params))
        return ()

    optax.tree.map_params(init, lambda x: x, ())
    return found[0]


def without_metadata(tree, where: Callable[[Any], bool] = lambda x: True):
    """``tree`` without Flax's boxes, Linen's or NNX's, around the arrays for which ``where`` is true."""
    kinds = {"flax.core.meta": "AxisMetadata", "flax.nnx": "Variable"}
    boxes = tuple(getattr(sys.modules[module], name) for module, name in kinds.items() if module in sys.modules)

    def unboxed(x):
        """The array in ``x``, if that is a box of one."""
        leaves = jax.tree.leaves(x) if isinstance(x, boxes) else []
        return leaves[0] if len(leaves) == 1 and where(leaves[0]) else x

    return jax.tree.map(unboxed, tree, is_leaf=lambda x: isinstance(x, boxes)) if boxes else tree


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
        put_into = lambda part: jax.tree.map(lambda _: next(new), part)  # an array, or a box of Flax around one
        return structure.unflatten(
            [put_into(part) if has else part for has, part in zip(has_gradient, parts, strict=True)]
        )

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
    named = defaultdict(list)  # of the parameters with the same keys, if a class gives several the same
    for name, (path, p) in zip(leaf_names(params), jax.tree_util.tree_leaves_with_path(params), strict=True):
        named[_keys(path)].append((name, p))
    seen = Counter()
    spans_all = lambda x: getattr(x, "belongs_to_no_param", False)
    candidates = []
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=spans_all):
        candidates += [{}] * len(jax.tree.leaves(x)) if spans_all(x) else [_candidates(path, x, named, seen)]
    num_matches = Counter(tree for matches in candidates for tree in matches)
    # The subtree that matches the most parameters. Ties: the first, which has the longest parameter path.
    best = [max(matches, key=num_matches.__getitem__, default=None) for matches in candidates]
    return [(None, None) if tree is None else x[tree] for x, tree in zip(candidates, best, strict=True)]


def _candidates(path, x, params, seen) -> dict[tuple[str, ...], tuple[str, str | None]]:
    """For each subtree of the state in which ``x`` has a parameter's path: that parameter's name, and the field.

    ``seen`` counts the leaves of each subtree with the same path: the second belongs to the second such parameter.
    """
    keys, found = _keys(path), {}
    for i in range(len(keys) + 1):
        same_path = params.get(keys[i:], ())
        index = seen[keys[:i], keys[i:]]
        seen[keys[:i], keys[i:]] += 1
        fields = [key.name for key in path[:i] if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value"]
        field = fields[-1] if fields else None
        if index < len(same_path) and field not in ("count", "version"):
            name, p = same_path[index]
            if jnp.ndim(p) == jnp.ndim(x):
                found[keys[:i]] = name, field
    return found


def _keys(path) -> tuple[str, ...]:
    """The keys of a path as strings, without the ``.value`` of Flax NNX."""
    keys = tuple(map(str, path))
    return keys[:-1] if keys[-1:] == (".value",) else keys
