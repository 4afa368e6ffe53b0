"""From a rule for one array to an Optax transformation over a tree.

A *rule* is a pure function ``rule(step, g, *moments) -> (u, *moments)`` on arrays of one dtype, with this
step's scalars in ``step``. It knows nothing of trees, stored dtypes or schedules; this file knows nothing
of Adam. `scale_by_rule` maps a rule over the tree once, `descend` puts weight decay and the learning rate
behind it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jadam import _checks
from jadam._numerics import Beta, Scalar, at_least_float32, constant_beta, promote, real, scheduled_beta

Rule = Callable[..., tuple[jax.Array, ...]]

_ALLOWED = {"b1": "in [0, 1)", "b2": "in [0, 1)", "eps": ">= 0", "eps_root": ">= 0"}


class Step(NamedTuple):
    """The scalars of one step, in the dtype of the leaf they are used on."""

    t: Scalar  # 1, 2, ...
    b1: Beta
    b2: Beta
    eps: Scalar
    eps_root: Scalar


class ScheduledBetasState(NamedTuple):
    """The state when ``b1`` or ``b2`` is a schedule: the plain one, and what corrects a scheduled beta.

    A correction is ``1 - b(0) * b(1) * ... * b(t-1)``, a scalar; ``None`` for a beta that is constant.
    """

    b1_correction: jax.Array | None
    b2_correction: jax.Array | None
    inner_state: Any


def scale_by_rule(
    rule: Rule,
    state_type: Any,
    *,
    b1,
    b2,
    eps,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies ``rule`` to every leaf.

    Args:
        rule: ``rule(step, g, *moments) -> (u, *moments)``.
        state_type: NamedTuple of ``count`` and the moments. The first moment, ``mu``, is shaped and typed like
            the parameter, the others are shaped like it and real.
        b1, b2, eps, eps_root, mu_dtype: as in `jadam.scale_by_adam`.
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    given = {name: _checked(name, value) for name, value in given.items()}
    scheduled = [callable(given["b1"]), callable(given["b2"])]
    mu_dtype = _checks.storage_dtype("mu_dtype", mu_dtype)
    names = state_type._fields[1:]

    def init(params) -> Any:
        _checks.trainable(params, "params")
        _checks.holds_complex("mu_dtype", mu_dtype, params)

        def zeros(p, name):
            dtype = at_least_float32(p)
            return jnp.zeros_like(p, dtype=(mu_dtype or dtype) if name == "mu" else real(dtype))

        moments = [jax.tree.map(functools.partial(zeros, name=name), params) for name in names]
        state = state_type(jnp.zeros([], jnp.int32), *moments)
        if any(scheduled):
            b1_correction, b2_correction = (jnp.zeros([]) if x else None for x in scheduled)
            state = ScheduledBetasState(b1_correction, b2_correction, state)
        return state

    def update(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        corrections = [None, None]
        if any(scheduled):
            *corrections, state = state
        _checks.gradients(updates, params)
        for name, moments in zip(names, state[1:], strict=True):
            _checks.same_tree(updates, moments, "updates", f"state.{name}")
            if name != "mu" or mu_dtype is None:
                _checks.moments_wide_enough(moments, name)
        scalars, corrections = _scalars(given, state.count, corrections)

        def leaf(g, result_dtype, *stored):
            dtype = at_least_float32(g, *stored)
            wide = [x.astype(dtype if name == "mu" else real(dtype)) for name, x in zip(names, stored, strict=True)]
            u, *moments = rule(scalars(real(dtype)), g.astype(dtype), *wide)
            return u.astype(result_dtype), *(x.astype(s.dtype) for x, s in zip(moments, stored, strict=True))

        trees = [updates, result_dtypes(updates, params), *state[1:]]
        results = [leaf(*x) for x in zip(*map(jax.tree.leaves, trees), strict=True)]
        columns = zip(*results, strict=True) if results else [()] * (1 + len(names))
        updates, *moments = (jax.tree.unflatten(jax.tree.structure(updates), column) for column in columns)
        state = state_type(optax.safe_increment(state.count), *moments)
        return updates, ScheduledBetasState(corrections[0], corrections[1], state) if any(scheduled) else state

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(name, value, schedule=True):
    hint = "Did you swap it with learning_rate or eps?" if name in ("b1", "b2") else ""
    return _checks.hyperparameter(name, value, _ALLOWED[name], hint=hint, schedule=schedule, wide=True)


def _scalars(given, count, corrections):
    """This step's `Step` as a function of the dtype, and the corrections of scheduled betas to keep."""

    def at(name, count):
        value = given[name]
        value = _checked(name, value(count), schedule=False) if callable(value) else value
        return _checks.or_nan(value, _ALLOWED[name])

    next_count = jnp.asarray(optax.safe_increment(count))
    now = {name: at(name, count) for name in given}
    betas = [
        None if correction is None else scheduled_beta(now[name], at(name, next_count), correction)
        for name, correction in zip(("b1", "b2"), corrections, strict=True)
    ]

    @functools.cache  # per dtype, not per leaf
    def step(dtype):
        t = next_count.astype(dtype)
        b1, b2 = (
            constant_beta(now[name], t, dtype) if beta is None else Beta(*(x.astype(dtype) for x in beta))
            for name, beta in zip(("b1", "b2"), betas, strict=True)
        )
        return Step(t, b1, b2, jnp.asarray(now["eps"], dtype), jnp.asarray(now["eps_root"], dtype))

    return step, [None if beta is None else beta.correction for beta in betas]


def descend(direction, learning_rate, weight_decay=None, mask=None) -> optax.GradientTransformationExtraArgs:
    """``direction``, then weight decay unless ``None``, then ``-learning_rate``: Optax's own stages, in float32.

    Optax multiplies in the updates' dtype, which rounds a learning rate to bf16 for bf16 gradients. Here the
    stages see gradients and parameters widened to float32, and only the final update is narrowed.
    """
    stages = [direction]
    if weight_decay is not None:
        weight_decay = _checks.hyperparameter("weight_decay", weight_decay, ">= 0")
        stages.append(optax.add_decayed_weights(weight_decay, mask))
    learning_rate = _checks.hyperparameter("learning_rate", learning_rate, ">= 0", hint="To maximise, negate the loss.")
    stages.append(optax.scale_by_learning_rate(learning_rate))
    chain = optax.chain(*stages)

    def widen(x):
        return x.astype(at_least_float32(x))

    def update(updates, state, params=None, **extra_args):
        _checks.gradients(updates, params)
        narrow = result_dtypes(updates, params)
        wide_params = None if params is None else jax.tree.map(widen, params)
        updates, state = chain.update(jax.tree.map(widen, updates), state, wide_params, **extra_args)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, narrow), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def result_dtypes(updates, params):
    """The dtype of each update: the gradient's, promoted with the parameter's where that is known."""
    return jax.tree.map(promote, updates, *([] if params is None else [params]))
