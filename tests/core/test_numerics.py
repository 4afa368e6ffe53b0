"""Each function of `jadam._core.numerics` against exact arithmetic: Python's integers and fractions, and float64."""

import fractions
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lowbias32, round_to_bfloat16
from jax.sharding import PartitionSpec as P

from jadam._core import numerics
from jadam._core.numerics import CurrentCorrection, constant_beta, scheduled_beta

ULP = 2.0**-23  # of a float32 in [1, 2)
RATES = [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 0.999999]
PATTERNS = [0, 1, 2, 3, 77, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF]


def exact_corrections(b, t):
    """1 - b^t, rounded once, to float64."""
    return float(1 - fractions.Fraction(b) ** t)


constant_beta_of_traced = jax.jit(lambda b, t: constant_beta(b, t, np.dtype("float32")))


@pytest.mark.parametrize("b", RATES)
@pytest.mark.parametrize("traced", [False, True])
def test_constant_beta(b, traced):
    t = 7
    beta = (
        constant_beta_of_traced(np.float32(b), np.float32(t))
        if traced
        else constant_beta(b, jnp.float32(t), np.dtype("float32"))
    )
    # a traced beta is a float32
    known = float(np.float32(b)) if traced else b
    assert {np.asarray(x).dtype for x in beta} == {np.dtype("float32")}
    assert beta.b == beta.next_b == np.float32(b)
    assert beta.one_minus_b == np.float32(1 - known)
    # log1p, product and expm1 round once each; expm1 does not amplify the relative error of its argument
    np.testing.assert_allclose(beta.correction, exact_corrections(known, t), rtol=4 * ULP)
    np.testing.assert_allclose(beta.next_correction, exact_corrections(known, t + 1), rtol=4 * ULP)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scheduled_beta(dtype, x64):
    rates = [0.1, 0.7, 0.95, 0.999, 0.3]
    eps = np.finfo(dtype).eps
    correction, product = jnp.zeros([], dtype), 1.0
    for b, next_b in itertools.pairwise(rates):
        product *= b
        beta = scheduled_beta(b, next_b, correction)
        again = scheduled_beta(b, next_b, CurrentCorrection(beta.correction))
        # an average of ones: two roundings a step
        np.testing.assert_allclose(beta.correction, 1 - product, rtol=8 * eps)
        np.testing.assert_allclose(beta.next_correction, 1 - product * next_b, rtol=10 * eps)
        assert (beta.b, beta.next_b, beta.one_minus_b) == (dtype(b), dtype(next_b), dtype(1 - b))
        assert again == beta
        assert again.correction.dtype == dtype
        correction = beta.correction


@pytest.mark.parametrize("b", RATES)
def test_one_minus(b):
    exact = numerics.one_minus(b, np.float32)
    assert exact.dtype == np.float32
    assert exact == np.float32(1 - b)
    assert numerics.one_minus(jnp.float32(b), np.float32) == np.float32(1) - np.float32(b)
    assert numerics.one_minus(jnp.float32(b), np.float32).dtype == jnp.float32


@pytest.mark.parametrize("b", [*RATES, 1e-3, 0.3, 0.9999999, 1 - 1e-12])
@pytest.mark.parametrize("t", [1, 2, 3, 10, 1000, 10**6, 2**31 - 1])
def test_one_minus_power(b, t):
    # expm1 2 ulp, its argument 1.5 (log b, t, their product), which expm1 does not amplify.
    def exact(b):
        with np.errstate(divide="ignore"):
            return -np.expm1(t * np.log1p(-(1 - b)))

    found = numerics.one_minus_power(b, jnp.float32(t), np.float32)
    np.testing.assert_allclose(found, exact(b), rtol=4 * ULP)
    found = numerics.one_minus_power(jnp.float32(b), jnp.float32(t), np.float32)
    np.testing.assert_allclose(found, exact(float(np.float32(b))), rtol=4 * ULP)


def test_one_minus_power_of_zero_warns_of_nothing():
    assert numerics.one_minus_power(0.0, jnp.float32(3), np.float32) == 1
    assert numerics.one_minus_power(jnp.float32(0), jnp.float32(3), np.float32) == 1


@pytest.mark.parametrize("b", RATES)
@pytest.mark.parametrize("traced", [False, True])
def test_ema(b, traced):
    beta = constant_beta(jnp.float32(b) if traced else b, jnp.float32(1), np.dtype("float32"))
    known = float(np.float32(b)) if traced else b
    for average, x in [(0.0, 1.0), (3.0, -2.0), (1e8, 1e-8), (1e-8, 1e8), (-5.0, -5.0), (0.1, 0.1)]:
        average, x = np.float32(average), np.float32(x)
        exact = known * float(average) + (1 - known) * float(x)
        # three roundings of terms of at most twice the larger-weighted one, and one of each weight
        larger = max(abs(known * float(average)), abs((1 - known) * float(x)))
        found = numerics.ema(beta, jnp.float32(average), jnp.float32(x))
        assert abs(float(found) - exact) <= 4 * ULP * larger, (average, x)
        if average == x:
            assert found == x


@pytest.mark.parametrize(("b", "slow"), [(0.5, True), (0.4999, False), (0.9, True), (0.1, False)])
def test_ema_corrects_the_larger_term(b, slow):
    """`ema` corrects the average for b >= 1/2, the newest term for b < 1/2."""
    rng = np.random.default_rng(0)
    average, x = np.float32(rng.standard_normal((2, 1000)))
    beta = constant_beta(b, jnp.float32(1), np.dtype("float32"))
    b, one_minus_b = np.float32(beta.b), np.float32(beta.one_minus_b)
    of_average, of_newest = average + one_minus_b * (x - average), x + b * (average - x)
    assert (of_average != of_newest).any()
    for known in (beta, beta._replace(b=jnp.float32(b))):
        found = numerics.ema(known, jnp.asarray(average), jnp.asarray(x))
        np.testing.assert_array_equal(found, of_average if slow else of_newest)


def test_ema_with_a_traced_rate():
    beta = constant_beta(0.75, jnp.float32(1), np.dtype("float32"))
    found = jax.jit(lambda b: numerics.ema(beta._replace(b=b), jnp.float32(4), jnp.float32(8)))(jnp.float32(0.75))
    assert found == 5


@jax.jit
def sqrt(x):
    """JAX's square root, ours, and the first and second derivatives of ours."""
    ours = numerics.sqrt
    return jnp.sqrt(x), ours(x), jax.grad(ours)(x), *jax.jvp(ours, (x,), (jnp.float32(3),))


@pytest.mark.parametrize("x", [0.0, 1e-30, 0.25, 1.0, 4.0, 1e30])
def test_sqrt_and_its_derivative(x):
    root, found, slope, again, along = sqrt(np.float32(x))
    assert found == again == root
    assert numerics.sqrt(jnp.float32(x)) == root
    if x == 0:
        assert slope == along == 0
    else:  # two roundings: square root and quotient
        np.testing.assert_allclose(slope, 0.5 / np.sqrt(np.float64(np.float32(x))), rtol=2 * ULP)
        np.testing.assert_allclose(along, 3 * slope, rtol=ULP)


def test_sqrt_of_what_is_negative_is_nan_and_so_is_its_derivative():
    _, *found = sqrt(np.float32(-1))
    assert np.isnan(found).all()


def test_abs_sq():
    assert numerics.abs_sq(jnp.float32(-3)) == 9
    z = numerics.abs_sq(jnp.complex64(3 - 4j))
    assert (z, z.dtype) == (25, jnp.float32)


def test_divide():
    found = jax.jit(numerics.divide)(np.float32([6, 0, 5, 6]), np.float32([2, 0, 0, -2]))
    assert found.tolist() == [3, 0, 5, -3]
    assert numerics.divide(jnp.float32(5), jnp.float32(0)) == 5
    assert jax.jit(jax.grad(lambda x: numerics.divide(x, 0 * x)))(np.float32(1)) == 1


def test_dtypes(strict):
    assert numerics.promote(jnp.bfloat16(1), jnp.float16(1)) == jnp.float32
    assert numerics.promote(np.dtype("int32"), np.dtype("float16")) == jnp.float16
    assert (
        numerics.promote(jnp.asarray(np.ones(2, jnp.bfloat16)), 2.0) == jnp.float32
    )  # jnp.result_type gives the Python type of a Python number
    assert numerics.at_least_float32(jnp.bfloat16(1)) == jnp.float32
    assert numerics.at_least_float32(jnp.complex64(1)) == jnp.complex64
    assert numerics.real(np.dtype("complex64")) == jnp.float32
    assert numerics.real(jnp.bfloat16) == jnp.bfloat16


def test_lowbias32():
    found = jax.jit(numerics.lowbias32)(np.array(PATTERNS, np.uint32))
    assert found.tolist() == [lowbias32(x) for x in PATTERNS]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("salt", [0, 5, 0xFFFFFFFF])
@pytest.mark.parametrize("t", [0, 1, 123456789])
def test_dither(k, salt, t):
    """The dither is part of the saved format: a resumed run needs the same bits."""

    def exact(index):
        start = lowbias32(index ^ lowbias32((salt + k // 2 * 0x632BE5AB) & 0xFFFFFFFF))
        start = (start << 16 | start >> 16) & 0xFFFFFFFF if k % 2 else start
        return (start + t * 0x9E3779B9) & 0xFFFFFFFF

    index = jnp.asarray(np.array(PATTERNS, np.uint32))
    found = numerics.dither(index, salt, jnp.uint32(t), k)
    assert found.dtype == jnp.uint32
    assert found.tolist() == [exact(x) for x in PATTERNS]


SHAPES = [(), (1,), (5,), (2, 3), (3, 1, 4), (2, 3, 4, 5), (0, 3)]
# a shard of an array of 2^66 elements
PART, LARGE = (3, 2, 2), (2**3, 2**31 + 5, 2**32 - 9)


def larger(shape):
    return tuple(x + i + 1 for i, x in enumerate(shape))


@functools.cache
def linear_indices():
    """``{(shard shape, whole shape): indices}``, from one program."""
    of = [*((x, x) for x in SHAPES), *((x, larger(x)) for x in SHAPES), (PART, LARGE)]
    found = jax.jit(lambda: [numerics.linear_index(x) if x == y else numerics.linear_index(x, y) for x, y in of])()
    return dict(zip(of, found, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_index(shape):
    found = linear_indices()[shape, shape]
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, np.arange(math.prod(shape), dtype=np.uint32).reshape(shape))
    whole = larger(shape)
    exact = np.arange(math.prod(whole), dtype=np.uint32).reshape(whole)[tuple(map(slice, shape))]
    np.testing.assert_array_equal(linear_indices()[shape, whole], exact)


def test_linear_index_beyond_32_bits():
    """Indices are modulo 2^32."""
    exact = [
        [[(i * LARGE[1] * LARGE[2] + j * LARGE[2] + k) % 2**32 for k in range(2)] for j in range(2)] for i in range(3)
    ]
    assert linear_indices()[PART, LARGE].tolist() == exact


def test_linear_index_of_a_sharded_array_is_global():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, P("x"))
    found = jax.jit(lambda: numerics.linear_index((16, 3)), out_shardings=sharding)()
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, np.arange(48).reshape(16, 3))


def rounded(x, bits):
    """`round_to_bfloat16`, as float32."""
    found = round_to_bfloat16(x, bits)
    assert found.dtype == jnp.bfloat16
    return np.asarray(found).astype(np.float32)


@pytest.mark.parametrize("sign", [1, -1])
def test_round_to_bfloat16(sign):
    """1 + k/2^16 lies k/2^9 of the way to the next bfloat16, 1 + 2^-7: that share of random bits rounds it up."""
    bits = np.arange(2**16, dtype=np.uint32) << 16 | 0xABCD
    for k in (0, 1, 100, 256, 511):
        found = rounded(np.full(2**16, sign * (1 + k * 2.0**-16), np.float32), bits)
        values, counts = np.unique(np.abs(found), return_counts=True)
        share = dict(zip(values.tolist(), counts.tolist(), strict=True))
        assert share == {v: n for v, n in {1.0: 2**16 - 128 * k, 1 + 2.0**-7: 128 * k}.items() if n}


def test_round_to_bfloat16_of_what_is_not_finite():
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38, 1e-45, -0.0], np.float32)
    up = rounded(x, np.full(6, 0xFFFFFFFF, np.uint32))
    assert (up[0], up[1], up[3]) == (np.inf, -np.inf, np.inf)
    assert np.isnan(up[2])
    down = rounded(x, np.zeros(6, np.uint32))
    assert (down[0], down[1]) == (np.inf, -np.inf)
    assert np.isnan(down[2])
    assert np.isfinite(down[3])
    assert np.signbit(down[5])


apply_rounded = jax.jit(numerics.apply_rounded, static_argnums=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, np.float64])
def test_applied(dtype, x64):
    rng = np.random.default_rng(0)
    wide = dtype if dtype == np.float64 else np.float32
    p = jnp.asarray(rng.standard_normal(1000), dtype)
    u = jnp.asarray(rng.standard_normal(1000) * 1e-2, wide)
    found = apply_rounded(p, u, dtype)
    assert found.dtype == wide
    exact = (np.asarray(p, wide) + np.asarray(u)).astype(dtype).astype(wide)
    np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_applied_leaves_subnormal_numbers_unrounded(dtype):
    smallest = float(jnp.finfo(dtype).smallest_normal)
    below, above = smallest * (1 - 2.0**-20), smallest * (1 + 2.0**-20)
    u = np.float32([0.3 * below, -0.3 * below, below, -below, above])
    found = apply_rounded(np.zeros(5, dtype), u, dtype)
    expected = np.where(np.abs(u) < 2.0**-126, 0, u)  # XLA flushes subnormal numbers to 0 on a CPU
    expected[4] = smallest
    np.testing.assert_array_equal(found, expected)
