"""Optax's `chain`, `clip` and `clip_by_global_norm`, in a form that `jadam.step` can fuse.

Each has the state and results of its namesake in Optax, and runs Optax's code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._core.numerics import sqrt
from jadam._transformation.transformation import (
    CustomUpdateFn,
    LeafwiseUpdate,
    NotFusible,
    Transformation,
    raise_not_fusible,
    update_of,
)
from jadam._wrappers.exact_bf16 import ExactBF16


@dataclasses.dataclass(eq=False)
class ClipUpdateFn(CustomUpdateFn):
    """`UpdateFn` of a clipping transformation."""

    name: str = dataclasses.field(kw_only=True)
    clip_leaves: Callable[..., Any] = dataclasses.field(kw_only=True)  # (leaf_updates, grads) -> leaf_updates that clip


class Clip(optax.GradientTransformation):
    """A clipping transformation of Optax's that `chain` can fuse."""

    update: ClipUpdateFn  # pyright: ignore[reportIncompatibleVariableOverride]

    def __repr__(self):
        return self.update.made_by


def _clip(clip_grads, clip_leaves, name, bound) -> Clip:
    """Make a `Clip` of its two forms: on gradients, and as a setting of leaf updates."""

    def update(updates, state, params=None) -> Any:
        checks.check_gradients(updates, state, None)
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten(clip_grads(leaves)), state

    call = f"jadam.{name}({bound})"
    update_fn = ClipUpdateFn(raise_not_fusible, call, function=update, name=name, clip_leaves=clip_leaves)
    return Clip(optax.identity().init, update_fn)


def clip(max_delta: jax.typing.ArrayLike) -> Clip:
    """Clip every gradient element to ``[-max_delta, max_delta]``: `optax.clip`, for `jadam.chain`.

    Args:
        max_delta: a number or a scalar array > 0, in the gradient's unit.

    Returns:
        A stateless transformation.

    Raises:
        ValueError: ``max_delta`` is out of range.
        TypeError: ``max_delta`` is not a number.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.clip(1.0)
        >>> g = jnp.array([3.0, -0.5])
        >>> print(tx.update(g, tx.init(g))[0])
        [ 1.  -0.5]
    """
    bound = checks.hyperparameter("max_delta", max_delta, "> 0", schedule=False)
    clip_grads = lambda leaves: optax.clip(bound).update(leaves, optax.EmptyState())[0]
    clip_leaves = lambda leaf_updates, grads: [leaf._replace(bound=bound) for leaf in leaf_updates]
    return _clip(clip_grads, clip_leaves, "clip", bound)


def clip_by_global_norm(max_norm: jax.typing.ArrayLike) -> Clip:
    """Scale all gradients so that their global norm is at most ``max_norm``, as Optax does, for `jadam.chain`.

    Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", Algorithm 1.

    Args:
        max_norm: a number or a scalar array > 0, in the gradient's unit.

    Returns:
        A stateless transformation.

    Raises:
        ValueError: ``max_norm`` is out of range.
        TypeError: ``max_norm`` is not a number.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.clip_by_global_norm(1.0)
        >>> g = jnp.array([3.0, -4.0])
        >>> print(tx.update(g, tx.init(g))[0])
        [ 0.6 -0.8]
    """
    max_norm = checks.hyperparameter("max_norm", max_norm, "> 0", schedule=False)

    def factors(leaves):
        """The divisor and the factor, both 1 if nothing is clipped: for zero gradients Optax would compute 0 / 0."""
        norm = sqrt(optax.tree.norm(leaves, squared=True))
        unclipped = jnp.squeeze(norm < max_norm)
        return jnp.where(unclipped, 1.0, norm), jnp.where(unclipped, 1.0, max_norm)

    def clip_grads(leaves):
        """Return the clipped gradients."""
        norm, factor = factors(leaves)
        as_g = lambda x, g: x.astype(jax.dtypes.canonicalize_dtype(g.dtype))
        return [g / as_g(norm, g) * as_g(factor, g) for g in leaves]

    def clip_leaves(leaf_updates, grads):
        """Return the leaf updates, told to scale their gradients by the same factors."""
        leaves = jax.tree.leaves(grads)
        if (bound := next((leaf.bound for leaf in leaf_updates), None)) is not None:
            leaves, _ = optax.clip(bound).update(leaves, optax.EmptyState())
        norm, factor = factors(leaves)
        return [leaf._replace(norm=norm, max_norm=factor) for leaf in leaf_updates]

    return _clip(clip_grads, clip_leaves, "clip_by_global_norm", max_norm)


def chain(*stages: optax.GradientTransformation) -> Transformation:
    """`optax.chain` in a form that `jadam.step` can fuse, with the same state and results.

    The step is one pass over memory if the stages are, in this order: `jadam.clip` (optional),
    `jadam.clip_by_global_norm` (optional), and one of jadam's optimizers. With other stages, `jadam.step` calls
    ``update`` and `optax.apply_updates`.

    Args:
        stages: transformations; each gets the updates of the one before.

    Returns:
        A transformation whose state is the tuple of the stages' states.

    Raises:
        TypeError: a stage is not a transformation.
        ValueError: there are no stages, or a stage is `jadam.exact_bf16` or `jadam.record`, which must be outermost.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-3))
        >>> params = jnp.ones(3)
        >>> params, state = jadam.step(tx, jnp.ones(3), tx.init(params), params)
        >>> print(params)
        [0.9989999 0.9989999 0.9989999]
    """
    for i, stage in enumerate(stages):
        checks.check_transformation(f"chain's stage {i} must be", stage)
        if isinstance(stage, ExactBF16):
            raise ValueError(f"chain's stage {i} is exact_bf16, which must be outermost: exact_bf16(chain(...)).")
        if update_of(stage).after_step is not None:
            raise ValueError(
                f"chain's stage {i} is record, which must be outermost: record(chain(...)). With stages other than "
                "clipping and the optimizer: optax.chain(..., record(optimizer), ...)."
            )
    if not stages:
        raise ValueError("chain needs at least one stage, got none. To change nothing: optax.identity().")
    inner = optax.with_extra_args_support(optax.chain(*stages))
    *clips, last = cast(tuple[Any, ...], stages)
    reason = _why_never_fused(clips, last)

    def update(updates, state, params=None, **extra_args) -> Any:
        checks.check_chain_state(state, len(stages))
        return inner.update(updates, state, params, **extra_args)

    def leafwise(updates, state, params=None) -> LeafwiseUpdate:
        checks.check_chain_state(state, len(stages))
        *states, last_state = state
        if reason is not None:
            raise NotFusible(reason)
        checks.check_gradients(updates, state, params, params_may_be_shapes=True)
        if clips and any(jnp.finfo(jnp.result_type(g)).bits < 32 for g in jax.tree.leaves(updates)):
            raise NotFusible(
                "kernels clip in float32, Optax in 16 bits (for bfloat16 parameters, use jadam.exact_bf16)"
            )
        if clips and any(jnp.iscomplexobj(g) for g in jax.tree.leaves(updates)):
            raise NotFusible("jadam.chain clips complex gradients")
        leaf_updates, rebuild_state = last.update.leafwise(updates, last_state, params)
        for stage in clips:
            leaf_updates = stage.update.clip_leaves(leaf_updates, updates)
        return LeafwiseUpdate(leaf_updates, lambda state_arrays: (*states, rebuild_state(state_arrays)))

    call = f"jadam.chain({', '.join(map(repr, stages))})"
    needs_gradient_values = any(
        stage.update.name == "clip_by_global_norm" for stage in clips if isinstance(stage, Clip)
    )
    is_frozen = update_of(last).is_frozen
    update_fn = CustomUpdateFn(
        leafwise, call, needs_gradient_values=needs_gradient_values, is_frozen=is_frozen, function=update
    )
    return Transformation(inner.init, update_fn)


def _why_never_fused(clips, last) -> str | None:
    """Why a chain of these stages cannot be fused, whatever the gradients; or None."""
    if not isinstance(last, Transformation):
        return "jadam.chain's last stage is not a jadam optimizer"
    for i, stage in enumerate(clips):
        if not isinstance(stage, Clip):
            return f"jadam.chain's stage {i} is neither jadam.clip nor jadam.clip_by_global_norm"
    names = [stage.update.name for stage in clips]
    if "clip" in names[1:]:
        return "jadam.chain has jadam.clip after another clipping"
    if names.count("clip_by_global_norm") > 1:
        return "jadam.chain has jadam.clip_by_global_norm more than once"
    return None
