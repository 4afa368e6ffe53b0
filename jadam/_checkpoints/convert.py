"""From one format of the moments to another, for a state that was made or saved otherwise than it is now wanted."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._core.numerics import at_least_float32
from jadam._moments import formats
from jadam._moments.formats import Moments
from jadam._transformation.transformation import QuantizedAdamState
from jadam._wrappers.by_path import ByPathState


def convert_moments(state, to: Moments) -> Any:
    """Store a state's moments in another format, as the same optimizer with ``moments=to`` expects them.

    Also what a state of `optax.adam` needs once if its moments are 16-bit, as Optax keeps those of 16-bit parameters:
    ``convert_moments(state, "float32")``. Narrowing rounds as a step would, without bias; widening is exact.

    Args:
        state: the state of jadam's or Optax's transformation of the Adam family, or one that has such states within:
            chains, `jadam.exact_bf16`, `optax.MultiSteps`. With shardings, call it outside of `jax.jit`.
        to: ``"float32"``, ``"bfloat16"``, ``"int8"``, or a function ``f(path, leaf)`` to these, as for
            `jadam.scale_by_adam`; ``leaf`` has the parameter's shape. A ``mu_dtype`` is not kept. int8 is for Adam and
            NAdam; other members of the family that share their state's type would refuse it at the next step.

    Returns:
        The state; what is not of the Adam family unchanged.

    Raises:
        ValueError: a format that does not exist or that a state cannot have, a ``state.version`` that is not known, or
            nothing to convert in ``state``.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> params = {"w": jnp.ones((64, 128))}
        >>> state = optax.adam(1e-3).init(params)  # as restored from a checkpoint
        >>> state = jadam.convert_moments(state, "int8")
        >>> params, state = jadam.step(jadam.adam(1e-3, moments="int8"), params, state, params)
        >>> print(state[0].mu["w"].dtype)
        int8
    """
    checks.check_values(state, "state")
    found = []

    def one(x):
        if isinstance(x, ByPathState):  # whose moments are of the type that can be mixed, whatever they are
            return x._replace(moments=convert(x.moments, mixed=True))
        return convert(x) if has_moments(x) else x

    def convert(x, mixed=False):
        found.append(x)
        return _converted(x, to, mixed)

    state = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, ByPathState) or has_moments(x))
    if not found:
        raise ValueError(f"state must hold the moments of an Adam (count, mu, nu), got {type(state).__name__}.")
    return state


def has_moments(x) -> bool:
    """Whether ``x`` is the state of an Adam, jadam's or Optax's."""
    return {"count", "mu", "nu"} <= set(getattr(x, "_fields", ()))


def _converted(state, to: Moments, mixed: bool):
    if hasattr(state, "version"):
        checks.check_version(state, formats.VERSION)
    names = [name for name in state._fields if name not in ("count", "version") and not name.endswith("_scale")]
    scales = [name for name in state._fields if name.endswith("_scale")]
    unknown = {"b1": None, "b2": None}
    choose = formats.format_selector(to, None, unknown if names == ["mu", "nu"] else None)
    mixed = mixed or ((to == "int8" or callable(to)) and names == ["mu", "nu"])
    arrays = 2 * len(names) if mixed else len(names)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state.mu)

    def leaf(path, *stored):
        old = formats.format_of(stored)
        own = stored[: old.num_arrays(len(names))]
        moments = old.decode(own, at_least_float32(*own) if old.name == "float32" else jnp.float32)
        new = choose(path, own[0])
        random = formats.random_bits(own[0].shape, formats.leaf_salt(path), state.count)
        empty = new.init(own[0] if old.name != "float32" else moments[0], len(names))
        converted = new.encode(moments, empty, random)
        return *converted, *(formats.placeholder(own[0]) for _ in range(arrays - len(converted)))

    trees = [structure.flatten_up_to(getattr(state, name)) for name in names + scales]
    rows = [leaf(path, *x) for (path, _), *x in zip(leaves, *trees, strict=True)]
    columns = [structure.unflatten(column) for column in zip(*rows, strict=True)] if rows else [state.mu] * 4
    if mixed:
        mu, nu, mu_scale, nu_scale = columns
        return QuantizedAdamState(state.count, mu, nu, mu_scale, nu_scale, formats.version())
    kind = optax.ScaleByAdamState if isinstance(state, QuantizedAdamState) else type(state)
    return kind(state.count, *columns[: len(names)])
