"""Formulas that lose accuracy in floating point as textbooks write them, in an accurate form.

All functions work on single arrays or scalars, without trees, states or optimizers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Scalar = jax.Array  # or the NumPy scalar of a hyperparameter known on the host


class Beta(NamedTuple):
    """A decay rate ``b`` at step ``t`` and the numbers derived from it, each rounded once."""

    b: Scalar  # the rate itself, in [0, 1)
    one_minus_b: Scalar  # the weight of the newest term
    correction: Scalar  # 1 - b**t: the average of t ones, started from 0
    next_b: Scalar  # the rate at t+1: b, unless it follows a schedule
    next_correction: Scalar  # 1 - b**(t+1)


def constant_beta(b, t: Scalar, dtype) -> Beta:
    """The `Beta` of a constant rate ``b``, a float or an array. ``t`` is a float of ``dtype``."""
    value = b.astype(dtype) if isinstance(b, jax.Array) else np.dtype(dtype).type(b)
    correction, next_correction = one_minus_power(b, t, dtype), one_minus_power(b, t + 1, dtype)
    return Beta(value, one_minus(b, dtype), correction, value, next_correction)


class CurrentCorrection(NamedTuple):
    """The bias correction of a scheduled beta at the current step, for when the previous step's is not known."""

    value: jax.Array


def scheduled_beta(b, next_b, correction: jax.Array | CurrentCorrection) -> Beta:
    """The `Beta` of a scheduled rate ``b`` with next value ``next_b``.

    ``correction`` is the previous step's, or a `CurrentCorrection`. This step's, ``1 - b(0) * ... * b(t-1)``, is
    computed as the moving average of ones under these rates. Where it is close to 0, one minus the product would
    cancel; the average does not.
    """
    known = correction.value if isinstance(correction, CurrentCorrection) else correction
    current, following = (constant_beta(x, jnp.ones([], known.dtype), known.dtype) for x in (b, next_b))
    correction = known if isinstance(correction, CurrentCorrection) else ema(current, known, 1)
    return current._replace(correction=correction, next_b=following.b, next_correction=ema(following, correction, 1))


def one_minus(b, dtype) -> Scalar:
    """``1 - b``, computed in float64 on the host if ``b`` is a Python float.

    In float32, ``1 - 0.999`` has a relative error of 1.3e-5. A traced ``b`` is float32 already and keeps that error.
    """
    if isinstance(b, float):
        return np.dtype(dtype).type(1.0 - b)
    return 1 - b.astype(dtype)


def one_minus_power(b, t, dtype) -> Scalar:
    """``1 - b**t`` for an integer ``t >= 1`` in ``dtype``, to a few ulp: ``-expm1(t * log(b))``.

    ``1 - b**t`` as written cancels: at b = 0.999, t = 1 it loses ten of float32's 24 bits. ``log(b)`` is computed as
    ``log1p(-(1-b))``, so that the value at t = 1 equals ``1-b``, the weight of the newest term. For b = 0 the
    logarithm is ``-inf``, and the result is exactly 1.
    """
    if isinstance(b, float):
        with np.errstate(divide="ignore"):
            log_b = np.dtype(dtype).type(np.log1p(-(1.0 - b)))
    else:
        log_b = jnp.log1p(-one_minus(b, dtype))
    return -jnp.expm1(t * log_b)


def ema(beta: Beta, average, x):
    """The exponential moving average ``b * average + (1-b) * x``, with a constant ``x`` as its fixed point.

    In float32, ``b + (1-b)`` is not 1, and ``b*average + (1-b)*x`` converges to a value up to 1.3e-5 off. Here the
    change is added to the term with the larger weight: at b = 0 and ``average`` = 1e8 the other form would lose ``x``.
    """
    slow = lambda: average + beta.one_minus_b * (x - average)
    fast = lambda: x + beta.b * (average - x)
    if isinstance(beta.b, np.floating):
        if beta.one_minus_b == 0:  # only in `jadam.statistics`; 0 * (x - average) would be NaN for an infinite average
            return average
        return slow() if beta.b >= 0.5 else fast()
    return jnp.where(beta.b >= 0.5, slow(), fast())


@jax.custom_jvp
def sqrt(x):
    """Square root with derivative 0 at 0, instead of infinity.

    ``m / (sqrt(v) + eps)`` has a finite derivative where all gradients were zero. The chain rule through ``jnp.sqrt``
    would make it ``0 * inf``, which is NaN.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x == 0, 0, dx / (2 * jnp.where(x == 0, 1, root)))


def abs_sq(x):
    """``|x|**2``, a real array also for complex ``x``."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def divide(x, y):
    """``x / y``, or ``x`` where ``y`` is 0. So 0 / 0 is 0, and its derivative is finite."""
    return x / jnp.where(y == 0, 1, y)


def promote(*values) -> np.dtype:
    """The common dtype of arrays and dtypes by JAX's standard promotion, even in strict mode."""
    dtypes = (getattr(value, "dtype", None) or jnp.result_type(value) for value in values)
    return _promoted(jax.dtypes.canonicalize_dtype(np.float64), *dtypes)


@functools.cache
def _promoted(cache_key, *dtypes):
    """The common dtype of ``dtypes``. ``cache_key`` is unused: the result depends on jax_enable_x64."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, dtypes))


def at_least_float32(*values) -> np.dtype:
    """The common dtype of ``values`` and float32."""
    return promote(np.dtype(np.float32), *values)


def real(dtype) -> np.dtype:
    """The dtype of ``abs(x)`` for ``x`` of ``dtype``."""
    return jnp.finfo(dtype).dtype


def lowbias32(x: jax.Array) -> jax.Array:
    """Wellons' lowbias32, a hash from uint32 to uint32. If an input bit flips, each output bit flips half the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


_GOLDEN_RATIO = np.uint32(0x9E3779B9)  # 2**32 / golden ratio


def dither(index: jax.Array, salt: int, count: jax.Array, k: int) -> jax.Array:
    """32 pseudo-random bits for every element of an array, without a key: a Weyl sequence over the steps.

    A hash of the index is the start, and every step adds 2**32 / golden ratio, modulo 2**32. Over any run of
    steps these bits are spread more evenly than independent ones, so rounding errors cancel sooner. Under random
    gradients the root mean square error of v is 12 % less in int8, and 30 % less in bfloat16.

    The bits of successive steps are not independent, which biases v downwards. The bias is 0.1 % in bfloat16. In int8
    it is 0.3 % for the largest elements of a block and 1.5 % for the smallest, far below the error itself, 14 and 30 %
    (measured with standard deviations from 1 to 0.001 at b2 = 0.999). Under a constant gradient int8's m is 0.15 %
    too large.

    Args:
        index: uint32, the elements' linear indices in the global array.
        salt: distinguishes arrays.
        count: the number of steps taken before this one, a uint32 scalar.
        k: the number of an independent stream, from 0.
    """
    start = lowbias32(index ^ lowbias32(jnp.uint32((salt + k // 2 * 0x632BE5AB) & 0xFFFFFFFF)))
    if k % 2:  # the halves of a hash are independent: two streams from one hash
        start = start << 16 | start >> 16
    return start + count * _GOLDEN_RATIO


def dither_of_block(first_index: jax.Array, lane: jax.Array, salt: int, count: jax.Array) -> jax.Array:
    """`dither` with one hash for a block of elements: a Weyl sequence over its lanes as well, 2**32 / plastic number.

    Args:
        first_index: uint32, the linear index of the first element of each element's block.
        lane: uint32, the place of each element in its block.
        salt, count: see `dither`.
    """
    return dither(first_index, salt, count, 0) + lane * jnp.uint32(0xC13FA9A9)


def linear_index(shape, global_shape=None) -> jax.Array:
    """Each element's row-major index modulo 2**32, as uint32. It uses iota, so it stays global under sharding.

    ``global_shape`` is the shape of a larger array whose first part has ``shape``. Default: ``shape``.
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= (global_shape or shape)[axis]
    return index


def round_to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically, without bias, by random uint32 ``bits``.

    It works on bit patterns, because XLA may elide a conversion to bfloat16 and back.
    """
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = ((pattern + (bits >> 16)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_rounded(p, u, dtype):
    """``p + u`` rounded to ``dtype``, as `optax.apply_updates` does, but returned in at least float32.

    It uses ``reduce_precision``, because under jit XLA drops the rounding of ``x.astype(bfloat16).astype(float32)``.
    Numbers that are subnormal in ``dtype`` are not rounded.
    """
    wide = at_least_float32(p, u)
    x = p.astype(wide) + u.astype(wide)
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return x
    rounded = jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(x) < wide.type(info.smallest_normal), x, rounded)


def apply_updates(params, updates):
    """`optax.apply_updates` with standard promotion: in strict mode updates may be wider than parameters."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)
