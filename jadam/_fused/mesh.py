"""`jadam.step` where shardings are known when it is traced: each device updates its shards in `jax.shard_map`."""

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jadam._core.meshes import call_with_auto_axes
from jadam._fused import partitioning, shards
from jadam._fused.primitive import bind, step_shards
from jadam._transformation.transformation import Operands, as_state_arrays, pack, unpack

LEAVES_PER_SHARD_MAP = 64  # Shardy takes time quadratic in the arrays of a jax.shard_map


def step_on_explicit_mesh(leaf_updates, grads: list, params: list, mesh) -> tuple[list, list[tuple]]:
    """Update leaves on a mesh with explicit axes. Returns the new parameters and each leaf's new state arrays."""
    if mesh.are_all_axes_explicit:
        specs = [shards.spec_of_leaf(x, p, mesh) for x, p in zip(leaf_updates, params, strict=True)]
        return step_on_mesh(leaf_updates, grads, params, mesh, specs)
    settings, operands = pack(leaf_updates)
    return _step_with_auto_axes(settings, operands, grads, params)


@functools.partial(jax.jit, static_argnums=0)
def _step_with_auto_axes(settings, operands, grads, params):
    """Bind the primitive, for which all axes of the mesh are made ``Auto``."""
    like = params, list(map(as_state_arrays, operands.leaf_arrays))
    run = lambda operands, grads, params: bind(unpack(settings, operands), grads, params)
    return call_with_auto_axes(run, operands, grads, params, like=like)


def step_on_mesh(leaf_updates, grads: list, params: list, mesh, specs) -> tuple[list, list[tuple]]:
    """Update every device's shards. Returns the new parameters and each leaf's new state arrays."""
    cut = [shards.cuts_blocks(x, p.shape, spec, mesh) for x, p, spec in zip(leaf_updates, params, specs, strict=True)]
    partitioning.warn_of_cut_blocks(
        [
            (leaf_update.name, p.shape, NamedSharding(mesh, spec).shard_shape(p.shape))
            for leaf_update, p, spec, is_cut in zip(leaf_updates, params, specs, cut, strict=True)
            if is_cut
        ]
    )
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
        return step_shards(leaf_updates, grads, params)

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
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))
