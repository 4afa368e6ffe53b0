"""Bad input stops here, with one line that says the name, the range, the value and the remedy."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

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
        raise TypeError(f"{name} must be a number {allowed}, got the callable {shown(value)}.")
    if isinstance(value, jax.Array):
        return _array(name, value, allowed, hint, wide)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.ndarray)):
        kinds = "a number or a schedule" if schedule else "a number"
        raise TypeError(f"{name} must be {kinds} {allowed}, got {shown(value)} of type {type(value).__name__}.")
    scalar(name, getattr(value, "shape", ()))
    value = float(value)
    _in_range(name, value, allowed, hint)
    return value


def _array(name, value, allowed, hint, wide):
    scalar(name, value.shape)
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


def scalar(name: str, shape) -> None:
    """Raise unless ``shape`` is that of a scalar."""
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
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}.")


def whole(name: str, value, *, none: bool = False) -> Any:
    """``value``, of any integer type, as an int; or None, where that is welcome."""
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < 2**31:
        raise ValueError(f"{name} must be a whole number > 0 and < 2**31{' or None' * none}, got {shown(value)}.")
    return int(value)


def transformation(who: str, tx) -> None:
    """Raise unless ``tx`` is an Optax transformation; ``who`` "needs" one."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{who} an Optax transformation, got {shown(tx)}. Pass jadam.adam(...), for one.")


def mask_for(mask) -> Callable[[Any], Any]:
    """A mask of `optax.masked` as a function of the tree that it is for, which raises unless it fits."""
    callables = [callable(x) for x in jax.tree.leaves(mask)]  # a tree may be callable itself, as Equinox' are
    if callables and all(callables):
        return lambda tree: _fitting(mask(tree), tree)
    _booleans(mask)
    return lambda tree: _fitting(mask, tree)


def _fitting(mask, tree):
    _booleans(mask)
    try:
        jax.tree.map(lambda on, x: None, mask, tree)
    except ValueError:
        here, there = (shown(jax.tree.structure(x)) for x in (mask, tree))
        raise ValueError(
            f"mask must have the parameters' tree or a part of it from the top, got {here} for {there}."
        ) from None
    return mask


def _booleans(mask):
    for path, x in jax.tree_util.tree_leaves_with_path(mask):
        known = not isinstance(x, jax.core.Tracer)
        if not (isinstance(x, bool) or (known and getattr(x, "dtype", None) == np.bool_ and not x.shape)):
            raise TypeError(f"mask{jax.tree_util.keystr(path)} must be True or False, got {shown(x)}.")


def shown(value) -> str:
    """A value's ``repr`` in one line, and not long."""
    try:
        text = " ".join(repr(value).split())
    except RuntimeError:  # a deleted array's
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def storage_dtype(name: str, dtype):
    """``dtype`` as a floating dtype, or None."""
    if dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16, got {shown(dtype)}.") from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16, got {dtype}.")
    return dtype


def _failing(check: Callable[..., bool], tree, *like):
    """``(path, leaf, ...)`` of the first leaf, with those of the trees like it, that fails the check; nothing if none.

    Paths are made only for it: an eager step has several checks of hundreds of leaves.
    """
    columns = [jax.tree.leaves(x) for x in (tree, *like)]
    for i, row in enumerate(zip(*columns, strict=True)):
        if not check(*row):
            yield jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(tree)[i][0]), *row
            return


def holds_complex(mu, updates) -> None:
    """Raise if a complex gradient's first moment is stored in a real dtype, which would drop its imaginary part."""
    fits = lambda g, m: np.iscomplexobj(m) or not np.iscomplexobj(g)
    for path, _, m in _failing(fits, updates, mu):
        raise TypeError(
            f"mu_dtype must be complex for complex gradients, got {m.dtype} for updates{path}. Leave it out."
        )


def _is_array(leaf) -> bool:
    """Whether it is an array, a number or a `jax.ShapeDtypeStruct`."""
    if isinstance(leaf, (jax.Array, numbers.Number)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return hasattr(leaf, "shape") and isinstance(dtype, np.dtype) and dtype.kind not in "OSU"


def arrays(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is an array, a number or a `jax.ShapeDtypeStruct`."""
    for path, leaf in _failing(_is_array, tree):
        raise TypeError(f"{what}{path} must be an array, got {shown(leaf)} of type {type(leaf).__name__}.")


def _is_there(leaf) -> bool:
    """Whether an array can be read."""
    if isinstance(leaf, jax.Array):
        return isinstance(leaf, jax.core.Tracer) or not leaf.is_deleted()
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def values(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is an array, or a number, that can be read."""
    arrays(tree, what)
    for path, leaf in _failing(_is_there, tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{what}{path} must be an array, got a ShapeDtypeStruct, which has no values. For shapes: "
                "jax.eval_shape."
            )
        raise ValueError(
            f"{what}{path} must be there, but was donated to an earlier step or deleted. Go on with what that step "
            "returned."
        )


def _committed(x):
    """The devices that an array must stay on, or None."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return x.sharding.device_set if known and x.committed else None


def together(**trees) -> None:
    """Raise unless all arrays that are committed to devices are on the same ones."""
    if len({frozenset(on) for x in jax.tree.leaves(trees) if (on := _committed(x))}) < 2:
        return
    found = [
        (devices, f"{what}{jax.tree_util.keystr(path)}", what)
        for what, tree in trees.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if (devices := _committed(x))
    ]
    first, other = found[0], next(x for x in found if x[0] != found[0][0])
    here, there = (shown(sorted(devices, key=lambda x: x.id)) for devices, *_ in (other, first))
    raise ValueError(
        f"all must be on the same devices, got {other[1]} on {here} and {first[1]} on {there}. Move one: "
        f"jax.device_put({other[2]}, sharding)."
    )


@functools.cache
def _is_trainable(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def trainable(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is real or complex floating, of 16 bits at least."""
    arrays(tree, what)
    dtype_of = lambda leaf: getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    for path, leaf in _failing(lambda leaf: _is_trainable(dtype_of(leaf)), tree):
        dtype = dtype_of(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{what}{path} must have 16 bits or more to be trained, got {dtype}. Keep it in bfloat16, and cast in "
                "the model."
            )
        kind = "float0, as the gradient of an integer is" if dtype == jax.dtypes.float0 else dtype
        raise TypeError(
            f"{what}{path} must be floating or complex to be trained, got {kind}. Leave it out "
            "(eqx.is_inexact_array, nnx.Param) or wrap the optimizer in optax.masked."
        )


def gradients(updates, state, params, *, planning: bool = False) -> None:
    """Raise unless ``updates`` are floating arrays over the same tree as ``params`` (if given).

    ``planning`` is for a plan, which may be given the parameters' shapes alone.
    """
    for tree, what in ((updates, "updates"), (params, "params")):
        trainable(tree, what)
    for tree, what in ((updates, "updates"), (state, "state"), (None if planning else params, "params")):
        values(tree, what)
    if params is not None:
        same_tree(params, updates, "params", "updates")


def state_of(state, state_type, remedy: str = "If with other moments: jadam.convert_moments.") -> None:
    """Raise unless ``state`` has the fields of ``state_type``."""
    if getattr(state, "_fields", None) != state_type._fields:
        raise TypeError(
            f"state must be the {state_type.__name__} that init returns, got {type(state).__name__}. Was it made by "
            f"another transformation? {remedy}"
        )


def stages(state, n: int) -> None:
    """Raise unless ``state`` is a tuple of the states of so many stages."""
    if hasattr(state, "inner_state"):
        raise TypeError(
            f"state must be the tuple of {n} that init returns, got {type(state).__name__} of a transformation around "
            "this one. Take what is within: state.inner_state."
        )
    if not (isinstance(state, tuple) and len(state) == n):
        got = (
            f"{type(state).__name__} of {len(state)}"
            if isinstance(state, (tuple, dict, list))
            else type(state).__name__
        )
        raise TypeError(
            f"state must be the tuple of {n} that init returns, got {got}. Was it made by another transformation? It "
            "goes before params."
        )


def version(state, known: int) -> None:
    """Raise unless a state's arrays are laid out as this version knows them."""
    if jnp.shape(state.version) != (known,):
        found = state.version.shape[0] if jnp.ndim(state.version) else state.version
        raise ValueError(
            f"state.version must be {known}, got {found}: a {type(state).__name__} saved by another version of jadam. "
            "Restore it with that version, and save jadam.convert_moments(state, 'float32')."
        )


def counts(count) -> None:
    """Raise unless ``count`` is an integer."""
    kind = getattr(count, "dtype", type(count).__name__)
    if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"state.count must be int32, got {kind}. {_CAST}")
    if count.shape:
        raise ValueError(f"state.count must be a scalar, got shape {count.shape}. Use jax.vmap for several states.")


def no_scales(has: bool, path) -> None:
    """Raise if a leaf that is not int8 has scales: it was, and its codes were cast to another dtype."""
    if has:
        raise TypeError(f"state.mu{jax.tree_util.keystr(path)} must be int8, for it has scales. {_CAST}")


def moments_narrow_enough(tree, name: str, mu) -> None:
    """Raise if a moment is float32 that should be bfloat16: it would go on taking its 4 bytes."""
    for path, *_ in _failing(lambda x, m: x.dtype != np.float32 or np.iscomplexobj(m), tree, mu):
        raise TypeError(
            f"state.{name}{path} must be bfloat16 with moments='bfloat16', got float32. If the state was made with "
            "other moments: jadam.convert_moments(state, 'bfloat16')."
        )


@functools.cache
def _is_wide(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32


def moments_wide_enough(tree, name: str) -> None:
    """Raise if a second moment is narrower than float32: there it stalls, and silently."""
    for path, leaf in _failing(lambda x: _is_wide(x.dtype), tree):
        raise TypeError(
            f"state.{name}{path} must be float32 or wider, got {leaf.dtype}: at b2 = 0.999 a step is smaller than its "
            "spacing. Optax keeps bf16 parameters' moments in bf16; widen the restored state once: "
            "jadam.convert_moments(state, 'float32')."
        )


def keeps_dtypes(tree, leaves) -> None:
    """Raise if a class of ``tree`` makes float32 of moments of 8 or 16 bits, or 16 bits of float32."""
    kept = lambda x, y: x.dtype == y.dtype or (_is_wide(x.dtype) and _is_wide(y.dtype)) or y.size <= 1
    for path, x, given in _failing(kept, tree, leaves):
        raise TypeError(
            f"params{path} must be able to hold {given.dtype}, in which its moments are stored, got {x.dtype} back "
            "from the class it lies in. Let its __post_init__ keep dtypes, or choose moments='float32' for it."
        )


def same_tree(tree, reference, what: str, than: str, hint: str = "") -> None:
    """Raise unless ``tree`` has the structure and shapes of ``reference``, naming the first path that differs."""
    same_structure(tree, reference, what, than, hint)
    for path, leaf, other in _failing(lambda x, y: np.shape(x) == np.shape(y), tree, reference):
        raise ValueError(f"{what}{path} has shape {np.shape(leaf)}, {than} has {np.shape(other)}. {_SAME_TREE}{hint}")


def same_structure(tree, reference, what: str, than: str, hint: str = "") -> None:
    """Raise unless ``tree`` has the structure of ``reference``, naming the first path that differs."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        leaves, other = (jax.tree_util.tree_leaves_with_path(x) for x in (tree, reference))
        here, there = ([jax.tree_util.keystr(path) for path, _ in x] for x in (leaves, other))
        extra = next((path for path in here if path not in set(there)), None)
        missing = next((path for path in there if path not in set(here)), None)
        if extra is not None:
            difference = f"{what}{extra} has no counterpart in {than}"
        elif missing is not None:
            difference = f"{what}{missing} is missing (or None), {than} has it"
        else:
            difference = f"{what} is {jax.tree.structure(tree)}, {than} is {jax.tree.structure(reference)}"
        raise ValueError(f"{difference}. {_SAME_TREE}{hint}")


_CAST = "Cast no state as a whole; jadam.convert_moments(state, 'float32') widens moments."
_SAME_TREE = "Gradients, parameters and the tree given to init must match."
