"""Checks of the input. Every error is one line: the name, its range, the value and the remedy."""

import difflib
import functools
import numbers
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

_LIBRARIES = ("jadam", "optax", "flax", "jax")
_HOST = jax.memory.Space.Host
_FLOAT32_MAX = float(np.finfo(np.float32).max)  # a larger one would be infinite in float32
_RANGES: dict[str, Callable[[Any], Any]] = {
    "in [0, 1)": lambda x: (x >= 0) & (x < 1),
    ">= 0": lambda x: (x >= 0) & (x <= _FLOAT32_MAX),
    ">= 4": lambda x: (x >= 4) & (x <= _FLOAT32_MAX),
    "> 0": lambda x: (x > 0) & (x <= _FLOAT32_MAX),
}


def hyperparameter(name: str, value, allowed: str, *, hint: str = "", schedule: bool = True, wide: bool = False) -> Any:
    """Return ``value`` as a float, a scalar `jax.Array` or a schedule.

    Args:
        allowed: a key of `_RANGES`. Traced values and schedules are not compared with it here.
        hint: the remedy for a value out of range.
        schedule: whether a schedule is allowed.
        wide: whether an array or NumPy number must be float32 or wider.
    """
    if callable(value) and schedule:
        return value
    dtype: Any = getattr(value, "dtype", None)
    if wide and dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} must be float32 or wider, got {dtype}: 16 bits round 0.999 to 1 or 1e-8 to 0. Use a Python "
            "number or a float32 array. With optax.inject_hyperparams: hyperparam_dtype=jnp.float32."
        )
    if isinstance(value, jax.Array):
        return _array_hyperparameter(name, value, allowed, hint)
    if isinstance(value, np.generic) and jnp.issubdtype(value.dtype, jnp.floating):
        value = np.asarray(value)  # bfloat16 of ml_dtypes is not a numbers.Real
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.ndarray)):
        raise TypeError(
            f"{name} must be a number{' or a schedule' * schedule} {allowed}, got {short_repr(value)} of type "
            f"{type(value).__name__}."
        )
    check_scalar(name, getattr(value, "shape", ()))
    value = float(value)
    _check_range(name, value, allowed, hint)
    return value


def _array_hyperparameter(name, value, allowed, hint):
    """`hyperparameter` for a JAX array."""
    check_scalar(name, value.shape)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a real floating-point number {allowed}, got an array of {value.dtype}. "
            "Use a float32 array."
        )
    if not isinstance(value, jax.core.Tracer):
        _check_range(name, float(value), allowed, hint)
    return value


def warn(message: str) -> None:
    """Warn at the user's line, the innermost one outside of `_LIBRARIES`."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)


def warn_of_unusual_betas(betas: dict) -> None:
    """Warn if the decay rates, as far as they are numbers, look like other arguments or swapped."""
    b1, b2 = (x if isinstance(x, float) else None for x in (betas.get("b1"), betas.get("b2")))
    if b1 is not None and 0 < b1 < 1e-4:
        warn(f"b1 is usually near 0.9, got {b1:g}. Did you mean eps={b1:g}?")
    elif b1 is not None and b2 is not None and b1 > b2:
        warn(f"b1 is usually at most b2, got b1={b1:g} and b2={b2:g}. Are they swapped?")


def check_scalar(name: str, shape) -> None:
    """Raise unless ``shape`` is ``()``."""
    if shape:
        raise ValueError(f"{name} must be a scalar, got an array of shape {shape}. Use jax.vmap for several values.")


def _check_range(name, value, allowed, hint):
    """Raise unless ``value`` is in the range ``allowed``, a key of `_RANGES`."""
    if not _RANGES[allowed](value):
        finite = " and finite in float32" * (_FLOAT32_MAX < value < float("inf"))
        raise ValueError(f"{name} must be {allowed}{finite}, got {value:g}. {hint}".rstrip())


def nan_if_out_of_range(value, allowed: str):
    """``value``, with NaN in place of an array that is out of range: compiled code cannot raise."""
    return jnp.where(_RANGES[allowed](value), value, jnp.nan) if isinstance(value, jax.Array) else value


def check_one_of(name: str, value, allowed: tuple) -> None:
    """Raise unless ``value`` is one of ``allowed``: equal for strings, else identical."""
    if not any(value is x or (isinstance(x, str) and value == x) for x in allowed):
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {short_repr(value)}.")


def positive_int(name: str, value, *, none: bool = False) -> Any:
    """Return ``value``, of any integer type, as an int. ``none``: whether None is allowed."""
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < 2**31:
        raise ValueError(f"{name} must be an integer in [1, 2**31){' or None' * none}, got {short_repr(value)}.")
    return int(value)


def check_transformation(subject: str, tx) -> None:
    """Raise unless ``tx`` is an Optax transformation. ``subject`` begins the sentence, e.g. "step needs"."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        remedy = "Pass its tx." if hasattr(tx, "tx") else "For example: jadam.adam(1e-3)."
        raise TypeError(f"{subject} an Optax transformation, got {short_repr(tx)}. {remedy}")


def check_not_transformation(state) -> None:
    """Raise if a transformation is given in place of its state."""
    if hasattr(state, "init") and hasattr(state, "update"):
        raise TypeError(
            f"state must be an optimizer's state, got {short_repr(state)}. Pass what its init or a step returned."
        )


def mask_function(mask) -> Callable[[Any], Any]:
    """A mask of `optax.masked` as a function from a tree to its mask, which raises if the mask does not fit."""
    callables = [callable(x) for x in jax.tree.leaves(mask)]  # an Equinox module of booleans may be callable itself
    if callables and all(callables):
        return lambda tree: _checked_mask(mask(tree), tree)
    _check_booleans(mask)
    return lambda tree: _checked_mask(mask, tree)


def _checked_mask(mask, tree):
    """Return ``mask``; raise unless its leaves are booleans and its tree is a prefix of ``tree``'s."""
    _check_booleans(mask)
    try:
        jax.tree.map(lambda on, x: None, mask, tree)
    except ValueError:
        found, expected = (short_repr(jax.tree.structure(x)) for x in (mask, tree))
        raise ValueError(
            f"mask must have the parameters' tree structure or a prefix of it, got {found} for {expected}."
        ) from None
    return mask


def _check_booleans(mask):
    """Raise unless all leaves of ``mask`` are booleans, and not traced."""
    for path, x in jax.tree_util.tree_leaves_with_path(mask):
        concrete = not isinstance(x, jax.core.Tracer)
        if not (isinstance(x, bool) or (concrete and getattr(x, "dtype", None) == np.bool_ and not x.shape)):
            raise TypeError(
                f"mask{jax.tree_util.keystr(path)} must be True or False, got {short_repr(x)}. A mask is a tree of "
                "booleans, or a function that makes one from the parameters."
            )


def short_repr(value) -> str:
    """The ``repr`` of ``value`` in one line of at most 100 characters."""
    try:
        text = " ".join(repr(value).split())
    except RuntimeError:  # a deleted array has no repr
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def did_you_mean(value, candidates) -> str:
    """The closest of ``candidates`` as a question, or nothing if none is close."""
    close = difflib.get_close_matches(value, candidates, 1, 0.5) if isinstance(value, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""


def floating_dtype(name: str, dtype):
    """Return ``dtype`` as a floating-point dtype, or None."""
    if dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a floating dtype such as jnp.bfloat16, got {short_repr(dtype)}."
            f"{did_you_mean(dtype, ('bfloat16', 'float16', 'float32', 'float64'))}"
        ) from None
    if _is_foreign(dtype) or not _is_trainable(dtype):
        remedy = " For int8 moments: moments='int8'." * (name == "mu_dtype" and dtype == np.int8)
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16, got {dtype}.{remedy}")
    return dtype


def _first_failure(check: Callable[..., bool], tree, *others):
    """Yield ``(path, *leaves)`` of the first leaves of ``tree`` and ``others`` that fail ``check``, if any do.

    Makes the path of that leaf only: an eager step runs several checks over hundreds of leaves.
    """
    columns = [jax.tree.leaves(x) for x in (tree, *others)]
    for i, row in enumerate(zip(*columns, strict=True)):
        if not check(*row):
            yield jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(tree)[i][0]), *row
            return


def check_complex_gradients(updates, mu, params) -> None:
    """Raise if a first moment in a real dtype would drop the imaginary part of its gradient."""
    fits = lambda g, m, p: np.iscomplexobj(m) or not np.iscomplexobj(g)
    for path, _, m, p in _first_failure(fits, updates, mu, mu if params is None else params):
        if np.iscomplexobj(p):
            raise TypeError(
                f"state.mu{path} must be complex for a complex parameter, got {m.dtype}. Leave out mu_dtype, and call "
                "init on these parameters."
            )
        raise TypeError(
            f"updates{path} is a complex gradient, but {'state.mu' if params is None else 'params'}{path} is real "
            f"({dtype_of(p)}). Take the gradient's real part: jnp.real(g)."
            f"{' If the parameter is complex, leave out mu_dtype.' * (params is None)}"
        )


def is_array(leaf) -> bool:
    """Whether ``leaf`` is an array, a ShapeDtypeStruct or a number, with a dtype that JAX has."""
    if isinstance(leaf, (jax.Array, bool, int, float, complex)):
        return True
    if isinstance(leaf, (jax.Ref, np.ma.MaskedArray)):
        return False
    dtype = getattr(leaf, "dtype", None)
    return hasattr(leaf, "shape") and isinstance(dtype, np.dtype) and not _is_foreign(dtype)


@functools.cache
def _is_foreign(dtype) -> bool:
    """Whether JAX has no such dtype: objects, texts, big-endian and 80-bit numbers, bytes without a type."""
    is_bytes = dtype.type is np.void and dtype != jax.dtypes.float0
    return dtype.kind in "OSU" or dtype.char in "gG" or not dtype.isnative or is_bytes


def check_arrays(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is an array, a number or a `jax.ShapeDtypeStruct`."""
    for path, leaf in _first_failure(is_array, tree):
        dtype = leaf.dtype if isinstance(leaf, np.ndarray) else None
        if dtype == np.dtype("V2"):
            raise TypeError(
                f"{what}{path} must be an array of numbers, got dtype {dtype}, as NumPy loads bfloat16. View it: "
                "x.view(ml_dtypes.bfloat16)."
            )
        if dtype is not None and dtype.kind in "fc" and _is_foreign(dtype):
            raise TypeError(f"{what}{path} must have a dtype that JAX has, got {dtype}. Cast it: x.astype(np.float32).")
        raise TypeError(
            f"{what}{path} must be an array, got {short_repr(leaf)} of type {type(leaf).__name__}."
            f"{' Pass its value: ref[...].' if isinstance(leaf, jax.Ref) else _FILTER * (what == 'params')}"
        )


def has_constant_shape(leaf) -> bool:
    """Whether no dimension of an array is symbolic, as in `jax.export.symbolic_shape`."""
    return all(isinstance(n, int) for n in jnp.shape(leaf))


def check_constant_shapes(tree, subject: str) -> None:
    """Raise if an array has a symbolic dimension. ``subject`` begins the sentence, e.g. "record needs"."""
    for path, leaf in _first_failure(has_constant_shape, tree):
        raise ValueError(f"{subject} constant shapes, got {leaf.shape} for params{path}. Export a step for each shape.")


def _has_values(leaf) -> bool:
    """Whether ``leaf`` is traced or has values: neither deleted nor a ShapeDtypeStruct."""
    if isinstance(leaf, jax.Array):
        return isinstance(leaf, jax.core.Tracer) or not leaf.is_deleted()
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def check_values(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is a number or an array with values: neither donated nor a shape alone."""
    check_arrays(tree, what)
    for path, leaf in _first_failure(_has_values, tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{what}{path} must be an array, got a ShapeDtypeStruct, which has no values. To compute with shapes: "
                "jax.eval_shape."
            )
        raise ValueError(f"{what}{path} was donated to an earlier step; use the value that step returned.")


def _committed_devices(x):
    """The devices that an array is committed to, or None."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return x.sharding.device_set if concrete and x.committed else None


def check_same_devices(**trees) -> None:
    """Raise unless all committed arrays are on the same devices."""
    if len({frozenset(devices) for x in jax.tree.leaves(trees) if (devices := _committed_devices(x))}) < 2:
        return
    arrays = [
        (devices, f"{what}{jax.tree_util.keystr(path)}", what)
        for what, tree in trees.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if (devices := _committed_devices(x))
    ]
    first, other = arrays[0], next(x for x in arrays if x[0] != arrays[0][0])
    on_first, on_other = (short_repr(sorted(devices, key=lambda x: x.id)) for devices, *_ in (first, other))
    raise ValueError(
        f"{', '.join(trees)} must be on the same devices, got {other[1]} on {on_other} and {first[1]} on {on_first}. "
        f"Move one: jax.device_put({other[2]}, sharding)."
    )


def is_in_device_memory(x) -> bool:
    """Whether an array, traced or not, is in the memory of its devices, not in that of their host."""
    if (aval := getattr(x, "aval", None)) is None:  # of NumPy, or a number
        return True
    if isinstance(x, jax.core.Tracer):
        return getattr(aval, "memory_space", None) is not _HOST
    return x.sharding.memory_kind != "pinned_host"  # not x.aval: out_shardings move an array without a change of type


def check_in_device_memory(tree, what: str) -> None:
    """Raise if an array is in host memory, as an offloaded state is between steps. JAX does not compute there."""
    for path, _ in _first_failure(is_in_device_memory, tree):
        raise ValueError(
            f"{what}{path} must be in device memory, got memory kind 'pinned_host'. Move it, under jit "
            f"within the jitted function: jax.device_put({what}, jax.memory.Space.Device)."
        )


def is_trainable(leaf) -> bool:
    """Whether ``leaf`` is an array or a number, floating or complex, of at least 16 bits."""
    return is_array(leaf) and _is_trainable(dtype_of(leaf))


@functools.cache
def _is_trainable(dtype) -> bool:
    """Whether ``dtype`` is floating or complex with at least 16 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def dtype_of(leaf):
    """The dtype of an array or a number."""
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def check_trainable(tree, what: str) -> None:
    """Raise unless every leaf of ``tree`` is floating or complex, of at least 16 bits."""
    check_arrays(tree, what)
    for path, leaf in _first_failure(lambda leaf: _is_trainable(dtype_of(leaf)), tree):
        dtype = dtype_of(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            remedy = "Keep it in bfloat16, and cast it in the model."
            if what == "updates":  # JAX promotes no 8-bit float, and one is useless without its scale
                remedy = "Cast it, and undo its scaling if there is one: g.astype(jnp.bfloat16)."
            raise TypeError(f"{what}{path} must have at least 16 bits to be trained, got {dtype}. {remedy}")
        kind = "float0, the gradient of an integer" if dtype == jax.dtypes.float0 else dtype
        remedy = "Leave it out (eqx.is_inexact_array, nnx.Param), or freeze it: jadam.by_path with jadam.FROZEN."
        if what == "updates" and any(jnp.issubdtype(dtype, kind) for kind in (np.integer, np.bool_)):
            remedy = "Cast it: g.astype(p.dtype)."
        raise TypeError(f"{what}{path} must be floating or complex to be trained, got {kind}. {remedy}")


def check_gradients(updates, state, params, *, params_may_be_shapes: bool = False) -> None:
    """Raise unless ``updates`` are trainable arrays with the tree and shapes of ``params``, if those are given.

    The state must be in device memory.

    ``params_may_be_shapes``: whether ``params`` may be shapes without values.
    """
    for tree, what in ((params, "params"), (updates, "updates")):
        check_trainable(tree, what)
    for tree, what in ((updates, "updates"), (state, "state"), (None if params_may_be_shapes else params, "params")):
        check_values(tree, what)
    check_in_device_memory(state, "state")
    if params is not None:
        check_same_tree(params, updates, "params", "updates")


def check_state_type(state, state_type, remedy: str = "") -> None:
    """Raise unless ``state`` has the fields of ``state_type``."""
    if getattr(state, "_fields", None) != state_type._fields:
        if not remedy and hasattr(state, "mu") and "mu" in state_type._fields:
            remedy = "If only its moments are stored differently: jadam.convert_moments(state, moments)."
        raise TypeError(
            f"state must be the {state_type.__name__} that init returns, got {type(state).__name__}. "
            f"{_state_remedy(state, f'It was made by another optimizer, or with other arguments. {remedy}'.rstrip())}"
        )


def check_chain_state(state, n: int) -> None:
    """Raise unless ``state`` is a tuple of the states of ``n`` stages."""
    if hasattr(state, "inner_state"):
        raise TypeError(
            f"state must be the tuple of {n} that init returns, got {type(state).__name__}, the state of a wrapper. "
            "Pass state.inner_state."
        )
    if not (isinstance(state, tuple) and len(state) == n):
        size = f" of {len(state)}" if isinstance(state, (tuple, dict, list)) else ""
        raise TypeError(
            f"state must be the tuple of {n} that init returns, got {type(state).__name__}{size}. "
            f"{_state_remedy(state, 'It was made by another optimizer, or state and params are swapped.')}"
        )


def _state_remedy(state, remedy: str) -> str:
    """The remedy for a state that is None or was restored as a list or dict, else ``remedy``."""
    if not isinstance(state, (list, dict)):
        return "Make it with tx.init(params)." if state is None else remedy
    # jax.tree.leaves sorts a dict by its keys, but the fields of a NamedTuple may be in another order.
    has_fields = any(f"'{x}'" in str(jax.tree.structure(state)) for x in ("count", "corrections", "remainder"))
    how = "restore it into the template tx.init(params)" if has_fields else _REBUILD
    restored = "If the state was restored as a list or dict (JSON, msgpack, Orbax)"
    return f"Argument order: state, then params. {restored}: {how}."


def check_schedule_state(state, what: str, name: str) -> None:
    """Raise unless the state of a stage with a schedule for the argument ``name`` has a step count."""
    if "count" not in getattr(state, "_fields", ()):
        raise ValueError(
            f"{what} must have the step count of a schedule, got {type(state).__name__}: it was made with a constant "
            f"{name}. Replace this part by that of tx.init(params), and keep the others."
        )


def check_corrections(corrections, names) -> None:
    """Raise unless the state has the bias corrections of the decay rates ``names``, which follow schedules."""
    if sorted(corrections) != sorted(names):
        raise ValueError(
            f"state.corrections must have {', '.join(sorted(names))}, got {', '.join(sorted(corrections))}: it was "
            "made with schedules for other decay rates. Make the state anew with tx.init(params)."
        )


def check_version(state, known: int, convertible: int | None = None) -> None:
    """Raise unless the layout of a state's arrays is that of version ``known``.

    Args:
        convertible: an older version that `jadam.convert_moments` reads; its error says so.
    """
    shape = np.shape(state.version)
    if len(shape) > 1:
        raise ValueError(f"state.version must have one dimension, got shape {shape}. Use jax.vmap for several states.")
    is_concrete = lambda x: isinstance(x, (np.ndarray, jax.Array)) and not isinstance(x, jax.core.Tracer)
    values = filter(is_concrete, jax.tree.leaves(state.version))
    if shape == (known,) and any(np.any(np.asarray(x) != known - 1) for x in values):
        raise ValueError(
            f"state.version must be {known}, got an older version that was padded to its length. Restore it without "
            "padding, into a template with the version that was saved, and convert it: jadam.convert_moments."
        )
    if shape != (known,):
        found = shape[0] if shape else state.version
        saved = "float32_params(params, state)" if hasattr(state, "remainder") else "convert_moments(state, 'float32')"
        remedy = f"Restore it with that version, and save jadam.{saved}."
        if shape == (convertible,):
            remedy = "Convert it: jadam.convert_moments(state, moments), with the optimizer's argument moments."
        raise ValueError(
            f"state.version must be {known}, got {found}: a {type(state).__name__} saved by another version of jadam. "
            f"{remedy}"
        )


def check_count(count) -> None:
    """Raise unless a state's ``count`` is an integer scalar array."""
    kind = getattr(count, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jnp.integer):
        got = f"{type(count).__name__}. Convert it: jnp.int32(state.count)." if kind is None else f"{kind}. {_CAST}"
        raise TypeError(f"state.count must be int32, got {got}")
    if count.shape:
        raise ValueError(f"state.count must be a scalar, got shape {count.shape}. Use jax.vmap for several states.")


def check_codes_not_cast(path, dtype, has_scales: bool) -> None:
    """Raise if a leaf that is not int8 has scales: its codes were cast to another dtype."""
    if has_scales:
        raise TypeError(
            f"state.mu{jax.tree_util.keystr(path)} must be int8 because it has scales, got {dtype}. {_CAST}"
        )


def check_moments_bfloat16(tree, name: str, mu) -> None:
    """Raise if a real moment is float32 although ``moments="bfloat16"``: it would keep its 4 bytes."""
    for path, *_ in _first_failure(lambda x, m: x.dtype != np.float32 or np.iscomplexobj(m), tree, mu):
        raise TypeError(
            f"state.{name}{path} must be bfloat16 with moments='bfloat16', got float32. If the state was made with "
            "other moments: jadam.convert_moments(state, 'bfloat16')."
        )


@functools.cache
def _is_wide(dtype) -> bool:
    """Whether ``dtype`` is floating or complex with at least 32 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32


def check_moments_wide(tree, name: str) -> None:
    """Raise if a moment is narrower than float32, where the second one silently stops changing."""
    for path, leaf in _first_failure(lambda x: _is_wide(x.dtype), tree):
        raise TypeError(
            f"state.{name}{path} must be float32 or wider, got {leaf.dtype}. Rounded to nearest, 16-bit moments stop "
            "changing at b2 = 0.999. Widen them once: jadam.convert_moments(state, 'float32'). To keep 16 bits: "
            "jadam.convert_moments(state, 'bfloat16') and moments='bfloat16'; or mu_dtype, if it was given before."
        )


def check_dtypes_kept(tree, leaves, what: str = "moments") -> None:
    """Raise if a class in ``tree`` widens moments of 8 or 16 bits, or narrows float32."""
    kept = lambda x, y: x.dtype == y.dtype or (_is_wide(x.dtype) and _is_wide(y.dtype)) or y.size <= 1
    for path, x, given in _first_failure(kept, tree, leaves):
        raise TypeError(
            f"params{path} is in a pytree class that must keep {given.dtype} {what}, got {x.dtype} back from it. Let "
            "its __post_init__ or unflatten keep dtypes"
            + ("." if _is_wide(given.dtype) else ", or use moments='float32' for it.")
        )


def check_same_tree(tree, reference, what: str, than: str, hint: str = "") -> None:
    """Raise unless ``tree`` has the structure and shapes of ``reference``, naming the first path that differs."""
    check_same_structure(tree, reference, what, than, hint)
    for path, leaf, other in _first_failure(lambda x, y: np.shape(x) == np.shape(y), tree, reference):
        raise ValueError(f"{what}{path} has shape {np.shape(leaf)}, {than} has {np.shape(other)}. {_SAME_TREE}{hint}")


def check_one_for_each(updates, tree, what: str) -> None:
    """Raise unless ``tree`` has an array for each one of ``updates``. Its structure may differ by Flax's boxes."""
    expected, found = len(jax.tree.leaves(updates)), len(jax.tree.leaves(tree))
    if expected and found != expected:
        raise ValueError(f"{what} must have an array for each of {expected} parameters, got {found}. {_SAME_TREE}")


def check_same_structure(tree, reference, what: str, than: str, hint: str = "") -> None:
    """Raise unless ``tree`` has the structure of ``reference``, naming the first path that differs."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        paths, expected = (
            [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]
            for x in (tree, reference)
        )
        missing = [f"{than}{x} is missing or None, {what} has it" for x in paths if x not in set(expected)]
        missing += [f"{what}{x} is missing or None, {than} has it" for x in expected if x not in set(paths)]
        if tree is None or reference is None:
            difference = f"{what if tree is None else than} is None"
        elif missing:
            difference = missing[0]
        else:
            difference = f"{what} is {short_repr(jax.tree.structure(tree))}, {than} is "
            difference += short_repr(jax.tree.structure(reference))
            if "OptVariable" in f"{jax.tree.structure(tree)} {jax.tree.structure(reference)}":
                hint += " The state of an nnx.Optimizer: call optimizer.update(model, grads)."
        raise ValueError(f"{difference}. {_SAME_TREE}{hint}")


_CAST = (
    "Do not cast the whole state. Go back to the state before the cast, and widen its moments: "
    "jadam.convert_moments(state, 'float32')."
)
_REBUILD = "jax.tree.unflatten(jax.tree.structure(tx.init(params)), jax.tree.leaves(state))"
_FILTER = " Pass arrays only: eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)."
_SAME_TREE = "Gradients, parameters and the tree given to init must match."
