"""Numerical accuracy of Adam: distance from the paper in float64, and the hard cases of floating point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jadam
from jadam._core import numerics

DEFAULT = jadam.scale_by_adam()


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, gradients, params):
    def step(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    return jax.lax.scan(step, tx.init(gradients[0] if params is None else params), gradients)[1]


def directions(tx, gradients, params=None):
    """Directions of a ``scale_by_*`` for these gradients, from one scan."""
    return np.asarray(scan(tx, np.stack(gradients), params))


def largest_error(found, expected):
    return np.abs(found - expected).max()


def normal(steps, shape, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(steps)]


def rounding_floor(gradients, b2):
    """Error of Adam in float64 if v alone is rounded to float32 in every step."""
    b1, eps = 0.9, 1e-8
    m, v, stored, worst = 0.0, 0.0, np.float32(0.0), 0.0
    for t, g in enumerate(gradients, start=1):
        g = g.astype(np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        stored = (stored + (1 - b2) * (g**2 - stored)).astype(np.float32).astype(np.float64)
        u, u_stored = (m / (1 - b1**t) / (np.sqrt(x / (1 - b2**t)) + eps) for x in (v, stored))
        worst = max(worst, np.abs(u_stored - u).max())
    return worst


B2, SCALES = (0.95, 0.999, 0.9999), (1.0, 1e-6, 1e6)
FEW, MANY = slice(16), slice(16, 1016)


@functools.cache
def long_gradients(scale):
    """Gradients of 1500 steps, for 16 and for 1000 coordinates, concatenated."""
    return [np.concatenate(g) for g in zip(normal(1500, 16, scale), normal(1500, 1000, scale), strict=True)]


@functools.cache
def long_directions():
    """Directions for every b2 and scale."""

    @jax.jit
    def run(gradients):
        txs = {b2: jadam.scale_by_adam(b2=b2) for b2 in B2}

        def step(states, g):
            found = {b2: tx.update(g, states[b2]) for b2, tx in txs.items()}
            return {b2: state for b2, (_, state) in found.items()}, {b2: u for b2, (u, _) in found.items()}

        return jax.lax.scan(step, {b2: tx.init(gradients[0]) for b2, tx in txs.items()}, gradients)[1]

    found = run(np.stack([long_gradients(scale) for scale in SCALES], axis=1))
    return {(b2, scale): np.asarray(u)[:, i] for b2, u in found.items() for i, scale in enumerate(SCALES)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("b2", B2)
def test_error_against_float64_over_1500_steps(b2, scale):
    # Storing v in float32 rounds it once a step, by 0.29 ulp rms. The roundings add up as a random walk over 1/(1-b2)
    # steps. At b2 = 0.9999 v grows in all 1500 steps, and sqrt(v) has sqrt(1500/3) * 0.29 * 2**-23.5 / 2 = 2.7e-7 rms.
    # That is a floor for any Adam with float32 state. docs/accuracy.md has 5.4e-7 for 16 coordinates.
    gradients, found = long_gradients(scale), long_directions()[b2, scale]
    expected = np.array(oracle.adam(gradients, b2=b2))
    assert largest_error(found[:, FEW], expected[:, FEW]) <= 7e-7
    # The maximum grows with the number of coordinates, so compare with the floor. jadam adds some 5 roundings of the
    # direction, 2**-24 of |u| <= 4 each, in quadrature 5e-7, and those of m, 1e-7.
    floor = rounding_floor([g[MANY] for g in gradients], b2)
    assert largest_error(found[:, MANY], expected[:, MANY]) <= floor + 3e-7


@pytest.mark.parametrize(
    "wrong",
    [
        lambda u, t: u * (1 - 0.9**t),  # no bias correction of m
        lambda u, t: u * np.sqrt((1 - 0.999 ** (t + 1)) / (1 - 0.999**t)),  # t off by one in the correction of v
        lambda u, t: u * (1 + 1e-6),
    ],
)
def test_tolerance_detects_wrong_corrections(wrong):
    gradients = normal(5, 64)
    expected = oracle.adam(gradients)
    found = directions(DEFAULT, gradients)
    assert largest_error(found, expected) <= 7e-7
    assert max(np.abs(wrong(u, t) - e).max() for t, (u, e) in enumerate(zip(found, expected, strict=True), 1)) > 7e-7


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("k", [-50, -20, 20, 50])
def test_invariant_to_powers_of_two(k, nesterov):
    # Kingma & Ba 2015, section 2.1: with eps = 0 the step does not depend on the scale of gradients. A power of two
    # changes exponents only, so no bit may differ as long as every product is a normal number.
    gradients = [np.where(np.abs(g) < 0.01, np.float32(0.01), g) for g in normal(100, 1000)]
    tx = scale_free(nesterov)
    scaled = [np.ldexp(g, k) for g in gradients]
    for u, v in zip(directions(tx, gradients), directions(tx, scaled), strict=True):
        np.testing.assert_array_equal(u.view(np.int32), v.view(np.int32))


@functools.cache
def scale_free(nesterov):
    return jadam.scale_by_adam(eps=0.0, nesterov=nesterov)


B1 = (0.0, 0.1, 0.5)


@functools.cache
def after_a_spike():
    """Gradients with a spike, and the directions for every b1, as a Python number and traced."""

    @jax.jit
    def run(gradients, traced):
        known = {(b1, False): scan(jadam.scale_by_adam(b1=b1, b2=0.5), gradients, None) for b1 in B1}
        return known | {(b1, True): scan(jadam.scale_by_adam(b1=traced[b1], b2=0.5), gradients, None) for b1 in B1}

    gradients = [np.full(3, g, np.float32) for g in (1e8, 1.0, -1.0, 1.0)]
    return gradients, run(np.stack(gradients), {b1: np.float32(b1) for b1 in B1})


@pytest.mark.parametrize("b1", B1)
@pytest.mark.parametrize("traced", [False, True])
def test_small_b1_survives_a_spike(b1, traced):
    # After 1e8, m + (1-b1)*(g-m) has the rounding error of m, up to 4, instead of g = 1.
    gradients, found = after_a_spike()
    expected = oracle.adam(gradients, b1=float(np.float32(b1)) if traced else b1, b2=0.5)
    for u, e in zip(found[b1, traced], expected, strict=True):
        np.testing.assert_allclose(u, e, rtol=1e-6)  # 8 roundings of 2**-24, some halved by the root, and those of m


def test_ema_keeps_a_constant():
    # In float32 b*v + (1-b)*g settles 1.3e-5 away from g at b = 0.999. Here g is a fixed point, to the bit.
    known = (0.0, 0.3, 0.9, 0.999)

    @jax.jit
    def averages(g, t, traced):
        beta = lambda b: numerics.constant_beta(b, t, np.dtype("float32"))
        return [[numerics.ema(beta(b), g, g) for b in values] for values in (known, traced)]

    g = np.float32(0.7)
    found = averages(g, np.float32(1), [np.float32(b) for b in known])
    np.testing.assert_array_equal(found, np.full((2, 4), g), err_msg=f"known, then traced b of {known}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_float64_equals_the_oracle(dtype):
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal(50).astype(dtype) for _ in range(60)]
    if dtype == np.complex128:
        gradients = [g + 1j * rng.standard_normal(50) for g in gradients]
    params = jnp.zeros(50, dtype)
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "eps_root": 1e-6}
    tx = jadam.scale_by_adam(**settings)
    state, update = tx.init(params), jax.jit(tx.update)
    # For complex gradients v averages |g|**2, so the oracle for real gradients does not apply.
    m = v = np.zeros(50)
    for t, g in enumerate(gradients, start=1):
        u, state = update(g, state, params)
        assert u.dtype == dtype
        g = g.astype(np.promote_types(dtype, np.float64))
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * np.abs(g) ** 2
        expected = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t) + 1e-6) + 1e-4)
        np.testing.assert_allclose(np.asarray(u), expected, atol=1e-12 if dtype != np.float32 else 1e-6)


def test_complex_has_a_real_second_moment():
    params = np.ones(3, np.complex64)
    tx = jadam.scale_by_adam()
    state = tx.init(params)
    u, state = jax.jit(tx.update)(np.array([3 + 4j, 1j, 0], np.complex64), state, params)
    assert (u.dtype, state.mu.dtype, state.nu.dtype) == (jnp.complex64, jnp.complex64, jnp.float32)
    np.testing.assert_allclose(u, [0.6 + 0.8j, 1j, 0], rtol=1e-6)  # one step: g / |g|


class TestMaml:
    """Derivatives of a loss through three updates; some coordinates have gradients of exactly zero."""

    def outer(self, start):
        tx = jadam.adam(0.1)
        params, state = start, tx.init(start)
        for _ in range(3):
            grads = self.slopes * params
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    slopes = np.array([1.0, 0.0, 3.0, -2.0, 0.0], np.float32)
    start = np.array([1.0, 2.0, -0.5, 0.3, 0.0])

    def oracle_outer(self, start):
        params, gradients = start, []
        for _ in range(3):
            gradients.append(np.asarray(self.slopes, np.float64) * params)
            params = params - 0.1 * oracle.adam(gradients)[-1]
        return np.sum(params**2)

    def test_derivative_equals_the_oracle(self):
        found = jax.jit(jax.grad(self.outer))(jnp.asarray(self.start, jnp.float32))
        h = 1e-5  # central differences in float64: error h**2 * f''' / 6, about 1e-9
        expected = [
            (self.oracle_outer(self.start + h * e) - self.oracle_outer(self.start - h * e)) / (2 * h)
            for e in np.eye(len(self.start))
        ]
        # About 10 roundings in each of three steps, of terms of size 4: 30 * 2**-24 * 4 = 7e-6.
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_at_zero_gradient_the_slope_is_one_over_eps(self):
        direction = lambda g: jadam.scale_by_adam(eps=0.5).update(g, jadam.scale_by_adam().init(g))[0]
        slope = jax.jit(jax.grad(direction))(np.float32(0.0))
        np.testing.assert_allclose(slope, 2.0, rtol=1e-6)  # m_hat's two roundings

    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_finite_where_everything_is_zero(self, eps):
        tx = jadam.scale_by_adam(eps=eps)

        @jax.jit
        def direction_and_derivative(g, tangent):
            u, vjp = jax.vjp(lambda g: tx.update(g, tx.init(g))[0], g)
            return u, vjp(tangent)[0]

        u, derivative = direction_and_derivative(np.zeros(3, np.float32), np.ones(3, np.float32))
        np.testing.assert_array_equal(u, 0)
        assert np.isfinite(derivative).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_are_computed_in_float32(dtype):
    narrow = np.stack(normal(50, 200)).astype(dtype)
    gradients = {"narrow": narrow, "wide": narrow.astype(np.float32), "zero": np.zeros_like(narrow)}
    params = {"narrow": np.zeros(200, np.float32), "wide": np.zeros(200, np.float32), "zero": np.zeros(200, dtype)}
    found = scan(DEFAULT, gradients, params)
    np.testing.assert_array_equal(found["narrow"], found["wide"])
    assert found["zero"].dtype == dtype
    np.testing.assert_array_equal(found["zero"], 0)


def test_the_learning_rate_is_not_rounded_to_bf16():
    # Optax's chain rounds lr = 1.003e-3 to bf16; here only the final update is rounded.
    p, g = np.zeros(1, jnp.bfloat16), np.ones(1, jnp.bfloat16)
    tx = jadam.adamw(1.003e-3, weight_decay=0.0)
    u, _ = jax.jit(tx.update)(g, tx.init(p), p)
    assert u[0] == jnp.bfloat16(-1.003e-3)


def test_count_saturates():
    tx = jadam.scale_by_adam(nesterov=True)
    g = np.ones(2, np.float32)
    last = 2**31 - 1
    state = optax.ScaleByAdamState(np.int32(last), g, g)
    u, state = jax.jit(tx.update)(g, state)
    assert state.count == last
    np.testing.assert_allclose(u, 1, rtol=1e-6)  # m = v = 1, corrections 1


def test_outside_the_range_of_squares():
    # See scale_by_adam: for |g| < 1e-19 the update is at most m_hat / eps; for |g| > 2e19 nu is inf, then NaN.
    tiny, huge = np.float32([1e-25]), np.float32([1e30])
    for eps, bound in ((0.0, 1e-25), (1e-8, 1e-17)):
        (u,) = directions(jadam.scale_by_adam(eps=eps), [tiny])
        assert 0 < u[0] <= bound * 1.001
    update, state = jax.jit(DEFAULT.update), DEFAULT.init(tiny)
    u, state = update(huge, state)
    assert (u[0], state.nu[0]) == (0, np.inf)
    assert np.isnan(update(np.ones(1, np.float32), state)[0])
