"""A checksum to detect damaged checkpoints."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.numerics import linear_index, lowbias32


def checksum(tree) -> jax.Array:
    """A 32-bit checksum of every bit of a tree: save it in a checkpoint and compare it after restoring.

    Orbax may restore a damaged file to other numbers without an error. One flipped bit in an array, or any change of
    one element of up to 4 bytes, always changes the checksum. Other damage does with probability 1 - 2**-32.

    Args:
        tree: a tree of JAX or NumPy arrays and Python numbers, of any dtype, sharding and memory kind.

    Returns:
        A uint32 scalar. It depends on each leaf's dtype, shape, bits and path (the names, not the container types). It
        does not depend on the devices, nor on None and arrays without elements.

    Raises:
        TypeError: a leaf is not an array of numbers, for example a random key.
        ValueError: an array was donated.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"w": jnp.ones(2)}
        >>> state = jadam.adam(1e-3).init(params)
        >>> saved = params, state, jadam.checksum((params, state))  # the contents of a checkpoint
        >>> params, state, expected = saved  # as restored
        >>> if jadam.checksum((params, state)) != expected:
        ...     raise ValueError("the checkpoint is damaged")
        >>> bool(jadam.checksum(({"w": jnp.array([1.0, -1.0])}, state)) != expected)
        True
    """
    total = jnp.zeros([], jnp.uint32)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, jax.Array):
            checks.check_values(x, f"tree{jax.tree_util.keystr(path)}")
        elif isinstance(x, jax.Ref):
            checks.check_arrays(x, f"tree{jax.tree_util.keystr(path)}")
        else:
            x = np.asarray(x)
            if x.dtype == np.dtype("V2"):
                checks.check_arrays(x, f"tree{jax.tree_util.keystr(path)}")
        if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
            raise TypeError(
                f"tree{jax.tree_util.keystr(path)} must be an array of numbers, got {x.dtype}. Leave it out. For "
                "a random key, pass jax.random.key_data(key)."
            )
        if not checks.is_in_device_memory(x):
            x = jax.device_put(x, jax.memory.Space.Device)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        seed = np.uint32(zlib.crc32(f"{name} {x.dtype} {x.shape}".encode()))
        if isinstance(x, np.ndarray) and x.dtype.itemsize >= 8:  # JAX without x64 would truncate it to 4 bytes
            x = np.ascontiguousarray(x)[..., None].view(np.uint32)
        total += _hash(x, seed)
    return total


@jax.jit
def _hash(x: Any, seed) -> jax.Array:
    """The sum of a hash of every word and its position.

    A sum modulo 2**32 does not depend on the order of its terms, so it is the same on any number of devices. It detects
    every change of a single word: `lowbias32` is a bijection, and the other terms do not change.
    """
    words = _words(x)
    return jnp.sum(lowbias32(words ^ lowbias32(linear_index(words.shape) ^ seed)), dtype=jnp.uint32)


def _words(x) -> jax.Array:
    """The bits of ``x`` as uint32, injectively; elements wider than 32 bits get another axis."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if not jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 8:
        return x.astype(jnp.uint32)
    width = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else 64
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
