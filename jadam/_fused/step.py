"""`jadam.step`: update parameters and moments in one pass over memory.

`step` builds one `LeafUpdate` per leaf, which calls the schedules and makes every scalar an array. It then binds one
JAX primitive for all leaves, with hashable settings. The kernel is chosen when the primitive is lowered for a platform,
so ahead-of-time compilation and `jax.export` choose it by their target. XLA does the leaves that no kernel supports,
and everything under `jax.vmap` and differentiation.
"""

from __future__ import annotations

import functools
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
from jadam._core.meshes import call_with_auto_axes, explicit_mesh
from jadam._core.numerics import apply_updates
from jadam._core.trees import leaf_names, params_with_gradients
from jadam._fused import pallas, partitioning, shards
from jadam._fused.backends import backends, kernels_disabled, platform_of, warn_once
from jadam._fused.cpu import kernel as cpu
from jadam._moments.int8 import Int8CutBlocks
from jadam._transformation.transformation import (
    ConcreteCount,
    LeafUpdate,
    NotFusible,
    Operands,
    as_state_arrays,
    pack,
    raise_not_fusible,
    unpack,
    update_leaf,
    update_of,
)


def step(
    tx: optax.GradientTransformation, grads: optax.Updates, state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """Run ``tx.update`` and `optax.apply_updates` in one pass over memory.

    Adam's cost is memory traffic: at best 28 bytes per float32 parameter, each read or written once. On a CPU,
    ``tx.update`` and `optax.apply_updates` take at least two passes.

    jadam's optimizers are fused into one pass, also inside `jadam.chain` and `jadam.exact_bf16`. On a CPU a compiled
    kernel does this, see `jadam.backends`. On GPU and TPU XLA does it for float32, and a Pallas kernel where XLA needs
    several passes, such as for int8 moments. XLA does leaves that no kernel supports. For any other transformation
    `step` calls ``tx.update`` and `optax.apply_updates`. `jadam.describe` shows what is fused, and the reason if not.

    On several devices each device updates its shards in the same way: on CPU and GPU under plain `jax.jit`, and on any
    platform on a mesh with explicit axes, with `jadam.sharding.sharded` or `zero1`, and inside `jax.shard_map`. On a
    TPU mesh whose axes are ``Auto``, XLA does the step and partitions it, unless `jadam.sharding.sharded` declares the
    shardings. Where parameters and state are sharded alike, nothing is sent between devices.

    The state may be in host memory between steps, not within. Before `step` and in the same jitted function, call
    ``state = jax.device_put(state, jax.memory.Space.Device)``, and after it ``jax.device_put(state,
    jax.memory.Space.Host)``.

    Args:
        tx: any Optax transformation. Transformations that need extra arguments are not supported.
        grads: gradients, a tree like ``params``.
        state: the state of ``tx``.
        params: parameters.

    Returns:
        ``(params, state)``: the new parameters, not updates to apply. Donate both and pass them in this order, as
        below, to update them in place. JAX gives the first donated array of a shape to the first result of that shape.
        In another order XLA must copy. A loop that is interrupted between the donation and the assignment, as in a
        notebook, has lost both: keep a copy, or do not donate.

    Raises:
        ValueError: arrays are on different devices, or were donated to an earlier step; the state is in host memory;
            and what ``tx.update`` raises.
        TypeError: a leaf is not an array; and what ``tx.update`` raises.

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
    checks.check_transformation("step needs", tx)
    update = update_of(tx)
    if update.step is not None:
        return update.step(grads, state, params)
    if update.leafwise is raise_not_fusible:
        return update_and_apply(tx, grads, state, params)
    grads = update.without_untrainable(grads, params)
    all_params = params
    params, merge = params_with_gradients(params, grads)
    for tree, what in ((grads, "grads"), (state, "state"), (params, "params")):
        checks.check_values(tree, what)
    checks.check_same_devices(grads=grads, state=state, params=params)
    if grads is None or params is None:
        raise ValueError(f"{'params' if params is None else 'grads'} is None. Call step(tx, grads, state, params).")
    try:
        leaf_updates, rebuild_state = update.leafwise(grads, state, params)
    except NotFusible:
        return update_and_apply(tx, grads, state, all_params)
    leaves, structure = jax.tree.flatten(params)
    mesh = explicit_mesh(leaves)
    if mesh is None:
        arrays, static = _flatten_arguments(leaf_updates, jax.tree.leaves(grads), leaves)
        leaves, arrays = _unflatten_results(static["treedef"], step_p.bind(*arrays, **static))
    else:
        leaves, arrays = _step_on_explicit_mesh(leaf_updates, jax.tree.leaves(grads), leaves, mesh)
    untouched = [x.frozen and x.remainder is None for x in leaf_updates]
    leaves = [old if keep else new for keep, old, new in zip(untouched, jax.tree.leaves(params), leaves, strict=True)]
    # checkify looks for NaN only after primitives that it knows, such as mul. XLA removes this product with 1.
    leaves = [jax.lax.mul(p, np.ones([], p.dtype)) if isinstance(p, jax.core.Tracer) else p for p in leaves]
    return merge(leaves), _after_step(update, rebuild_state(arrays), structure.unflatten(leaves))


def _step_on_explicit_mesh(leaf_updates, grads: list, params: list, mesh) -> tuple[list, list[tuple]]:
    """Return the new parameters and each leaf's new state arrays, on a mesh of which some or all axes are explicit."""
    if mesh.are_all_axes_explicit:
        specs = [shards.spec_of_leaf(x, p, mesh) for x, p in zip(leaf_updates, params, strict=True)]
        return _step_on_mesh(leaf_updates, grads, params, mesh, specs)
    settings, operands = pack(leaf_updates)
    return _step_with_auto_axes(settings, operands, grads, params)


@functools.partial(jax.jit, static_argnums=0)
def _step_with_auto_axes(settings, operands, grads, params):
    """Bind the primitive, for which all axes of the mesh are made ``Auto``."""
    like = params, list(map(as_state_arrays, operands.leaf_arrays))
    run = lambda operands, grads, params: _bind(unpack(settings, operands), grads, params)
    return call_with_auto_axes(run, operands, grads, params, like=like)


def _bind(leaf_updates: list[LeafUpdate], grads: list, params: list) -> tuple[list, list[tuple]]:
    """Bind the primitive. Returns the new parameters and each leaf's new state arrays."""
    arrays, static = _flatten_arguments(leaf_updates, grads, params)
    return _unflatten_results(static["treedef"], step_p.bind(*arrays, **static))


def _flatten_arguments(leaf_updates: list[LeafUpdate], grads: list, params: list) -> tuple[list, dict[str, Any]]:
    """The arrays and the static parameters of the primitive."""
    settings, operands = pack(leaf_updates)
    arrays, treedef = jax.tree.flatten((operands, grads, params))
    return arrays, {"settings": settings, "treedef": treedef}


def _unflatten_results(treedef, arrays) -> tuple[list, list[tuple]]:
    """The new parameters and each leaf's new state arrays, from the primitive's flat results."""
    return jax.tree.unflatten(_result_structure(treedef), arrays)


@functools.lru_cache(maxsize=256)
def _result_structure(treedef):
    """The structure of the primitive's results: the parameters, and the state arrays of each leaf."""
    operands, _, params = treedef.unflatten(range(treedef.num_leaves))
    return jax.tree.structure((params, list(map(as_state_arrays, operands.leaf_arrays))))


def update_and_apply(tx, grads, state, params):
    """One step by ``tx.update`` and `optax.apply_updates`."""
    updates, state = tx.update(grads, state, params)
    params, merge = params_with_gradients(params, updates)
    names, old, new = leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(apply_updates(params, updates))
    is_frozen = update_of(tx).is_frozen or (lambda name: False)
    return merge([p if is_frozen(name) else x for name, p, x in zip(names, old, new, strict=True)]), state


def why_not_fused(tx, grads, state, params) -> str | None:
    """Return why `step` cannot be fused on any platform, or None. Raises what ``tx.update`` raises."""

    def try_fuse(grads, state, params):
        """Raise `NotFusible`, or return arrays, as a traced function must."""
        return pack(update_of(tx).leafwise(grads, _with_concrete_counts(state), params).leaf_updates)[1]

    try:
        jax.eval_shape(try_fuse, grads, state, params)
    except NotFusible as reason:
        return str(reason)
    return None


def _with_concrete_counts(state):
    """``state`` with every count replaced by a NumPy 0, so that schedules get a number while all else is traced."""
    is_count = lambda x: jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda x: np.zeros([], x.dtype).view(ConcreteCount) if is_count(x) else x, state)


def why_leaves_not_fused(
    platform, tx, grads, state, params, shard_shapes=None, shardings_known=True
) -> list[tuple[str, str | None]]:
    """Return for each leaf its `jadam.by_path` rule and why it is not fused on ``platform``; both may be None.

    The CPU kernel is assumed to be available. On a mesh, ``shard_shapes`` has the shape of each leaf's shards, and
    ``shardings_known`` tells whether `step` knows them when it is lowered.
    """
    found = []

    def unsupported_reason(leaf_update, g, p):
        """Return why a leaf, or its shard, is not updated in one pass."""
        if platform == "cpu":
            return cpu.unsupported_reason(leaf_update, g, p)
        if not shardings_known and not pallas.fused_by_xla(platform, leaf_update):
            return "on several devices it needs jadam.sharding.sharded"
        return pallas.why_several_passes(platform, leaf_update, g, p)

    def find_reasons(grads, state, params):
        """Append every leaf's group and reason to ``found``."""
        leaf_updates = update_of(tx).leafwise(grads, _with_concrete_counts(state), params).leaf_updates
        leaves = jax.tree.leaves(params)
        shapes = [p.shape for p in leaves] if shard_shapes is None else shard_shapes
        for leaf_update, g, p, shape in zip(leaf_updates, jax.tree.leaves(grads), leaves, shapes, strict=True):
            arrays = shards.shard_avals(leaf_update, g, p, shape)
            found.append((leaf_update.group, None if leaf_update.frozen else unsupported_reason(*arrays)))

    jax.eval_shape(find_reasons, grads, state, params)
    return found


def _after_step(update, state, params):
    """The new state after ``update.after_step``, with which `jadam.record` adds its statistics."""
    return state if update.after_step is None else update.after_step(state, params)


LEAVES_PER_SHARD_MAP = 64  # Shardy takes time quadratic in the arrays of a jax.shard_map


def step_sharded(tx, grads, state, params, mesh, specs):
    """`step` on a mesh, where each device updates its shard of every leaf.

    The leaf updates are made from global arrays, so that a norm is that of all gradients.

    Args:
        tx, grads, state, params: as for `step`, global arrays.
        mesh: `jax.sharding.Mesh`.
        specs: a `PartitionSpec` per leaf, with an entry for each dimension.
    """
    update = update_of(tx)
    leaf_updates, rebuild_state = update.leafwise(grads, state, params)
    leaves, structure = jax.tree.flatten(params)
    leaves, arrays = _step_on_mesh(leaf_updates, jax.tree.leaves(grads), leaves, mesh, specs)
    params = structure.unflatten(leaves)
    return params, _after_step(update, rebuild_state(arrays), params)


def _step_on_mesh(leaf_updates, grads: list, params: list, mesh, specs) -> tuple[list, list[tuple]]:
    """Update every device's shards. Returns the new parameters and each leaf's new state arrays."""
    cut = [shards.cuts_blocks(x, p.shape, spec, mesh) for x, p, spec in zip(leaf_updates, params, specs, strict=True)]
    for leaf_update, p, spec, is_cut in zip(leaf_updates, params, specs, cut, strict=True):
        if is_cut:
            partitioning.warn_of_cut_blocks(leaf_update.name, p.shape, spec)
    new_params, new_arrays = [], []
    for start in range(0, len(params), LEAVES_PER_SHARD_MAP):
        part = slice(start, start + LEAVES_PER_SHARD_MAP)
        settings, operands = pack(leaf_updates[part])
        static = settings, mesh, tuple(specs[part]), tuple(cut[part])
        results = _step_shards(*static, operands, grads[part], params[part])
        new_params += results[0]
        new_arrays += results[1]
    return new_params, new_arrays


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step_shards(settings, mesh, specs, cut, operands, grads, params):
    """Update every device's shards in `jax.shard_map`."""
    shapes, specs = [p.shape for p in params], list(specs)
    blocks = [leaf_update.block for leaf_update in unpack(settings, operands)]
    of_scales = [PartitionSpec(*spec[:-1], None) if is_cut else spec for spec, is_cut in zip(specs, cut, strict=True)]
    of_state = list(map(shards.leaf_arrays_of, operands.leaf_arrays, blocks, specs, of_scales))

    def body(operands, grads, params):
        """The step on the shards of one device."""
        rows = zip(unpack(settings, operands), shapes, specs, blocks, cut, strict=True)
        leaf_updates = [shards.with_shard(x, mesh, *where) for x, *where in rows]
        return _step_shards_of_device(leaf_updates, grads, params)

    of_operands = Operands(jax.tree.map(lambda _: PartitionSpec(), operands.scalars), of_state, None)
    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(of_operands, specs, specs),
        out_specs=(specs, list(map(as_state_arrays, of_state))),
        check_vma=False,
    )
    if not mesh.are_all_axes_explicit:
        return run(operands, grads, params)
    to_specs = lambda arrays, specs: jax.tree.map(lambda x, spec: _reshard(x, mesh, spec), arrays, specs)
    of_params, of_arrays = jax.tree.map(
        lambda x: jax.typeof(x).sharding.spec, (params, list(map(as_state_arrays, operands.leaf_arrays)))
    )
    operands = operands._replace(leaf_arrays=to_specs(operands.leaf_arrays, of_state))
    params, arrays = run(operands, to_specs(grads, specs), to_specs(params, specs))
    return to_specs(params, of_params), to_specs(arrays, of_arrays)


def _reshard(x, mesh, spec):
    """``x`` resharded on an explicit mesh."""
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))


def _step_shards_of_device(leaf_updates, grads, params):
    """Update the shards of one device: by the primitive, or by XLA where they cut int8 blocks.

    Returns:
        The new parameters, and each leaf's new state arrays.
    """
    results: list = [None] * len(params)
    whole = []
    for i, (leaf_update, g, p) in enumerate(zip(leaf_updates, grads, params, strict=True)):
        if isinstance(leaf_update.format, Int8CutBlocks):
            results[i] = update_leaf(leaf_update, g, p)
        else:
            whole.append(i)
    new = _bind(*([column[i] for i in whole] for column in (leaf_updates, grads, params)))
    for i, *result in zip(whole, *new, strict=True):
        results[i] = result
    return [p for p, _ in results], [x for _, x in results]


KERNELS: dict[str, Any] = {  # run_kernel(leaf_updates, grads, params) returns None for the leaves left to XLA
    "cpu": cpu.run_kernel,
    **{platform: functools.partial(pallas.run_kernel, platform) for platform in pallas.PLATFORMS},
}


def _why_no_kernel(platform, leaf_update, g, p) -> str | None:
    """Return why the kernel of ``platform`` does not run for a leaf, or None."""
    if platform == "cpu":
        return cpu.unsupported_reason(leaf_update, g, p)
    if pallas.fused_by_xla(platform, leaf_update):
        return "XLA takes one pass"
    return pallas.why_several_passes(platform, leaf_update, g, p)


step_p = Primitive("jadam_step")
step_p.multiple_results = True


def _step_leaves(*arrays, settings, treedef, platform, num_devices=1):
    """Implementation of the primitive: the platform's kernel for the leaves that it supports, XLA for the others."""
    operands, grads, params = treedef.unflatten(arrays)
    leaf_updates = unpack(settings, operands)
    # Arrays are concrete only under jax_debug_nans, which runs this op by op to find the one that made a NaN.
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    has_kernel = platform in KERNELS and backends()[platform].kernel is not None
    if traced and platform == "cpu" and not has_kernel and not kernels_disabled():
        reason = backends()["cpu"].reason
        warn_once(f"jadam.step takes about 1.7 times as long on this CPU without its kernel: {reason}")
    use_kernel = traced and has_kernel and all(map(checks.has_constant_shape, params))  # symbolic in `jax.export`
    results: list = [None] * len(leaf_updates)
    if use_kernel and num_devices > 1:
        results = partitioning.run_kernel(
            functools.partial(_why_no_kernel, platform),
            _step_shards_of_device,
            num_devices,
            leaf_updates,
            grads,
            params,
        )
    elif use_kernel:
        results = KERNELS[platform](leaf_updates, grads, params)
    for i, (leaf_update, g, p) in enumerate(zip(leaf_updates, grads, params, strict=True)):
        if results[i] is None:
            results[i] = update_leaf(leaf_update, g, p)
    return jax.tree.leaves(([p for p, _ in results], [arrays for _, arrays in results]))


_step_leaves_by_xla = functools.partial(_step_leaves, platform=None)
_compiled_single_device = jax.jit(_step_leaves, static_argnames=("settings", "treedef", "platform"))


@functools.partial(jax.jit, static_argnames=("settings", "treedef"))
def _compiled_multi_device(*arrays, settings, treedef):
    """Binds the primitive again, as a user's jit does, so that results have the same shardings."""
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)  # as in `_step_leaves`
    return (step_p.bind if traced else _step_leaves_by_xla)(*arrays, settings=settings, treedef=treedef)


@step_p.def_impl
def _run_eagerly(*arrays, settings, treedef):
    """Run the program compiled for these settings, on one device or several."""
    with jax.disable_jit(False):  # the user's jax.disable_jit must not change the results
        platform = _single_device_platform(arrays)
        if platform is None:
            return _compiled_multi_device(*arrays, settings=settings, treedef=treedef)
        return _compiled_single_device(*arrays, settings=settings, treedef=treedef, platform=platform)


def _single_device_platform(arrays) -> str | None:
    """The platform that JAX lowers for ("cpu", "cuda", "rocm", "tpu"), or None if the arrays are on several devices."""
    arrays = [x for x in arrays if isinstance(x, jax.Array)]
    if not arrays:
        return None
    array = next((x for x in arrays if x.committed), arrays[0])
    devices = array.sharding.device_set
    return platform_of(next(iter(devices))) if len(devices) == 1 else None


@step_p.def_abstract_eval
def _abstract_eval(*avals, settings, treedef):
    """The shapes and dtypes of the results: the parameters, and the state arrays of each leaf."""
    operands, _, params = treedef.unflatten(avals)
    if not avals:
        return []
    results = [x.strip_weak_type() for x in jax.tree.leaves((params, list(map(as_state_arrays, operands.leaf_arrays))))]
    return _with_varying_axes(avals, results)


def _with_varying_axes(avals, results):
    """``results`` that vary, in `jax.shard_map`, over every mesh axis over which one of ``avals`` varies."""
    if hasattr(avals[0], "vma"):  # JAX before 0.10
        varying = frozenset().union(*(x.vma for x in avals))
        return [x.update(vma=varying) for x in results]
    varying = frozenset().union(*(x.manual_axis_type.varying for x in avals))
    return [x.update(manual_axis_type=x.manual_axis_type.update(varying=varying)) for x in results]


def _lower(ctx, *arrays, settings, treedef, platform):
    """Lower to the platform's kernel, partitioned if arrays may be sharded, else to XLA operations."""
    function = functools.partial(_step_leaves, platform=platform)
    if not _is_unsharded(ctx):
        reason = partitioning.why_not_partitioned(ctx, platform)
        if not (platform in KERNELS and backends()[platform].kernel):
            function = _step_leaves_by_xla
        elif reason is None:
            function = functools.partial(function, num_devices=ctx.module_context.axis_context.num_devices)
            ctx = partitioning.with_devices(ctx)
        else:
            _warn_of_several_passes(reason, unpack(settings, treedef.unflatten(arrays)[0]))
            function = _step_leaves_by_xla
    return mlir.lower_fun(function, multiple_results=True)(ctx, *arrays, settings=settings, treedef=treedef)


def _warn_of_several_passes(reason, leaf_updates) -> None:
    """Log once that XLA takes several passes over narrow moments and remainders, because no kernel serves."""
    if any(x.format.name != "float32" or x.remainder is not None for x in leaf_updates):
        warn_once(
            "jadam.step takes several passes over memory for narrow moments and bfloat16 weights on several devices: "
            f"{reason}. Use jadam.sharding.sharded(tx, params, mesh), or a mesh with explicit axes."
        )


def _is_unsharded(ctx) -> bool:
    """Whether the program has one device, or every mesh axis is manual, as in `jax.shard_map`.

    Otherwise XLA's partitioner would gather the operands of a custom call.
    """
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


mlir.register_lowering(step_p, functools.partial(_lower, platform=None))
for platform in KERNELS:
    mlir.register_lowering(step_p, functools.partial(_lower, platform=platform), platform=platform)


def _batching_rule(arrays, dims, **settings):
    """Under `jax.vmap` XLA computes the step; all results are batched along axis 0."""
    out = jax.vmap(functools.partial(_step_leaves_by_xla, **settings), in_axes=dims)(*arrays)
    return out, [0] * len(out)


def _jvp_rule(primals, tangents, **settings):
    """Differentiate the step as XLA computes it."""
    tangents = map(ad.instantiate_zeros, tangents)
    function = functools.partial(_step_leaves_by_xla, **settings)
    out, tangents = jax.jvp(function, tuple(primals), tuple(tangents))
    is_zero = lambda t: t.dtype == jax.dtypes.float0
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if is_zero(t) else t for x, t in zip(out, tangents, strict=True)
    ]


batching.primitive_batchers[step_p] = _batching_rule
ad.primitive_jvps[step_p] = _jvp_rule
