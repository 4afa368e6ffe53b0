"""Long runs: no drift in a million steps, exact float32 masters, and a count that saturates at int32's maximum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import parametrize_grid, update_and_apply

import jadam

B1, B2 = 0.9, 0.999
STEPS = 1_000_000
CHUNK = 1000
LAST = 2**31 - 1
nightly = pytest.mark.nightly


def run(step, carry, n):
    """``carry`` after ``n`` calls of ``step(carry, t)``, and the mean of their outputs over each chunk of steps."""

    @jax.jit
    def chunk(carry, start):
        carry, out = jax.lax.scan(step, carry, start + np.arange(CHUNK, dtype=np.uint32))
        return carry, jax.tree.map(lambda x: jnp.mean(x, 0), out)

    means = []
    for start in range(0, n, CHUNK):
        carry, out = chunk(carry, np.uint32(start))
        means.append(jax.tree.map(np.asarray, out))
    return carry, jax.tree.map(lambda *x: np.stack(x), *means)


STREAMS = {
    "constant": lambda mean, t: mean,
    "random": lambda mean, t: mean + jax.random.normal(jax.random.key(t), mean.shape, jnp.float32),
}
streams = pytest.mark.parametrize("stream", STREAMS)
lengths = pytest.mark.parametrize(
    "steps", [pytest.param(16_000, marks=pytest.mark.slow), pytest.param(STEPS, marks=nightly)]
)


@lengths
@streams
@pytest.mark.usefixtures("x64")
def test_float32_moments_do_not_drift(stream, steps):
    """float32 moments against float64 moments of the same gradients."""
    mean = jnp.linspace(0.25, 4, 64, dtype=jnp.float32)
    tx = jadam.scale_by_adam(B1, B2)
    wide = lambda x: x.astype(jnp.float64)

    def step(carry, t):
        state, m, v = carry
        g = STREAMS[stream](mean, t)
        u, state = tx.update(g, state)
        m, v = B1 * m + (1 - B1) * wide(g), B2 * v + (1 - B2) * wide(g) ** 2
        return (state, m, v), (wide(state.mu) - m, wide(state.nu) / v - 1, jnp.abs(u))

    zeros = jnp.zeros(64, jnp.float64)
    (state, m, v), (of_m, of_v, _) = run(step, (tx.init(mean), zeros, zeros), steps)
    assert state.count == steps
    assert (state.mu.dtype, state.nu.dtype) == (jnp.float32, jnp.float32)
    # A step's error is at most 4 * 2**-24 of the average of |g|, or of v (see test_properties.py), and 1-b of earlier
    # errors is forgotten. The sum never exceeds 4 * 2**-24 / (1-b).
    worst_m, worst_v = (4 * 2.0**-24 / (1 - b) for b in (B1, B2))
    assert np.max(np.abs(state.mu - m)) <= worst_m * 10  # |g| <= 10: mean 4 plus six standard deviations
    assert np.max(np.abs(state.nu / v - 1)) <= worst_v
    if stream == "constant":
        # m stops below g where an increment is less than half an ulp: (1-b) * (g - m) <= 2**-24 g.
        np.testing.assert_allclose(state.mu, mean, rtol=2.0**-24 / (1 - B1))
        settled = 1 - B2**steps
        np.testing.assert_allclose(state.nu, settled * np.float64(mean) ** 2, rtol=2.0**-24 / (1 - B2) + 1e-6)
    else:
        # Two independent roundings a step, uniform within half an ulp, at most 2**-24, have a variance of 2/3 * 2**-48.
        # Summed with weights b2**k: variance 2 / 3 / (1 - b2**2), standard deviation 18 times 2**-24. The mean over 64
        # coordinates and (steps / 1000) independent times divides by the root of their number. Six standard deviations.
        times = max(1, (steps - 5000) // 1000)
        assert np.abs(of_v[5:].mean()) <= 6 * 19 * 2.0**-24 / np.sqrt(times * 64)
        assert np.max(np.abs(of_m[5:].mean())) <= 6 * 3 * 2.0**-24 * 5 / np.sqrt(times * 64)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_constant_gradient_is_a_fixed_point(moments):
    """m = g and v = g**2 stay to the bit under a constant gradient; in bfloat16 for representable v."""
    g = np.array([0.75, -3.0, 1e-12, 1e12], jnp.bfloat16).astype(np.float32)
    v = np.square(g)
    g = np.where(v == v.astype(jnp.bfloat16), g, np.float32(1.5)) if moments == "bfloat16" else g
    dtype = jnp.dtype(moments)
    start = optax.ScaleByAdamState(np.int32(1000), g.astype(dtype), np.square(g).astype(dtype))
    tx = jadam.scale_by_adam(B1, B2, moments=moments)

    def step(state, t):
        u, state = tx.update(g, state)
        return state, u

    state, _ = run(step, start, 100_000)
    np.testing.assert_array_equal(np.float32(state.mu), np.float32(start.mu))
    np.testing.assert_array_equal(np.float32(state.nu), np.float32(start.nu))
    assert state.count == 101_000


@lengths
@streams
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.usefixtures("x64")
def test_bias_of_narrow_moments(moments, stream, steps):
    """Means of m and v over time and coordinates are E[g] and E[g**2], up to the small biases given below."""
    shape = (32, 128) if moments == "int8" else (64,)
    mean = jnp.linspace(0.5, 1, np.prod(shape), dtype=jnp.float32).reshape(shape)
    tx = jadam.scale_by_adam(B1, B2, moments=moments)

    def step(state, t):
        u, state = tx.update(STREAMS[stream](mean, t), state)
        plain = jadam.convert_moments(state, "float32")
        return state, (*(jnp.mean(x, dtype=jnp.float64) for x in (plain.mu, plain.nu)), jnp.abs(u).max())

    state, (mu, nu, largest) = run(step, tx.init(mean), steps)
    assert state.count == steps
    assert np.all(largest <= 7.27 * (1 + 1e-4))  # the bound of `jadam._moments.int8`
    warm = 10  # chunks, after which 1 - b2**t is 1 to 5e-5, and to 5e-6 in the mean
    n = np.sqrt((steps - warm * CHUNK) * mean.size)
    of_m, of_v = mu[warm:].mean() - np.mean(mean, dtype=np.float64), nu[warm:].mean() - expected_square(mean, stream)
    # A stochastic rounding has an error of at most half a gap between levels (rms), and the average sums 1 / (1-b) of
    # them. Gaps: bfloat16 2**-7 of a moment of at most 2; int8's v 1/16 of v (16 codes per octave, as a block's values
    # are within 2**-8 of the largest); int8's r 1/16 of 5.9375 parts of its maximum, at most 3. Noise: g has variance
    # 1, g**2 at most 6. Tolerance: six standard deviations.
    gap_m, gap_v = (3 / 16 / 5.9375 * 2, 2 / 16) if moments == "int8" else (2.0**-7 * 2, 2.0**-7 * 2)
    noise = stream == "random"
    most_m, most_v = (np.hypot(gap / 2 / (1 - b), noise * x) for gap, b, x in ((gap_m, B1, 1), (gap_v, B2, 6**0.5)))
    # int8's m is r times the root of an unbiased v: low by gap**2 / 32, summed over 9 steps.
    low = 9 / 16**2 / 32 if moments == "int8" else 0
    # The dither is an evenly spread sequence, of which m averages only some ten steps. Under a constant gradient a bias
    # of a fortieth of bfloat16's gap, 2**-8 below 1, remains (measured, not derived); round-to-nearest has five gaps.
    # int8's m is a seventh of the gap of r high, 0.0012: r takes the low bits of the sequence, spread less evenly.
    low += 0 if noise else 2.0**-8 / 20 if moments == "bfloat16" else 0.0012
    assert abs(of_m) <= 6 * most_m / n + low + 5e-6, (of_m, most_m / n)
    # Under random gradients int8's v is 0.3 % low, a twentieth of a gap (measured, not derived). With round-to-nearest
    # v would never change, as an increment is less than half a gap.
    low_v = 0.004 * expected_square(mean, stream) if moments == "int8" and noise else 0
    assert abs(of_v) <= 6 * most_v / n + low_v + 1e-5, (of_v, most_v / n)


def expected_square(mean, stream):
    return np.mean(np.float64(mean) ** 2) + (stream == "random")


@pytest.mark.parametrize(
    ("moments", "steps"),
    [
        ("float32", 20_000),
        pytest.param("int8", 3_000, marks=pytest.mark.slow),
        pytest.param("float32", STEPS, marks=nightly),
    ],
)
def test_exact_bf16_masters_equal_float32_training(moments, steps):
    """Noisy descent, each side with gradients at its own weights: one lost bit would make the paths diverge."""
    shape = (32, 128) if moments == "int8" else (16, 16)
    target = np.linspace(-1, 1, np.prod(shape), dtype=np.float32).reshape(shape)
    plain = jadam.adam(2.0**-10, B1, B2, moments=moments)  # a power of two: the product is exact, contracted or not
    exact = jadam.exact_bf16(plain)

    @jax.jit
    def start():
        zeros = jnp.zeros_like(target)
        return (zeros, plain.init(zeros)), jadam.from_float32(zeros, exact)

    def step(carry, t):
        (w, state), (params, other) = carry
        noise = jax.random.normal(jax.random.key(t), w.shape, jnp.float32)
        u, state = plain.update(w - target + noise, state, w)
        masters = jadam.float32_params(params, other)
        v, other = exact.update(masters - target + noise, other, params)
        w, params = optax.apply_updates(w, u), optax.apply_updates(params, v)
        return ((w, state), (params, other)), jnp.max(jnp.abs(w - jadam.float32_params(params, other)))

    ((w, state), (params, other)), apart = run(step, start(), steps)
    assert params.dtype == jnp.bfloat16
    assert np.abs(w - target).mean() < 0.1
    assert np.max(apart) == 0
    assert optax.tree.get(other, "count") == optax.tree.get(state, "count") == steps


SCHEDULE = lambda count: jnp.where(count < 2**29, 0.0, 0.01) * jnp.ones([])
AT_THE_END = {
    "adam": lambda: jadam.adam(0.01),
    "adam, hat": lambda: jadam.adam(0.01, eps_mode="hat"),
    "adam, uncorrected": lambda: jadam.adam(0.01, bias_correction=False),
    "adam, scheduled betas": lambda: jadam.adam(
        0.01, b1=lambda count: jnp.where(count < 2**29, 0.5, 0.9), b2=lambda count: jnp.where(count < 2**29, 0.9, 0.999)
    ),
    "adamw, scheduled": lambda: jadam.adamw(SCHEDULE, weight_decay=SCHEDULE),
    "nadam": lambda: jadam.nadam(0.01),
    "nadamw, momentum": lambda: jadam.nadamw(0.01, momentum_decay=4e-3),
    "adamax": lambda: jadam.adamax(0.01),
    "amsgrad": lambda: jadam.amsgrad(0.01),
    "amsgrad of v": lambda: jadam.amsgrad(0.01, max_of="v"),
    "radam": lambda: jadam.radam(0.01),
    "radam of nadam": lambda: jadam.radam(0.01, nesterov=True),
    "chain": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adamw(SCHEDULE)),
    "by_path": lambda: jadam.by_path([("a", {"lr_mult": 0.5}), ("", {"b1": SCHEDULE})], SCHEDULE),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adam(SCHEDULE)),
    "bfloat16": lambda: jadam.adam(0.01, moments="bfloat16"),
    "int8": lambda: jadam.adam(0.01, moments="int8"),
}


@functools.cache
def five_steps(name, call):
    """An optimizer, and a jitted function that takes five steps from a state with the given count."""
    tx = AT_THE_END[name]()

    one = functools.partial(jadam.step if call == "step" else update_and_apply, tx)

    @jax.jit
    def five(count, params, state, gradients):
        state = optax.tree.set(state, count=count)

        def body(carry, g):
            params, state = one(g, carry[1], carry[0])
            return (params, state), params

        (_, state), path = jax.lax.scan(body, (params, state), gradients)
        return path, state

    return tx, five


@parametrize_grid(
    {"name": list(AT_THE_END), "call": ["step", "two calls"]},
    default=[
        "adam-step",
        "adam, scheduled betas-two calls",
        "nadamw, momentum-step",
        "radam-two calls",
        "chain-two calls",
        "by_path-step",
        "exact_bf16-two calls",
        "int8-step",
    ],
)
def test_count_saturates(name, call):
    """The count saturates at int32's maximum. Steps there equal those at 2**30, as all corrections are 1."""
    tx, five = five_steps(name, call)
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if name == "exact_bf16" else jnp.float32
    tree = lambda *more: {k: rng.standard_normal((*more, *x)).astype(dtype) for k, x in SHAPES.items()}
    params, gradients = tree(), tree(5)
    _, state = five(np.int32(10), params, jax.jit(tx.init)(params), gradients)
    path, last = five(np.int32(LAST - 2), params, state, gradients)
    expected, before = five(np.int32(2**30), params, state, gradients)
    counts = [x for _, x in optax.tree.get_all_with_path(last, "count")]
    assert [x.dtype for x in counts] == [jnp.int32] * len(counts)
    assert counts
    assert all(x == LAST for x in counts)
    assert {int(x) for _, x in optax.tree.get_all_with_path(before, "count")} == {2**30 + 5}
    for k in SHAPES:
        moved = np.abs(np.diff(np.float32(path[k]), axis=0))
        assert np.isfinite(np.float32(path[k])).all()
        assert moved.max() > 1e-4
        if name in ("bfloat16", "int8"):  # another dither: only the first update is the same
            np.testing.assert_array_equal(path[k][0], expected[k][0])
            assert moved.max() <= 0.01 * 7.27 * (1 + 1e-4)  # the bound of `jadam._moments.int8`
        else:
            np.testing.assert_array_equal(np.float32(path[k]), np.float32(expected[k]))


SHAPES = {"a": (32, 129), "b": (7,)}
