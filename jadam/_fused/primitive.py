"""The JAX primitive of `jadam.step`: it updates a list of leaves by a kernel or by XLA.

The kernel is chosen when the primitive is lowered for a platform, so ahead-of-time compilation and `jax.export` choose
it by their target. XLA does the leaves that no kernel supports, and everything under `jax.vmap` and differentiation.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jadam._core import checks
from jadam._fused import pallas, partitioning
from jadam._fused.backends import backends, kernels_disabled, platform_of, warn_once
from jadam._fused.cpu import kernel as cpu
from jadam._fused.cuda import kernel as cuda
from jadam._fused.native import call
from jadam._moments.int8 import Int8CutBlocks
from jadam._transformation.transformation import LeafUpdate, as_state_arrays, pack, unpack, update_leaf


def bind(leaf_updates: list[LeafUpdate], grads: list, params: list) -> tuple[list, list[tuple]]:
    """Bind the primitive. Returns the new parameters and each leaf's new state arrays."""
    arrays, static = flatten_arguments(leaf_updates, grads, params)
    return unflatten_results(static["treedef"], step_p.bind(*arrays, **static))


def flatten_arguments(leaf_updates: list[LeafUpdate], grads: list, params: list) -> tuple[list, dict[str, Any]]:
    """The arrays and the static parameters of the primitive."""
    settings, operands = pack(leaf_updates)
    arrays, treedef = jax.tree.flatten((operands, grads, params))
    return arrays, {"settings": settings, "treedef": treedef}


def unflatten_results(treedef, arrays) -> tuple[list, list[tuple]]:
    """The new parameters and each leaf's new state arrays, from the primitive's flat results."""
    return jax.tree.unflatten(_result_structure(treedef), arrays)


@functools.lru_cache(maxsize=256)
def _result_structure(treedef):
    """The structure of the primitive's results: the parameters, and the state arrays of each leaf."""
    operands, _, params = treedef.unflatten(range(treedef.num_leaves))
    return jax.tree.structure((params, list(map(as_state_arrays, operands.leaf_arrays))))


def step_shards(leaf_updates, grads, params):
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
    new = bind(*([column[i] for i in whole] for column in (leaf_updates, grads, params)))
    for i, *result in zip(whole, *new, strict=True):
        results[i] = result
    return [p for p, _ in results], [x for _, x in results]


KERNELS: dict[str, Any] = {  # run_kernel(leaf_updates, grads, params) returns None for the leaves left to XLA
    "cpu": cpu.run_kernel,
    "cuda": cuda.run_kernel,
    "tpu": pallas.run_kernel,
}


def _is_active(platform) -> bool:
    """Whether kernels are used on ``platform``."""
    return platform in KERNELS and backends()[platform].kernel is not None


step_p = Primitive("jadam_step")
step_p.multiple_results = True


def _step_leaves(*arrays, settings, treedef, platform, num_devices=1):
    """Implementation of the primitive: the platform's kernel for the leaves that it supports, XLA for the others."""
    operands, grads, params = treedef.unflatten(arrays)
    leaf_updates = unpack(settings, operands)
    # Arrays are concrete only under jax_debug_nans, which runs this op by op to find the one that made a NaN.
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    if traced and platform == "cpu" and not _is_active(platform) and not kernels_disabled():
        reason = backends()["cpu"].reason
        warn_once(f"jadam.step takes about 1.7 times as long on this CPU without its kernel: {reason}")
    use_kernel = (
        traced and _is_active(platform) and all(map(checks.has_constant_shape, params))
    )  # symbolic in `jax.export`
    results: list = [None] * len(leaf_updates)
    if use_kernel and num_devices > 1:
        has_kernel = [call.unsupported_reason(*x) is None for x in zip(leaf_updates, grads, params, strict=True)]
        results = partitioning.update_partitioned(has_kernel, step_shards, num_devices, leaf_updates, grads, params)
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
        function = _step_leaves_by_xla
        if _is_active(platform) and (reason := partitioning.why_not_partitioned(ctx, platform)) is not None:
            _warn_of_several_passes(reason, unpack(settings, treedef.unflatten(arrays)[0]))
        elif _is_active(platform):
            num_devices = ctx.module_context.axis_context.num_devices
            function = functools.partial(_step_leaves, platform=platform, num_devices=num_devices)
            ctx = partitioning.with_stand_in_devices(ctx)
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
