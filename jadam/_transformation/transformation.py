"""Optax transformations from an update rule for one array.

A `Rule` holds a pure function ``f(hp, g, *moments) -> (u, *moments)`` on arrays of one dtype. ``hp`` are the
hyperparameters of the step. `scale_by_rule` maps a rule over a tree; `scale_by_learning_rate_and_decay` adds weight
decay and the learning rate. Rules are independent of trees, storage formats and schedules. Of particular rules this
file knows only `adam_denominator`, `QuantizedAdamState`, and the fields of `Hyperparams` for NAdam and RAdam.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core  # before a step is traced: JAX traces again once this is loaded
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.bf16 import join, remainder_of, split, update_to
from jadam._core.meshes import call_with_auto_axes, explicit_mesh
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
from jadam._core.trees import beside_params, leaf_name, leaf_names, params_with_gradients
from jadam._moments import formats
from jadam._moments.int8 import Int8


@jax.tree_util.register_pytree_node_class
class Hyperparams(SimpleNamespace):
    """Hyperparameters of one step, in the dtype of the leaf's arithmetic.

    Every decay rate is a `Beta`, every other hyperparameter a scalar. A pytree: arrays are its leaves, NumPy scalars
    and Python numbers are static.
    """

    t: Scalar  # the step, counted from 1
    b1: Beta
    b2: Beta
    momentum: Beta  # b1, unless a rule sets it
    eps: Scalar | float
    eps_root: Scalar | float = 0.0
    trusted: Scalar | bool = True  # RAdam: whether the rectified step is used
    rectification: Scalar | float = 1.0  # RAdam

    def __init__(self, **values):
        """Set the hyperparameters by name."""
        super().__init__(**{"momentum": values.get("b1"), **values})

    def replace(self, **changed) -> "Hyperparams":
        """Return a copy with some hyperparameters changed."""
        return Hyperparams(**{**vars(self), **changed})

    def tree_flatten(self):
        """For JAX."""
        values, tree = jax.tree.flatten(vars(self))
        is_array = [isinstance(x, jax.Array) for x in values]
        static = tuple(None if array else x for x, array in zip(values, is_array, strict=True))
        return [x for x, array in zip(values, is_array, strict=True) if array], (static, tree)

    @classmethod
    def tree_unflatten(cls, aux, arrays) -> "Hyperparams":
        """For JAX."""
        static, tree = aux
        arrays = iter(arrays)
        return cls(**tree.unflatten([next(arrays) if x is None else x for x in static]))


class QuantizedAdamState(NamedTuple):
    """State where some leaves may have int8 moments: Optax's ``ScaleByAdamState``, a scale for each moment, a version.

    For an int8 leaf of shape ``[..., n]``, ``mu`` (int8) holds codes of ``r = m / sqrt(v)`` and ``nu`` (uint8) codes of
    ``v``, which `jadam.convert_moments` decodes. ``mu_scale`` and ``nu_scale`` (float32, ``[..., blocks]``) hold the
    largest ``|r|`` and ``v`` of each block. For any other leaf, ``mu`` and ``nu`` are the moments themselves, and each
    scale is a placeholder of one byte. Neither has Flax's metadata, and `optax.tree.map_params` passes each tree of
    scales to ``transform_non_params``. The length of ``version`` is the version number of this layout, and its values
    are one less.
    """

    count: jax.Array  # tuples have a method of this name  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any
    version: jax.Array


class ScheduledBetasState(NamedTuple):
    """State when a decay rate is a schedule: the inner state, and the bias correction of each scheduled rate.

    ``corrections[name]`` is the scalar ``1 - b(0) * b(1) * ... * b(t-1)`` after ``t`` steps.
    """

    corrections: dict[str, jax.Array]
    inner_state: Any


def adam_denominator(hp: Hyperparams, v):
    """``sqrt(v_hat)``: Adam's denominator without eps."""
    return sqrt(v / hp.b2.correction)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Update rule of one optimizer: its formula for one array, and its properties."""

    function: Callable[..., tuple[jax.Array, ...]]  # function(hp, g, *moments) -> (u, *moments)
    state_type: Any  # NamedTuple of count and the moments: mu like the parameter, the others real
    native: str | None = None  # its name in the compiled CPU kernel; None if the kernel lacks it
    int8: bool = False  # whether m / sqrt(v) is bounded, which int8 moments require
    denominator: Callable[..., Any] = adam_denominator  # denominator(hp, *second_moments): what divides m_hat
    eps_in_moment: bool = False  # whether eps is part of the stored moment, as in AdaMax, not added to `denominator`
    nesterov: bool = False  # whether the update depends on g directly, not only through the moments

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Names of the state's fields that hold moments."""
        return self.state_type._fields[1:]

    def __repr__(self):
        return self.function.__name__


def _frozen_rule(hp, g) -> Any:
    """Never called. A module-level function, so that a pickled and loaded rule is equal to `FROZEN_RULE`."""


FROZEN_RULE = Rule(_frozen_rule, optax.EmptyState)  # placeholder rule of a frozen parameter


class NotFusible(Exception):
    """Raised by `UpdateFn.leafwise` when `jadam.step` cannot fuse the update; the message is the reason."""


class Shard(NamedTuple):
    """Position of a shard in its global array."""

    offset: jax.Array  # linear index of the shard's first element in the global array, uint32
    global_shape: tuple[int, ...]

    def global_indices(self, shape) -> jax.Array:
        """Linear index in the global array of each element of the shard, which has shape ``shape``."""
        return self.offset + linear_index(shape, self.global_shape)

    def strides(self, shape, axes=None) -> list[tuple[int, int]]:
        """`global_indices` in mixed-radix form: ``(size, stride)`` of each digit, innermost first, as few as possible.

        If ``i`` is an element's index in the shard, its digits are ``i % size`` of the first size, ``i // size`` modulo
        the second, and so on. Its global index is ``offset + sum(digit * stride)``, modulo 2**32 as the strides are.
        The first digit has stride 1: elements that differ only in it are contiguous in the global array.

        With ``axes``, ``i`` is the index along these axes, the last of them the fastest, and the sum is their share.
        """
        digits = [(1, 1)]
        for axis in reversed(range(len(shape)) if axes is None else axes):
            size, stride = digits[-1]
            global_stride = math.prod(self.global_shape[axis + 1 :])
            if size * stride == global_stride:  # nothing is cut off within this axis
                digits[-1] = (size * shape[axis], stride)
            elif shape[axis] != 1:
                digits.append((shape[axis], global_stride))
        return [(size, stride % 2**32) for size, stride in digits]


class LeafUpdate(NamedTuple):
    """Everything needed to update one leaf. An optional field is None where its operation is skipped."""

    rule: Rule
    hyperparams: Any  # a `Hyperparams`
    dtype: np.dtype  # of the arithmetic
    format: formats.Format  # how the moments are stored
    stored: tuple[jax.Array, ...]  # the moments, in this format
    salt: int  # seeds the random bits of stochastic rounding
    count: Any  # steps taken before this one  # pyright: ignore[reportIncompatibleMethodOverride]
    minus_lr: Any = 1.0  # minus the learning rate; 1 if there is none: then the update is the rule's direction
    weight_decay: Any = None
    bound: Any = None  # the gradient is clipped to [-bound, bound]
    norm: Any = None  # then divided by this: the global norm, or 1 if that is below the limit
    max_norm: Any = None  # and multiplied by this: the limit, or 1 likewise
    remainder: jax.Array | None = None  # of a bfloat16 parameter, see `jadam.exact_bf16`
    shard: Shard | None = None  # set if the leaf is a shard of a larger array
    index: Any = None  # linear index of each element in the global array, if precomputed
    group: Any = None  # the leaf's group in `jadam.by_path`
    name: str = ""  # of the parameter, for messages

    @property
    def frozen(self) -> bool:
        """Whether the leaf has `FROZEN_RULE`: its parameter stays as it is."""
        return self.rule == FROZEN_RULE  # by value: a copied transformation holds a copy

    @property
    def block(self) -> int | None:
        """The length of its int8 blocks; None for other formats."""
        return self.format.block_length(self.stored) if isinstance(self.format, Int8) else None

    def update(self, g, p):
        """Return ``(u, stored)``: the update of the parameter ``p``, and the new moments in their format."""
        if self.frozen:
            return jnp.zeros_like(p, dtype=self.dtype), ()
        if self.bound is not None:
            g = jnp.clip(g, -jnp.asarray(self.bound, g.dtype), jnp.asarray(self.bound, g.dtype))
        if self.norm is not None:
            g = g / self.norm.astype(g.dtype) * self.max_norm.astype(g.dtype)
        moments = self.format.decode(self.stored, self.dtype)
        with jax.numpy_dtype_promotion("standard"):  # complex moments times real scalars
            u, *moments = self.rule.function(self.hyperparams, g.astype(self.dtype), *moments)
        index = self.shard.global_indices(g.shape) if self.index is None and self.shard is not None else self.index
        random = formats.random_bits(g.shape, self.salt, self.count, index)
        return self.apply_decay_and_lr(u, p), self.format.encode(moments, self.stored, random)

    def update_master(self, g, p):
        """Return ``(x, stored)``: the new float32 master of a bfloat16 parameter, and the new moments."""
        x, g = join(p, self.remainder), g.astype(at_least_float32(g))
        u, stored = self.update(g, x)
        return apply_updates(x, u.astype(promote(g, x))), stored

    def apply_decay_and_lr(self, u, p):
        """Add weight decay to the rule's output ``u``, and multiply by minus the learning rate."""
        as_u = lambda x: jnp.asarray(x).astype(self.dtype)
        if self.weight_decay is not None:
            u = u + as_u(self.weight_decay) * p.astype(self.dtype)
        return as_u(self.minus_lr) * u


def update_leaf(leaf_update: LeafUpdate, g, p):
    """Return one leaf's new parameter, and its new state arrays: the remainder, if it has one, then the moments.

    XLA runs this on whole arrays, Pallas on tiles.
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
    """Arrays of a list of leaf updates."""

    scalars: list[jax.Array]  # distinct ones only: most are shared by many leaves
    leaf_arrays: list[tuple]  # (stored, remainder or None) of each leaf
    offsets: list | None = None  # offset of each leaf's `Shard`


class Settings(NamedTuple):
    """Static part of a list of leaf updates. Hashable, and equal for optimizers that differ only in numbers."""

    leaf_updates: tuple[LeafUpdate, ...]  # without arrays
    hyperparams_index: tuple[int, ...]  # for each leaf, which of the distinct `Hyperparams` it uses
    scalar_index: tuple[int, ...]  # for each scalar of `scalars_treedef`, its index in `Operands.scalars`
    scalars_treedef: Any  # of (distinct `Hyperparams`, `LEAF_SCALARS` of each leaf)
    global_shapes: tuple | None  # of the global arrays, if the leaves are shards


LEAVES_PER_PROGRAM = 32  # an eager update compiles at most this many leaves into one program
LEAF_SCALARS = ("minus_lr", "weight_decay", "bound", "norm", "max_norm", "count")


def pack(leaf_updates: list[LeafUpdate]) -> tuple[Settings, Operands]:
    """Split leaf updates into hashable settings and arrays. All leaves are shards, or none is."""
    distinct = {id(leaf.hyperparams): leaf.hyperparams for leaf in leaf_updates}
    order = {key: i for i, key in enumerate(distinct)}
    own_scalars = [[getattr(leaf, name) for name in LEAF_SCALARS] for leaf in leaf_updates]
    values, treedef = jax.tree.flatten((list(distinct.values()), own_scalars))
    scalars = {id(x): x for x in values}
    place = {key: i for i, key in enumerate(scalars)}
    shards = [leaf.shard for leaf in leaf_updates if leaf.shard is not None]
    removed = dict.fromkeys(("hyperparams", "remainder", "shard", "group", *LEAF_SCALARS)) | {"stored": ()}
    settings = Settings(
        leaf_updates=tuple(  # without an unused salt and name, so that equal leaves have equal settings
            leaf._replace(**({} if leaf.format.stochastic else {"salt": 0, "name": ""}), **removed)
            for leaf in leaf_updates
        ),
        hyperparams_index=tuple(order[id(leaf.hyperparams)] for leaf in leaf_updates),
        scalar_index=tuple(place[id(x)] for x in values),
        scalars_treedef=treedef,
        global_shapes=tuple(shard.global_shape for shard in shards) or None,
    )
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in scalars.values()]
    offsets = [shard.offset for shard in shards] or None
    return settings, Operands(arrays, [(leaf.stored, leaf.remainder) for leaf in leaf_updates], offsets)


def unpack(settings: Settings, operands: Operands) -> list[LeafUpdate]:
    """Rebuild the leaf updates that `pack` split."""
    hyperparams, own_scalars = settings.scalars_treedef.unflatten([operands.scalars[i] for i in settings.scalar_index])
    shards: list = [None] * len(settings.leaf_updates)
    if operands.offsets is not None and settings.global_shapes is not None:
        shards = [Shard(*x) for x in zip(operands.offsets, settings.global_shapes, strict=True)]
    rows = zip(
        settings.leaf_updates, settings.hyperparams_index, own_scalars, operands.leaf_arrays, shards, strict=True
    )
    return [
        leaf._replace(
            hyperparams=hyperparams[i],
            stored=stored,
            remainder=remainder,
            shard=shard,
            **dict(zip(LEAF_SCALARS, scalars, strict=True)),
        )
        for leaf, i, scalars, (stored, remainder), shard in rows
    ]


def as_state_arrays(leaf_arrays) -> tuple:
    """Reorder ``(stored, remainder)`` of `Operands.leaf_arrays` to ``(remainder, *stored)``, as in the new state."""
    stored, remainder = leaf_arrays
    return stored if remainder is None else (remainder, *stored)


@functools.partial(jax.jit, static_argnums=0)
def _compute_updates(settings, operands, grads, params) -> tuple[list[jax.Array], list[tuple]]:
    """Return each leaf's update, and its new state arrays: the remainder, if it has one, then the moments."""
    updates, new_arrays = [], []
    for leaf, g, p in zip(unpack(settings, operands), grads, params, strict=True):
        if leaf.remainder is None:
            u, new = leaf.update(g, p)
            u = u.astype(promote(g) if p is None else promote(g, p))
        else:
            x, new = leaf.update_master(g, p)
            u = update_to(p, x)
            new = (remainder_of(p, x, u), *new)
        updates.append(u)
        new_arrays.append(new)
    return updates, new_arrays


def _compute_updates_with_auto_axes(settings, operands, grads, params):
    """`_compute_updates` on a mesh with explicit axes. A parameter's update is sharded like its gradient."""
    like = grads, list(map(as_state_arrays, operands.leaf_arrays))
    return call_with_auto_axes(functools.partial(_compute_updates, settings), operands, grads, params, like=like)


class LeafwiseUpdate(NamedTuple):
    """The update of a whole tree, not yet computed: a `LeafUpdate` for each leaf, and how to rebuild the state.

    ``rebuild_state(state_arrays)`` returns the new state. ``state_arrays`` has a tuple for each leaf: its remainder, if
    it has one, then its moments in their format.
    """

    leaf_updates: list[LeafUpdate]
    rebuild_state: Callable[..., Any]


def _group_by_program(leaf_updates: list[LeafUpdate], grads: list, traced: bool) -> list[list[int]]:
    """Group the leaves' indices: each group is updated by one compiled program.

    Under a trace every leaf is its own group. JAX traces and lowers a jitted function once for all leaves with the same
    shapes and settings, and XLA inlines it. Eagerly, one program for all leaves is fastest. Above 32 leaves, groups of
    up to 32 similar leaves share a program, which bounds compile time.
    """
    if traced:
        return [[i] for i in range(len(leaf_updates))]
    if len(leaf_updates) <= LEAVES_PER_PROGRAM:
        return [list(range(len(leaf_updates)))] if leaf_updates else []
    similar = collections.defaultdict(list)
    for i, (leaf, g) in enumerate(zip(leaf_updates, grads, strict=True)):
        similar[np.shape(g), jnp.result_type(g), leaf.format.name, leaf.rule].append(i)
    return [
        indices[k : k + LEAVES_PER_PROGRAM]
        for indices in similar.values()
        for k in range(0, len(indices), LEAVES_PER_PROGRAM)
    ]


@dataclasses.dataclass(eq=False)
class UpdateFn:
    """A transformation's ``update`` function, with all that jadam needs to know about the transformation.

    The information is here because Flax rebuilds transformations from ``init`` and ``update``: attributes of the
    transformation itself would be lost. Compared and hashed by identity, as functions are.
    """

    leafwise: Callable[
        ..., LeafwiseUpdate
    ]  # leafwise(grads, state, params): checks the input, evaluates the schedules; may raise `NotFusible`
    made_by: str = ""  # the call that made the transformation, its repr
    inner: Any = None  # the wrapped transformation, if this one is a wrapper
    needs_gradient_values: bool = False  # whether `leafwise` reads the gradients' values, as for a norm, or only shapes
    after_step: Callable[..., Any] | None = None  # after_step(new_state, new_params) -> state, called by `jadam.step`
    step: Callable[..., Any] | None = None  # step(grads, state, params) -> (params, state), in place of `jadam.step`
    is_frozen: Callable[[str], bool] | None = None  # whether `jadam.by_path` freezes the parameter of this name
    fills_frozen: bool = False  # whether a frozen parameter needs a gradient, zeros if there is none

    def __call__(self, updates, state, params=None, **extra_args) -> Any:
        """Return Optax's ``(updates, new_state)``."""
        trainable = self.without_untrainable(updates, params)
        new_updates, state = self.compute(trainable, state, params, **extra_args)
        return new_updates if trainable is updates else _fill_with_zeros(new_updates, updates, params), state

    def without_untrainable(self, updates, params):
        """``updates`` with None for each frozen parameter that could not be trained, such as an array of integers.

        A parameter whose gradient is None is not updated, whatever its type.
        """
        if self.is_frozen is None:
            return updates
        if self.fills_frozen and params is not None:
            updates = _fill_frozen(self.is_frozen, updates, params)
        leaves, others = jax.tree.leaves(updates), jax.tree.leaves(params_with_gradients(params, updates)[0])
        trainable = checks.is_trainable
        if len(leaves) != len(others) or all(map(trainable, (*leaves, *others))):
            return updates
        frozen = map(self.is_frozen, leaf_names(updates))

        def gradient(g, p, frozen):
            """The gradient to use: zeros if only the gradient could not be trained."""
            if not frozen or (trainable(g) and trainable(p)):
                return g
            return jnp.zeros_like(p) if trainable(p) else None

        return jax.tree.unflatten(jax.tree.structure(updates), list(map(gradient, leaves, others, frozen)))

    def compute(self, updates, state, params=None, **extra_args) -> Any:
        """Return ``(updates, new_state)``, computed by XLA."""
        params, _ = params_with_gradients(params, updates)
        checks.check_values(params, "params")
        checks.check_same_devices(updates=updates, state=state, params=params)
        leaf_updates, rebuild_state = self.leafwise(updates, state, params)
        grads, structure = jax.tree.flatten(updates)
        params = [None] * len(grads) if params is None else jax.tree.leaves(params)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((leaf_updates[:1], grads, params)))
        updates, new_arrays = [None] * len(leaf_updates), [None] * len(leaf_updates)
        for group in _group_by_program(leaf_updates, grads, traced):
            own_grads, own_params = [grads[i] for i in group], [params[i] for i in group]
            run = _compute_updates if explicit_mesh(own_grads) is None else _compute_updates_with_auto_axes
            results = run(*pack([leaf_updates[i] for i in group]), own_grads, own_params)
            for i, u, new in zip(group, *results, strict=True):
                updates[i], new_arrays[i] = u, new
        return structure.unflatten(updates), rebuild_state(new_arrays)


def _fill_frozen(is_frozen, updates, params):
    """Put zeros for the gradients of frozen parameters that are None."""

    def fill(path, g, p):
        """The gradient ``g`` or zeros."""
        return jnp.zeros_like(p) if g is None and checks.is_trainable(p) and is_frozen(leaf_name(path)) else g

    return jax.tree_util.tree_map_with_path(fill, updates, params, is_leaf=lambda x: x is None)


def _fill_with_zeros(new_updates, updates, params):
    """Put zeros for the frozen parameters that `UpdateFn.without_untrainable` left out of ``new_updates``."""

    def fill(u, g, p):
        """The update of one parameter: zeros if it is a number. Others, such as random keys, have no zero."""
        left_out = u is None and g is not None and checks.is_array(p)
        is_number = left_out and not jnp.issubdtype(checks.dtype_of(p), jax.dtypes.extended)
        return jnp.zeros_like(p) if is_number else u

    params = params_with_gradients(params, updates)[0]
    return jax.tree.map(fill, new_updates, updates, params, is_leaf=lambda x: x is None)


@dataclasses.dataclass(eq=False)
class CustomUpdateFn(UpdateFn):
    """An `UpdateFn` whose ``update`` calls ``function``, while `jadam.step` uses ``leafwise``."""

    function: Callable[..., Any] = dataclasses.field(kw_only=True)  # function(updates, state, params, **extra_args)

    def compute(self, updates, state, params=None, **extra_args) -> Any:
        """Return ``(updates, new_state)``."""
        return self.function(updates, state, params, **extra_args)


def raise_not_fusible(grads, state, params) -> LeafwiseUpdate:
    """`UpdateFn.leafwise` of a transformation that is not a jadam optimizer: always raises `NotFusible`."""
    raise NotFusible("not a jadam optimizer (for a chain, use jadam.chain)")


def update_of(tx: optax.GradientTransformation) -> UpdateFn:
    """Return the `UpdateFn` of a transformation; for Optax's own, one that cannot be fused."""
    return tx.update if isinstance(tx.update, UpdateFn) else UpdateFn(raise_not_fusible)


class Transformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that `jadam.step` may fuse by its ``leafwise``. `Clip` and `Sharded` are not one."""

    update: UpdateFn  # pyright: ignore[reportIncompatibleVariableOverride]

    def __repr__(self):
        return self.update.made_by or super().__repr__()

    def __treescope_repr__(self, path, subtree_renderer):
        """The repr, for notebooks that use treescope."""
        from treescope import rendering_parts

        return rendering_parts.text(repr(self))


def identity(hp: Hyperparams) -> Hyperparams:
    """Return ``hp`` unchanged."""
    return hp


def scale_by_rule(
    rule: Rule,
    betas: dict[str, Any],
    scalars: dict[str, Any],
    mu_dtype: Any = None,
    moments: formats.FormatChoice = "float32",
    transform: Callable[[Hyperparams], Hyperparams] = identity,
) -> Transformation:
    """The transformation that applies ``rule`` to every leaf.

    Args:
        rule: the update rule.
        betas: decay rates by name, in [0, 1): numbers, scalar arrays or schedules.
        scalars: other hyperparameters by name, >= 0: numbers, scalar arrays or schedules.
        mu_dtype: dtype in which ``mu`` is stored; default the parameter's, at least float32.
        moments: how the moments are stored, see `jadam.scale_by_adam`.
        transform: applied to the `Hyperparams` once per step: the part of the rule that involves scalars only. Each
            function compiles its own program, so pass the same one for the same transform.
    """
    betas = {name: _beta(name, value) for name, value in betas.items()}
    checks.warn_of_unusual_betas(betas)
    moments = formats.by_name_or_function(moments)
    scalars = {name: _scalar(name, value) for name, value in scalars.items()}
    scheduled = [name for name, value in betas.items() if callable(value)]
    mu_dtype = checks.floating_dtype("mu_dtype", mu_dtype)
    format_for = formats.format_selector(moments, mu_dtype, betas if rule.int8 else None)
    quantized = rule.int8 and (moments == "int8" or callable(moments))
    state_type = QuantizedAdamState if quantized else rule.state_type
    fields = [name for name in state_type._fields if name not in ("count", "version")]
    scale_fields = fields[len(rule.moment_names) :]

    def init(params) -> Any:
        checks.check_trainable(params, "params")

        def init_leaf(path, p):
            """Return one parameter's initial arrays, one for each field of the state."""
            stored = format_for(path, p).init(p, len(rule.moment_names))
            return *stored, *(formats.placeholder(p) for _ in fields[len(stored) :])

        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        columns = _transpose([init_leaf(path, p) for path, p in leaves], len(fields))
        trees = list(map(structure.unflatten, columns))
        for name, tree, column in zip(fields, trees, columns, strict=True):
            if mu_dtype is None or name != "mu":
                checks.check_dtypes_kept(tree, column)
        trees = [
            beside_params(tree) if name in scale_fields else tree for name, tree in zip(fields, trees, strict=True)
        ]
        state = state_type(jnp.zeros([], jnp.int32), *trees, *([formats.version()] if quantized else []))
        return ScheduledBetasState({name: jnp.zeros([]) for name in scheduled}, state) if scheduled else state

    def leafwise(updates, state, params=None) -> LeafwiseUpdate:
        if scheduled:
            checks.check_state_type(state, ScheduledBetasState)
        corrections, state = state if scheduled else ({}, state)
        checks.check_corrections(corrections, scheduled)
        checks.check_state_type(state, state_type)
        if quantized:
            checks.check_version(state, formats.VERSION, convertible=1)
        checks.check_count(state.count)
        checks.check_gradients(updates, state, params, params_may_be_shapes=True)
        for name, tree in zip(rule.moment_names, state[1:], strict=False):
            checks.check_same_tree(updates, tree, "updates", f"state.{name}")
            if moments == "float32" and (name != "mu" or mu_dtype is None):
                checks.check_moments_wide(tree, name)
            if moments == "bfloat16":
                checks.check_moments_bfloat16(tree, name, state.mu)
        for name in scale_fields:
            checks.check_one_for_each(updates, getattr(state, name), f"state.{name}")
        checks.check_complex_gradients(updates, state.mu, params)
        count = state.count if isinstance(state.count, ConcreteCount) else jnp.asarray(state.count)
        hyperparams, next_count, corrections = _hyperparams_at(betas, scalars, count, corrections, transform)

        @functools.cache  # leaves of the same dtype and format share their Hyperparams
        def checked_hyperparams(dtype, format):
            """The `Hyperparams` in ``dtype``, NaN where ``format`` does not support them."""
            hp = format.nan_if_unsupported(hyperparams(dtype))
            return formats.nan_if_padded(hp, state.version) if format.name == "int8" else hp

        def leaf_update(path, g, *stored):
            """Return the `LeafUpdate` of one leaf."""
            format = formats.format_of(stored)
            own, unused = stored[: (n := format.num_arrays(len(rule.moment_names)))], stored[n:]
            checks.check_codes_not_cast(path, own[0].dtype, not all(map(formats.is_placeholder, unused)))
            dtype = at_least_float32(g, *own)
            hp, name = checked_hyperparams(real(dtype), format), leaf_name(path)
            return LeafUpdate(rule, hp, dtype, format, own, formats.leaf_salt(name), count, name=name)

        def rebuild_state(state_arrays):
            """The new state, with these arrays."""
            full = [(*new, *old[len(new) :]) for new, old in zip(state_arrays, arrays, strict=True)]
            columns = map(jax.tree.unflatten, structures, _transpose(full, len(fields)))
            new = state._replace(count=next_count, **dict(zip(fields, columns, strict=True)))
            return ScheduledBetasState(corrections, new) if scheduled else new

        leaves = jax.tree_util.tree_leaves_with_path(updates)
        trees = [getattr(state, name) for name in fields]
        structures = list(map(jax.tree.structure, trees))
        arrays = list(zip(*map(jax.tree.leaves, trees), strict=True)) if leaves else []
        rows = zip(leaves, arrays, strict=True)
        return LeafwiseUpdate([leaf_update(path, g, *stored) for (path, g), stored in rows], rebuild_state)

    return Transformation(init, UpdateFn(leafwise))


def _transpose(rows, n: int):
    """Return the ``n`` columns of ``rows``, which may be empty."""
    return list(zip(*rows, strict=True)) if rows else [()] * n


def _beta(name, value, schedule=True):
    """Check a decay rate."""
    hint = "Did you swap it with learning_rate or eps?"
    return checks.hyperparameter(name, value, "in [0, 1)", hint=hint, schedule=schedule, wide=True)


def _scalar(name, value, schedule=True):
    """Check a hyperparameter >= 0."""
    return checks.hyperparameter(name, value, ">= 0", schedule=schedule, wide=True)


class ConcreteCount(np.ndarray):
    """A count that schedules can read as a number while everything else is traced, as in `jadam.describe`."""


def _hyperparams_at(betas, scalars, count, corrections, transform):
    """Evaluate the hyperparameters of the step that follows ``count`` steps.

    Returns:
        A function from a dtype to `Hyperparams`, the next count, and the new bias corrections of scheduled betas.
    """

    def beta(name, count):
        """The checked value of a decay rate after ``count`` steps."""
        value = betas[name]
        return _beta(name, schedule_value(value, count), schedule=False) if callable(value) else value

    def scalar(name):
        """The checked value of another hyperparameter at this step."""
        value = scalars[name]
        return _scalar(name, schedule_value(value, count), schedule=False) if callable(value) else value

    concrete = isinstance(count, ConcreteCount)
    next_count = count + count.dtype.type(1) if concrete else _increment(count)
    scheduled = {}
    for name, correction in corrections.items():
        b, next_b = (checks.nan_if_out_of_range(beta(name, x), "in [0, 1)") for x in (count, next_count))
        value = scheduled_beta(b, next_b, correction)
        scheduled[name] = value if concrete else Beta(*map(jnp.asarray, value))  # static numbers would recompile
    constant = {name: value for name, value in betas.items() if name not in scheduled}
    scalars_now = {name: scalar(name) for name in scalars}
    numbers = tuple((name, x) for name, x in constant.items() if isinstance(x, float))
    arrays = {name: x for name, x in constant.items() if not isinstance(x, float)}
    make = _hyperparams if concrete or scheduled else _compiled_hyperparams

    @functools.cache  # per dtype, not per leaf
    def hyperparams(dtype):
        """The `Hyperparams` of this step in ``dtype``."""
        return make(transform, dtype, numbers, next_count, arrays, scalars_now, scheduled)

    return hyperparams, next_count, {name: value.correction for name, value in scheduled.items()}


def _hyperparams(transform, dtype, numbers, step, arrays, scalars, scheduled) -> Hyperparams:
    """Return the `Hyperparams` of ``step``, counted from 1.

    A decay rate is in ``numbers`` if it is a Python number, in ``arrays`` if it is an array, and in ``scheduled``, as a
    `Beta`, if it follows a schedule.
    """
    t = step.astype(dtype)
    arrays = {name: checks.nan_if_out_of_range(value, "in [0, 1)") for name, value in arrays.items()}
    return transform(
        Hyperparams(
            t=t,
            **{name: Beta(*(x.astype(dtype) for x in value)) for name, value in scheduled.items()},
            **{name: constant_beta(value, t, dtype) for name, value in {**dict(numbers), **arrays}.items()},
            **{name: jnp.asarray(checks.nan_if_out_of_range(x, ">= 0"), dtype) for name, x in scalars.items()},
        )
    )


# For eager updates: one program, not one per operation.
_compiled_hyperparams = jax.jit(_hyperparams, static_argnums=(0, 1, 2), inline=True)
_increment = jax.jit(optax.safe_increment, inline=True)


def scale_by_learning_rate_and_decay(tx: Transformation, learning_rate, *decay_args) -> Transformation:
    """Chain ``tx`` with weight decay and ``-learning_rate``. The stages and states are Optax's, the arithmetic float32.

    ``decay_args`` are ``weight_decay, mask, max_lr``; without them there is no decay stage. With ``max_lr`` the decay
    is ``weight_decay * learning_rate / max_lr``, which makes it independent of the peak learning rate.

    Optax multiplies in the updates' dtype, which rounds the learning rate to bf16 for bf16 gradients. Here only the
    final update is rounded.
    """
    stages: list[Any] = [tx]
    weight_decay: Any = None
    mask = None
    if decay_args:
        weight_decay, mask, max_lr = decay_args
        weight_decay = nan_if_invalid("weight_decay", checks.hyperparameter("weight_decay", weight_decay, ">= 0"))
        if max_lr is not None:
            max_lr = checks.hyperparameter("max_lr", max_lr, "> 0", schedule=False)
            weight_decay = independent_decay(weight_decay, max_lr)
        mask = None if mask is None else checks.mask_function(mask)
        stages.append(optax.add_decayed_weights(weight_decay, mask))
    decay_is_scheduled = callable(weight_decay)
    learning_rate = checks.hyperparameter("learning_rate", learning_rate, ">= 0", hint="To maximise, negate the loss.")
    learning_rate = nan_if_invalid("learning_rate", learning_rate)
    stages.append(optax.scale_by_learning_rate(learning_rate))
    chain = optax.chain(*stages)

    def leafwise(updates, state, params):
        checks.check_chain_state(state, len(stages))
        checks.check_gradients(updates, state, params, params_may_be_shapes=True)
        if decay_args and params is None:
            raise ValueError("weight_decay needs params: call update(updates, state, params).")
        if callable(learning_rate):
            checks.check_schedule_state(state[-1], f"state[{len(stages) - 1}]", "learning_rate")
        leaf_updates, rebuild_state = tx.update.leafwise(updates, state[0], params)
        widest = jax.dtypes.canonicalize_dtype(np.float64)
        zero, one = jnp.zeros([], widest), jnp.ones([], widest)  # an Optax stage, applied to 1, returns its factor
        minus_lr, lr_state = stages[-1].update(one, state[-1])
        if not decay_args:
            decays, decay_states = [None] * len(leaf_updates), ()
        else:
            inner = state[1] if mask is None else state[1].inner_state
            if decay_is_scheduled:
                checks.check_schedule_state(inner, "state[1]", "weight_decay")
            decay, inner = optax.add_decayed_weights(weight_decay).update(zero, inner, one)
            decays = [decay if on else None for on in _leaf_mask(mask, params)]
            decay_states = (inner if mask is None else state[1]._replace(inner_state=inner),)
        leaf_updates = [
            leaf._replace(minus_lr=minus_lr, weight_decay=x) for leaf, x in zip(leaf_updates, decays, strict=True)
        ]
        return LeafwiseUpdate(leaf_updates, lambda state_arrays: (rebuild_state(state_arrays), *decay_states, lr_state))

    return Transformation(chain.init, UpdateFn(leafwise))


def _leaf_mask(mask, params) -> list[bool]:
    """Evaluate a mask of `optax.masked`, which may be a prefix tree, for each leaf."""
    leaves, structure = jax.tree.flatten(True if mask is None else mask(params))
    parts = map(jax.tree.leaves, structure.flatten_up_to(params))
    return [on for on, part in zip(leaves, parts, strict=True) for _ in part]


def schedule_value(value, count):
    """Evaluate a hyperparameter after ``count`` steps. Schedules may promote dtypes, even under strict promotion."""
    if not callable(value):
        return value
    with jax.numpy_dtype_promotion("standard"):
        return value(count)


def nan_if_invalid(name: str, value):
    """Guard a learning rate or weight decay, or a schedule of one: where it is traced and out of range, it is NaN."""
    if not callable(value):
        return checks.nan_if_out_of_range(value, ">= 0")

    def schedule(count):
        """The checked value of the schedule; a traced value out of range becomes NaN."""
        x = schedule_value(value, count)
        if isinstance(x, jax.Array):
            checks.check_scalar(name, x.shape)
            return checks.nan_if_out_of_range(x, ">= 0")
        return checks.hyperparameter(name, x, ">= 0", schedule=False)

    return schedule


def independent_decay(weight_decay, max_lr):
    """``weight_decay / max_lr``, also of a schedule: makes weight decay independent of the peak learning rate."""
    return (
        (lambda count: schedule_value(weight_decay, count) / max_lr)
        if callable(weight_decay)
        else weight_decay / max_lr
    )
