"""Optax's `chain` and clipping, made recognisable, so that `jadam.step` sees through them.

Each has the state and the results of its namesake in Optax, whose code it runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._transformation.transformation import (
    FunctionUpdate,
    FusedUpdate,
    NotFusible,
    Transformation,
    not_fusible,
    update_of,
)
from jadam._wrappers.exact_bf16 import ExactBF16


@dataclasses.dataclass(eq=False)
class ClipUpdate(FunctionUpdate):
    """``update`` of a clipping, and what it does to the jobs of a plan."""

    name: str = dataclasses.field(kw_only=True)
    clip_leaves: Callable[..., Any] = dataclasses.field(kw_only=True)  # clip_leaves(jobs, updates) returns the jobs


class Clip(optax.GradientTransformation):
    """What `clip` and `clip_by_global_norm` return: Optax's transformation, which `chain` knows."""

    update: ClipUpdate  # pyright: ignore[reportIncompatibleVariableOverride]

    def __repr__(self):
        return self.update.call


def _clip(tx, clip_leaves, name, bound) -> Clip:
    def update(updates, state, params=None) -> Any:
        checks.gradients(updates, state, None)
        leaves, structure = jax.tree.flatten(updates)  # a norm makes numbers of arrays: none for a user's own class
        leaves, state = tx.update(leaves, state)
        return structure.unflatten(leaves), state

    return Clip(
        tx.init, ClipUpdate(not_fusible, f"jadam.{name}({bound})", function=update, name=name, clip_leaves=clip_leaves)
    )


def clip(max_delta: jax.typing.ArrayLike) -> Clip:
    """Clip every gradient to ``[-max_delta, max_delta]``: `optax.clip`, for `jadam.chain`.

    Args:
        max_delta: > 0, in the gradient's unit; a number or a scalar array.

    Returns:
        A transformation without state.

    Raises:
        ValueError, TypeError: ``max_delta`` out of range or no number.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.clip(1.0)
        >>> g = jnp.array([3.0, -0.5])
        >>> print(tx.update(g, tx.init(g))[0])
        [ 1.  -0.5]
    """
    bound = checks.hyperparameter("max_delta", max_delta, "> 0", schedule=False)

    clip_leaves = lambda leaf_updates, updates: [leaf_update._replace(bound=bound) for leaf_update in leaf_updates]
    return _clip(optax.clip(bound), clip_leaves, "clip", bound)


def clip_by_global_norm(max_norm: jax.typing.ArrayLike) -> Clip:
    """Scale all gradients so that their norm together is at most ``max_norm``: Optax's own, for `jadam.chain`.

    Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", Algorithm 1.

    Args:
        max_norm: > 0, in the gradient's unit; a number or a scalar array.

    Returns:
        A transformation without state.

    Raises:
        ValueError, TypeError: ``max_norm`` out of range or no number.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.clip_by_global_norm(1.0)
        >>> g = jnp.array([3.0, -4.0])
        >>> print(tx.update(g, tx.init(g))[0])
        [ 0.6 -0.8]
    """
    max_norm = checks.hyperparameter("max_norm", max_norm, "> 0", schedule=False)

    def clip_leaves(leaf_updates, updates):
        leaves = jax.tree.leaves(updates)
        if (bound := next((leaf_update.bound for leaf_update in leaf_updates), None)) is not None:
            leaves, _ = optax.clip(bound).update(leaves, optax.EmptyState())
        norm = optax.tree.norm(leaves)
        small = jnp.squeeze(norm < max_norm)
        by, to = jnp.where(small, 1.0, norm), jnp.where(small, 1.0, max_norm)
        return [leaf_update._replace(norm=by, max_norm=to) for leaf_update in leaf_updates]

    return _clip(optax.clip_by_global_norm(max_norm), clip_leaves, "clip_by_global_norm", max_norm)


def chain(*stages: optax.GradientTransformation) -> Transformation:
    """`optax.chain`, remembering its stages: the same state and results, and `jadam.step` can see what it is.

    One pass over memory is kept where the stages are any of `jadam.clip` and then `jadam.clip_by_global_norm`, and then
    one of jadam's optimizers. With other stages `jadam.step` does what it does for any transformation.

    Args:
        stages: transformations, each fed with the updates of the one before.

    Returns:
        A transformation whose state is the tuple of the stages' states.

    Raises:
        TypeError: a stage that is no transformation.
        ValueError: no stage, or `jadam.exact_bf16` or `jadam.record` within: they must be outermost.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-3))
        >>> params = jnp.ones(3)
        >>> params, state = jadam.step(tx, jnp.ones(3), tx.init(params), params)
        >>> print(params)
        [0.9989999 0.9989999 0.9989999]
    """
    for i, stage in enumerate(stages):
        checks.transformation(f"chain's stage {i} must be", stage)
        if isinstance(stage, ExactBF16):
            raise ValueError(f"chain's stage {i} is exact_bf16, which must be outermost: exact_bf16(chain(...)).")
        if update_of(stage).after_step is not None:
            raise ValueError(
                f"chain's stage {i} is record, which must be outermost: record(chain(...)). With other stages than "
                "clipping: optax.chain(record(...), ...)."
            )
    if not stages:
        raise ValueError("chain needs one stage at least, got none. optax.identity() changes nothing.")
    inner = optax.with_extra_args_support(optax.chain(*stages))
    clips: list[Any] = list(stages[:-1])
    last: Any = stages[-1]
    reason = _why_not_one_pass(clips, last)

    def update(updates, state, params=None, **extra_args) -> Any:
        checks.stages(state, len(stages))
        return inner.update(updates, state, params, **extra_args)

    def fuse(updates, state, params=None) -> FusedUpdate:
        checks.stages(state, len(stages))
        *states, last_state = state
        if reason is not None:
            raise NotFusible(reason)
        checks.gradients(updates, state, params, planning=True)
        if clips and any(jnp.finfo(jnp.result_type(g)).bits < 32 for g in jax.tree.leaves(updates)):
            raise NotFusible("16-bit gradients are clipped in 16 bits; wrap the chain in jadam.exact_bf16")
        if clips and any(jnp.iscomplexobj(g) for g in jax.tree.leaves(updates)):
            raise NotFusible("complex gradients are clipped")
        leaf_updates, rebuild_state = last.update.fuse(updates, last_state, params)
        for stage in clips:
            leaf_updates = stage.update.clip_leaves(leaf_updates, updates)
        return FusedUpdate(leaf_updates, lambda *stored: (*states, rebuild_state(*stored)))

    text = f"jadam.chain({', '.join(map(repr, stages))})"
    needs_gradient_values = any(
        stage.update.name == "clip_by_global_norm" for stage in clips if isinstance(stage, Clip)
    )
    return Transformation(inner.init, FunctionUpdate(fuse, text, None, needs_gradient_values, function=update))


def _why_not_one_pass(clips, last) -> str | None:
    """Why a chain of these stages is never one pass, or None."""
    if not isinstance(last, Transformation):
        return "jadam.chain's last stage is none of jadam's optimizers"
    for i, stage in enumerate(clips):
        if not isinstance(stage, Clip):
            return f"jadam.chain's stage {i} is neither jadam.clip nor jadam.clip_by_global_norm"
    names = [stage.update.name for stage in clips]
    if "clip" in names[1:]:
        return "jadam.clip comes after another clipping"
    if names.count("clip_by_global_norm") > 1:
        return "two jadam.clip_by_global_norm in one chain"
    return None
