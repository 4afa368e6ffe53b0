"""A float32 number as a pair: the nearest bfloat16, and an int16 remainder that counts float32 spacings from it.

Ties are rounded away from zero, so that the remainder fits int16. Operations on bits have no derivative, so these
functions define the one of exact numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import apply_rounded

bitcast = jax.lax.bitcast_convert_type


@jax.custom_jvp
def split(x):
    """Split float32 into the nearest bfloat16 and an int16 remainder."""
    bits = bitcast(x, jnp.uint32)
    bits = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC00000), bits)  # rounding up another NaN could give -0.0
    high = (bits + 0x8000) >> 16
    rest = (bits - (high << 16)).astype(jnp.uint16)
    return bitcast(high.astype(jnp.uint16), jnp.bfloat16), bitcast(rest, jnp.int16)


@split.defjvp
def _split_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    d_remainder: Any = np.zeros(x.shape, jax.dtypes.float0)  # the tangent of integers
    return split(x), (dx.astype(jnp.bfloat16), d_remainder)


@jax.custom_jvp
def join(p, remainder):
    """The inverse of `split`.

    If a user set a parameter to 0 or infinity, a remainder that would make it NaN is dropped.
    """
    high = bitcast(p, jnp.uint16)
    rest = remainder.astype(jnp.int32)
    magnitude = high & 0x7FFF
    stray = ((magnitude == 0) & (rest < 0)) | ((magnitude == 0x7F80) & (rest > 0))
    bits = (high.astype(jnp.uint32) << 16) + bitcast(jnp.where(stray, 0, rest), jnp.uint32)
    return bitcast(bits, jnp.float32)


@join.defjvp
def _join_jvp(primals, tangents):
    return join(*primals), tangents[0].astype(jnp.float32)


@jax.custom_jvp
def update_to(p, x):
    """The float32 update with which bfloat16 ``p`` becomes float32 ``x`` rounded to bfloat16.

    It is -0.0, which changes no bit, where ``p`` is that already.
    """
    rounded = split(x)[0]
    equal = bitcast(rounded, jnp.uint16) == bitcast(p, jnp.uint16)
    return jnp.where(equal, -0.0, _to_float32(rounded) - _to_float32(p))


@update_to.defjvp
def _update_to_jvp(primals, tangents):
    dp, dx = tangents
    return update_to(*primals), dx - dp.astype(jnp.float32)


def remainder_of(p, x, update):
    """The int16 remainder of float32 ``x`` where ``p + update`` is ``x`` rounded to bfloat16, otherwise 0."""
    rounded, rest = split(x)
    updated = bitcast(apply_rounded(_to_float32(p), update, jnp.bfloat16), jnp.uint32)
    return jnp.where(updated == bitcast(_to_float32(rounded), jnp.uint32), rest, 0)


def _to_float32(p):
    """Convert bfloat16 to float32 by bits: under jit, XLA may skip the rounding to bfloat16 before a convert."""
    return bitcast(bitcast(p, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
