r"""Adam's two moments in little more than two bytes per parameter.

The state stores the ratio :math:`r = m / \sqrt v` and :math:`v` instead of :math:`m` and :math:`v`. The ratio is
bounded even if both carry errors. With :math:`m' = b_1 m + (1 - b_1) g` and :math:`v' = b_2 v + (1 - b_2) g^2`, the
Cauchy-Schwarz inequality gives

.. math::

    |r'|^2 \le \frac{b_1^2}{b_2} |r|^2 + \frac{(1 - b_1)^2}{1 - b_2}, \qquad\text{so}\qquad
    |r| \le R = \frac{1 - b_1}{\sqrt{1 - b_2}} \Big/ \sqrt{1 - b_1^2 / b_2} \qquad (b_1^2 < b_2)

for every sequence of gradients. At 0.9 and 0.999, :math:`R` is 7.27. So quantisation error cannot push an update past
Adam's own bound. If :math:`m` and :math:`v` were quantised separately, a small :math:`v` could be rounded to zero where
:math:`m` is not, and the step would explode.

Both are scaled by the largest value of their block, a run along the last axis, and rounded stochastically to levels
that are denser near 0. A code is a part of the bits of a float32, so no root or table is needed:

* :math:`|r|` becomes a number in [2, 7.9375]. Random bits are added below the 6th bit of its mantissa. The code is the
  last bit of the exponent, those 6 bits, and the sign.
* :math:`v` becomes a number in [2**-64, 31/32]. Its bits shifted right by 3, plus 0x3B900000, which takes 2**-64 to 1,
  are those of a number in [1, 255], nearly the eighth root. This is rounded to an integer. Decoding adds
  0x23800000 = -0x3B900000 * 8 modulo 2**32.

One rounding is unbiased in :math:`r`, and in :math:`v` down to 1e-12 of the block's largest. A smaller :math:`v`, also
0, is stored too large, at least 5.6e-20 of the largest, and :math:`m` is then too large with it; the ratio is not. For
the bias over many steps see `jadam._core.numerics.dither`. With rounding to nearest, an :math:`r` whose gradient is now
zero would never reach 0.
"""

import functools
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.numerics import at_least_float32, dither_of_block

BLOCK = 128  # at most this many elements along the last axis share a scale; a TPU has as many lanes
MIN_SIZE = 4096  # smaller leaves stay float32
R_TOP, V_TOP = np.float32(5.9375), np.float32(31 / 32)  # what the largest |r| and v of a block are scaled to
ENCODED_V_TOP = 4 * V_TOP  # in `quantize`, so that dividing it by a large scale does not underflow
BELOW_R_TOP = R_TOP * np.float32(1 - 2**-22)  # rounding errors must not take 2 + |r| to 8, whose code would be 0
_INFINITY = 0x7F800000  # the bits of infinity
MIN_R_SCALE, MIN_V_SCALE = np.float32(1e-30), np.float32(2.0**-126)  # smaller scales become 0, as 1 / scale overflows


def dequantize(rq, vq, r_scale, v_scale):
    """The moments ``m, v`` from codes ``rq`` (int8) and ``vq`` (uint8). The scales broadcast against them."""
    rq, vq = rq.astype(jnp.int32), vq.astype(jnp.int32)  # Mosaic cannot convert 8 bits to float
    v = v_scale * (1 / V_TOP) * _float((_bits(vq.astype(jnp.float32)) << 3) + jnp.uint32(0x23800000))
    r = _float((rq.astype(jnp.uint32) & 0x7F) << 17 | jnp.uint32(0x40000000)) - 2
    m = r * (r_scale * (1 / R_TOP) * jnp.sqrt(v))
    return jnp.where(rq < 0, -m, m), v


def quantize(m, v, random, axis=-1):
    """The codes and scales of ``m, v``. A block is the whole ``axis``; ``random`` are uint32 random bits.

    A block with a non-finite value gets NaN scales, since integer codes cannot hold it. A block with all ratios below
    `MIN_R_SCALE` gets ratios of 0.
    """
    r = _ratio(m, v)
    scales = _scales(*(jnp.max(x, axis=axis, keepdims=True) for x in _magnitudes(r, v)))
    return *_codes(r, v, *scales, random), *scales


def _ratio(m, v):
    """``m / sqrt(v)``, and 0 where both are 0."""
    s = jnp.sqrt(v)
    return jnp.where(s > 0, m / jnp.where(s > 0, s, 1), m * 0)


def _magnitudes(r, v):
    """int32 numbers in the order of ``|r|`` and of ``v``: positive floats are ordered as their bits, NaN is largest."""
    return _bits(jnp.abs(r)).astype(jnp.int32), _bits(jnp.abs(v)).astype(jnp.int32)


def _scales(r_max, v_max):
    """The scales of blocks with these largest `_magnitudes`."""
    finite = jnp.maximum(r_max, v_max) < _INFINITY
    r_scale, v_scale = (_float(x.astype(jnp.uint32)) for x in (r_max, v_max))
    r_scale = jnp.where(finite, jnp.where(r_scale < MIN_R_SCALE, 0, r_scale), jnp.nan)
    v_scale = jnp.where(finite, jnp.where(v_scale < MIN_V_SCALE, 0, v_scale), jnp.nan)
    return r_scale, v_scale


def _codes(r, v, r_scale, v_scale, random):
    """The codes of ``r, v`` with these scales, which broadcast against them."""
    x = jnp.abs(r) * jnp.where(r_scale > 0, BELOW_R_TOP / jnp.where(r_scale > 0, r_scale, 1), 0) + 2
    rq = ((_bits(x) + (random & 0x1FFFF)) >> 17 & 0x7F).astype(jnp.int32)
    y = v * jnp.where(v_scale > 0, ENCODED_V_TOP / jnp.where(v_scale > 0, v_scale, 1), 0) + np.float32(2.0**-62)
    y = _float((_bits(y) >> 3) + jnp.uint32(0x3B700000)) + (_float(random >> 9 | jnp.uint32(0x3F800000)) - 1)
    vq = jnp.where(y < 255, y, 255).astype(jnp.int32)
    rq = jnp.where(r < 0, rq - 128, rq)  # sign and magnitude
    return rq.astype(jnp.int8), vq.astype(jnp.uint8)


def _bits(x):
    """The bits of float32 numbers, as uint32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits):
    """The float32 numbers with these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class Int8:
    """Adam's two moments in 2 bytes per parameter, and two float32 scales per block of up to 128 elements."""

    name = "int8"
    stochastic = True
    dequantize = staticmethod(dequantize)

    def __init__(self, block: int | None = None):
        """``block`` is the block length of a shard, which its shape does not tell. Default: that of a whole array."""
        self.block = block

    def block_length(self, stored) -> int:
        """The length of the blocks. The last block of an axis may be shorter."""
        return self.block or _block_length(stored[0].shape[-1], stored[2].shape[-1])

    @staticmethod
    def check(betas: dict | None) -> None:
        """Raise if int8 is not allowed (``betas`` is None), or if known rates leave ``m / sqrt(v)`` unbounded."""
        if betas is None:
            raise ValueError(
                "moments must be 'bfloat16' or 'float32' for this optimizer, got 'int8', which needs the bound of Adam "
                "and NAdam on m / sqrt(v). Use 'bfloat16', or adam, adamw, nadam or nadamw."
            )
        b1, b2 = betas["b1"], betas["b2"]
        if isinstance(b1, float) and isinstance(b2, float) and b1 * b1 >= b2:
            raise ValueError(
                f"moments='int8' needs b1*b1 < b2, got b1 = {b1:g} and b2 = {b2:g}: m / sqrt(v) would be unbounded. "
                "Use moments='bfloat16', or a larger b2."
            )

    def unsupported_reason(self, p):
        dtype = at_least_float32(p)
        if dtype != np.float32:
            return f"{dtype} moments are not compressed"
        if jnp.ndim(p) < 2:
            return f"{jnp.ndim(p)}-dimensional, int8 needs 2 dimensions"
        if not checks.has_constant_shape(p):
            raise ValueError(
                f"moments='int8' needs constant shapes, got {p.shape}: it divides rows into blocks. Use "
                "moments='bfloat16', or export a step for each shape."
            )
        if p.size < MIN_SIZE:
            return f"{p.size} elements, int8 needs {MIN_SIZE}"
        block = _init_block_length(p)
        if block is None:
            return "no block of 32 to 128 divides the shards of its last dimension"
        if 2 + 8 / block > 4:
            return f"blocks of {block}: int8 would not halve the state"
        return None

    def matches(self, stored):
        return stored[1].dtype == jnp.uint8

    def num_arrays(self, num_moments):
        return 2 * num_moments

    def init(self, p, num_moments):
        num_blocks = -(-p.shape[-1] // _init_block_length(p))
        scale = lambda: jnp.zeros((*p.shape[:-1], num_blocks), jnp.float32, device=_sharding(p))
        return jnp.zeros_like(p, dtype=jnp.int8), jnp.zeros_like(p, dtype=jnp.uint8), scale(), scale()

    def nan_if_unsupported(self, hp):
        b1, b2, a1, a2 = hp.b1.b, hp.b2.b, hp.b1.one_minus_b, hp.b2.one_minus_b
        bounded = (b1 * b1 < b2) | (a2 < a1 * (2 - a1))  # equivalent, but b1 and b2 may round to 1, or a2 to 1
        if isinstance(bounded, np.bool_) and bounded:
            return hp
        return hp.replace(b1=hp.b1._replace(b=jnp.where(bounded, hp.b1.b, jnp.nan)))

    def decode(self, stored, dtype):
        rq, vq, r_scale, v_scale = stored
        n, block = rq.shape[-1], self.block_length(stored)
        m, v = self.dequantize(_to_blocks(rq, block), _to_blocks(vq, block), r_scale[..., None], v_scale[..., None])
        return tuple(_from_blocks(x, n).astype(dtype) for x in (m, v))

    def encode(self, moments, stored, random):
        n = moments[0].shape[-1]
        block = self.block_length(stored)
        moments = jax.lax.stop_gradient(
            tuple(moments)
        )  # codes have no derivative, and that of the scales alone would be wrong
        m, v = (_to_blocks(x.astype(jnp.float32), block) for x in moments)
        lane = jax.lax.broadcasted_iota(jnp.uint32, m.shape, m.ndim - 1)
        first_index = _to_blocks(random.index, block)[..., :1]
        bits = dither_of_block(first_index, lane, random.salt, random.count)
        rq, vq, r_scale, v_scale = quantize(m, v, bits)
        return _from_blocks(rq, n), _from_blocks(vq, n), r_scale[..., 0], v_scale[..., 0]


def _dequantize_version_1(rq, sq, r_scale, s_scale):
    """`dequantize` of states of version 1, where ``sq`` and ``s_scale`` are of the root of v."""
    rq, sq = (x.astype(jnp.int32).astype(jnp.float32) for x in (rq, sq))
    s = s_scale * (sq / 255) ** 4
    return r_scale * (rq * jnp.abs(rq) / 127**2) * s, s * s


class Int8Version1(Int8):
    """What jadam stored when `formats.VERSION` was 1, for `jadam.convert_moments`."""

    dequantize = staticmethod(_dequantize_version_1)


class Int8CutBlocks(Int8):
    """`Int8` of a shard that does not hold whole blocks along the last axis. Each device has the scales of whole rows.

    The largest values of a block are found across devices. No kernel does this.
    """

    def __init__(self, block: int, length: int, first_column: jax.Array, max_across_row: Callable[..., jax.Array]):
        """Describe a shard.

        Args:
            block: the block length.
            length: the length of the last axis of the whole array. The last shard may be padded.
            first_column: the shard's first index along this axis.
            max_across_row: the elementwise maximum over the devices that hold the same rows.
        """
        self.block, self.length = block, length
        self.first_column, self.max_across_row = first_column, max_across_row

    def decode(self, stored, dtype):
        rq, vq, *scales = stored
        _, blocks, _ = self._place(rq)
        return tuple(x.astype(dtype) for x in dequantize(rq, vq, *(jnp.take(x, blocks, axis=-1) for x in scales)))

    def encode(self, moments, stored, random):
        m, v = moments
        column, blocks, lane = self._place(m)
        r, zeros = _ratio(m, v), jnp.zeros(stored[2].shape, jnp.int32)
        magnitudes = (jnp.where(column < self.length, x, 0) for x in _magnitudes(r, v))
        r_max, v_max = (self.max_across_row(zeros.at[..., blocks].max(x)) for x in magnitudes)
        scales = _scales(r_max, v_max)
        bits = dither_of_block(random.index - lane, lane, random.salt, random.count)
        r_scale, v_scale = (jnp.take(x, blocks, axis=-1) for x in scales)
        return *_codes(r, v, r_scale, v_scale, bits), *scales

    def _place(self, x):
        """Each column's index in the whole array, its block, and its place in the block."""
        column = self.first_column.astype(jnp.uint32) + jnp.arange(x.shape[-1], dtype=jnp.uint32)
        as_row = lambda a: a.reshape((1,) * (x.ndim - 1) + a.shape)  # jax_numpy_rank_promotion may forbid others
        blocks = (column // jnp.uint32(self.block)).astype(jnp.int32)
        return as_row(column), blocks, as_row(column % jnp.uint32(self.block))


@functools.cache
def int8_of_shards(block: int) -> Int8:
    """`Int8` with this block length: the same object for each, since it is a static argument of `jax.jit`."""
    return Int8(block)


def _block_length(n: int, num_blocks: int) -> int:
    """The block length of an axis of ``n`` elements with ``num_blocks`` blocks. The last block may be shorter."""
    standard = min(BLOCK, n)
    return standard if -(-n // standard) == num_blocks else -(-n // num_blocks)


def _init_block_length(p) -> int | None:
    """The block length for a new state: `BLOCK`, less if shards would not hold whole blocks, or None."""
    n, sharding = p.shape[-1], _sharding(p)
    return largest_block(n, n if sharding is None else sharding.shard_shape(p.shape)[-1])


def largest_block(n: int, shard: int) -> int | None:
    """The largest block length, 32 to 128, that divides shards of length ``shard`` of an axis of length ``n``, or None.

    An unsharded axis, ``shard == n``, may end in a shorter block: it gets `BLOCK`, or ``n`` if that is less.
    """
    if shard == n:
        return min(BLOCK, n)
    fits = lambda b: shard % b == 0 and _block_length(n, n // b) == b
    return next(filter(fits, range(min(BLOCK, shard), 31, -1)), None)


def _sharding(p) -> jax.sharding.NamedSharding | None:
    """The sharding of ``p`` over a mesh. None if ``p`` is whole, or if it is traced and the axes are not explicit."""
    sharding = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else getattr(p, "sharding", None)
    known = isinstance(sharding, jax.sharding.NamedSharding) and any(axes is not None for axes in sharding.spec)
    return sharding if known else None


def _to_blocks(x, block: int):
    """Split the last axis of ``x`` into blocks. The last block is padded with zeros."""
    n = x.shape[-1]
    num_blocks = -(-n // block)
    if num_blocks * block != n:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_blocks * block - n)])
    return x.reshape(*x.shape[:-1], num_blocks, block)


def _from_blocks(x, n: int):
    """The inverse of `_to_blocks` for an axis of ``n`` elements."""
    return x.reshape(*x.shape[:-2], -1)[..., :n]
