"""Optax transformations from an update rule for one array.

A `Rule` holds a pure function ``f(hp, g, *moments) -> (u, *moments)`` on arrays of one dtype, where ``hp`` are the
hyperparameters of this step, and what the rest of the package needs to know about it. A rule knows nothing of trees,
stored formats or schedules; this file knows nothing of Adam. `scale_by_rule` maps a rule over a tree;
`scale_by_learning_rate_and_decay` adds weight decay and the learning rate.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.bf16 import join, remainder_of, split, update_to
from jadam._core.numerics import (
    Beta,
    Scalar,
    apply_updates,
    at_least_float32,
    constant_beta,
    linear_index,
    promote,
    real,
    scheduled_beta,
    sqrt,
)
from jadam._core.trees import params_with_gradients
from jadam._moments import formats


@jax.tree_util.register_pytree_node_class
class Hyperparams(SimpleNamespace):
    """The scalars of one step, in the dtype of the leaf they are used on.

    ``t`` counts from 1; a `Beta` for every decay rate and a scalar for every other hyperparameter, by name. A tree
    whose leaves are those that are arrays; numbers known on the host belong to its structure.
    """

    t: Scalar
    b1: Beta
    b2: Beta
    momentum: Beta  # b1 unless the rule has one of its own
    eps_root: Scalar | float = 0.0
    trusted: Scalar | bool = True  # RAdam's
    rectification: Scalar | float = 1.0

    def __init__(self, **values):
        """The hyperparameters by name."""
        super().__init__(**{"momentum": values.get("b1"), **values})

    def replace(self, **changed) -> "Hyperparams":
        """The same step with some scalars changed."""
        return Hyperparams(**{**vars(self), **changed})

    def tree_flatten(self):
        """For JAX."""
        values, tree = jax.tree.flatten(vars(self))
        is_array = [isinstance(x, jax.Array) for x in values]
        known = tuple(None if array else x for x, array in zip(values, is_array, strict=True))
        return [x for x, array in zip(values, is_array, strict=True) if array], (known, tree)

    @classmethod
    def tree_unflatten(cls, aux, arrays) -> "Hyperparams":
        """For JAX."""
        known, tree = aux
        arrays = iter(arrays)
        return cls(**tree.unflatten([next(arrays) if x is None else x for x in known]))


class QuantizedAdamState(NamedTuple):
    """The state where ``moments`` may be int8 for some leaves: Optax's `ScaleByAdamState` and, beside it, scales.

    For a leaf that is int8, ``mu`` holds codes of ``m / sqrt(v)`` and ``nu`` of ``sqrt(v)``; the scales are float32 and
    shaped like the leaf but for the last axis, which has one element a block. For any other leaf ``mu`` and ``nu`` are
    the moments themselves and each scale is one byte. The length of ``version`` tells how codes and scales are meant.
    """

    count: jax.Array  # tuples have a method of this name  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any
    version: jax.Array


class ScheduledBetasState(NamedTuple):
    """The state when a decay rate is a schedule: the plain one, and what corrects each scheduled rate.

    A correction is ``1 - b(0) * b(1) * ... * b(t-1)``, a scalar.
    """

    corrections: dict[str, jax.Array]
    inner_state: Any


def adam_denominator(hp: Hyperparams, v):
    """``sqrt(v_hat)``, the denominator of Adam but for eps."""
    return sqrt(v / hp.b2.correction)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A relative of Adam: its formula for one array, and all that other files need to know about it."""

    function: Callable[..., tuple[jax.Array, ...]]  # function(hp, g, *moments) -> (u, *moments)
    state_type: Any  # NamedTuple of count and the moments: mu like the parameter, the others real
    native: str | None = None  # its name in the compiled kernels, if it is there
    int8: bool = False  # whether m / sqrt(v) has the bound that int8 moments need
    root: Callable[..., Any] = adam_denominator  # root(hp, *second moments), which divides m_hat
    eps_in_denominator: bool = False  # whether the moment that is the root has eps in it already
    nesterov: bool = False  # whether the direction has a share of the gradient itself, as Nesterov's

    @property
    def moments(self) -> tuple[str, ...]:
        """The fields of the state that hold moments."""
        return self.state_type._fields[1:]

    def __repr__(self):
        return self.function.__name__


def _frozen_rule(hp, g) -> Any:
    """Never called. A function of this module, so that a pickled rule is `FROZEN_RULE` again."""


FROZEN_RULE = Rule(_frozen_rule, optax.EmptyState)  # of a parameter that stays what it is


class NotFusible(Exception):
    """Raised by a plan for what `jadam.step` cannot do in one pass; its text is the reason."""


class Shard(NamedTuple):
    """Where in a whole array a device's part lies: the index of its first element, uint32, and the whole's shape."""

    offset: jax.Array
    global_shape: tuple[int, ...]

    def global_indices(self, shape) -> jax.Array:
        """The index in the whole of each element of the part, which has this shape."""
        return self.offset + linear_index(shape, self.global_shape)

    def strided_runs(self, shape) -> tuple[int, int] | None:
        """``(run, stride)`` if element ``i`` has index ``first + i // run * stride + i % run``, else None."""
        cut = [axis for axis, (n, whole) in enumerate(zip(shape, self.global_shape, strict=True)) if n != whole]
        if any(math.prod(shape[:axis]) != 1 for axis in cut[:-1]):
            return None
        inner = cut[-1] if cut else 0
        return math.prod(shape[inner:]), math.prod(self.global_shape[inner:])


class LeafUpdate(NamedTuple):
    """What a step does to one leaf. Fields are `None` where there is nothing to do."""

    rule: Rule
    hyperparams: Any  # a `Hyperparams`
    dtype: np.dtype  # of the arithmetic
    format: formats.Format
    stored: tuple[jax.Array, ...]
    salt: int  # of the leaf's dither
    count: Any  # tuples have a method of this name  # pyright: ignore[reportIncompatibleMethodOverride]
    minus_lr: Any = 1.0
    weight_decay: Any = None  # of the parameter, added to the direction
    bound: Any = None  # of the gradient's absolute value
    norm: Any = None  # the gradient is divided by it
    max_norm: Any = None  # and multiplied by this
    remainder: jax.Array | None = None  # of a bfloat16 parameter, see `jadam.exact_bf16`
    shard: Shard | None = None  # where the leaf is a shard of a larger array
    index: Any = None  # of each element in the whole array, where that is known already
    group: Any = None  # the rule of `jadam.by_path` that it follows: its name and moments

    @property
    def frozen(self) -> bool:
        """Whether the parameter stays what it is."""
        return self.rule == FROZEN_RULE  # a copy of it, in a transformation that was copied

    def update(self, g, p):
        """``(u, stored)``: the rule on the decoded moments, what comes before it and behind it."""
        if self.frozen:
            return jnp.zeros_like(p, dtype=self.dtype), ()
        if self.bound is not None:
            g = jnp.clip(g, -jnp.asarray(self.bound, g.dtype), jnp.asarray(self.bound, g.dtype))
        if self.norm is not None:
            g = g / self.norm.astype(g.dtype) * self.max_norm.astype(g.dtype)
        moments = self.format.decode(self.stored, self.dtype)
        with jax.numpy_dtype_promotion("standard"):  # complex numbers times real ones
            u, *moments = self.rule.function(self.hyperparams, g.astype(self.dtype), *moments)
        index = self.shard.global_indices(g.shape) if self.index is None and self.shard is not None else self.index
        random = formats.random_bits(g.shape, self.salt, self.count, index)
        return self.scaled(u, p), self.format.encode(moments, self.stored, random)

    def update_master(self, g, p):
        """``(x, stored)``: a bfloat16 parameter's float32 master after the step."""
        x, g = join(p, self.remainder), g.astype(at_least_float32(g))
        u, stored = self.update(g, x)
        return apply_updates(x, u.astype(promote(g, x))), stored

    def scaled(self, u, p):
        """The update that the rule's direction becomes: with weight decay, times the learning rate."""
        as_u = lambda x: jnp.asarray(x).astype(self.dtype)
        if self.weight_decay is not None:
            u = u + as_u(self.weight_decay) * p.astype(self.dtype)
        return as_u(self.minus_lr) * u


def update_leaf(leaf_update: LeafUpdate, g, p):
    """The whole step of one leaf, from the gradient to the new parameter, and the tuple of what is stored.

    XLA runs it on arrays, Pallas on tiles.
    """
    if leaf_update.frozen:
        return p, () if leaf_update.remainder is None else (leaf_update.remainder,)
    if leaf_update.remainder is None:
        u, stored = leaf_update.update(g, p)
        return apply_updates(p, u.astype(promote(g, p))), stored
    x, stored = leaf_update.update_master(g, p)
    p, remainder = split(x)
    return p, (remainder, *stored)


class Operands(NamedTuple):
    """The arrays of all jobs."""

    scalars: list[jax.Array]  # each once, whichever jobs have it
    owned: list[tuple]  # of each job what is stored, and its remainder or None
    offsets: list | None = None  # where in a whole array each job's part of it begins


class Settings(NamedTuple):
    """Everything else about the jobs. Hashable; equal for transformations that differ in numbers only."""

    leaf_updates: tuple[LeafUpdate, ...]  # without arrays
    hyperparams: tuple[int, ...]  # which of them each leaf has
    places: tuple[int, ...]  # of each scalar among the arrays
    tree: Any  # of the steps and of each job's own scalars
    shapes: tuple | None  # of the whole arrays, where each job does a part


LEAVES_PER_PROGRAM = 32  # leaves that an eager update does at once
LEAF_SCALARS = ("minus_lr", "weight_decay", "bound", "norm", "max_norm", "count")


def pack(leaf_updates: list[LeafUpdate], shapes=None) -> tuple[Settings, Operands]:
    """Split jobs into hashable settings and arrays; ``shapes`` are the whole arrays', where each job does a part."""
    distinct = {id(leaf_update.hyperparams): leaf_update.hyperparams for leaf_update in leaf_updates}
    order = {key: i for i, key in enumerate(distinct)}
    values, tree = jax.tree.flatten(
        (
            list(distinct.values()),
            [[getattr(leaf_update, name) for name in LEAF_SCALARS] for leaf_update in leaf_updates],
        )
    )
    scalars = {id(x): x for x in values}
    place = {key: i for i, key in enumerate(scalars)}
    settings = Settings(
        leaf_updates=tuple(
            leaf_update._replace(
                hyperparams=None,
                stored=(),
                salt=leaf_update.salt
                if leaf_update.format.stochastic
                else 0,  # else leaves that are alike would differ
                remainder=None,
                group=None,
                **dict.fromkeys(LEAF_SCALARS),
            )
            for leaf_update in leaf_updates
        ),
        hyperparams=tuple(order[id(leaf_update.hyperparams)] for leaf_update in leaf_updates),
        places=tuple(place[id(x)] for x in values),
        tree=tree,
        shapes=None if shapes is None else tuple(shapes),
    )
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in scalars.values()]
    return settings, Operands(arrays, [(leaf_update.stored, leaf_update.remainder) for leaf_update in leaf_updates])


def unpack(settings: Settings, operands: Operands) -> list[LeafUpdate]:
    """The jobs that `pack` split."""
    hyperparams, own = settings.tree.unflatten([operands.scalars[i] for i in settings.places])
    shards: list = [None] * len(settings.leaf_updates)
    if operands.offsets is not None and settings.shapes is not None:
        shards = [Shard(first, shape) for first, shape in zip(operands.offsets, settings.shapes, strict=True)]
    rows = zip(settings.leaf_updates, settings.hyperparams, own, operands.owned, shards, strict=True)
    return [
        leaf_update._replace(
            hyperparams=hyperparams[i],
            stored=stored,
            remainder=r,
            shard=shard,
            **dict(zip(LEAF_SCALARS, values, strict=True)),
        )
        for leaf_update, i, values, (stored, r), shard in rows
    ]


def stored_arrays(owned) -> tuple:
    """What `Plan.finish` takes for a job: its remainder, if it has one, and its moments."""
    stored, remainder = owned
    return stored if remainder is None else (remainder, *stored)


@functools.partial(jax.jit, static_argnums=0)
def _updates(settings, operands, grads, params) -> tuple[list[jax.Array], list[tuple]]:
    """The updates of leaves, and what is stored."""
    updates, stored = [], []
    for leaf_update, g, p in zip(unpack(settings, operands), grads, params, strict=True):
        if leaf_update.remainder is None:
            u, new = leaf_update.update(g, p)
            u = u.astype(promote(g) if p is None else promote(g, p))
        else:
            x, new = leaf_update.update_master(g, p)
            u = update_to(p, x)
            new = (remainder_of(p, x, u), *new)
        updates.append(u)
        stored.append(new)
    return updates, stored


class FusedUpdate(NamedTuple):
    """A whole update as one `LeafUpdate` for each leaf of the gradients.

    ``rebuild_state(stored)`` returns the new state. ``stored`` has a tuple for each leaf: its remainder, if it has one,
    and its moments as stored.
    """

    leaf_updates: list[LeafUpdate]
    rebuild_state: Callable[..., Any]


def _programs(leaf_updates: list[LeafUpdate], grads: list, traced: bool) -> list[list[int]]:
    """Groups of leaves, each updated by one compiled program.

    Under a trace every leaf is its own group: JAX traces and lowers a jitted function once for all leaves with the same
    shapes and settings, and XLA inlines it. Eagerly, one program for all leaves is fastest; above 32 leaves, groups of
    32 like leaves share a program, which bounds the time to compile.
    """
    if traced:
        return [[i] for i in range(len(leaf_updates))]
    if len(leaf_updates) <= LEAVES_PER_PROGRAM:
        return [list(range(len(leaf_updates)))] if leaf_updates else []
    alike = collections.defaultdict(list)
    for i, (leaf_update, g) in enumerate(zip(leaf_updates, grads, strict=True)):
        alike[np.shape(g), jnp.result_type(g), leaf_update.format.name, leaf_update.rule].append(i)
    return [
        indices[k : k + LEAVES_PER_PROGRAM]
        for indices in alike.values()
        for k in range(0, len(indices), LEAVES_PER_PROGRAM)
    ]


@dataclasses.dataclass(eq=False)
class Update:
    """``update`` of a transformation, and all else that jadam knows about it.

    A transformation is a tree of two leaves, ``init`` and ``update``, which Flax takes apart and puts together again:
    ``update`` holds what must not be lost on the way. It is compared and hashed by identity, as a function is.
    """

    fuse: Callable[..., FusedUpdate]  # fuse(grads, state, params), with all checks
    call: str = ""  # the call that made the transformation
    inner: Any = None  # the transformation that this one is around
    needs_gradient_values: bool = False  # whether a plan depends on the gradients' values, as a norm does
    after_step: Callable[..., Any] | None = None  # after_step(state, params), of the new ones, returns the state
    step: Callable[..., Any] | None = None  # step(grads, state, params), if `jadam.step` has to be another

    def __call__(self, updates, state, params=None, **extra_args) -> Any:
        """Optax's ``update``: carries out the plan."""
        params, _ = params_with_gradients(params, updates)
        checks.check_values(params, "params")
        checks.check_same_devices(updates=updates, state=state, params=params)
        leaf_updates, rebuild_state = self.fuse(updates, state, params)
        grads, structure = jax.tree.flatten(updates)
        params = [None] * len(grads) if params is None else jax.tree.leaves(params)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((leaf_updates[:1], grads, params)))
        updates, stored = [None] * len(leaf_updates), [None] * len(leaf_updates)
        for group in _programs(leaf_updates, grads, traced):
            us, new = _updates(
                *pack([leaf_updates[i] for i in group]), [grads[i] for i in group], [params[i] for i in group]
            )
            for i, u, x in zip(group, us, new, strict=True):
                updates[i], stored[i] = u, x
        return structure.unflatten(updates), rebuild_state(stored)


@dataclasses.dataclass(eq=False)
class FunctionUpdate(Update):
    """An ``update`` written as a function. `jadam.step` still uses the plan."""

    function: Callable[..., Any] = dataclasses.field(kw_only=True)  # function(updates, state, params, **extra_args)

    def __call__(self, updates, state, params=None, **extra_args) -> Any:
        """Optax's ``update``."""
        return self.function(updates, state, params, **extra_args)


def not_fusible(grads, state, params) -> FusedUpdate:
    """The plan of a transformation that is not one of jadam's optimizers."""
    raise NotFusible("not a jadam optimizer (for a chain, use jadam.chain)")


def info_of(tx: optax.GradientTransformation) -> Update:
    """What jadam knows about a transformation; Optax's own have no plan."""
    return tx.update if isinstance(tx.update, Update) else Update(not_fusible)


class Transformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that `jadam.step` can fuse into one pass.

    ``info.fuse(grads, state, params)`` returns a `FusedUpdate`, or raises `NotFusible` and what ``update`` raises.
    """

    @property
    def info(self) -> Update:
        """``update``, with its type."""
        return cast(Update, self.update)

    def __repr__(self):
        return self.info.call or super().__repr__()

    def __treescope_repr__(self, path, subtree_renderer):
        """What treescope, which asks for it, shows in a notebook."""
        from treescope import rendering_parts

        return rendering_parts.text(repr(self))


def identity(hp: Hyperparams) -> Hyperparams:
    """The scalars as they are."""
    return hp


def scale_by_rule(
    rule: Rule,
    betas: dict[str, Any],
    scalars: dict[str, Any],
    mu_dtype: Any = None,
    moments: formats.Moments = "float32",
    transform: Callable[[Hyperparams], Hyperparams] = identity,
) -> Transformation:
    """The transformation that applies ``rule`` to every leaf.

    Args:
        rule: what is applied.
        betas: decay rates by name, in [0, 1): numbers, scalar arrays or schedules.
        scalars: other hyperparameters by name, >= 0: the same.
        mu_dtype: dtype in which ``mu`` is stored; default the parameter's, at least float32.
        moments: how the moments are stored, see `jadam.scale_by_adam`.
        adjust: what of the rule is a matter of its scalars only, once a step. Compiled once for each function.
    """
    betas = {name: _beta(name, value) for name, value in betas.items()}
    scalars = {name: _scalar(name, value) for name, value in scalars.items()}
    scheduled = [name for name, value in betas.items() if callable(value)]
    mu_dtype = checks.floating_dtype("mu_dtype", mu_dtype)
    choose = formats.format_selector(moments, mu_dtype, betas if rule.int8 else None)
    names = rule.moments
    quantized = rule.int8 and (moments == "int8" or callable(moments))
    state_type = QuantizedAdamState if quantized else rule.state_type
    stored_names = [name for name in state_type._fields if name not in ("count", "version")]
    versions = [formats.version] if "version" in state_type._fields else []

    def init(params) -> Any:
        checks.check_trainable(params, "params")

        def leaf(path, p):
            stored = choose(path, p).init(p, len(names))
            return *stored, *(formats.placeholder(p) for _ in stored_names[len(stored) :])

        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        columns = _columns([leaf(path, p) for path, p in leaves], len(stored_names))
        trees = list(map(structure.unflatten, columns))
        for name, tree, column in zip(stored_names, trees, columns, strict=True):
            if mu_dtype is None or name != "mu":
                checks.check_dtypes_kept(tree, column)
        state = state_type(jnp.zeros([], jnp.int32), *trees, *(make() for make in versions))
        return ScheduledBetasState({name: jnp.zeros([]) for name in scheduled}, state) if scheduled else state

    def fuse(updates, state, params=None) -> FusedUpdate:
        if scheduled:
            checks.check_state_type(state, ScheduledBetasState)
        corrections, state = state if scheduled else ({}, state)
        checks.check_state_type(state, state_type)
        if versions:
            checks.check_version(state, formats.VERSION)
        checks.check_count(state.count)
        checks.check_gradients(updates, state, params, planning=True)
        for name, tree in zip(names, state[1:], strict=False):
            checks.check_same_tree(updates, tree, "updates", f"state.{name}")
            if moments == "float32" and (name != "mu" or mu_dtype is None):
                checks.check_moments_wide(tree, name)
            if moments == "bfloat16":
                checks.check_moments_bfloat16(tree, name, state.mu)
        checks.check_complex_gradients(updates, state.mu, params)
        taken = state.count if isinstance(state.count, ConcreteCount) else jnp.asarray(state.count)
        hyperparams, count, corrections = _hyperparams_at(betas, scalars, taken, corrections, transform)

        @functools.cache  # leaves that share it share its scalars
        def validated(dtype, format):
            return format.validate(hyperparams(dtype))

        def leaf_update(path, g, *stored):
            format = formats.format_of(stored)
            own, unused = stored[: (n := format.num_arrays(len(names)))], stored[n:]
            checks.check_codes_not_cast(path, own[0].dtype, not all(map(formats.is_placeholder, unused)))
            dtype = at_least_float32(g, *own)
            return LeafUpdate(rule, validated(real(dtype), format), dtype, format, own, formats.leaf_salt(path), taken)

        def rebuild_state(stored):
            trees = [structure.flatten_up_to(getattr(state, name)) for name in stored_names]
            full = [(*new, *old[len(new) :]) for new, old in zip(stored, zip(*trees, strict=True), strict=True)]
            columns = map(structure.unflatten, _columns(full, len(stored_names)))
            new = state._replace(count=count, **dict(zip(stored_names, columns, strict=True)))
            return ScheduledBetasState(corrections, new) if scheduled else new

        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        trees = [structure.flatten_up_to(getattr(state, name)) for name in stored_names]
        return FusedUpdate(
            [leaf_update(path, g, *x) for (path, g), *x in zip(leaves, *trees, strict=True)], rebuild_state
        )

    return Transformation(init, Update(fuse))


def _columns(rows, n: int):
    """The ``n`` columns of ``rows``, also of none."""
    return list(zip(*rows, strict=True)) if rows else [()] * n


def _beta(name, value, schedule=True):
    hint = "Did you swap it with learning_rate or eps?"
    return checks.hyperparameter(name, value, "in [0, 1)", hint=hint, schedule=schedule, wide=True)


def _scalar(name, value, schedule=True):
    return checks.hyperparameter(name, value, ">= 0", schedule=schedule, wide=True)


class ConcreteCount(np.ndarray):
    """A count that a schedule can read although all else is traced, as in `jadam.describe`."""


def _hyperparams_at(betas, scalars, count, corrections, transform):
    """The hyperparameters of the step after ``count`` others.

    Returns:
        A function from a dtype to `Hyperparams`, the next count, and the bias corrections of scheduled betas.
    """

    def beta(name, count):
        value = betas[name]
        return _beta(name, schedule_value(value, count), schedule=False) if callable(value) else value

    def scalar(name):
        value = scalars[name]
        return _scalar(name, schedule_value(value, count), schedule=False) if callable(value) else value

    known = isinstance(count, ConcreteCount)
    next_count = count + count.dtype.type(1) if known else _incremented(count)
    varying = {}
    for name, done in corrections.items():
        now, then = (checks.nan_if_out_of_range(beta(name, x), "in [0, 1)") for x in (count, next_count))
        rate = scheduled_beta(now, then, done)
        varying[name] = rate if known else Beta(*map(jnp.asarray, rate))  # a number is another at every step
    constant = {name: value for name, value in betas.items() if name not in varying}
    others = {name: scalar(name) for name in scalars}
    fixed = tuple((name, x) for name, x in constant.items() if isinstance(x, float))
    given = {name: x for name, x in constant.items() if not isinstance(x, float)}
    make = _hyperparams if known or varying else _compiled_hyperparams

    @functools.cache  # per dtype, not per leaf
    def hyperparams(dtype):
        return make(transform, dtype, fixed, next_count, given, others, varying)

    return hyperparams, next_count, {name: value.correction for name, value in varying.items()}


def _hyperparams(transform, dtype, fixed, count, given, others, varying) -> Hyperparams:
    """The `Hyperparams` of step ``count``.

    ``fixed`` decay rates are Python numbers, ``given`` ones arrays, ``varying`` ones the `Beta` of a schedule.
    """
    t = count.astype(dtype)
    given = {name: checks.nan_if_out_of_range(value, "in [0, 1)") for name, value in given.items()}
    return transform(
        Hyperparams(
            t=t,
            **{name: Beta(*(x.astype(dtype) for x in value)) for name, value in varying.items()},
            **{name: constant_beta(value, t, dtype) for name, value in {**dict(fixed), **given}.items()},
            **{name: jnp.asarray(checks.nan_if_out_of_range(x, ">= 0"), dtype) for name, x in others.items()},
        )
    )


_compiled_hyperparams = jax.jit(
    _hyperparams, static_argnums=(0, 1, 2), inline=True
)  # one program where nothing is traced
_incremented = jax.jit(optax.safe_increment, inline=True)


def scale_by_learning_rate_and_decay(direction: Transformation, learning_rate, *decaying) -> Transformation:
    """``direction``, then weight decay, then ``-learning_rate``: Optax's own stages and their states, in float32.

    ``decaying`` is ``weight_decay, mask, max_lr``, or nothing.
    With ``max_lr`` the decay is ``weight_decay * learning_rate / max_lr``, free of the learning rate's scale.

    Optax multiplies in the updates' dtype, which rounds a learning rate to bf16 for bf16 gradients. Here only the final
    update is narrowed.
    """
    stages: list[Any] = [direction]
    weight_decay: Any = None
    mask = None
    if decaying:
        weight_decay, mask, max_lr = decaying
        weight_decay = or_nan("weight_decay", checks.hyperparameter("weight_decay", weight_decay, ">= 0"))
        if max_lr is not None:
            max_lr = checks.hyperparameter("max_lr", max_lr, "> 0", schedule=False)
            weight_decay = over(weight_decay, max_lr)
        mask = None if mask is None else checks.mask_function(mask)
        stages.append(optax.add_decayed_weights(weight_decay, mask))
    learning_rate = checks.hyperparameter("learning_rate", learning_rate, ">= 0", hint="To maximise, negate the loss.")
    learning_rate = or_nan("learning_rate", learning_rate)
    stages.append(optax.scale_by_learning_rate(learning_rate))
    chain = optax.chain(*stages)

    def fuse(updates, state, params):
        checks.check_chain_state(state, len(stages))
        checks.check_gradients(updates, state, params, planning=True)
        if decaying and params is None:
            raise ValueError("weight_decay needs params: call update(updates, state, params).")
        leaf_updates, rebuild_state = direction.info.fuse(updates, state[0], params)
        widest = jax.dtypes.canonicalize_dtype(np.float64)
        zero, one = jnp.zeros([], widest), jnp.ones([], widest)  # each stage tells its factor when it is given 1
        minus_lr, lr_state = stages[-1].update(one, state[-1])
        if not decaying:
            decays, decay_states = [None] * len(leaf_updates), ()
        else:
            inner = state[1] if mask is None else state[1].inner_state
            decay, inner = optax.add_decayed_weights(weight_decay).update(zero, inner, one)
            decays = [decay if on else None for on in _leaf_mask(mask, params)]
            decay_states = (inner if mask is None else state[1]._replace(inner_state=inner),)
        leaf_updates = [
            x._replace(minus_lr=minus_lr, weight_decay=wd) for x, wd in zip(leaf_updates, decays, strict=True)
        ]
        return FusedUpdate(leaf_updates, lambda stored: (rebuild_state(stored), *decay_states, lr_state))

    return Transformation(chain.init, Update(fuse))


def _leaf_mask(mask, params) -> list[bool]:
    """A mask of `optax.masked` for each leaf."""
    leaves, structure = jax.tree.flatten(True if mask is None else mask(params))
    parts = map(jax.tree.leaves, structure.flatten_up_to(params))
    return [on for on, part in zip(leaves, parts, strict=True) for _ in part]


def schedule_value(value, count):
    """A hyperparameter after ``count`` steps. Schedules may promote: Optax's own do, where the user wants it strict."""
    if not callable(value):
        return value
    with jax.numpy_dtype_promotion("standard"):
        return value(count)


def or_nan(name: str, value):
    """A learning rate or weight decay, or a schedule of it, that is NaN where it is traced and out of range."""
    if not callable(value):
        return checks.nan_if_out_of_range(value, ">= 0")

    def schedule(count):
        x = schedule_value(value, count)
        if isinstance(x, jax.Array):
            checks.check_scalar(name, x.shape)
            return checks.nan_if_out_of_range(x, ">= 0")
        return checks.hyperparameter(name, x, ">= 0", schedule=False)

    return schedule


def over(weight_decay, max_lr):
    """A weight decay, a number or a schedule, free of the learning rate's scale."""
    return (
        (lambda count: schedule_value(weight_decay, count) / max_lr)
        if callable(weight_decay)
        else weight_decay / max_lr
    )
