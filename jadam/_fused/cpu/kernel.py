"""The CPU kernel of ``cpu.cc``."""

import jax.numpy as jnp

from jadam._fused.native import call
from jadam._transformation.transformation import LeafUpdate

LEAVES_PER_CALL = 16  # XLA's compile time grows with the square of a call's aliases
ASYNC_SIZE = 2**16  # parameters from which a step takes longer than handing it to another thread


def run_kernel(leaf_updates: list[LeafUpdate], grads, params) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where the kernel does not support it."""
    columns = leaf_updates, grads, params
    supported = [i for i, x in enumerate(zip(*columns, strict=True)) if not call.unsupported_reason(*x)]
    unused_rows = None
    if sum(params[i].size for i in supported) >= ASYNC_SIZE:
        unused_rows = _unused_rows(leaf_updates[supported[0]].count, len(supported) // LEAVES_PER_CALL)
    return call.update_leaves(*columns, supported, LEAVES_PER_CALL, unused_rows)


def _unused_rows(count, num_calls):
    """Return rows of scalars that no leaf uses, in which XLA counts 1500 operations, and 7 more for each call.

    XLA executes a program on the calling thread, which has to wait, if it counts fewer than 1000 operations. It counts
    -1 for a call of the kernel. The rows take less than a microsecond.
    """
    width = len(call.SCALARS)
    rows = jnp.arange((26 + num_calls // 8) * width, dtype=jnp.float32).reshape(-1, width)
    return rows * count.astype(jnp.float32)
