r"""Adam's two moments in two bytes and a bit per parameter.

Stored are not :math:`m` and :math:`v` but the ratio :math:`r = m / \sqrt v` and the root :math:`s = \sqrt v`, because
the ratio is bounded whatever error sits in either: with :math:`m' = b_1 m + (1 - b_1) g` and
:math:`v' = b_2 v + (1 - b_2) g^2` the Cauchy-Schwarz inequality gives

.. math::

    |r'|^2 \le \frac{b_1^2}{b_2} |r|^2 + \frac{(1 - b_1)^2}{1 - b_2}, \qquad\text{so}\qquad
    |r| \le R = \frac{1 - b_1}{\sqrt{1 - b_2}} \Big/ \sqrt{1 - b_1^2 / b_2} \qquad (b_1^2 < b_2)

for every sequence of gradients: 7.27 at 0.9 and 0.999. So no error of a code can blow a step up, as it does where
:math:`m` and :math:`v` are quantised each for itself and a small :math:`v` is rounded to zero below an :math:`m` that
was not.

Both are scaled to [0, 1] by the largest of their block, a run along the last axis, and rounded stochastically to
levels that are dense near 0: :math:`(a/127)^2` for :math:`|r|`, :math:`(c/255)^4` for :math:`s`. A rounding is
unbiased in :math:`r` and in :math:`v`; what many of them leave, see `jadam._core.numerics.dither`. To nearest, an
:math:`r` whose gradient died would never get from level 1 to 0.
"""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import at_least_float32, uniform

BLOCK = 128  # elements along the last axis that share a scale, at most; TPU's lanes
SMALLEST = 4096  # elements below which a leaf is not worth it
R_LEVELS, S_LEVELS = np.float32(127**2), np.float32(255**4)  # |r| is a**2 / R_LEVELS of r_scale, s likewise
SMALLEST_RATIO = np.float32(1e-30)  # below it r_scale is 0, lest R_LEVELS / r_scale overflow


def dequantize(rq, sq, r_scale, s_scale):
    """The moments ``m, v`` of codes ``rq`` (int8) and ``sq`` (uint8) and scales that broadcast against them."""
    rq, sq = (x.astype(jnp.int32).astype(jnp.float32) for x in (rq, sq))  # Mosaic converts no 8 bits to floats
    r = r_scale * (1 / R_LEVELS) * (rq * jnp.abs(rq))
    s = s_scale * (1 / S_LEVELS) * jnp.square(jnp.square(sq))
    return r * s, s * s


def quantize(m, v, rho_r, rho_s, axis=-1):
    """``m, v`` in codes and scales, a block being the whole ``axis``, and ``rho_r, rho_s`` uniform in [0, 1).

    A block with a value that is not finite gets scales that are NaN: integers could not hold it. One whose ratios are
    all below `SMALLEST_RATIO` gets ratios of 0.
    """
    s = jnp.sqrt(v)
    r = jnp.where(s > 0, m / jnp.where(s > 0, s, 1), m * 0)
    finite = jnp.where((jnp.abs(r) < jnp.inf) & (s < jnp.inf), np.float32(1), 0)
    finite = jnp.min(finite, axis=axis, keepdims=True, initial=1) > 0  # Triton has no all
    r_scale, s_scale = (jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0) for x in (r, s))
    r_scale = jnp.where(finite, jnp.where(r_scale < SMALLEST_RATIO, 0, r_scale), jnp.nan)
    s_scale = jnp.where(finite, s_scale, jnp.nan)
    y = jnp.abs(r) * jnp.where(r_scale > 0, R_LEVELS / jnp.where(r_scale > 0, r_scale, 1), 0)
    a = jnp.minimum(jnp.floor(jnp.sqrt(y)), 126)
    a += (rho_r * (2 * a + 1) < y - a * a).astype(jnp.float32)
    w = s * jnp.where(s_scale > 0, S_LEVELS / jnp.where(s_scale > 0, s_scale, 1), 0)
    c = jnp.minimum(jnp.floor(jnp.sqrt(jnp.sqrt(w))), 254)
    c += (rho_s * (_eighth_power(c + 1) - _eighth_power(c)) < w * w - _eighth_power(c)).astype(jnp.float32)
    c = jnp.where(s > 0, jnp.maximum(c, 1), 0)  # code 0 is v = 0 exactly
    rq, sq = (x.astype(jnp.int32) for x in (jnp.where(r < 0, -a, a), c))
    return rq.astype(jnp.int8), sq.astype(jnp.uint8), r_scale, s_scale


def _eighth_power(x):
    return jnp.square(jnp.square(jnp.square(x)))


class Int8:
    """Two moments of Adam in 2 bytes per parameter and two float32 scales per block of up to 128."""

    name = "int8"
    stochastic = True

    @staticmethod
    def check(betas: dict | None) -> None:
        """Raise unless ``betas``, where they are known, bound ``m / sqrt(v)``."""
        if betas is None:
            raise ValueError(
                "moments must be 'bfloat16' or 'float32' here, got 'int8', whose codes rest on the bound that Adam's "
                "and NAdam's rules give m / sqrt(v). Take 'bfloat16', or adam, adamw, nadam or nadamw."
            )
        b1, b2 = betas["b1"], betas["b2"]
        if isinstance(b1, float) and isinstance(b2, float) and b1 * b1 >= b2:
            raise ValueError(
                f"moments='int8' needs b1*b1 < b2, got b1 = {b1:g} and b2 = {b2:g}: m / sqrt(v) would have no bound. "
                "Take moments='bfloat16', or a larger b2."
            )

    def unsupported_reason(self, p):
        dtype = at_least_float32(p)
        if dtype != np.float32:
            return f"{dtype} is never stored narrower than itself"
        if jnp.ndim(p) < 2:
            return f"{jnp.ndim(p)}-dimensional, int8 needs 2 axes"
        if p.size < SMALLEST:
            return f"{p.size} elements, int8 needs {SMALLEST}"
        block = _block_for(p)
        if block is None:
            return "its last axis is sharded into runs that no block of 32 to 128 divides"
        if 2 + 8 / block > 4:
            return f"blocks of {block}: int8 would not halve the state"
        return None

    def matches(self, stored):
        return stored[1].dtype == jnp.uint8

    def num_arrays(self, moments):
        return 2 * moments

    def init(self, p, moments):
        blocks = -(-p.shape[-1] // _block_for(p))
        scale = lambda: jnp.zeros((*p.shape[:-1], blocks), jnp.float32, device=_sharding(p))
        return jnp.zeros_like(p, dtype=jnp.int8), jnp.zeros_like(p, dtype=jnp.uint8), scale(), scale()

    def validate(self, hp):
        b1, b2, a1, a2 = hp.b1.b, hp.b2.b, hp.b1.one_minus_b, hp.b2.one_minus_b
        bounded = (b1 * b1 < b2) | (a2 < a1 * (2 - a1))  # the same twice: float32 may have 1 for b1 and b2, or for a2
        if isinstance(bounded, np.bool_) and bounded:
            return hp
        return hp.replace(b1=hp.b1._replace(b=jnp.where(bounded, hp.b1.b, jnp.nan)))

    def decode(self, stored, dtype):
        rq, sq, r_scale, s_scale = stored
        n, block = rq.shape[-1], block_of(stored)
        return tuple(
            _joined(x, n).astype(dtype)
            for x in dequantize(_blocked(rq, block), _blocked(sq, block), r_scale[..., None], s_scale[..., None])
        )

    def encode(self, moments, stored, random):
        n = moments[0].shape[-1]
        block = block_of(stored)
        moments = jax.lax.stop_gradient(tuple(moments))  # codes have no derivative, and scales alone a misleading one
        arrays = *(x.astype(jnp.float32) for x in moments), uniform(random(0)), uniform(random(1))
        m, v, rho_r, rho_s = (_blocked(x, block) for x in arrays)
        rq, sq, r_scale, s_scale = quantize(m, v, rho_r, rho_s)
        return _joined(rq, n), _joined(sq, n), r_scale[..., 0], s_scale[..., 0]


def block_of(stored) -> int:
    """The length of the blocks of stored arrays."""
    return block_length(stored[0].shape[-1], stored[2].shape[-1])


def block_length(n: int, blocks: int) -> int:
    """The length of the blocks, the last one perhaps shorter, of which an axis of ``n`` has ``blocks``."""
    standard = min(BLOCK, n)
    return standard if -(-n // standard) == blocks else -(-n // blocks)


def _block_for(p) -> int | None:
    """The block length for a new state: `BLOCK`, or less where each shard would not hold whole blocks."""
    n, sharding = p.shape[-1], _sharding(p)
    return largest_block(n, n if sharding is None else sharding.shard_shape(p.shape)[-1])


def largest_block(n: int, here: int) -> int | None:
    """The longest blocks of an axis of ``n`` of which runs of ``here`` hold whole ones, or None; `BLOCK` in one run."""
    if here == n:
        return min(BLOCK, n)
    fitting = (b for b in range(min(BLOCK, here), 31, -1) if here % b == 0 and block_length(n, n // b) == b)
    return next(fitting, None)


def _sharding(p) -> jax.sharding.NamedSharding | None:
    """How ``p`` is spread over a mesh, where that can be known: under jit only on a mesh with explicit axes."""
    sharding = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else getattr(p, "sharding", None)
    known = isinstance(sharding, jax.sharding.NamedSharding) and any(axes is not None for axes in sharding.spec)
    return sharding if known else None


def _blocked(x, block: int):
    """``x`` with its last axis cut into blocks, the last one filled up with zeros."""
    n = x.shape[-1]
    blocks = -(-n // block)
    if blocks * block != n:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - n)])
    return x.reshape(*x.shape[:-1], blocks, block)


def _joined(x, n: int):
    """`_blocked` undone."""
    return x.reshape(*x.shape[:-2], -1)[..., :n]
