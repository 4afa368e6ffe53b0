"""Pallas kernel for TPUs: `update_leaf` on tiles, where XLA needs more than one pass over memory.

XLA needs several passes for int8 moments: a block can be rounded only when its maximum is known, so XLA stores the
moments in between. It also needs several for bfloat16 moments and remainders: it makes one fusion per output array and
recomputes the step in each. XLA does float32 in one pass.

Limits: float32 arithmetic and at most 2**31 elements; vectors must have a multiple of 1024 elements, and int8 blocks
must be 128 long or the whole last axis. Mosaic gets a leaf in XLA's layout, its axes in the order that needs the least
padding, and scales always transposed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import dither_of_block
from jadam._fused.backends import backends
from jadam._moments.int8 import BLOCK, dequantize, quantize
from jadam._transformation.transformation import Hyperparams, LeafUpdate, Shard, update_leaf

BLOCKS_PER_TILE = 8  # blocks per tile along the blocked axis; a tile of scales has 8 sublanes
TPU_LANES, TPU_SUBLANES = 128, 32  # of an int8 tile; other tiles have fewer sublanes
TILE = BLOCKS_PER_TILE * BLOCK * TPU_LANES  # elements that a program on a TPU updates


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


def run_kernel(leaf_updates: list[LeafUpdate], grads, params, interpret=False) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where XLA does it."""

    def run_leaf(leaf_update, g, p):
        """Return the new parameter and new state arrays of a leaf, or None if the kernel does not run for it."""
        if fused_by_xla(leaf_update) or why_several_passes(leaf_update, g, p):
            return None
        p, *stored = _on_tpu(leaf_update, g, p, interpret)
        return p, tuple(stored)

    return list(map(run_leaf, leaf_updates, grads, params))


def fused_by_xla(leaf_update: LeafUpdate) -> bool:
    """Whether XLA takes at most one pass over the leaf."""
    return leaf_update.frozen or (leaf_update.format.name == "float32" and leaf_update.remainder is None)


def why_several_passes(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the step takes more than one pass over a leaf, or None: XLA or the kernel does it in one."""
    if fused_by_xla(leaf_update):
        return None
    if (backend := backends()["tpu"]).kernel is None:
        return backend.reason
    if leaf_update.dtype != np.float32:
        return f"no kernel for {leaf_update.dtype}"
    if not 0 < p.size <= 2**31:
        return "no elements" if not p.size else "more than 2**31 elements"
    if p.ndim < 2 and p.size % 1024:
        return f"the TPU kernel needs 2 dimensions or a multiple of 1024 elements, got shape {p.shape}"
    if _block_size(leaf_update, p) not in (BLOCK, p.shape[-1]):
        return f"the TPU kernel needs int8 blocks of {BLOCK}, got {_block_size(leaf_update, p)}"
    return None


def _block_size(leaf_update: LeafUpdate, p) -> int:
    """The length of int8 blocks; for other formats a tile width."""
    return leaf_update.block or min(BLOCK, p.shape[-1])


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


def _shard(leaf_update: LeafUpdate, p) -> Shard:
    """The leaf's place in its global array."""
    return Shard(jnp.uint32(0), p.shape) if leaf_update.shard is None else leaf_update.shard


def _count_and_offset(leaf_update: LeafUpdate, shard: Shard):
    """The step count and the shard's offset as an int32 array."""
    return jax.lax.bitcast_convert_type(jnp.stack([leaf_update.count.astype(jnp.uint32), shard.offset]), jnp.int32)


def _index(i, strides) -> jax.Array:
    """The sum of the digits of ``i`` times their strides; see `Shard.strides`."""
    *inner, (_, last_stride) = [(size, stride) for size, stride in strides if size != 1] or [(1, 0)]
    index = jnp.uint32(0)
    for size, stride in inner:
        sizes = jnp.full_like(i, size)
        index += jnp.uint32(stride) * jax.lax.rem(i, sizes).astype(jnp.uint32)
        i = jax.lax.div(i, sizes)  # i is not negative, and Mosaic would have to know the TPU for jnp's division
    return index + jnp.uint32(last_stride) * i.astype(jnp.uint32)


def _update_tile(leaf_update: LeafUpdate, arrays, scales, inside) -> tuple[Any, ...]:
    """Update one tile; elements not ``inside`` the leaf count as 0. Returns all new arrays, none for the gradient."""
    g, p, *others = arrays
    g, *others = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (g, *others))
    remainder = None if leaf_update.remainder is None else others.pop(0)
    p, stored = update_leaf(leaf_update._replace(remainder=remainder, stored=(*others, *scales)), g, p)
    return (p, *stored)


class View(NamedTuple):
    """The three axes that a leaf has for the TPU kernel, each made of axes of the leaf; no copy in XLA's layout."""

    outer: tuple[int, ...]
    sublanes: tuple[int, ...]
    lanes: tuple[int, ...]

    def of(self, x):
        """The view of an array of the leaf's rank."""
        sizes = (math.prod(x.shape[axis] for axis in axes) for axes in self)
        return x.transpose(sum(self, ())).reshape(*sizes)

    def undo(self, x, shape):
        """The array of ``shape`` whose view is ``x``."""
        order = sum(self, ())
        return x.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _layout(shape, itemsize: int, axis: int | None) -> tuple[int, ...]:
    """The order of axes in which XLA lays out an array on a TPU: that of the least padding to tiles.

    If ``axis`` is not None, it must be one of the last two. XLA copies an array that it lays out otherwise: for such an
    ``axis``, or because of axes shorter than 4, for which the order depends on the dtype.
    """

    def padded_size(order):
        """The number of elements with padding, by 128. A tile has 128 lanes and 8 sublanes, or fewer if these do."""
        *_, sublanes, lanes = (shape[k] for k in order)
        tile = next((n for n in (1, 2, 4) if max(sublanes, 4 // itemsize) <= n), 8)
        return math.prod(shape) // (sublanes * lanes) * math.ceil(sublanes / tile) * tile * math.ceil(lanes / TPU_LANES)

    axes = range(len(shape))
    pairs = [(i, k) for i in axes for k in axes if i != k and axis in (None, i, k)]
    orders = sorted((*(axis for axis in axes if axis not in pair), *pair) for pair in pairs)
    return min(orders, key=padded_size)  # of several, the first


def _view(shape, itemsize: int, axis: int | None) -> View:
    """The view of a leaf; ``axis`` is that of its int8 blocks."""
    *outer, sublanes, lanes = _layout(shape, itemsize, axis)
    if axis != sublanes and shape[sublanes] < TPU_LANES and shape[sublanes] % TPU_SUBLANES == 0:
        return View((), (*outer, sublanes), (lanes,))  # a larger tile, and scales with less padding
    return View(tuple(outer), (sublanes,), (lanes,))


def _on_tpu(leaf_update: LeafUpdate, g, p, interpret):
    """Update a leaf on a TPU in tiles of about `TILE` elements: several matrices, each of rows of up to 8 blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    if p.ndim == 1:
        return _vector_on_tpu(leaf_update, g, p, interpret)
    scalars, with_scalars = _pack_scalars(leaf_update)
    arrays, scales = _arrays(leaf_update, g, p)
    last, shard = p.ndim - 1, _shard(leaf_update, p)
    view = _view(p.shape, p.dtype.itemsize, last if scales else None)
    axis = 0 if scales and view.sublanes == (last,) else 1  # of a tile, along which blocks lie
    ordered = lambda row, column: (row, column) if axis == 1 else (column, row)
    row_axes, column_axes = ordered(view.sublanes, view.lanes)
    scale_view = View(view.outer, (last,), row_axes)
    outer, rows, n = (math.prod(p.shape[axis] for axis in axes) for axes in (view.outer, row_axes, column_axes))
    block = _block_size(leaf_update, p) if scales else min(BLOCK, n)
    blocks = -(-n // block)
    tile_blocks = min(BLOCKS_PER_TILE, blocks)
    tile_rows = min(rows, TPU_LANES * max(1, TPU_LANES // block))
    tile_outer = min(outer, max(1, TILE // math.prod(_padded(*ordered(tile_rows, tile_blocks * block)))))

    def body(scalars, count_and_offset, *refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) + len(scales) :]
        old_scale_refs, new_scale_refs = refs[len(arrays) : len(arrays) + len(scales)], outs[len(arrays) - 1 :]
        first_outer, first_row = pl.program_id(0) * tile_outer, pl.program_id(1) * tile_rows
        first_column = pl.program_id(2) * (tile_blocks * block)
        scale_to_tile = (lambda x: x) if axis == 0 else (lambda x: x.T)  # scales are always stored transposed
        row = first_row + jax.lax.broadcasted_iota(jnp.int32, ordered(tile_rows, 1), 1 - axis)
        row_index = count_and_offset[1].astype(jnp.uint32) + _index(row, shard.strides(p.shape, row_axes))

        def update(i):
            """Update the i-th of the tile's matrices."""
            index = row_index + _index(first_outer + i, shard.strides(p.shape, view.outer))
            old_scales = [scale_to_tile(ref[i]) for ref in old_scale_refs]
            new_scales = [[] for _ in scales]
            for k in range(tile_blocks):
                tile = (i, *ordered(slice(None), slice(k * block, (k + 1) * block)))
                scale = ordered(slice(None), slice(k, k + 1))
                column = jax.lax.broadcasted_iota(jnp.int32, ordered(tile_rows, block), axis)
                column += first_column + k * block
                # each element's column, or of an int8 block its first element's
                column_index = _index(
                    first_column + k * block if scales else column, shard.strides(p.shape, column_axes)
                )
                tile_update = with_scalars(
                    lambda i: scalars[i],
                    count=count_and_offset[0].astype(jnp.uint32),
                    index=index + column_index,
                    format=Int8Tile(axis) if scales else leaf_update.format,
                )
                new = _update_tile(tile_update, [ref[tile] for ref in ins], [x[scale] for x in old_scales], column < n)
                for ref, x in zip(outs, new[: len(arrays) - 1], strict=False):
                    ref[tile] = x
                for columns, x in zip(new_scales, new[len(arrays) - 1 :], strict=True):
                    columns.append(x)
            for ref, x in zip(new_scale_refs, new_scales, strict=True):
                ref[i] = scale_to_tile(jnp.concatenate(x, axis=axis))

        if tile_outer == 1:
            update(0)
        else:
            pl.loop(0, tile_outer)(update)

    inputs = [*map(view.of, arrays), *map(scale_view.of, scales)]
    specs = [pl.BlockSpec((tile_outer, *ordered(tile_rows, tile_blocks * block)), lambda i, j, k: (i, *ordered(j, k)))]
    specs *= len(arrays)
    specs += [pl.BlockSpec((tile_outer, tile_blocks, tile_rows), lambda i, j, k: (i, k, j))] * len(scales)
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[1:]],
        grid=(-(-outer // tile_outer), -(-rows // tile_rows), -(-blocks // tile_blocks)),
        in_specs=[pl.BlockSpec(memory_space=tpu.SMEM)] * 2 + specs,
        out_specs=specs[1:],
        input_output_aliases={i + 2: i - 1 for i in range(1, len(inputs))},
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="jadam_step",
    )(scalars, _count_and_offset(leaf_update, shard), *inputs)
    views = [view] * (len(arrays) - 1) + [scale_view] * len(scales)
    return [v.undo(x, old.shape) for v, x, old in zip(views, new, (*arrays[1:], *scales), strict=True)]


def _vector_on_tpu(leaf_update: LeafUpdate, g, p, interpret):
    """Update a vector as rows of `TPU_LANES`, which is no copy for a multiple of 1024 elements."""
    to_rows = lambda x: x.reshape(-1, TPU_LANES)
    p_rows = to_rows(p)
    leaf_update = leaf_update._replace(
        stored=tuple(map(to_rows, leaf_update.stored)),
        remainder=None if leaf_update.remainder is None else to_rows(leaf_update.remainder),
        shard=Shard(_shard(leaf_update, p).offset, p_rows.shape),
    )
    return [x.reshape(-1) for x in _on_tpu(leaf_update, to_rows(g), p_rows, interpret)]


def _padded(sublanes: int, lanes: int) -> tuple[int, int]:
    """The size of an int8 tile in a TPU's memory."""
    return math.ceil(sublanes / TPU_SUBLANES) * TPU_SUBLANES, math.ceil(lanes / TPU_LANES) * TPU_LANES
