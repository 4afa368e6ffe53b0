"""Parameters and moments in one pass over memory, where a kernel serves; elsewhere Optax's two calls.

`step` makes the plan where it is called, so that schedules are called there and scalars are arrays, and binds one
primitive for all leaves: arrays in, arrays out, its settings hashable. What becomes of it is decided when it is lowered
for a platform, so compilation ahead of time and `jax.export` choose by their target: a kernel where one is active,
otherwise XLA, which is also what `jax.vmap` and differentiation see.
"""

import functools
import logging
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jadam._core import checks
from jadam._core.numerics import apply_updates
from jadam._core.trees import params_with_gradients
from jadam._fused import pallas
from jadam._fused.backends import backends, off, platform_of
from jadam._fused.cpu import kernel as cpu
from jadam._transformation.transformation import (
    ConcreteCount,
    NotFusible,
    Operands,
    not_fusible,
    pack,
    stored_arrays,
    unpack,
    update_leaf,
    update_of,
)


def step(tx: optax.GradientTransformation, grads, state, params):
    """``tx.update`` and `optax.apply_updates` in one pass over memory.

    Memory traffic is what Adam costs: at best 28 bytes per float32 parameter, read and written once. The two calls are
    two passes at least on a CPU.

    One pass, for jadam's optimizers, `jadam.chain` and `jadam.exact_bf16` around them: on a CPU by a compiled kernel,
    see `jadam.backends`; on GPU and TPU by XLA in float32, and by a kernel in Pallas where XLA would take several, as
    for int8 moments. Anything else, and any leaf that no kernel takes, is done by the two calls or what they amount to;
    `jadam.describe` tells which and why. On several devices the kernels serve with `jadam.sharding.zero1` and inside
    `jax.shard_map`; otherwise XLA shards the two calls.

    Args:
        tx: any Optax transformation. One that needs more than gradients, state and parameters has no place here.
        grads: gradients, a tree like ``params``.
        state: of ``tx``.
        params: parameters.

    Returns:
        ``(params, state)``. Donate both and take them in that order, as below: then the kernels work in place. JAX
        gives the first donated array of a shape to the first result of that shape; in another order XLA must copy.

    Raises:
        ValueError: arrays on different devices, or donated to an earlier step; and what ``tx.update`` raises.
        TypeError: a leaf that is no array; and what ``tx.update`` raises.

    Example:
        >>> import functools, jax, jax.numpy as jnp, jadam
        >>> tx = jadam.adamw(0.1)
        >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
        ... def train_step(params, state, x):
        ...     grads = jax.grad(lambda w: jnp.sum((w - x) ** 2))(params)
        ...     return jadam.step(tx, grads, state, params)
        >>> params = jnp.ones(2)
        >>> params, state = train_step(params, tx.init(params), jnp.array([0.0, 3.0]))
        >>> print(*(f"{x:.2f}" for x in params))
        0.90 1.10
    """
    checks.transformation("step needs", tx)
    update = update_of(tx)
    if update.step is not None:
        return update.step(grads, state, params)
    if update.fuse is not_fusible:
        return update_and_apply(tx, grads, state, params)
    whole = params
    params, put = params_with_gradients(params, grads)
    for tree, what in ((grads, "grads"), (state, "state"), (params, "params")):
        checks.values(tree, what)
    checks.together(grads=grads, state=state, params=params)
    if params is None:
        raise ValueError("step needs params: call step(tx, grads, state, params).")
    try:
        leaf_updates, rebuild_state = update.fuse(grads, state, params)
    except NotFusible:
        return update_and_apply(tx, grads, state, whole)
    settings, operands = pack(leaf_updates)
    leaves, structure = jax.tree.flatten(params)
    arrays, tree = jax.tree.flatten((operands, jax.tree.leaves(grads), leaves))
    leaves, stored = _results(tree, step_p.bind(*arrays, settings=settings, tree=tree))
    # Times 1, which XLA leaves out: checkify looks for NaN behind operations that it knows, such as a product.
    leaves = [p * np.ones([], p.dtype) if isinstance(p, jax.core.Tracer) else p for p in leaves]
    return put(leaves), _with_record(update, rebuild_state(stored), structure.unflatten(leaves))


def _results(tree, arrays) -> tuple[list, list[tuple]]:
    """The new parameters, and what is stored, of the primitive's results."""
    return jax.tree.unflatten(_structure_of_results(tree), arrays)


@functools.lru_cache(maxsize=256)
def _structure_of_results(tree):
    operands, _, params = tree.unflatten(range(tree.num_leaves))
    return jax.tree.structure((params, list(map(stored_arrays, operands.leaf_arrays))))


def update_and_apply(tx, grads, state, params):
    """What `step` amounts to."""
    updates, state = tx.update(grads, state, params)
    params, put = params_with_gradients(params, updates)
    return put(jax.tree.leaves(apply_updates(params, updates))), state


def why_not_fused(tx, grads, state, params) -> str | None:
    """Why `step` must be two calls whatever the platform, or None. Raises what the plan's checks raise."""

    def fuse(grads, state, params):
        return pack(update_of(tx).fuse(grads, _with_known_counts(state), params).leaf_updates)[1]

    try:
        jax.eval_shape(fuse, grads, state, params)
    except NotFusible as reason:
        return str(reason)
    return None


def _with_known_counts(state):
    """``state`` with NumPy's 0 for every count, so that schedules get a number where all else is traced."""
    is_count = lambda x: jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda x: np.zeros([], x.dtype).view(ConcreteCount) if is_count(x) else x, state)


def why_leaves_not_fused(platform, tx, grads, state, params) -> list[tuple[str, str | None]]:
    """For every leaf its rule of `jadam.by_path`, and why it takes a platform more than one pass, or None.

    Kernels are taken to be active.
    """
    found = []
    unsupported_reason = (
        cpu.unsupported_reason if platform == "cpu" else functools.partial(pallas.unsupported_reason, platform)
    )

    def fuse(grads, state, params):
        leaf_updates = update_of(tx).fuse(grads, _with_known_counts(state), params).leaf_updates
        for leaf_update, g, p in zip(leaf_updates, jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
            found.append((leaf_update.group, None if leaf_update.frozen else unsupported_reason(leaf_update, g, p)))

    jax.eval_shape(fuse, grads, state, params)
    return found


def _with_record(update, state, params):
    """The new state, with a record in it where `jadam.record` is due."""
    return state if update.after_step is None else update.after_step(state, params)


def step_sharded(tx, grads, state, params, mesh, specs, first):
    """`step` on a mesh, in parts: ``specs`` divide the leaves, ``first(shape, spec, mesh)`` is where a part begins.

    The plan is of whole arrays, so that a norm is that of all gradients; each device then does its parts of the jobs.
    """
    update = update_of(tx)
    leaf_updates, rebuild_state = update.fuse(grads, state, params)
    leaves, structure = jax.tree.flatten(params)
    settings, operands = pack(leaf_updates, [p.shape for p in leaves])
    leaves, stored = _on_mesh(settings, mesh, tuple(specs), first, operands, jax.tree.leaves(grads), leaves)
    params = structure.unflatten(leaves)
    return params, _with_record(update, rebuild_state(stored), params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _on_mesh(settings, mesh, specs, first, operands, grads, params):
    specs = list(specs)

    def body(operands, grads, params):
        offsets = [first(shape, spec, mesh) for shape, spec in zip(settings.global_shapes, specs, strict=True)]
        arrays, tree = jax.tree.flatten((operands._replace(offsets=offsets), grads, params))
        return _results(tree, step_p.bind(*arrays, settings=settings, tree=tree))

    of_owned = [jax.tree.map(lambda _, spec=spec: spec, x) for x, spec in zip(operands.leaf_arrays, specs, strict=True)]
    of_operands = Operands(jax.tree.map(lambda _: PartitionSpec(), operands.scalars), of_owned, None)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(of_operands, specs, specs),
        out_specs=(specs, list(map(stored_arrays, of_owned))),
        check_vma=False,
    )(operands, grads, params)


KERNELS: dict[str, Any] = {  # kernel(jobs, grads, params) gives None for the leaves it leaves to XLA
    "cpu": cpu.kernel,
    **{platform: functools.partial(pallas.kernel, platform) for platform in pallas.PLATFORMS},
}

step_p = Primitive("jadam_step")
step_p.multiple_results = True


def _step_leaves(*arrays, settings, tree, platform):
    """What the primitive does: the kernel where the platform has one that is active, XLA elsewhere."""
    operands, grads, params = tree.unflatten(arrays)
    leaf_updates = unpack(settings, operands)
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)  # else JAX looks for the operation that made a NaN
    serves = traced and platform in KERNELS and backends()[platform].kernel is not None
    if traced and platform == "cpu" and not serves and not off():
        _warn(backends()["cpu"].reason)
    done: list = KERNELS[platform](leaf_updates, grads, params) if serves else [None] * len(leaf_updates)
    for i, (leaf_update, g, p) in enumerate(zip(leaf_updates, grads, params, strict=True)):
        if done[i] is None:
            done[i] = update_leaf(leaf_update, g, p)
    return jax.tree.leaves(([p for p, _ in done], [stored for _, stored in done]))


@functools.cache  # once
def _warn(reason):
    logging.getLogger("jadam").warning(
        "jadam.step takes about 1.7 times as long on this CPU without its kernel: %s", reason
    )


_step_leaves_by_xla = functools.partial(_step_leaves, platform=None)
_compiled = jax.jit(_step_leaves, static_argnames=("settings", "tree", "platform"))


@functools.partial(jax.jit, static_argnames=("settings", "tree"))
def _compiled_on_several_devices(*arrays, settings, tree):
    """As in a user's jit, so that results have the same shardings."""
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)  # else JAX looks for the operation that made a NaN
    return (step_p.bind if traced else _step_leaves_by_xla)(*arrays, settings=settings, tree=tree)


@step_p.def_impl
def _(*arrays, settings, tree):
    with jax.disable_jit(False):  # so that the kernel serves, and results are the same, where the user's own jit is off
        platform = _platform_of(arrays)
        if platform is None:
            return _compiled_on_several_devices(*arrays, settings=settings, tree=tree)
        return _compiled(*arrays, settings=settings, tree=tree, platform=platform)


def _platform_of(arrays) -> str | None:
    """That of the one device on which the arrays are, None if they are on several."""
    arrays = [x for x in arrays if isinstance(x, jax.Array)]
    if not arrays:
        return None
    one = next((x for x in arrays if x.committed), arrays[0])
    devices = one.sharding.device_set
    return platform_of(next(iter(devices))) if len(devices) == 1 else None


@step_p.def_abstract_eval
def _(*avals, settings, tree):
    operands, _, params = tree.unflatten(avals)
    if not avals:
        return []
    results = [x.strip_weak_type() for x in jax.tree.leaves((params, list(map(stored_arrays, operands.leaf_arrays))))]
    return _varying_as(avals, results)


def _varying_as(avals, results):
    """``results`` varying over the axes of a mesh over which any of ``avals`` does, within `jax.shard_map`."""
    if hasattr(avals[0], "vma"):  # JAX before 0.10
        varying = frozenset().union(*(x.vma for x in avals))
        return [x.update(vma=varying) for x in results]
    varying = frozenset().union(*(x.manual_axis_type.varying for x in avals))
    return [x.update(manual_axis_type=x.manual_axis_type.update(varying=varying)) for x in results]


def _lowering(ctx, *arrays, settings, tree, platform):
    """A platform's kernel where it sees whole arrays, else XLA."""
    function = functools.partial(_step_leaves, platform=platform if _is_unsharded(ctx) else None)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *arrays, settings=settings, tree=tree)


def _is_unsharded(ctx) -> bool:
    """Whether a call sees all of its arrays: one device, or every axis of the mesh is manual as within `jax.shard_map`.

    Otherwise XLA's partitioner would gather what an opaque call gets.
    """
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


mlir.register_lowering(step_p, functools.partial(_lowering, platform=None))
for platform in KERNELS:
    mlir.register_lowering(step_p, functools.partial(_lowering, platform=platform), platform=platform)


def _batch(arrays, dims, **settings):
    out = jax.vmap(functools.partial(_step_leaves_by_xla, **settings), in_axes=dims)(*arrays)
    return out, [0] * len(out)


def _jvp(primals, tangents, **settings):
    tangents = map(ad.instantiate_zeros, tangents)
    function = functools.partial(_step_leaves_by_xla, **settings)
    out, tangents = jax.jvp(function, tuple(primals), tuple(tangents))
    is_zero = lambda t: t.dtype == jax.dtypes.float0
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if is_zero(t) else t for x, t in zip(out, tangents, strict=True)
    ]


batching.primitive_batchers[step_p] = _batch
ad.primitive_jvps[step_p] = _jvp
