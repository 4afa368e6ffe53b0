"""A float32 number as its bfloat16 neighbour and the distance to it, counted in float32's own steps.

Ties go away from zero, so that the count fits int16.
"""

import jax
import jax.numpy as jnp

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
