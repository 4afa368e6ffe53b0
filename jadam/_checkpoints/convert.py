"""Conversion of a state's moments from one format to another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.numerics import at_least_float32
from jadam._core.trees import leaf_name, without_metadata
from jadam._moments import formats
from jadam._moments.formats import FormatChoice
from jadam._moments.int8 import Int8Version1
from jadam._transformation.transformation import QuantizedAdamState


def convert_moments(state, to: FormatChoice) -> Any:
    """Convert a state's moments to another format, as the same optimizer with ``moments=to`` expects them.

    A restored state of `optax.adam` with 16-bit parameters has 16-bit moments. Convert it once:
    ``convert_moments(state, "float32")``. Narrowing rounds stochastically, without bias, as a step does; widening is
    exact. States of version 1, the first layout of int8 moments, are converted too, from int8 to int8 with a rounding.
    Orbax restores them into a template whose ``version`` has one element: see "Checkpoints" in the documentation.

    Args:
        state: a state of jadam's or Optax's Adam family, or one that contains such states: chains, `jadam.exact_bf16`,
            `optax.MultiSteps`. If it is sharded, call this outside of `jax.jit`, when it is on its mesh.
        to: ``"float32"``, ``"bfloat16"``, ``"int8"``, or a function ``f(path, leaf)`` to one of these, as for
            `jadam.scale_by_adam`; ``leaf`` has the parameter's shape. A ``mu_dtype`` is not kept. int8 is only for Adam
            and NAdam. Other optimizers with the same state type raise an error at the next step.

    Returns:
        The converted state. Parts that do not belong to an Adam are unchanged.

    Raises:
        ValueError: the format does not exist or is not supported for this state, ``state.version`` is unknown, or
            ``state`` has no moments.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> params = {"w": jnp.ones((64, 128))}
        >>> state = optax.adam(1e-3).init(params)  # as restored from a checkpoint
        >>> state = jadam.convert_moments(state, "int8")
        >>> params, state = jadam.step(jadam.adam(1e-3, moments="int8"), params, state, params)
        >>> print(state[0].mu["w"].dtype)
        int8
    """
    checks.check_not_transformation(state)
    checks.check_values(state, "state")
    checks.check_in_device_memory(state, "state")
    to = formats.by_name_or_function(to)
    found = []

    def convert_part(x):
        """Convert ``x`` if it is an Adam state, else return it unchanged."""
        if not has_moments(x):
            return x
        found.append(x)
        return _convert(x, to)

    state = jax.tree.map(convert_part, state, is_leaf=has_moments)
    if not found:
        raise ValueError(
            f"state must have the moments of an Adam (count, mu, nu), got {type(state).__name__}. Pass the state that "
            "init returns, or a checkpoint restored into it."
        )
    return state


def has_moments(x) -> bool:
    """Whether ``x`` is a state of the Adam family, jadam's or Optax's."""
    return {"count", "mu", "nu"} <= set(getattr(x, "_fields", ()))


def _convert(state, to: FormatChoice):
    """Return one optimizer state with its moments in the formats ``to``."""
    is_version_1 = hasattr(state, "version") and np.shape(state.version) == (1,)
    if hasattr(state, "version") and not is_version_1:
        checks.check_version(state, formats.VERSION)
    names = [name for name in state._fields if name not in ("count", "version") and not name.endswith("_scale")]
    scales = [name for name in state._fields if name.endswith("_scale")]
    unknown_betas = {"b1": None, "b2": None}
    select = formats.format_selector(to, None, unknown_betas if names == ["mu", "nu"] else None)
    mixed = (to == "int8" or callable(to)) and names == ["mu", "nu"]
    num_arrays = 2 * len(names) if mixed else len(names)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state.mu)

    def convert_leaf(path, *stored):
        """Return one leaf's arrays in the new format, with placeholders for the fields that it does not use."""
        old = formats.format_of(stored)
        if is_version_1 and old.name == "int8":
            old = Int8Version1()
        stored, unused = stored[: (n := old.num_arrays(len(names)))], stored[n:]
        checks.check_codes_not_cast(path, stored[0].dtype, not all(map(formats.is_placeholder, unused)))
        moments = old.decode(stored, at_least_float32(*stored) if old.name == "float32" else jnp.float32)
        new = select(path, stored[0])
        random = formats.random_bits(stored[0].shape, formats.leaf_salt(leaf_name(path)), state.count)
        empty = new.init(stored[0] if old.name != "float32" else moments[0], len(names))
        converted = new.encode(moments, empty, random)
        return *converted, *(formats.placeholder(stored[0]) for _ in range(num_arrays - len(converted)))

    trees = [jax.tree.leaves(getattr(state, name)) for name in names + scales]
    rows = [convert_leaf(path, *x) for (path, _), *x in zip(leaves, *trees, strict=True)]
    columns = [structure.unflatten(column) for column in zip(*rows, strict=True)] if rows else [state.mu] * 4
    if mixed:
        mu, nu, mu_scale, nu_scale = columns
        boxed = lambda x: jax.tree.map(lambda _: x, state.count)  # in a Variable as the count is, if in NNX
        mu_scale, nu_scale = (jax.tree.map(boxed, without_metadata(x)) for x in (mu_scale, nu_scale))
        return QuantizedAdamState(state.count, mu, nu, mu_scale, nu_scale, boxed(formats.version()))
    state_type = optax.ScaleByAdamState if isinstance(state, QuantizedAdamState) else type(state)
    return state_type(state.count, *columns[: len(names)])
