"""Training of bfloat16 parameters with float32 precision: each has a 16-bit remainder, the rest of a float32 master.

A float32 number is stored as the nearest bfloat16 number and the signed distance to it, in units of float32's spacing.
Ties round away from zero, so that the distance fits int16. This takes 2 bytes per parameter instead of 4 for a float32
master, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.bf16 import join, remainder_of, split, update_to
from jadam._core.numerics import apply_updates, at_least_float32
from jadam._core.trees import (
    find_states,
    leaf_name,
    leaf_names,
    params_tree,
    params_with_gradients,
    state_tree,
    without_metadata,
)
from jadam._moments.formats import placeholder, version
from jadam._transformation.transformation import (
    CustomUpdateFn,
    LeafwiseUpdate,
    NotFusible,
    Transformation,
    UpdateFn,
    update_of,
)

VERSION = 1  # of the layout of remainders in a saved state


class ExactBF16State(NamedTuple):
    """State of `exact_bf16`: remainders, the inner state, and a version.

    A remainder is int16 and shaped like the parameter; for parameters of other dtypes than bfloat16, it is a
    placeholder of one byte, without Flax's metadata. `optax.tree.map_params` does not know which are placeholders, so a
    function that it maps should look at the shape. The length of ``version`` is the version number of this layout.
    """

    remainder: Any
    inner_state: Any
    version: jax.Array


class ExactBF16UpdateFn(CustomUpdateFn):
    """`UpdateFn` of `exact_bf16`: fuses the update if the inner optimizer can be fused, else calls ``function``."""

    def compute(self, updates, state, params=None, **extra_args) -> Any:
        """Return ``(updates, new_state)``."""
        try:
            return UpdateFn.compute(self, updates, state, params)
        except NotFusible:
            return self.function(updates, state, params, **extra_args)


class ExactBF16(Transformation):
    """The transformation that `exact_bf16` returns."""


def exact_bf16(tx: optax.GradientTransformation) -> ExactBF16:
    r"""Train float32 masters with ``tx``; the bfloat16 parameters are the masters, rounded.

    A step joins parameters and remainders to masters, runs ``tx`` on them with float32 gradients, and splits the
    result. `optax.apply_updates` then gives the masters rounded to bfloat16. The masters are equal, bit for bit, to
    those of float32 training on the same gradients, with two exceptions: a step so long that the update overflows, as
    from -3e38 to 3e38, and a step between subnormal numbers, below 1.2e-38. In these two cases `optax.apply_updates`
    cannot give the rounded master, so the master is set to the parameter that it gives. With XLA's
    compiler option ``xla_backend_optimization_level=0``, ``update`` on a CPU may be off by a bfloat16 spacing, because
    XLA then computes a master twice, rounded differently; `jadam.step` is not affected.

    It must be the outermost wrapper, because a stage after it would change the parameters but not the masters.
    Correct: ``exact_bf16(optax.chain(...))``, ``exact_bf16(optax.apply_if_finite(tx, n))``, and
    ``exact_bf16(optax.MultiSteps(tx, k))``, which accumulates gradients in float32. Wrong:
    ``optax.MultiSteps(exact_bf16(tx), k)``, which rounds updates to bfloat16, and
    ``optax.chain(exact_bf16(jadam.scale_by_adam()), optax.scale(-1e-3))``, where the masters take the step without the
    scale. `jadam.chain` raises an error for this; `optax.chain` cannot detect it.

    Apply the updates with `optax.apply_updates`. ``eqx.apply_updates`` and ``p + u`` give float32 parameters, equal to
    the rounded masters. Cast them back, or the next ``update`` raises:
    ``jax.tree.map(lambda p, q: q.astype(p.dtype), params, new)``.

    Args:
        tx: any Optax transformation, chains and wrappers included.

    Returns:
        A transformation with state `ExactBF16State`; ``update`` needs ``params``. The state takes 2 bytes per bfloat16
        parameter, plus the state of ``tx`` for float32 parameters. Parameters of other dtypes are left to ``tx``.

    Raises:
        ValueError: ``update`` is called without ``params``, or with trees that do not match.
        TypeError: a parameter has another dtype than at ``init``, or ``tx`` is not a transformation.

    Example:
        >>> import jax.numpy as jnp, jadam, optax
        >>> tx = jadam.exact_bf16(jadam.adam(1e-4))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(10):  # each step is 1/40 of bfloat16's spacing below 1
        ...     updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params[0], f"{jadam.float32_params(params, state)[0]:.4f}")
        1 0.9990
    """
    checks.check_transformation("exact_bf16 needs", tx)
    if update_of(tx).after_step is not None:
        raise ValueError("exact_bf16 must be inside record, got it around record. Swap them: record(exact_bf16(tx)).")
    inner = optax.with_extra_args_support(tx)
    needs_gradient_values = update_of(tx).needs_gradient_values

    def init(params) -> Any:
        params = update_fn.without_untrainable(params, params)
        checks.check_trainable(params, "params")
        if (leaves := jax.tree.leaves(params)) and not any(map(_is_bf16, leaves)):
            checks.warn(
                f"exact_bf16 changes nothing: no parameter is bfloat16, the first is {jnp.result_type(leaves[0])}. "
                "Convert them: params, state = jadam.from_float32(params, tx)."
            )
        inner_state = inner.init(jax.tree.map(_widen, params, params))
        if find_states(inner_state, ExactBF16State):
            raise ValueError("exact_bf16 must be outermost, got it around another exact_bf16. Drop the inner one.")
        return ExactBF16State(_remainders(_zero_remainder, params), inner_state, version(VERSION))

    def update(updates, state, params, **extra_args) -> Any:
        checks.check_state_type(state, ExactBF16State)
        checks.check_version(state, VERSION)
        params, _ = params_with_gradients(params, updates)
        checks.check_gradients(updates, state, params)
        masters = _masters(params, state.remainder)
        wide = jax.tree.map(_widen, updates, params)
        updates, inner_state = inner.update(wide, state.inner_state, masters, **extra_args)
        masters = apply_updates(masters, updates)
        updates = jax.tree.map(lambda p, x, u: update_to(p, x) if _is_bf16(p) else u, params, masters, updates)
        new_remainder = lambda r, p, x, u: remainder_of(p, x, u) if _is_bf16(p) else r
        remainder = _map_by_order(new_remainder, state.remainder, params, masters, updates)
        return updates, state._replace(remainder=remainder, inner_state=inner_state)

    def leafwise(updates, state, params):
        if params is None:
            raise ValueError("exact_bf16 needs params: call update(updates, state, params).")
        if not isinstance(tx, Transformation):
            raise NotFusible("the optimizer inside jadam.exact_bf16 is not a jadam optimizer or jadam.chain")
        checks.check_state_type(state, ExactBF16State)
        checks.check_version(state, VERSION)
        checks.check_gradients(updates, state, params, params_may_be_shapes=True)
        _check_remainder(params, state.remainder)
        # `leafwise` reads shapes and dtypes only, except for a norm. So no masters and float32 gradients are made here:
        # each `LeafUpdate` makes its own, in the same pass over memory.
        masters = jax.tree.map(lambda p: _shaped_zeros(p) if _is_bf16(p) else p, params)
        widen = _widen if needs_gradient_values else lambda g, p: _shaped_zeros(g) if _is_bf16(p) else g
        leaf_updates, rebuild_inner = tx.update.leafwise(
            jax.tree.map(widen, updates, params), state.inner_state, masters
        )
        old, structure = jax.tree.flatten(state.remainder)
        is_bf16 = [_is_bf16(p) for p in jax.tree.leaves(params)]
        leaf_updates = [
            leaf._replace(remainder=r) if bf16 else leaf
            for leaf, r, bf16 in zip(leaf_updates, old, is_bf16, strict=True)
        ]

        def rebuild_state(state_arrays):
            """The new state, from each leaf's remainder and moments."""
            remainders = [new[0] if bf16 else r for new, r, bf16 in zip(state_arrays, old, is_bf16, strict=True)]
            moments = [new[1:] if bf16 else new for new, bf16 in zip(state_arrays, is_bf16, strict=True)]
            return state._replace(remainder=structure.unflatten(remainders), inner_state=rebuild_inner(moments))

        return LeafwiseUpdate(leaf_updates, rebuild_state)

    update_fn = ExactBF16UpdateFn(
        leafwise,
        f"jadam.exact_bf16({tx!r})",
        inner,
        needs_gradient_values,
        is_frozen=update_of(tx).is_frozen,
        fills_frozen=True,  # it has a remainder
        function=update,
    )
    return ExactBF16(init, update_fn)


def float32_params(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Return the float32 masters, for evaluation or a checkpoint.

    Args:
        params: the parameters after `optax.apply_updates`.
        state: the state of `exact_bf16`, or a state that contains one.

    Returns:
        A tree like ``params``: masters in place of bfloat16 parameters, copies of the others.

    Raises:
        ValueError: ``state`` contains no `ExactBF16State`, or several, or one of another tree; or an array was donated.
        TypeError: a parameter has another dtype than at ``init``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params, state = jadam.from_float32(jnp.array([0.1]), jadam.exact_bf16(jadam.adam(1e-3)))
        >>> print(params.dtype, jadam.float32_params(params, state))
        bfloat16 [0.1]
    """
    params, state = params_tree(params), state_tree(state)
    found = find_states(state, ExactBF16State)
    if len(found) != 1:
        raise ValueError(
            f"state must contain one ExactBF16State, found {len(found)}. "
            + (
                "Pass a part of state that has one."
                if found
                else "Train with jadam.exact_bf16(...), and call float32_params(params, state). With Flax NNX, pass "
                "optimizer.opt_state."
            )
        )
    checks.check_version(found[0], VERSION)
    remainder = found[0].remainder
    params, merge = params_with_gradients(params, remainder)  # without what is frozen and could not be trained
    checks.check_trainable(params, "params")
    for tree, what in ((params, "params"), (state, "state")):
        checks.check_values(tree, what)
    named, other = (dict(zip(leaf_names(x), jax.tree.leaves(x), strict=True)) for x in (params, remainder))
    if named.keys() == other.keys():  # the same tree, but perhaps of other Flax variables
        remainder = jax.tree.unflatten(jax.tree.structure(params), [other[name] for name in named])
    masters = jax.tree.map(lambda p, x: _copied(x) if x is p else x, params, _masters(params, remainder))
    return merge(jax.tree.leaves(masters))


def from_float32(
    params32: optax.Params,
    tx: optax.GradientTransformation,
    keep: Callable[[str, Any], bool] | None = None,
) -> tuple[optax.Params, optax.OptState]:
    """Convert float32 parameters to bfloat16 parameters and a state, without loss.

    Args:
        params32: parameters. Those that are float32 become bfloat16, the others are unchanged.
        tx: the result of `exact_bf16`, or `jadam.record` around it.
        keep: ``keep(path, leaf)`` is True for parameters that stay float32. ``path`` is a string such as
            ``"['norm']['scale']"``. Default: all become bfloat16.

    Returns:
        ``(params, state)``, with ``float32_params(params, state)`` equal to ``params32``. A NaN becomes the canonical
        NaN.

    Raises:
        ValueError: an array was donated.
        TypeError: ``tx`` is not from `exact_bf16`, ``keep`` is not a function, or a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.exact_bf16(jadam.adam(1e-3))
        >>> params, state = jadam.from_float32({"w": jnp.ones(2), "b": jnp.ones(1)}, tx, lambda path, _: "b" in path)
        >>> print(params["w"].dtype, params["b"].dtype)
        bfloat16 float32
    """
    recorded = isinstance(tx, Transformation) and tx.update.after_step is not None  # by jadam.record
    exact = update_of(tx).inner if recorded else tx
    if not isinstance(exact, ExactBF16):
        raise TypeError(
            f"tx must be from jadam.exact_bf16, got {checks.short_repr(tx)}. Pass jadam.exact_bf16(tx), or "
            "jadam.record(jadam.exact_bf16(tx))."
        )
    params32 = params_tree(params32)
    params32, merge = params_with_gradients(params32, exact.update.without_untrainable(params32, params32))
    checks.check_trainable(params32, "params32")
    checks.check_values(params32, "params32")
    if not (keep is None or callable(keep)):
        raise TypeError(f"keep must be a function f(path, leaf) that returns a bool, got {checks.short_repr(keep)}.")

    def narrow(path, x):
        """Return a bfloat16 parameter, or a copy of one that stays as it is."""
        if jnp.result_type(x) != jnp.float32 or (keep is not None and keep(leaf_name(path), x)):
            return _copied(x)
        return split(x)[0]

    params = jax.tree_util.tree_map_with_path(narrow, params32)
    of_split = lambda p, x: split(x)[1] if jnp.result_type(x) == jnp.float32 and _is_bf16(p) else _zero_remainder(p)
    remainder = _remainders(of_split, params, params32)
    state = ExactBF16State(remainder, exact.update.inner.init(_masters(params, remainder)), version(VERSION))
    state = cast(Any, tx.init(params))._replace(inner_state=state) if recorded else state
    return merge(jax.tree.leaves(params)), state


def _copied(x):
    """A copy, which outlives a donation of ``x``."""
    return x.copy() if hasattr(x, "copy") else x


def _masters(params, remainder):
    """Join bfloat16 parameters and their remainders; other parameters are unchanged."""
    _check_remainder(params, remainder)
    return _map_by_order(lambda p, r: join(p, r) if _is_bf16(p) else p, params, remainder)


def _map_by_order(f, tree, *others):
    """``jax.tree.map`` over trees that differ by Flax's boxes around their leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(list(map(f, leaves, *map(jax.tree.leaves, others))))


def _remainders(f, *trees):
    """``jax.tree.map`` of trees like the parameters to remainders; placeholders without Flax's boxes."""
    return without_metadata(jax.tree.map(f, *trees), where=lambda r: r.dtype != jnp.int16)


def _check_remainder(params, remainder) -> None:
    """Raise unless the parameters have the tree of ``init``, and its bfloat16 leaves the same dtype and shape."""
    if jax.tree.structure(params) != jax.tree.structure(remainder):  # perhaps only by metadata
        checks.check_same_structure(without_metadata(params), without_metadata(remainder), "params", "state.remainder")
    leaves, remainders = jax.tree.leaves(params), jax.tree.leaves(remainder)
    for i, (p, r) in enumerate(zip(leaves, remainders, strict=True)):
        was_bf16 = r.dtype == jnp.int16
        if _is_bf16(p) != was_bf16 or (was_bf16 and np.shape(p) != r.shape):
            was = f"bfloat16 of shape {r.shape}" if was_bf16 else "of another dtype than bfloat16"
            path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(params)[i][0])
            raise TypeError(
                f"params{path} was {was} at init, got {jnp.result_type(p)} of shape {np.shape(p)}. Pass the "
                "parameters of init, updated by optax.apply_updates; eqx.apply_updates and p + u leave float32 "
                "parameters to be cast back."
            )


def _zero_remainder(p):
    """The remainder of a parameter that was never float32: zeros, or a placeholder if it is not bfloat16."""
    return jnp.zeros_like(p, dtype=jnp.int16) if _is_bf16(p) else placeholder(p)


def _shaped_zeros(x):
    """float32 zeros in the shape of ``x``, which take no memory."""
    broadcast_to = np.broadcast_to if checks.has_constant_shape(x) else jnp.broadcast_to
    return broadcast_to(np.zeros([], at_least_float32(x)), jnp.shape(x))


def _widen(x, p):
    """Cast ``x`` to at least float32 if the parameter ``p`` is bfloat16."""
    return x.astype(at_least_float32(x)) if _is_bf16(p) else x


def _is_bf16(p) -> bool:
    """Whether ``p`` is bfloat16."""
    return jnp.result_type(p) == jnp.bfloat16
