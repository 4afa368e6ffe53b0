r"""Adam's two moments in little more than two bytes per parameter.

The state stores the ratio :math:`r = m / \sqrt v` and the root :math:`s = \sqrt v` instead of :math:`m` and :math:`v`.
The ratio is bounded even if both carry errors. With :math:`m' = b_1 m + (1 - b_1) g` and
:math:`v' = b_2 v + (1 - b_2) g^2`, the Cauchy-Schwarz inequality gives

.. math::

    |r'|^2 \le \frac{b_1^2}{b_2} |r|^2 + \frac{(1 - b_1)^2}{1 - b_2}, \qquad\text{so}\qquad
    |r| \le R = \frac{1 - b_1}{\sqrt{1 - b_2}} \Big/ \sqrt{1 - b_1^2 / b_2} \qquad (b_1^2 < b_2)

for every sequence of gradients. At 0.9 and 0.999, :math:`R` is 7.27. So quantisation error cannot push an update past
Adam's own bound. If :math:`m` and :math:`v` were quantised separately, a small :math:`v` could be rounded to zero where
:math:`m` is not, and the step would explode.

Both are scaled to [0, 1] by the largest value of their block, a run along the last axis. Then they are rounded
stochastically to levels that are dense near 0: :math:`(a/127)^2` for :math:`|r|`, :math:`(c/255)^4` for :math:`s`. One
rounding is unbiased in :math:`r` and in :math:`v`. For the bias over many steps see `jadam._core.numerics.dither`. With
rounding to nearest, an :math:`r` whose gradient is now zero would never get from level 1 to 0.
"""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.numerics import at_least_float32, uniform

BLOCK = 128  # at most this many elements along the last axis share a scale; a TPU has as many lanes
MIN_SIZE = 4096  # smaller leaves stay float32
# For codes a and c: |r| = r_scale * a**2 / R_LEVELS and s = s_scale * c**4 / S_LEVELS.
R_LEVELS, S_LEVELS = np.float32(127**2), np.float32(255**4)
MIN_R_SCALE = np.float32(1e-30)  # a smaller r_scale becomes 0, or R_LEVELS / r_scale would overflow


def dequantize(rq, sq, r_scale, s_scale):
    """The moments ``m, v`` from codes ``rq`` (int8) and ``sq`` (uint8). The scales broadcast against them."""
    rq, sq = (x.astype(jnp.int32).astype(jnp.float32) for x in (rq, sq))  # Mosaic cannot convert 8 bits to float
    r = r_scale * (1 / R_LEVELS) * (rq * jnp.abs(rq))
    s = s_scale * (1 / S_LEVELS) * jnp.square(jnp.square(sq))
    return r * s, s * s


def quantize(m, v, rho_r, rho_s, axis=-1):
    """The codes and scales of ``m, v``. A block is the whole ``axis``; ``rho_r, rho_s`` are uniform in [0, 1).

    A block with a non-finite value gets NaN scales, since integer codes cannot hold it. A block with all ratios below
    `MIN_R_SCALE` gets ratios of 0.
    """
    s = jnp.sqrt(v)
    r = jnp.where(s > 0, m / jnp.where(s > 0, s, 1), m * 0)
    finite = jnp.where((jnp.abs(r) < jnp.inf) & (s < jnp.inf), np.float32(1), 0)
    finite = jnp.min(finite, axis=axis, keepdims=True, initial=1) > 0  # Triton lacks jnp.all
    r_scale, s_scale = (jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0) for x in (r, s))
    r_scale = jnp.where(finite, jnp.where(r_scale < MIN_R_SCALE, 0, r_scale), jnp.nan)
    s_scale = jnp.where(finite, s_scale, jnp.nan)
    y = jnp.abs(r) * jnp.where(r_scale > 0, R_LEVELS / jnp.where(r_scale > 0, r_scale, 1), 0)
    a = jnp.minimum(jnp.floor(jnp.sqrt(y)), 126)
    a += (rho_r * (2 * a + 1) < y - a * a).astype(jnp.float32)
    w = s * jnp.where(s_scale > 0, S_LEVELS / jnp.where(s_scale > 0, s_scale, 1), 0)
    c = jnp.minimum(jnp.floor(jnp.sqrt(jnp.sqrt(w))), 254)
    c += (rho_s * (_eighth_power(c + 1) - _eighth_power(c)) < w * w - _eighth_power(c)).astype(jnp.float32)
    c = jnp.where(s > 0, jnp.maximum(c, 1), 0)  # code 0 means v = 0
    rq, sq = (x.astype(jnp.int32) for x in (jnp.where(r < 0, -a, a), c))
    return rq.astype(jnp.int8), sq.astype(jnp.uint8), r_scale, s_scale


def _eighth_power(x):
    """``x**8``."""
    return jnp.square(jnp.square(jnp.square(x)))


class Int8:
    """Adam's two moments in 2 bytes per parameter, and two float32 scales per block of up to 128 elements."""

    name = "int8"
    stochastic = True

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
        rq, sq, r_scale, s_scale = stored
        n, block = rq.shape[-1], block_length(stored)
        return tuple(
            _from_blocks(x, n).astype(dtype)
            for x in dequantize(_to_blocks(rq, block), _to_blocks(sq, block), r_scale[..., None], s_scale[..., None])
        )

    def encode(self, moments, stored, random):
        n = moments[0].shape[-1]
        block = block_length(stored)
        moments = jax.lax.stop_gradient(
            tuple(moments)
        )  # codes have no derivative, and that of the scales alone would be wrong
        arrays = *(x.astype(jnp.float32) for x in moments), uniform(random(0)), uniform(random(1))
        m, v, rho_r, rho_s = (_to_blocks(x, block) for x in arrays)
        rq, sq, r_scale, s_scale = quantize(m, v, rho_r, rho_s)
        return _from_blocks(rq, n), _from_blocks(sq, n), r_scale[..., 0], s_scale[..., 0]


def block_length(stored) -> int:
    return _block_length(stored[0].shape[-1], stored[2].shape[-1])


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
