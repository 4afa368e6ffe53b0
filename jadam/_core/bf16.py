"""A float32 number as its bfloat16 neighbour and the distance to it, counted in float32's own steps.

Ties go away from zero, so that the count fits int16.
"""

import jax
import jax.numpy as jnp

from jadam._core.numerics import apply_rounded

bitcast = jax.lax.bitcast_convert_type


def split(x):
    """float32 as bfloat16 and the remainder, int16."""
    bits = bitcast(x, jnp.uint32)
    bits = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC00000), bits)  # rounding up another could make it -0.0
    high = (bits + 0x8000) >> 16
    rest = (bits - (high << 16)).astype(jnp.uint16)
    return bitcast(high.astype(jnp.uint16), jnp.bfloat16), bitcast(rest, jnp.int16)


def join(p, remainder):
    """`split` undone; a weight that was set to 0 or infinity from outside loses a remainder that makes it NaN."""
    high = bitcast(p, jnp.uint16)
    rest = remainder.astype(jnp.int32)
    magnitude = high & 0x7FFF
    stray = ((magnitude == 0) & (rest < 0)) | ((magnitude == 0x7F80) & (rest > 0))
    bits = (high.astype(jnp.uint32) << 16) + bitcast(jnp.where(stray, 0, rest), jnp.uint32)
    return bitcast(bits, jnp.float32)


def distance(p, x):
    """The update that takes ``p`` to ``x`` rounded to bfloat16: -0.0, which changes nothing, where it is there."""
    rounded = split(x)[0]
    there = bitcast(rounded, jnp.uint16) == bitcast(p, jnp.uint16)
    return jnp.where(there, -0.0, _exactly(rounded) - _exactly(p))


def remainder_of(p, x, update):
    """The remainder of ``x`` if ``p + update`` lands on ``x`` rounded, otherwise 0."""
    rounded, rest = split(x)
    landed = bitcast(apply_rounded(_exactly(p), update, jnp.bfloat16), jnp.uint32)
    return jnp.where(landed == bitcast(_exactly(rounded), jnp.uint32), rest, 0)


def _exactly(p):
    """bfloat16 as float32, by bits: under jit XLA may take ``p`` from before it was rounded."""
    return bitcast(bitcast(p, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
