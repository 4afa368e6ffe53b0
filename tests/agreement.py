"""How far two ways of taking one step may differ: kernel and XLA, under jit and not, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np

import jadam

# XLA contracts products and sums on this machine; the portable loops may not, and then a product rounds once more.
ULPS = 4 if "portable" in str(jadam.backends()["cpu"].kernel) else 2


def assert_steps_agree(new, expected, old, ulps=ULPS):
    """The contract of the kernel, for ``(params, state)`` from the same start.

    What is stored within ``ulps`` of max(|old|, |increment|); an update within 5e-7 of the larger of itself and 1;
    bfloat16 moments, remainders and int8 codes equal but where the sides straddle a rounding edge.
    """
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for is_param, parts in enumerate(zip(new[::-1], expected[::-1], old[::-1], strict=True)):
        for a, b, c in zip(*map(jax.tree.leaves, parts), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.dtype != jnp.float32 and not (is_param and a.dtype == jnp.bfloat16):
                # 2 ulp of float32 are 2**-15 of bfloat16's spacing
                assert np.mean(np.asarray(a) != np.asarray(b)) <= (1e-4 if a.size > 10**5 else 1e-3), a.dtype
                continue
            a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
            close = ulps * 2.0**-23 * np.maximum(np.abs(c), np.abs(b - c)) + 1e-44
            close += 5e-7 * np.maximum(1, np.abs(b - c)) * is_param
            assert np.all((np.abs(a - b) <= close) | (a == b) | (np.isnan(a) & np.isnan(b))), (
                is_param,
                np.max(np.abs(a - b) / close * (a != b)),
                a.shape,
            )
