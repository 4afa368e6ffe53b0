"""The TPU's and the GPU's kernel: `update_leaf` on tiles, by Pallas, where XLA alone is not one pass over memory.

That is int8 moments: nothing of a block can be rounded before the largest of it is known, and XLA stores the moments
in between. On a TPU it is also bfloat16 moments and remainders: XLA makes a fusion of each of their arrays and computes
the step anew in it. Float32 on both, and bfloat16 on a GPU, XLA does in one pass.

Limits: float32 arithmetic and at most 2**31 elements. On a GPU (Triton) leaves are flat, of any rank. On a TPU (Mosaic)
they have two axes, and int8's blocks are 128 long or the whole last axis; Mosaic gets a leaf the way XLA lays it out,
transposed where that pads less, and scales always transposed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import uniform
from jadam._fused.backends import backends
from jadam._moments.int8 import BLOCK, block_length, dequantize, quantize
from jadam._transformation.transformation import Hyperparams, LeafUpdate, update_leaf

PLATFORMS = ("cuda", "tpu")
GPU_BLOCKS = 8  # a program; their scales are one sector of memory
TPU_BLOCKS = 8  # along the blocked axis in a tile, the height of a tile of scales
TPU_LANES = 128


class Int8Tile:
    """`Int8` where the blocks of an array are its whole ``axis``: nothing to reshape."""

    name = "int8"
    stochastic = True

    def __init__(self, axis: int):
        """``axis`` is the blocks'."""
        self.axis = axis

    def decode(self, stored, dtype):
        return tuple(x.astype(dtype) for x in dequantize(*stored))

    def encode(self, moments, stored, random):
        m, v = moments
        return quantize(m, v, uniform(random(0)), uniform(random(1)), axis=self.axis)


def kernel(platform: str, leaf_updates: list[LeafUpdate], grads, params, interpret=False) -> list[tuple | None]:
    """The new parameter and what is stored, for each leaf that XLA alone or `unsupported_reason` does not have."""
    call = {"cuda": _on_gpu, "tpu": _on_tpu}[platform]

    def leaf(leaf_update, g, p):
        if fused_by_xla(platform, leaf_update) or unsupported_reason(platform, leaf_update, g, p):
            return None
        p, *stored = call(leaf_update, g, p, interpret)
        return p, tuple(stored)

    return list(map(leaf, leaf_updates, grads, params))


def fused_by_xla(platform: str, leaf_update: LeafUpdate) -> bool:
    """Whether XLA's own step is one pass over the leaf, or none."""
    if leaf_update.frozen:
        return True
    narrow = leaf_update.format.name == "bfloat16" or leaf_update.remainder is not None
    return leaf_update.format.name != "int8" and not (platform == "tpu" and narrow)


def unsupported_reason(platform: str, leaf_update: LeafUpdate, g, p) -> str | None:
    """Why a leaf takes more than one pass, or None."""
    if fused_by_xla(platform, leaf_update):
        return None
    if (backend := backends()[platform]).kernel is None:
        return backend.reason
    if leaf_update.dtype != np.float32:
        return f"{leaf_update.dtype} is XLA's"
    if not 0 < p.size <= 2**31:
        return "no elements" if not p.size else "more than 2**31 elements"
    if leaf_update.shard is not None and leaf_update.shard.strided_runs(p.shape) is None:
        return "divided along several inner axes"
    if platform == "tpu" and p.ndim != 2:
        return f"{p.ndim} dimensions, the TPU's kernel needs 2"
    if platform == "tpu" and _block(leaf_update, p) not in (BLOCK, p.shape[-1]):
        return f"blocks of {_block(leaf_update, p)}, the TPU's kernel needs {BLOCK}"
    return None


def _block(leaf_update: LeafUpdate, p) -> int:
    """How long int8's blocks are; else what may be taken for one."""
    return block_length(leaf_update.stored) if leaf_update.format.name == "int8" else min(BLOCK, p.shape[-1])


def _arrays(leaf_update: LeafUpdate, g, p):
    """Gradient, parameter, remainder if there is one, moments or codes; and the scales."""
    remainder = [] if leaf_update.remainder is None else [leaf_update.remainder]
    codes, scales = (
        (leaf_update.stored[:2], leaf_update.stored[2:])
        if leaf_update.format.name == "int8"
        else (leaf_update.stored, ())
    )
    return [g, p, *remainder, *codes], list(scales)


def _scalars(leaf_update: LeafUpdate):
    """The job's scalars in one float32 array, and the function that from what reads its i-th makes the same job."""
    names = ("minus_lr", "weight_decay", "bound", "norm", "max_norm")
    leaves, tree = jax.tree.flatten(
        (vars(leaf_update.hyperparams), {name: getattr(leaf_update, name) for name in names})
    )
    given = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

    def within(read, **fields):
        tiles = {
            i: (read(k) != 0 if x.dtype == bool else read(k).astype(x.dtype)) for k, (i, x) in enumerate(given.items())
        }
        hyperparams, others = tree.unflatten(tiles.get(i, x) for i, x in enumerate(leaves))
        return leaf_update._replace(hyperparams=Hyperparams(**hyperparams), **others, **fields)

    return jnp.stack([*(x.astype(jnp.float32) for x in given.values()), jnp.zeros([], jnp.float32)]), within


def _place(leaf_update: LeafUpdate, p):
    """The step's count and the index of the first element in the whole array; and that array's ``(run, stride)``."""
    first = jnp.uint32(0) if leaf_update.shard is None else leaf_update.shard.offset
    bits = jax.lax.bitcast_convert_type(jnp.stack([leaf_update.count.astype(jnp.uint32), first]), jnp.int32)
    return bits, (leaf_update.shard and leaf_update.shard.strided_runs(p.shape)) or (p.size, p.size)


def _index(element, run: int, stride: int):
    """The index of an element of a part in the whole array, but for that of the first one."""
    if run == stride:
        return element.astype(jnp.uint32)
    return (element // run).astype(jnp.uint32) * jnp.uint32(stride & 0xFFFFFFFF) + (element % run).astype(jnp.uint32)


def _update(leaf_update: LeafUpdate, arrays, scales, inside) -> tuple[Any, ...]:
    """A tile: all new arrays but the gradient. Where it is not ``inside`` the leaf it counts as 0."""
    g, p, *others = arrays
    g, *others = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (g, *others))
    remainder = None if leaf_update.remainder is None else others.pop(0)
    p, stored = update_leaf(leaf_update._replace(remainder=remainder, stored=(*others, *scales)), g, p)
    return (p, *stored)


def _on_gpu(leaf_update: LeafUpdate, g, p, interpret):
    """Flat arrays; a program takes `GPU_BLOCKS` blocks, each a row of its tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    scalars, within = _scalars(leaf_update)
    place, (run, stride) = _place(leaf_update, p)
    arrays, scales = _arrays(leaf_update, g, p)
    n, block = p.shape[-1], _block(leaf_update, p)
    blocks = -(-n // block)
    total = p.size // n * blocks
    tile = (GPU_BLOCKS, 1 << (block - 1).bit_length())  # Triton wants powers of two

    def body(scalars, place, *refs):
        b = pl.program_id(0) * GPU_BLOCKS + jax.lax.broadcasted_iota(jnp.int32, (GPU_BLOCKS, 1), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
        column = b % blocks * block + lane
        element = b // blocks * n + column
        inside = (b < total) & (lane < block) & (column < n)
        where = [(element, inside)] * len(arrays) + [(b, b < total)] * len(scales)
        zero = lambda ref: jnp.zeros([], ref.dtype)
        old = [triton.load(ref.at[i], mask=m, other=zero(ref)) for ref, (i, m) in zip(refs, where, strict=False)]
        here = within(
            lambda k: scalars[k],
            count=place[0].astype(jnp.uint32),
            index=place[1].astype(jnp.uint32) + _index(element, run, stride),
            format=Int8Tile(1),
        )
        new = _update(here, old[: len(arrays)], old[len(arrays) :], inside)
        for ref, x, (i, m) in zip(refs[len(where) :], new, where[1:], strict=True):
            triton.store(ref.at[i], x, mask=m)

    flat = [x.reshape(-1) for x in (*arrays, *scales)]
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[1:]],
        grid=-(-total // GPU_BLOCKS),
        input_output_aliases={i + 2: i - 1 for i in range(1, len(flat))},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="jadam_step",
    )(scalars, place, *flat)
    return [x.reshape(old.shape) for x, old in zip(new, (*arrays[1:], *scales), strict=True)]


def _on_tpu(leaf_update: LeafUpdate, g, p, interpret):
    """Tiles of rows by whole blocks, transposed where the leaf is."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    scalars, within = _scalars(leaf_update)
    place, (run, stride) = _place(leaf_update, p)
    arrays, scales = _arrays(leaf_update, g, p)
    (rows, n), block = p.shape, _block(leaf_update, p)
    blocks = -(-n // block)
    lanes, high = min(TPU_LANES, rows), min(TPU_BLOCKS, blocks)
    transposed = _tiles(n, rows) < _tiles(rows, n)
    axis = 0 if transposed else 1  # of the columns
    turn = (lambda x: x.T) if transposed else (lambda x: x)
    turn_scale = (lambda x: x) if transposed else (lambda x: x.T)  # from how they lie to how the tile lies
    ordered = lambda row, column: (column, row) if transposed else (row, column)

    def body(scalars, place, *refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) + len(scales) :]
        old_scales = [turn_scale(ref[...]) for ref in refs[len(arrays) : len(arrays) + len(scales)]]
        new_scales = [[] for _ in scales]
        first_row, first_column = pl.program_id(0) * lanes, pl.program_id(1) * (high * block)
        for k in range(high):
            tile = ordered(slice(None), slice(k * block, (k + 1) * block))
            shape = ordered(lanes, block)
            column = first_column + k * block + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            element = (first_row + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)) * n + column
            here = within(
                lambda i: scalars[i],
                count=place[0].astype(jnp.uint32),
                index=place[1].astype(jnp.uint32) + _index(element, run, stride),
                format=Int8Tile(axis) if scales else leaf_update.format,
            )
            one = ordered(slice(None), slice(k, k + 1))
            new = _update(here, [ref[tile] for ref in ins], [x[one] for x in old_scales], column < n)
            for ref, x in zip(outs, new[: len(arrays) - 1], strict=False):
                ref[tile] = x
            for column_of, x in zip(new_scales, new[len(arrays) - 1 :], strict=True):
                column_of.append(x)
        for ref, x in zip(outs[len(arrays) - 1 :], new_scales, strict=True):
            ref[...] = turn_scale(jnp.concatenate(x, axis=axis))

    laid_out = [*map(turn, arrays), *(x.T for x in scales)]
    specs = [pl.BlockSpec(ordered(lanes, high * block), ordered)] * len(arrays)
    specs += [pl.BlockSpec((high, lanes), lambda i, j: (j, i))] * len(scales)
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in laid_out[1:]],
        grid=(-(-rows // lanes), -(-blocks // high)),
        in_specs=[pl.BlockSpec(memory_space=tpu.SMEM)] * 2 + specs,
        out_specs=specs[1:],
        input_output_aliases={i + 2: i - 1 for i in range(1, len(laid_out))},
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="jadam_step",
    )(scalars, place, *laid_out)
    return [*map(turn, new[: len(arrays) - 1]), *(x.T for x in new[len(arrays) - 1 :])]


def _tiles(rows, lanes):
    """How many tiles of 8 by 128 hold an array on a TPU; XLA lays it out, or its transpose, so that they are least."""
    return math.ceil(rows / 8) * math.ceil(lanes / 128)
