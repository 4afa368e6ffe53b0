"""Bad input stops here, with one line that says the name, the range, the value and the remedy."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jadam._formats import is_placeholder

_RANGES: dict[str, Callable[[Any], Any]] = {
    "in [0, 1)": lambda x: (x >= 0) & (x < 1),
    ">= 0": lambda x: (x >= 0) & (x < math.inf),
    ">= 4": lambda x: (x >= 4) & (x < math.inf),
    "> 0": lambda x: (x > 0) & (x < math.inf),
}


def hyperparameter(name: str, value, allowed: str, *, hint: str = "", schedule: bool = True, wide: bool = False) -> Any:
    """Return ``value`` as a float, a scalar `jax.Array`, or the schedule it is.

    Args:
        allowed: a key of the table above. Traced values and schedules cannot be compared with it here.
        schedule: whether a callable is welcome.
        wide: whether an array must be float32 or wider.
    """
    if callable(value):
        if schedule:
            return value
        raise TypeError(f"{name} must be a number {allowed}, got the callable {value!r}.")
    if isinstance(value, jax.Array):
        return _array(name, value, allowed, hint, wide)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.ndarray)):
        kinds = "a number or a schedule" if schedule else "a number"
        raise TypeError(f"{name} must be {kinds} {allowed}, got {value!r} of type {type(value).__name__}.")
    _scalar(name, getattr(value, "shape", ()))
    value = float(value)
    _in_range(name, value, allowed, hint)
    return value


def _array(name, value, allowed, hint, wide):
    _scalar(name, value.shape)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating number {allowed}, got an array of {value.dtype}.")
    if wide and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"{name} must be float32 or wider, got {value.dtype}, in which 0.999 is 1 or 1e-8 is 0. "
            "optax.inject_hyperparams casts to the parameters' dtype: pass it hyperparam_dtype=jnp.float32."
        )
    if not isinstance(value, jax.core.Tracer):
        _in_range(name, float(value), allowed, hint)
    return value


def _scalar(name, shape):
    if shape:
        raise ValueError(f"{name} must be a scalar, got an array of shape {shape}. Use jax.vmap for several at once.")


def _in_range(name, value, allowed, hint):
    if not _RANGES[allowed](value):
        raise ValueError(f"{name} must be {allowed}, got {value:g}. {hint}".rstrip())


def or_nan(value, allowed: str):
    """A traced ``value``, or NaN where it is out of range: nothing under jit can raise, NaN is seen."""
    return jnp.where(_RANGES[allowed](value), value, jnp.nan) if isinstance(value, jax.Array) else value


def one_of(name: str, value, allowed: tuple) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not any(value is x or (isinstance(x, str) and value == x) for x in allowed):
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")


def storage_dtype(name: str, dtype):
    """``dtype`` as a floating dtype, or None."""
    if dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16, got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16, got {dtype}.")
    return dtype


def holds_complex(mu, updates) -> None:
    """Raise if a complex gradient's first moment is stored in a real dtype, which would drop its imaginary part."""
    for (path, g), m in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(mu), strict=True):
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(m):
            raise TypeError(
                f"mu_dtype must be complex for complex gradients, got {m.dtype} for updates"
                f"{jax.tree_util.keystr(path)}. Leave it out."
            )


def trainable(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is real or complex floating."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{what}{jax.tree_util.keystr(path)} must be floating or complex to be trained, got {dtype}. "
                "Leave it out (eqx.is_inexact_array, nnx.Param) or wrap the optimizer in optax.masked."
            )


def gradients(updates, params) -> None:
    """Raise unless ``updates`` are floating arrays over the same tree as ``params`` (if given)."""
    trainable(updates, "updates")
    if params is not None:
        same_tree(params, updates, "params", "updates")


def state_of(state, state_type) -> None:
    """Raise unless ``state`` has the fields of ``state_type``."""
    if getattr(state, "_fields", None) != state_type._fields:
        raise TypeError(
            f"state must be the {state_type.__name__} that init returns, got {type(state).__name__}. Was it made by "
            "another transformation? If with other moments: jadam.convert_moments."
        )


def stages(state, n: int) -> None:
    """Raise unless ``state`` is a tuple of the states of so many stages."""
    if not (isinstance(state, tuple) and len(state) == n):
        got = (
            f"{type(state).__name__} of {len(state)}"
            if isinstance(state, (tuple, dict, list))
            else type(state).__name__
        )
        raise TypeError(
            f"state must be the tuple of {n} that init returns, got {got}. Was it made by another transformation? The "
            "order is step(tx, grads, state, params)."
        )


def version(state, known: int) -> None:
    """Raise unless a state's arrays are laid out as this version knows them."""
    if state.version.shape != (known,):
        found = state.version.shape[0] if state.version.ndim else state.version
        raise ValueError(
            f"state.version must be {known}, got {found}: a {type(state).__name__} saved by another version of jadam. "
            "Restore it with that version, and save jadam.convert_moments(state, 'float32')."
        )


def counts(count) -> None:
    """Raise unless ``count`` is an integer."""
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"state.count must be int32, got {count.dtype}. {_CAST}")


def unused(scales, path) -> None:
    """Raise if a leaf that is not int8 has scales: it was, and its codes were cast to another dtype."""
    if not all(map(is_placeholder, scales)):
        raise TypeError(f"state.mu{jax.tree_util.keystr(path)} must be int8, for it has scales. {_CAST}")


def moments_narrow_enough(tree, name: str, mu) -> None:
    """Raise if a moment is float32 that should be bfloat16: it would go on taking its 4 bytes."""
    for (path, leaf), m in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(mu), strict=True):
        if leaf.dtype == jnp.float32 and not jnp.iscomplexobj(m):
            raise TypeError(
                f"state.{name}{jax.tree_util.keystr(path)} must be bfloat16 with moments='bfloat16', got float32. If "
                "the state was made with other moments: jadam.convert_moments(state, 'bfloat16')."
            )


def moments_wide_enough(tree, name: str) -> None:
    """Raise if a second moment is narrower than float32: there it stalls, and silently."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"state.{name}{jax.tree_util.keystr(path)} must be float32 or wider, got {leaf.dtype}: at b2 = 0.999 "
                "a step is smaller than its spacing. Optax keeps bf16 parameters' moments in bf16; widen the restored "
                "state once: jadam.convert_moments(state, 'float32')."
            )


def same_tree(tree, reference, what: str, than: str) -> None:
    """Raise unless ``tree`` has the structure and shapes of ``reference``, naming the first path that differs."""
    same_structure(tree, reference, what, than)
    leaves, other = (jax.tree_util.tree_leaves_with_path(x) for x in (tree, reference))
    for (path, leaf), (_, expected) in zip(leaves, other, strict=True):
        if jnp.shape(leaf) != jnp.shape(expected):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, {than} has {jnp.shape(expected)}. "
                f"{_SAME_TREE}"
            )


def same_structure(tree, reference, what: str, than: str) -> None:
    """Raise unless ``tree`` has the structure of ``reference``, naming the first path that differs."""
    leaves, other = (jax.tree_util.tree_leaves_with_path(x) for x in (tree, reference))
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        here, there = ([jax.tree_util.keystr(path) for path, _ in x] for x in (leaves, other))
        extra = next((path for path in here if path not in set(there)), None)
        missing = next((path for path in there if path not in set(here)), None)
        if extra is not None:
            difference = f"{what}{extra} has no counterpart in {than}"
        elif missing is not None:
            difference = f"{what}{missing} is missing (or None), {than} has it"
        else:
            difference = f"{what} is {jax.tree.structure(tree)}, {than} is {jax.tree.structure(reference)}"
        raise ValueError(f"{difference}. {_SAME_TREE}")


_CAST = "Cast no state as a whole; jadam.convert_moments(state, 'float32') widens moments."
_SAME_TREE = "Gradients, parameters and the tree given to init must match."
