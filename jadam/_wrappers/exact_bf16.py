"""bfloat16 weights that train as float32: a 16-bit remainder beside each holds the rest of its float32 master.

A float32 number is its bfloat16 neighbour and the distance to it, counted in float32's own steps; ties go away from
zero, so that the count fits int16. 2 bytes per parameter instead of a master's 4, and the same bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.bf16 import distance, join, remainder_of, split
from jadam._core.numerics import apply_updates, at_least_float32
from jadam._core.trees import find_states, leaf_name, params_with_gradients
from jadam._moments.formats import VERSION, placeholder, version
from jadam._transformation.transformation import (
    FunctionUpdate,
    FusedUpdate,
    NotFusible,
    Transformation,
    Update,
    update_of,
)


class ExactBF16State(NamedTuple):
    """int16 remainders shaped like the parameters (one byte where one is not bfloat16), and the inner state.

    The length of ``version`` tells how remainders are laid out.
    """

    remainder: Any
    inner_state: Any
    version: jax.Array


class ExactUpdate(FunctionUpdate):
    """``update`` of `exact_bf16`: carries out the inner plan, or calls the inner ``update`` where there is no plan."""

    def __call__(self, updates, state, params=None, **extra_args) -> Any:
        """Optax's ``update``."""
        try:
            return Update.__call__(self, updates, state, params)
        except NotFusible:
            return self.function(updates, state, params, **extra_args)


class ExactBF16(Transformation):
    """What `exact_bf16` returns."""


def exact_bf16(tx: optax.GradientTransformation) -> ExactBF16:
    r"""Let ``tx`` train float32 masters of which the bfloat16 parameters are the rounded form.

    A step joins parameters and remainders to masters, runs ``tx`` on them with gradients in float32, and splits the
    result. `optax.apply_updates` then lands on the masters rounded to bfloat16. The masters are those of float32
    training on the same gradients, bit for bit. Where no update can lead `optax.apply_updates` there (from
    -3e38 to 3e38, or within bfloat16's subnormal numbers, below 1.2e-38) the master becomes what it does lead to.

    It is the outermost wrapper: a stage behind it would change the parameters without the masters' knowing. So
    ``exact_bf16(optax.chain(...))``, ``exact_bf16(optax.MultiSteps(tx, k))``, whose sums are then float32 too, and
    ``exact_bf16(optax.apply_if_finite(tx, n))``. Not ``optax.MultiSteps(exact_bf16(tx), k)``, which sums in bfloat16,
    and not ``optax.chain(exact_bf16(jadam.scale_by_adam()), optax.scale(-1e-3))``: the masters would take the step
    without the scale. In `jadam.chain` that is an error; `optax.chain` cannot be looked into.

    Apply the updates with `optax.apply_updates`. ``eqx.apply_updates`` and a bare ``p + u`` leave float32 parameters,
    exactly the rounded masters: cast them back, ``jax.tree.map(lambda p, q: q.astype(p.dtype), params, new)``, or the
    next ``update`` raises.

    Args:
        tx: any Optax transformation, chains and wrappers included.

    Returns:
        A transformation whose ``update`` needs ``params``. State: `ExactBF16State`, 2 bytes per bfloat16 parameter
        beside the state that ``tx`` has for float32 ones. Other parameters pass through to ``tx``.

    Raises:
        ValueError: an ``update`` without ``params``, or with trees that do not match.
        TypeError: parameters of other dtypes than at ``init``, or ``tx`` no transformation.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> tx = jadam.exact_bf16(jadam.adam(1e-4))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(10):  # each step is a fortieth of bfloat16's spacing at 1
        ...     updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params[0], f"{jadam.float32_params(params, state)[0]:.4f}")
        1 0.9990
    """
    checks.transformation("exact_bf16 needs", tx)
    if update_of(tx).after_step is not None:
        raise ValueError(
            "exact_bf16 must not be around record, whose records would be of other weights: record(exact_bf16(tx))."
        )
    inner = optax.with_extra_args_support(optax.GradientTransformation(tx.init, tx.update))
    needs_gradient_values = update_of(tx).needs_gradient_values

    def init(params) -> Any:
        checks.trainable(params, "params")
        inner_state = inner.init(jax.tree.map(_widened, params, params))
        if find_states(inner_state, ExactBF16State):
            raise ValueError("exact_bf16 must be outermost, got it around another exact_bf16. Drop the inner one.")
        return ExactBF16State(jax.tree.map(_no_remainder, params), inner_state, version())

    def update(updates, state, params, **extra_args) -> Any:
        checks.state_of(state, ExactBF16State)
        checks.version(state, VERSION)
        params, _ = params_with_gradients(params, updates)
        checks.gradients(updates, state, params)
        masters = _masters(params, state.remainder)
        wide = jax.tree.map(_widened, updates, params)
        updates, inner_state = inner.update(wide, state.inner_state, masters, **extra_args)
        update_master = apply_updates(masters, updates)
        updates = jax.tree.map(lambda p, x, u: distance(p, x) if _is_bf16(p) else u, params, update_master, updates)
        remainder = jax.tree.map(
            lambda p, x, u, r: remainder_of(p, x, u) if _is_bf16(p) else r,
            params,
            update_master,
            updates,
            state.remainder,
        )
        return updates, state._replace(remainder=remainder, inner_state=inner_state)

    def fuse(updates, state, params):
        if params is None:
            raise ValueError("exact_bf16 needs params: call update(updates, state, params).")
        if not isinstance(tx, Transformation):
            raise NotFusible("jadam.exact_bf16 is around none of jadam's optimizers nor jadam.chain")
        checks.state_of(state, ExactBF16State)
        checks.version(state, VERSION)
        checks.gradients(updates, state, params, planning=True)
        _check_remainder(params, state.remainder)
        # A plan looks at shapes and dtypes, mostly. Masters and wide gradients are made leaf by leaf, in the one pass.
        masters = jax.tree.map(lambda p: _no_values(p) if _is_bf16(p) else p, params)
        wide_gradient = _widened if needs_gradient_values else lambda g, p: _no_values(g) if _is_bf16(p) else g
        leaf_updates, rebuild_state = tx.update.fuse(
            jax.tree.map(wide_gradient, updates, params), state.inner_state, masters
        )
        old, structure = jax.tree.flatten(state.remainder)
        has = [_is_bf16(p) for p in jax.tree.leaves(params)]
        leaf_updates = [x._replace(remainder=r) if y else x for x, r, y in zip(leaf_updates, old, has, strict=True)]

        def whole(stored):
            remainders = [x[0] if y else r for x, r, y in zip(stored, old, has, strict=True)]
            moments = [x[1:] if y else x for x, y in zip(stored, has, strict=True)]
            return state._replace(remainder=structure.unflatten(remainders), inner_state=rebuild_state(moments))

        return FusedUpdate(leaf_updates, whole)

    return ExactBF16(
        init, ExactUpdate(fuse, f"jadam.exact_bf16({tx!r})", inner, needs_gradient_values, function=update)
    )


def float32_params(params, state):
    """The float32 masters, for evaluation or a checkpoint.

    Args:
        params: the parameters after `optax.apply_updates`.
        state: the state of `exact_bf16`, or one that has it inside, once.

    Returns:
        A tree like ``params``, float32 where they are bfloat16, itself elsewhere.

    Raises:
        ValueError: no `ExactBF16State` in ``state``, or several, or of another tree; or donated arrays.
        TypeError: parameters of other dtypes than at ``init``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params, state = jadam.from_float32(jnp.array([0.1]), jadam.exact_bf16(jadam.adam(1e-3)))
        >>> print(params.dtype, jadam.float32_params(params, state))
        bfloat16 [0.1]
    """
    found = find_states(state, ExactBF16State)
    if len(found) != 1:
        raise ValueError(
            f"state must hold one ExactBF16State, found {len(found)}. Train with jadam.exact_bf16(...), and call "
            "float32_params(params, state); with Flax NNX, state is optimizer.opt_state."
        )
    checks.version(found[0], VERSION)
    checks.trainable(params, "params")
    for tree, what in ((params, "params"), (state, "state")):
        checks.values(tree, what)
    remainder = found[0].remainder
    named, other = (
        {leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (params, remainder)
    )
    if named.keys() == other.keys():  # the same tree, be it of other Flax variables
        remainder = jax.tree.unflatten(jax.tree.structure(params), [other[name] for name in named])
    return _masters(params, remainder)


def from_float32(params32, tx: Transformation, keep: Callable[[str, Any], bool] | None = None):
    """bfloat16 parameters and a state that hold float32 ones without loss.

    Args:
        params32: parameters; those that are float32 become bfloat16, others stay what they are.
        tx: what `exact_bf16` returned, or `jadam.record` around it.
        keep: ``keep(path, leaf)`` is True for those that stay float32, ``path`` being a string such as
            ``"['norm']['scale']"``. Default: none.

    Returns:
        ``(params, state)``, with ``float32_params(params, state)`` equal to ``params32``. Should one of them be NaN, it
        becomes the canonical one.

    Raises:
        TypeError: ``tx`` is not from `exact_bf16`, or a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.exact_bf16(jadam.adam(1e-3))
        >>> params, state = jadam.from_float32({"w": jnp.ones(2), "b": jnp.ones(1)}, tx, lambda path, _: "b" in path)
        >>> print(params["w"].dtype, params["b"].dtype)
        bfloat16 float32
    """
    recorded = isinstance(tx, Transformation) and tx.update.after_step is not None  # by jadam.record
    exact = tx.update.inner if recorded else tx
    if not isinstance(exact, ExactBF16):
        got = checks.shown(tx)
        raise TypeError(f"from_float32 needs what jadam.exact_bf16 returned, got {got}. Wrap it: exact_bf16(tx).")
    checks.trainable(params32, "params32")
    checks.values(params32, "params32")
    if not (keep is None or callable(keep)):
        raise TypeError(f"keep must be a function f(path, leaf) to True or False, got {checks.shown(keep)}.")

    def narrow(path, x):
        if jnp.result_type(x) != jnp.float32 or (keep is not None and keep(leaf_name(path), x)):
            return x
        return split(x)[0]

    params = jax.tree_util.tree_map_with_path(narrow, params32)
    remainder = jax.tree.map(lambda p, x: _no_remainder(p) if p is x else split(x)[1], params, params32)
    state = ExactBF16State(remainder, exact.update.inner.init(_masters(params, remainder)), version())
    outer: Any = tx.init(params) if exact is not tx else None
    return params, state if outer is None else outer._replace(inner_state=state)


def _masters(params, remainder):
    _check_remainder(params, remainder)
    return jax.tree.map(lambda p, r: join(p, r) if _is_bf16(p) else p, params, remainder)


def _check_remainder(params, remainder) -> None:
    """Raise unless the parameters are in the dtypes that they had at `init`."""
    checks.same_structure(params, remainder, "params", "state.remainder")
    leaves, remainders = jax.tree.leaves(params), jax.tree.leaves(remainder)
    for i, (p, r) in enumerate(zip(leaves, remainders, strict=True)):
        was_bf16 = r.dtype == jnp.int16
        if _is_bf16(p) != was_bf16 or (was_bf16 and np.shape(p) != r.shape):
            was = f"bfloat16 of shape {r.shape}" if was_bf16 else "of another dtype than bfloat16"
            path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(params)[i][0])
            raise TypeError(
                f"params{path} was {was} at init, got {jnp.result_type(p)} of shape {np.shape(p)}. Apply updates with "
                "optax.apply_updates; eqx.apply_updates and p + u leave float32 parameters to be cast back."
            )


def _no_remainder(p):
    """Zeros for bfloat16."""
    return jnp.zeros_like(p, dtype=jnp.int16) if _is_bf16(p) else placeholder(p)


def _no_values(x):
    """Zeros in float32, of the shape of ``x`` but in no memory."""
    return np.broadcast_to(np.zeros([], at_least_float32(x)), jnp.shape(x))


def _widened(x, p):
    """``x``, of a bfloat16 parameter ``p`` or that itself, in float32 at least."""
    return x.astype(at_least_float32(x)) if _is_bf16(p) else x


def _is_bf16(p) -> bool:
    return jnp.result_type(p) == jnp.bfloat16
