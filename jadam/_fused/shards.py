"""Where the shards of arrays lie on a mesh, from their `PartitionSpec`s."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jadam._moments.int8 import Int8CutBlocks, int8_of_shards
from jadam._transformation.transformation import LeafUpdate, Shard


def axis_names(entry) -> tuple[str, ...]:
    """Return an entry of a PartitionSpec as a tuple of axis names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def num_shards(entry, mesh) -> int:
    """The number of shards along a dimension with this entry of a spec."""
    return math.prod(mesh.shape[name] for name in axis_names(entry))


def padded(spec, ndim: int) -> PartitionSpec:
    """``spec`` with an entry for each dimension."""
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def shard_offset(shape, spec, mesh) -> jax.Array:
    """In `jax.shard_map`: the index in the global array of the first element of this device's shard, modulo 2**32."""
    offset, stride = jnp.uint32(0), 1
    for size, entry in reversed(list(zip(shape, spec, strict=True))):
        names = axis_names(entry)
        if names:
            length = size // num_shards(entry, mesh)
            offset += jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(length * stride & 0xFFFFFFFF)
        stride *= size
    return offset


def cuts_blocks(leaf_update: LeafUpdate, shape, spec, mesh) -> bool:
    """Whether shards of a leaf do not hold whole int8 blocks."""
    if leaf_update.block is None:
        return False
    n = num_shards(spec[-1], mesh)
    return n > 1 and shape[-1] // n % leaf_update.block != 0


def with_shard(leaf_update: LeafUpdate, mesh, shape, spec, block, is_cut) -> LeafUpdate:
    """In `jax.shard_map`: the leaf update of this device's shard of an array of this ``shape``.

    ``block`` is the length of its int8 blocks, or None, and ``is_cut`` whether the shards cut them.
    """
    leaf_update = leaf_update._replace(shard=Shard(shard_offset(shape, spec, mesh), shape))
    if block is None:
        return leaf_update
    if not is_cut:
        return leaf_update._replace(format=int8_of_shards(block))
    names = axis_names(spec[-1])
    first_column = jax.lax.axis_index(names) * (shape[-1] // num_shards(spec[-1], mesh))
    max_across_row = functools.partial(jax.lax.pmax, axis_name=names)
    return leaf_update._replace(format=Int8CutBlocks(block, shape[-1], first_column, max_across_row))


def leaf_arrays_of(leaf_arrays, block: int | None, elements, scales) -> tuple:
    """``(stored, remainder)`` of a leaf, with ``elements`` for each array of its shape, and ``scales`` for its scales.

    ``block`` is the length of its int8 blocks, None for other formats, which have no scales.
    """
    stored, remainder = leaf_arrays
    num_scales = 0 if block is None else 2
    stored = (elements,) * (len(stored) - num_scales) + (scales,) * num_scales
    return stored, None if remainder is None else elements


def spec_of_leaf(leaf_update: LeafUpdate, p, mesh) -> PartitionSpec:
    """The spec with the most shards among those of a leaf's state arrays and its parameter.

    Where only the state is sharded (ZeRO), shards of the parameter are updated, then gathered.
    """
    like_param = [x for x in (*leaf_update.stored, leaf_update.remainder, p) if x is not None and x.shape == p.shape]
    specs = [padded(jax.typeof(x).sharding.spec, p.ndim) for x in like_param]
    return max(specs, key=lambda spec: math.prod(num_shards(entry, mesh) for entry in spec))


def shard_avals(leaf_update: LeafUpdate, g, p, shape):
    """The leaf update, gradient and parameter of shards of this shape that hold whole int8 blocks, without values."""
    aval = lambda x, shape: jax.ShapeDtypeStruct(shape, x.dtype)
    stored = leaf_update.stored
    if leaf_update.block is not None:
        scales = (*shape[:-1], -(-shape[-1] // leaf_update.block))
        stored = (*(aval(x, shape) for x in stored[:2]), *(aval(x, scales) for x in stored[2:]))
        leaf_update = leaf_update._replace(format=int8_of_shards(leaf_update.block))
    return leaf_update._replace(stored=stored), aval(g, shape), aval(p, shape)
