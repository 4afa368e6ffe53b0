"""Average of the parameters over the steps (Kingma & Ba 2015, section 7.2; Polyak & Juditsky 1992)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._core.numerics import Beta, apply_rounded, at_least_float32, ema, one_minus, one_minus_power
from jadam._core.trees import beside_params, find_states, params_with_gradients, state_tree
from jadam._moments.formats import placeholder


class AverageParamsState(NamedTuple):
    """State of `average_params`: the number of steps, the average so far, and the parameters' dtypes.

    ``average`` is in float32 at least. Each leaf of ``dtypes`` is an array of one element, in the parameter's dtype.
    """

    count: jax.Array  # tuples have a method of this name  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Any
    dtypes: Any


def average_params(decay: float | jax.Array | None = 0.999) -> optax.GradientTransformationExtraArgs:
    r"""Keep an average of the parameters. Put it last in a chain, because it needs the final update.

    Kingma & Ba 2015, section 7.2. With ``decay`` :math:`b` it is the bias-corrected exponential average,

    .. math::

        \bar\theta_t = \frac{1 - b}{1 - b^t} \sum_{i=1}^t b^{t-i} \theta_i,

    and with ``decay=None`` the uniform (Polyak-Ruppert) average, :math:`\frac1t \sum_{i=1}^t \theta_i`. Before the
    first step, the average is the parameters themselves. Updates are returned unchanged.

    Args:
        decay: :math:`b` in [0, 1), a number or a scalar array of at least float32; or None.

    Returns:
        A transformation with state `AverageParamsState`; ``update`` needs ``params``. ``count`` is int32. ``average``
        is shaped like the parameters, in their dtype widened to float32: 4 bytes per parameter. Read the average with
        `averaged_params`.

    Raises:
        ValueError: ``decay`` is out of range, or ``update`` is called without ``params``.
        TypeError: ``decay`` is not a number, or a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> tx = optax.chain(optax.sgd(1.0), jadam.average_params(decay=None))
        >>> w = jnp.array(0.0)
        >>> state = tx.init(w)
        >>> for _ in range(3):  # w is 1, 2, 3
        ...     updates, state = tx.update(jnp.array(-1.0), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> print(jadam.averaged_params(state))
        2.0
    """
    if decay is not None:
        decay = checks.hyperparameter("decay", decay, "in [0, 1)", schedule=False, wide=True)

    def init(params) -> Any:
        checks.check_trainable(params, "params")
        checks.check_values(params, "params")
        wide = lambda p: jnp.array(p, dtype=at_least_float32(p), copy=True)  # params and state may both be donated
        dtype_of = lambda p: placeholder(p, jnp.result_type(p))
        average = jax.tree.map(wide, params)
        checks.check_dtypes_kept(average, list(map(wide, jax.tree.leaves(params))), "averages")
        dtypes = beside_params(jax.tree.map(dtype_of, params))
        return AverageParamsState(jnp.zeros([], jnp.int32), average, dtypes)

    def update(updates, state, params=None, **extra_args) -> Any:
        if params is None:
            raise ValueError("average_params needs params: call update(updates, state, params).")
        checks.check_state_type(state, AverageParamsState)
        params, _ = params_with_gradients(params, updates)
        checks.check_gradients(updates, state, params)
        checks.check_same_tree(params, state.average, "params", "state.average")
        count = jnp.asarray(optax.safe_increment(state.count))

        def updated(average, p, u):
            """Return the new average of one parameter."""
            dtype, p, u = jnp.finfo(average.dtype).dtype, jnp.asarray(p), jnp.asarray(u)
            t = count.astype(dtype)
            one_minus_decay = lambda: one_minus(checks.nan_if_out_of_range(decay, "in [0, 1)"), dtype)
            weight = 1 / t if decay is None else one_minus_decay() / one_minus_power(decay, t, dtype)
            beta = Beta(1 - weight, weight, t, t, t)  # ema reads b and one_minus_b only
            return ema(beta, average, apply_rounded(p, u, p.dtype).astype(average.dtype))

        averages = jax.tree.map(updated, state.average, params, updates)
        return updates, AverageParamsState(count, averages, state.dtypes)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(state: optax.OptState) -> optax.Params:
    """Return the average that `average_params` keeps, found anywhere in ``state``.

    Args:
        state: the state of a transformation that contains one `average_params`.

    Returns:
        A copy of the average, a tree like the parameters, in their dtypes. It outlives a donation of ``state``.

    Raises:
        ValueError: ``state`` contains no average, or several.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> tx = optax.chain(jadam.adam(1e-3), jadam.average_params(0.99))
        >>> print(jadam.averaged_params(tx.init(jnp.ones(2, jnp.bfloat16))))
        [1 1]
    """
    found = find_states(state_tree(state), AverageParamsState)
    if len(found) != 1:
        raise ValueError(
            f"state must contain one AverageParamsState, found {len(found)}. "
            + ("Pass a part of state that has one." if found else "Train with optax.chain(tx, jadam.average_params()).")
        )
    checks.check_values(found[0], "state")
    copied = lambda average, like: jnp.array(average, like.dtype, copy=True)  # or a donated state would free it
    averages, structure = jax.tree.flatten(found[0].average)
    return structure.unflatten(list(map(copied, averages, jax.tree.leaves(found[0].dtypes))))
