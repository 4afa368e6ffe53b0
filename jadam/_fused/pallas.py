"""Pallas kernels for GPU and TPU: `update_leaf` on tiles, where XLA needs more than one pass over memory.

XLA needs several passes for int8 moments: a block can be rounded only when its maximum is known, so XLA stores the
moments in between. On a TPU it also needs several for bfloat16 moments and remainders: it makes one fusion per output
array and recomputes the step in each. XLA does float32 in one pass on both, and bfloat16 on a GPU.

Limits: float32 arithmetic and at most 2**31 elements. On a GPU (Triton) leaves are flattened and may have any rank. On
a TPU (Mosaic) they must have two axes, and int8 blocks must be 128 long or the whole last axis. Mosaic gets a leaf in
XLA's layout, transposed where that needs less padding, and scales always transposed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import dither_of_block
from jadam._fused.backends import backends
from jadam._moments.int8 import BLOCK, block_length, dequantize, quantize
from jadam._transformation.transformation import Hyperparams, LeafUpdate, update_leaf

PLATFORMS = ("cuda", "tpu")
BLOCKS_PER_PROGRAM = 8  # blocks per program; 8 float32 scales fill one 32-byte sector
BLOCKS_PER_TILE = 8  # blocks per tile along the blocked axis; a tile of scales has 8 sublanes
TPU_LANES = 128


class Int8Tile:
    """The int8 format of a tile whose blocks span its whole ``axis``, so that no array is reshaped.

    ``random.index`` has the index of each block's first element.
    """

    name = "int8"
    stochastic = True

    def __init__(self, axis: int):
        """``axis`` is the axis along which blocks lie."""
        self.axis = axis

    def decode(self, stored, dtype):
        return tuple(x.astype(dtype) for x in dequantize(*stored))

    def encode(self, moments, stored, random):
        m, v = moments
        lane = jax.lax.broadcasted_iota(jnp.int32, m.shape, self.axis).astype(jnp.uint32)
        return quantize(m, v, dither_of_block(random.index, lane, random.salt, random.count), axis=self.axis)


def run_kernel(platform: str, leaf_updates: list[LeafUpdate], grads, params, interpret=False) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where XLA does it."""
    call = {"cuda": _on_gpu, "tpu": _on_tpu}[platform]

    def run_leaf(leaf_update, g, p):
        """Return the new parameter and new state arrays of a leaf, or None if the kernel does not run for it."""
        if fused_by_xla(platform, leaf_update) or why_several_passes(platform, leaf_update, g, p):
            return None
        p, *stored = call(leaf_update, g, p, interpret)
        return p, tuple(stored)

    return list(map(run_leaf, leaf_updates, grads, params))


def fused_by_xla(platform: str, leaf_update: LeafUpdate) -> bool:
    """Whether XLA takes at most one pass over the leaf."""
    if leaf_update.frozen:
        return True
    has_bfloat16 = leaf_update.format.name == "bfloat16" or leaf_update.remainder is not None
    return leaf_update.format.name != "int8" and not (platform == "tpu" and has_bfloat16)


def why_several_passes(platform: str, leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the step takes more than one pass over a leaf, or None: XLA or the kernel does it in one."""
    if fused_by_xla(platform, leaf_update):
        return None
    if (backend := backends()[platform]).kernel is None:
        return backend.reason
    if leaf_update.dtype != np.float32:
        return f"no kernel for {leaf_update.dtype}"
    if not 0 < p.size <= 2**31:
        return "no elements" if not p.size else "more than 2**31 elements"
    if platform == "tpu" and p.ndim != 2:
        return f"the TPU kernel needs 2 dimensions, got {p.ndim}"
    if platform == "tpu" and _block_size(leaf_update, p) not in (BLOCK, p.shape[-1]):
        return f"the TPU kernel needs int8 blocks of {BLOCK}, got {_block_size(leaf_update, p)}"
    return None


def _block_size(leaf_update: LeafUpdate, p) -> int:
    """The length of int8 blocks; for other formats a tile width."""
    return block_length(leaf_update.stored) if leaf_update.format.name == "int8" else min(BLOCK, p.shape[-1])


def _arrays(leaf_update: LeafUpdate, g, p):
    """Gradient, parameter, remainder if any, moments or codes; and, separately, the scales."""
    remainder = [] if leaf_update.remainder is None else [leaf_update.remainder]
    codes, scales = (
        (leaf_update.stored[:2], leaf_update.stored[2:])
        if leaf_update.format.name == "int8"
        else (leaf_update.stored, ())
    )
    return [g, p, *remainder, *codes], list(scales)


def _pack_scalars(leaf_update: LeafUpdate):
    """Stack the scalars in one float32 array.

    Returns:
        The array, and ``with_scalars(read, **fields)``, which returns ``leaf_update`` with its i-th scalar replaced by
        ``read(i)``, and with other ``fields`` replaced.
    """
    names = ("minus_lr", "weight_decay", "bound", "norm", "max_norm")
    leaves, tree = jax.tree.flatten(
        (vars(leaf_update.hyperparams), {name: getattr(leaf_update, name) for name in names})
    )
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

    def with_scalars(read, **fields):
        """The leaf update with the i-th scalar replaced by ``read(i)``, and other ``fields`` replaced."""
        new = {
            i: (read(k) != 0 if x.dtype == bool else read(k).astype(x.dtype)) for k, (i, x) in enumerate(arrays.items())
        }
        hyperparams, others = tree.unflatten(new.get(i, x) for i, x in enumerate(leaves))
        return leaf_update._replace(hyperparams=Hyperparams(**hyperparams), **others, **fields)

    return jnp.stack([*(x.astype(jnp.float32) for x in arrays.values()), jnp.zeros([], jnp.float32)]), with_scalars


def _count_and_offset(leaf_update: LeafUpdate, p):
    """The step count and the shard's offset as an int32 array, and the shard's `strides`."""
    offset = jnp.uint32(0) if leaf_update.shard is None else leaf_update.shard.offset
    bits = jax.lax.bitcast_convert_type(jnp.stack([leaf_update.count.astype(jnp.uint32), offset]), jnp.int32)
    return bits, [(p.size, 1)] if leaf_update.shard is None else leaf_update.shard.strides(p.shape)


def _index_of_row(row, n: int, strides):
    """The global index of the first element of a shard's ``row`` of ``n``, minus that of the shard's first element."""
    *inner, (_, last_stride) = [(strides[0][0] // n, n), *strides[1:]]  # digits of the row's number
    index = jnp.zeros(row.shape, jnp.uint32)
    for size, stride in inner:
        index += (row % size).astype(jnp.uint32) * jnp.uint32(stride)
        row = row // size
    return index + row.astype(jnp.uint32) * jnp.uint32(last_stride)


def _update_tile(leaf_update: LeafUpdate, arrays, scales, inside) -> tuple[Any, ...]:
    """Update one tile; elements not ``inside`` the leaf count as 0. Returns all new arrays, none for the gradient."""
    g, p, *others = arrays
    g, *others = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (g, *others))
    remainder = None if leaf_update.remainder is None else others.pop(0)
    p, stored = update_leaf(leaf_update._replace(remainder=remainder, stored=(*others, *scales)), g, p)
    return (p, *stored)


def _on_gpu(leaf_update: LeafUpdate, g, p, interpret):
    """Update a leaf on a GPU: arrays are flat; a program takes `BLOCKS_PER_PROGRAM` blocks, the rows of its tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scalars, with_scalars = _pack_scalars(leaf_update)
    count_and_offset, strides = _count_and_offset(leaf_update, p)
    arrays, scales = _arrays(leaf_update, g, p)
    n, block = p.shape[-1], _block_size(leaf_update, p)
    blocks = -(-n // block)
    total = p.size // n * blocks
    tile = (BLOCKS_PER_PROGRAM, 1 << (block - 1).bit_length())  # Triton needs powers of two

    def body(scalars, count_and_offset, *refs):
        b = pl.program_id(0) * BLOCKS_PER_PROGRAM + jax.lax.broadcasted_iota(jnp.int32, (BLOCKS_PER_PROGRAM, 1), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
        row, column = b // blocks, b % blocks * block
        element = row * n + column + lane
        inside = (b < total) & (lane < block) & (column + lane < n)
        indices = [(element, inside)] * len(arrays) + [(b, b < total)] * len(scales)
        zero = lambda ref: jnp.zeros([], ref.dtype)
        old = [triton.load(ref.at[i], mask=m, other=zero(ref)) for ref, (i, m) in zip(refs, indices, strict=False)]
        tile_update = with_scalars(
            lambda k: scalars[k],
            count=count_and_offset[0].astype(jnp.uint32),
            index=count_and_offset[1].astype(jnp.uint32) + _index_of_row(row, n, strides) + column.astype(jnp.uint32),
            format=Int8Tile(1),
        )
        new = _update_tile(tile_update, old[: len(arrays)], old[len(arrays) :], inside)
        for ref, x, (i, m) in zip(refs[len(indices) :], new, indices[1:], strict=True):
            triton.store(ref.at[i], x, mask=m)

    flat = [x.reshape(-1) for x in (*arrays, *scales)]
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[1:]],
        grid=-(-total // BLOCKS_PER_PROGRAM),
        input_output_aliases={i + 2: i - 1 for i in range(1, len(flat))},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="jadam_step",
    )(scalars, count_and_offset, *flat)
    return [x.reshape(old.shape) for x, old in zip(new, (*arrays[1:], *scales), strict=True)]


def _on_tpu(leaf_update: LeafUpdate, g, p, interpret):
    """Update a leaf on a TPU in tiles of `TPU_LANES` rows by `BLOCKS_PER_TILE` blocks, transposed as the leaf is."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    scalars, with_scalars = _pack_scalars(leaf_update)
    count_and_offset, strides = _count_and_offset(leaf_update, p)
    arrays, scales = _arrays(leaf_update, g, p)
    (rows, n), block = p.shape, _block_size(leaf_update, p)
    blocks = -(-n // block)
    tile_rows, tile_blocks = min(TPU_LANES, rows), min(BLOCKS_PER_TILE, blocks)
    transposed = _num_tiles(n, rows) < _num_tiles(rows, n)
    axis = 0 if transposed else 1  # along which blocks lie
    to_layout = (lambda x: x.T) if transposed else (lambda x: x)
    scale_to_tile = (lambda x: x) if transposed else (lambda x: x.T)  # scales are always stored transposed
    ordered = lambda row, column: (column, row) if transposed else (row, column)

    def body(scalars, count_and_offset, *refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) + len(scales) :]
        old_scales = [scale_to_tile(ref[...]) for ref in refs[len(arrays) : len(arrays) + len(scales)]]
        new_scales = [[] for _ in scales]
        first_row, first_column = pl.program_id(0) * tile_rows, pl.program_id(1) * (tile_blocks * block)
        for k in range(tile_blocks):
            tile = ordered(slice(None), slice(k * block, (k + 1) * block))
            iota = lambda size, along: jax.lax.broadcasted_iota(jnp.int32, ordered(tile_rows, size), along)
            column = first_column + k * block + iota(block, axis)
            row = first_row + jax.lax.broadcasted_iota(jnp.int32, ordered(tile_rows, 1), 1 - axis)
            # each element's column, or of an int8 block its first element's
            index = _index_of_row(row, n, strides) + (first_column + k * block if scales else column).astype(jnp.uint32)
            tile_update = with_scalars(
                lambda i: scalars[i],
                count=count_and_offset[0].astype(jnp.uint32),
                index=count_and_offset[1].astype(jnp.uint32) + index,
                format=Int8Tile(axis) if scales else leaf_update.format,
            )
            scale = ordered(slice(None), slice(k, k + 1))
            new = _update_tile(tile_update, [ref[tile] for ref in ins], [x[scale] for x in old_scales], column < n)
            for ref, x in zip(outs, new[: len(arrays) - 1], strict=False):
                ref[tile] = x
            for columns, x in zip(new_scales, new[len(arrays) - 1 :], strict=True):
                columns.append(x)
        for ref, x in zip(outs[len(arrays) - 1 :], new_scales, strict=True):
            ref[...] = scale_to_tile(jnp.concatenate(x, axis=axis))

    inputs = [*map(to_layout, arrays), *(x.T for x in scales)]
    specs = [pl.BlockSpec(ordered(tile_rows, tile_blocks * block), ordered)] * len(arrays)
    specs += [pl.BlockSpec((tile_blocks, tile_rows), lambda i, j: (j, i))] * len(scales)
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[1:]],
        grid=(-(-rows // tile_rows), -(-blocks // tile_blocks)),
        in_specs=[pl.BlockSpec(memory_space=tpu.SMEM)] * 2 + specs,
        out_specs=specs[1:],
        input_output_aliases={i + 2: i - 1 for i in range(1, len(inputs))},
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="jadam_step",
    )(scalars, count_and_offset, *inputs)
    return [*map(to_layout, new[: len(arrays) - 1]), *(x.T for x in new[len(arrays) - 1 :])]


def _num_tiles(rows, lanes):
    """The number of 8 by 128 tiles that hold an array of this orientation on a TPU."""
    return math.ceil(rows / 8) * math.ceil(lanes / 128)
