"""A number by which a restored checkpoint is known to be the one that was saved."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core.numerics import linear_index, lowbias32


def checksum(tree) -> jax.Array:
    """32 bits that depend on every bit of a tree: save them beside it, and compare once it is restored.

    From a file with a flipped bit Orbax may restore other numbers without an error. One flipped bit in an array, or any
    change of one element of up to 4 bytes, always changes the checksum; other damage, but for a chance of 2**-32.

    Args:
        tree: of arrays of JAX or NumPy and Python numbers, in any dtype and sharding.

    Returns:
        A uint32 scalar. It is a function of the names on each leaf's path (not of the kind of container), its dtype and
        shape, and its bits; not of where it is. None has no part in it, nor has an array without elements.

    Raises:
        TypeError: a leaf that is no array of numbers, a random key for one.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"w": jnp.ones(2)}
        >>> state = jadam.adam(1e-3).init(params)
        >>> saved = params, state, jadam.checksum((params, state))  # what a checkpoint holds
        >>> params, state, expected = saved  # restored from it
        >>> if jadam.checksum((params, state)) != expected:
        ...     raise ValueError("the checkpoint is damaged")
        >>> bool(jadam.checksum(({"w": jnp.array([1.0, -1.0])}, state)) != expected)
        True
    """
    total = jnp.zeros([], jnp.uint32)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
            raise TypeError(
                f"tree{jax.tree_util.keystr(path)} must be an array of numbers, got {x.dtype}. Leave it out, or pass "
                "jax.random.key_data(key) for a random key."
            )
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        salt = np.uint32(zlib.crc32(f"{name} {x.dtype} {x.shape}".encode()))
        if isinstance(x, np.ndarray) and x.dtype.itemsize >= 8:  # JAX may make 4 bytes of it
            x = np.ascontiguousarray(x)[..., None].view(np.uint32)
        total += _sum(x, salt)
    return total


@jax.jit
def _sum(x: Any, salt) -> jax.Array:
    """The sum of a hash of every word with its place.

    A sum modulo 2**32 is the same in any order, so on any number of devices. It tells every change of one word for
    certain: `lowbias32` maps no two words to one, as each of its steps can be undone, and the other terms stay.
    """
    words = _words(x)
    return jnp.sum(lowbias32(words ^ lowbias32(linear_index(words.shape) ^ salt)), dtype=jnp.uint32)


def _words(x) -> jax.Array:
    """The bits of ``x`` as uint32, one for an element or, on another axis, several; no two numbers have the same."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if not jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 8:
        return x.astype(jnp.uint32)
    width = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else 64
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
