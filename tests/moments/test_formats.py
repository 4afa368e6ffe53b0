"""bfloat16 and int8 moments: size, error, bound of the update, and visibility of non-finite values."""

import contextlib
import functools
import math

import family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ones, parametrize, zeros
from hypothesis import strategies as st
from properties import property_test

import jadam
from jadam._moments import formats

NARROW = ["bfloat16", "int8"]
ADAMS = {
    "scale_by_adam": jadam.scale_by_adam,
    **{f.__name__: functools.partial(f, 1.0) for f in (jadam.adam, jadam.adamw, jadam.nadam, jadam.nadamw)},
}


@functools.cache
def scale_by(moments):
    """`jadam.scale_by_adam` and its jitted update; cached."""
    tx = jadam.scale_by_adam(moments=moments)
    return tx, jax.jit(tx.update)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("moments", "shape", "most"),
    [
        ("bfloat16", (1024, 1024), 4.001),
        ("int8", (1024, 1024), 2.07),
        ("int8", (300, 1000), 2.1),
        ("int8", (768, 50257), 2.1),
        ("int8", (100000, 16), 2.6),
    ],
)
def test_bytes_per_parameter(moments, shape, most):
    shapes = jax.ShapeDtypeStruct(shape, jnp.float32)
    tx = jadam.scale_by_adam(moments=moments)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, shapes)))
    assert total / math.prod(shape) <= most


@functools.cache
def gradients():
    return normal(1500, 16, 512, seed=1)


@jax.jit
def squares(b2, eps, scale, shift, gradients):
    """Sums of squares of the update's error and of the update. Half way the gradients shrink by ``shift``."""
    sides = {name: jadam.scale_by_adam(b2=b2, eps=eps, moments=name) for name in ("float32", *NARROW)}

    def step(states, g_and_t):
        g, t = g_and_t
        g = g * scale * jnp.where(t < len(gradients) // 2, 1, shift)
        u, states = {}, dict(states)
        for name, tx in sides.items():
            u[name], states[name] = tx.update(g, states[name])
        exact = u.pop("float32")
        return states, {name: (jnp.sum((x - exact) ** 2), jnp.sum(exact**2)) for name, x in u.items()}

    start = {name: tx.init(gradients[0]) for name, tx in sides.items()}
    return jax.lax.scan(step, start, (gradients, jnp.arange(len(gradients))))[1]


# Gradients are N(0, 1) times a lognormal scale for each coordinate.
@pytest.mark.parametrize(
    ("sigma", "shift", "settings", "most"),
    [
        (1.0, 1.0, {"eps": 1e-12}, {"int8": 0.11, "bfloat16": 0.03}),
        (1.0, 0.05, {"eps": 1e-12}, {"int8": 0.12, "bfloat16": 0.03}),
        (2.0, 1.0, {"eps": 1e-12}, {"int8": 0.17, "bfloat16": 0.03}),
        (1.0, 1.0, {"b2": 0.95}, {"int8": 0.04, "bfloat16": 0.03}),
    ],
)
def test_error_of_the_update(sigma, shift, settings, most):
    scale = np.exp(sigma * normal(16, 512))
    settings = {"b2": 0.999, "eps": 1e-8, **settings}
    sums = squares(**{k: np.float32(x) for k, x in settings.items()}, scale=scale, shift=shift, gradients=gradients())
    errors = {name: math.sqrt(np.sum(error) / np.sum(exact)) for name, (error, exact) in sums.items()}
    assert all(0 < errors[name] <= most[name] for name in errors), errors


def bound(b1, b2, t, nesterov):
    """Bound of |update| over all gradients, by Cauchy-Schwarz; derived in `jadam._moments.int8`."""
    newest = (1 - b1) / jnp.sqrt(1 - b2)
    ratio = newest / jnp.sqrt(1 - b1 * b1 / b2)
    adam = ratio / (1 - b1**t)
    nadam = b1 * ratio / (1 - b1 ** (t + 1)) + newest / (1 - b1**t)
    return (nadam if nesterov else adam) * jnp.sqrt(1 - b2**t)


@functools.partial(jax.jit, static_argnames="nesterov")
def worst_breach(b1, b2, gradients, nesterov=False):
    """Maximum of |u| / bound over a sequence of gradients."""
    tx = jadam.scale_by_adam(b1, b2, eps=1e-30, nesterov=nesterov, moments="int8")

    def step(state, g):
        u, state = tx.update(g, state)
        return state, jnp.max(jnp.abs(u)) / bound(b1, b2, state.count.astype(jnp.float32), nesterov)

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1].max()


def adversary(kind, rng, steps=200, shape=(32, 128)):
    size = (steps, *shape)
    g = rng.standard_normal(size)
    if kind == "spikes":
        g = 10 ** rng.uniform(-4.5, 4.5, size) * np.sign(g)
    elif kind == "sparse":
        g *= (rng.random(size) < 0.02) * 10 ** rng.uniform(-6, 6, shape)
    elif kind == "constant":
        g = np.broadcast_to(10 ** rng.uniform(-14, 17, shape), size)
    elif kind == "sign flips":
        g = np.abs(g) * np.where(np.arange(steps) % 7 < 5, 1, -1)[:, None, None]
    elif kind == "growing":  # equality in Cauchy-Schwarz: gradients grow by b2/b1
        g = np.broadcast_to(1e-15 * (0.999 / 0.9) ** np.arange(steps)[:, None, None], size)
    return g.astype(np.float32)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", ["normal", "spikes", "sparse", "constant", "sign flips", "growing"])
def test_the_bound_holds(kind, nesterov):
    # 1e-4 covers sums of 200 float32 terms and powers of rounded betas, a few 1e-6 each
    g = adversary(kind, np.random.default_rng(0))
    ratio = worst_breach(jnp.float32(0.9), jnp.float32(0.999), g, nesterov=nesterov)
    assert ratio <= 1 + 1e-4
    if kind == "growing":
        assert ratio > 0.5  # the bound is nearly reached


@property_test(
    few=40,
    b2=st.floats(0.5, 0.9999),
    share=st.floats(0, 0.98),
    exponents=st.lists(st.integers(-15, 18), min_size=24, max_size=24),
    signs=st.integers(0, 2**24 - 1),
    seed=st.integers(0, 99),
)
def test_no_breach_of_the_bound_is_found(b2, share, exponents, signs, seed):
    b1 = share * math.sqrt(b2)
    run = 10.0 ** np.array(exponents) * np.where((signs >> np.arange(24)) & 1, 1, -1)
    shuffled = np.random.default_rng(seed).permuted(np.tile(run[:, None], (1, 4096)), axis=0)
    shuffled[:, ::2] = run[:, None]
    g = np.clip(shuffled, -9e17, 9e17).reshape(24, 32, 128).astype(np.float32)
    assert worst_breach(jnp.float32(b1), jnp.float32(b2), g) <= 1 + 1e-4


def test_rounding_is_unbiased():
    int8, n = formats.FORMATS["int8"], 4096
    w = np.concatenate([[1.0], 10.0 ** -np.random.default_rng(0).uniform(0, 3, 127)]).astype(np.float32)  # sqrt(v)
    v, m = w[None] ** 2, w[None] * np.linspace(-1, 1, 128, dtype=np.float32)
    stored = int8.init(zeros((1, 128)), 2)

    def decoded(count):
        return int8.decode(int8.encode((m, v), stored, formats.random_bits(m.shape, 0, count)), jnp.float32)

    many = [np.asarray(x) for x in jax.jit(jax.vmap(decoded))(np.arange(n))]
    # The dither of successive steps is evenly spread, so the error of the mean is O(1/n), not O(1/sqrt(n)). The largest
    # gap between two levels of v is 25 v, at w**2 = 1e-6.
    np.testing.assert_allclose(np.asarray(many[1], np.float64).mean(0), v, rtol=1e-3)
    ratio = np.asarray(many[0] / np.sqrt(many[1]), np.float64).mean(0)
    np.testing.assert_allclose(ratio, m / np.sqrt(v), atol=1e-3)
    moments = jax.device_put((m, v))
    encoded = lambda t: formats.FORMATS["bfloat16"].encode(moments, moments, formats.random_bits(m.shape, 0, t))
    for x, exact in zip(jax.jit(jax.vmap(encoded))(np.arange(n)), (m, v), strict=True):
        # a gap times the discrepancy of the dither sequence, some log(n) / n
        np.testing.assert_allclose(np.asarray(x, np.float64).mean(0), exact, rtol=2**-7 / 500)


def test_a_gradient_that_dies_stops_its_weight():
    tx = jadam.scale_by_adam(moments="int8", eps=1e-12)
    dead = np.arange(128) % 2 == 0

    def step(state, t, some):
        g = some[t % len(some)]
        u, state = tx.update(jnp.where(dead & (t > 100), 0, g), state)
        return state, (jnp.abs(u * dead).max(), jnp.abs(u).max())

    @jax.jit
    def sizes(some):
        return jax.lax.scan(functools.partial(step, some=some), tx.init(some[0]), jnp.arange(10_000))[1]

    of_dead, of_all = sizes(normal(1000, 32, 128))
    assert of_dead[50] > 0.1
    assert of_dead[-1] == 0
    assert of_all[-1] > 0.1


def test_bound_of_betas_that_are_1_in_float32():
    g = normal(32, 128)
    tx = jadam.scale_by_adam(1 - 1e-12, 1 - 1e-12, eps=0.0, moments="int8")
    np.testing.assert_allclose(jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g), np.sign(g), rtol=1e-6)


@pytest.mark.parametrize("moments", NARROW)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_non_finite_values_stay_visible(moments, bad):
    p = zeros((32, 256))
    good = np.ones((32, 256), np.float32)
    g = good.copy()
    g[3, 5] = bad
    (tx, update), (plain, update_plain) = scale_by(moments), scale_by("float32")
    state, expected = tx.init(p), plain.init(p)
    for x in (good, g, good, good):
        u, state = update(x, state)
        v, expected = update_plain(x, expected)
        u, v = np.array(u), np.asarray(v)
        assert not np.any(np.isfinite(u) & ~np.isfinite(v))
        if moments == "int8":
            assert np.isfinite(u[:, 128:]).all()
        else:
            assert np.isfinite(np.delete(u, 3 * 256 + 5)).all()
        if np.isnan(v).any():
            held = [np.float32(x) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
            assert not all(np.isfinite(x).all() for x in held)


@pytest.mark.parametrize("moments", NARROW)
def test_apply_if_finite_leaves_the_state(moments):
    p = zeros((32, 256))
    tx = optax.apply_if_finite(jadam.adam(0.1, moments=moments), 5)
    update = jax.jit(tx.update)
    _, state = update(np.ones(p.shape, np.float32), tx.init(p), p)
    u, after = update(np.full(p.shape, np.nan, np.float32), state, p)
    assert not np.any(u)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, after.inner_state)


@pytest.mark.parametrize("moments", NARROW)
def test_same_bits_again_and_on_eight_devices(moments):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    p = zeros((64, 1024))
    tx, update = scale_by(moments)
    gradients = normal(5, *p.shape)
    states = [tx.init(p)]
    for g in gradients:
        states.append(update(g, states[-1])[1])
    _, resumed = update(gradients[-1], jax.device_put(jax.device_get(states[-2])))
    jax.tree.map(np.testing.assert_array_equal, resumed, states[-1])
    for spec in [("x", None), (None, "x")]:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        state = tx.init(jax.device_put(p, sharding))
        assert all(x.sharding == sharding for x in jax.tree.leaves(state) if x.ndim == 2)
        compiled = update.lower(jax.device_put(gradients[0], sharding), state).compile()
        assert "all-gather" not in compiled.as_text()
        for g in gradients:
            _, state = compiled(jax.device_put(g, sharding), state)
        jax.tree.map(np.testing.assert_array_equal, state, states[-1])


@pytest.mark.parametrize("under_jit", [False, True])
def test_blocks_fit_shards(under_jit):
    """Block sizes depend on shardings, which are known under jit if the mesh axes are explicit."""
    kind = jax.sharding.AxisType.Explicit if under_jit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    sharded = lambda *shape: jax.device_put(np.zeros(shape, np.float32), sharding)
    tx = jadam.scale_by_adam(moments="int8")
    init = jax.jit(tx.init) if under_jit else tx.init
    p = sharded(50, 768)  # 96 columns a shard: blocks of 128 would straddle shards
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with set_mesh(mesh) if under_jit else contextlib.nullcontext():
        state, other = init(p), init(sharded(600, 8 * 13))
    assert other.nu.dtype == jnp.float32  # no block divides 13: a documented fallback
    assert state.mu_scale.shape == (50, 8)
    assert all(x.sharding.spec == sharding.spec for x in jax.tree.leaves(state) if x.ndim == 2)
    g = jax.device_put(np.sign(normal(*p.shape)), sharding)
    update = jax.jit(tx.update).lower(g, state).compile()
    assert "all-gather" not in update.as_text()
    np.testing.assert_allclose(update(g, state)[0], g, rtol=1e-6)


@parametrize("make", ADAMS, default=["nadamw"])
def test_jit_is_eager(make):
    # Under jit XLA may contract products and sums, so a value may round to the neighbouring code.
    p = zeros((40, 300))
    tx = make(moments="int8")
    g = jax.device_put(normal(*p.shape))
    u, state = tx.update(g, tx.init(p), p)
    v, other = jax.jit(tx.update)(g, tx.init(p), p)
    np.testing.assert_allclose(u, v, rtol=5e-7)
    for name in ("mu", "nu"):
        codes, others = (np.asarray(optax.tree.get(x, name)).astype(int) for x in (state, other))
        assert np.abs(codes - others).max() <= 1
        assert (codes != others).mean() < 1e-3


@parametrize("member", family.FAMILY, default=["adamaxw", "amsgrad", "radam"])
def test_bfloat16_throughout_the_family(member):
    p = {"w": ones((8, 16), jnp.bfloat16), "b": ones(3), "none": None, "empty": zeros((0, 3))}
    tx, plain = member.make(0.1, moments="bfloat16"), member.make(0.1)
    state, expected = tx.init(p), plain.init(p)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    update, update_plain = jax.jit(tx.update), jax.jit(plain.update)
    for t in range(20):
        g = jax.tree.map(lambda x, t=t: np.full(x.shape, 1 + t % 3, x.dtype), p)
        u, state = update(g, state, p)
        v, expected = update_plain(g, expected, p)
        # a moment has an error of at most 2**-7, bfloat16's spacing; the root halves that of v; a v made of m has m's
        rtol = 2**-6 if isinstance(expected[0], (optax.ScaleByAdamState, optax.ScaleByAmsgradState)) else 2**-5
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), u, v)
    assert update._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype(jnp.bfloat16), np.dtype("int32")}


@pytest.mark.parametrize(
    "member", [m for m in family.FAMILY if m.name not in ("adam", "adamw", "nadam", "nadamw")], ids=str
)
def test_other_optimizers_refuse_int8(member):
    with pytest.raises(ValueError, match="moments must be 'bfloat16' or 'float32' for this optimizer, got 'int8'"):
        member.make(0.1, moments="int8")


def test_formats_chosen_by_a_function():
    p = {"embed": zeros((64, 128)), "layer": {"kernel": zeros((64, 128)), "bias": zeros(128)}}
    tx = jadam.adam(0.1, moments=lambda path, leaf: "bfloat16" if "embed" in path else "int8")
    state = tx.init(p)
    nu = optax.tree.get(state, "nu")
    assert [x.dtype for x in jax.tree.leaves(nu)] == [jnp.bfloat16, jnp.float32, jnp.uint8]
    update = jax.jit(tx.update)
    for _ in range(3):
        u, state = update(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), p), state, p)
    assert update._cache_size() == 1
    jax.tree.map(lambda x: np.testing.assert_allclose(x, -0.1, rtol=0.02), u)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@pytest.mark.parametrize("moments", NARROW)
def test_wide_leaves_stay_wide(moments, x64):
    p = {np.dtype(dtype).name: ones((64, 128), dtype) for dtype in (np.float64, np.complex64)}
    (tx, update), (plain, update_plain) = scale_by(moments), scale_by("float32")
    state = tx.init(p)
    assert {name: x.dtype.name for name, x in state.mu.items()} == {name: name for name in p}
    jax.tree.map(np.testing.assert_array_equal, update(p, state, p)[0], update_plain(p, plain.init(p), p)[0])


def test_scheduled_and_traced_betas():
    p = zeros((64, 128))
    g = np.ones(p.shape, np.float32)
    scheduled = jadam.scale_by_adam(b2=lambda count: jnp.where(count == 2, 0.5, 0.99), moments="int8")
    state, update = scheduled.init(p), jax.jit(scheduled.update)
    for t in range(4):
        u, state = update(g, state)
        assert np.isfinite(u).all() == (t < 2)  # from the third step on the update is unbounded, hence NaN
    make = functools.partial(optax.inject_hyperparams(jadam.adam, static_args=("moments",)), 0.1, moments="int8")
    update = jax.jit(make(b2=0.99).update)  # b2 is in the state
    for b2, finite in ((0.99, True), (0.5, False)):
        u, _ = update(g, make(b2=b2).init(p))
        assert np.isfinite(u).all() == finite


@pytest.mark.parametrize("wrap", [lambda tx: tx, jadam.exact_bf16])
def test_a_first_state_can_be_donated(wrap):
    """No two leaves share a buffer, which XLA refuses to donate twice."""
    params = {"kernel": ones((64, 128)), "bias": ones(128), "scale": ones(())}
    tx = wrap(jadam.adam(1e-3, b1=lambda count: 0.9, moments="int8"))
    state = tx.init(params)
    step = jax.jit(lambda state, params: tx.update(params, state, params)[1], donate_argnums=0)
    assert step(state, params) is not None


@pytest.mark.slow
def test_scheduled_betas_without_a_bound_are_nan():
    tx = jadam.adam(1e-2, b1=lambda count: 0.99, b2=0.9, moments="int8")
    p = ones((64, 128))
    assert np.isnan(jax.jit(tx.update)(p, tx.init(p), p)[0]).all()


def test_derivative_through_two_steps_is_finite():
    """Also where v is 0."""
    tx = jadam.adam(1.0, moments="int8")
    p = np.ones((64, 128), np.float32)
    p[0, 0] = 0

    def twice(g):
        _, state = tx.update(g, tx.init(p), p)
        return tx.update(g, state, p)[0].sum()

    assert np.isfinite(jax.jit(jax.grad(twice))(p)).all()


@pytest.mark.parametrize(
    ("wrap", "moments"),
    [
        pytest.param(wrap, moments, id=f"{name}-{moments}", marks=pytest.mark.slow)
        for name, wrap in (("plain", lambda tx: tx), ("exact", jadam.exact_bf16))
        for moments in ("float32", *NARROW)
    ],
)
def test_strict_promotion_changes_no_bit(moments, wrap, strict):
    """Strict modes change no bit of steps, `jadam.statistics` and `jadam.convert_moments`."""
    tx = wrap(jadam.adamw(1e-2, moments=moments))
    dtype = jnp.bfloat16 if wrap is jadam.exact_bf16 else jnp.float32
    params = {"kernel": ones((64, 129), dtype), "bias": ones(3, dtype)}
    numbers = normal(3, 64, 129).astype(dtype)
    grads = [{"kernel": x, "bias": x[0, :3]} for x in numbers]

    def results():
        @jax.jit
        def step(g, state, params):
            new, after = jadam.step(tx, g, state, params)
            return tx.update(g, state, params), (new, after, jadam.statistics(tx, after, new))

        state, taken = tx.init(params), []
        for g in grads:
            taken.append(step(g, state, params))
            state = taken[-1][1][1]
        return taken, [jadam.convert_moments(state, to) for to in ("float32", *NARROW)]

    found = results()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = results()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_strict_promotion_of_a_step_that_is_not_fused(strict):
    """`exact_bf16` returns float32 updates, which `optax.apply_updates` refuses in strict mode; `jadam.step` works."""
    tx = jadam.exact_bf16(optax.sgd(2.0**-9))
    p = ones(3, jnp.bfloat16)
    masters = jax.jit(lambda p, state: jadam.float32_params(*jadam.step(tx, p, state, p)))(p, tx.init(p))
    np.testing.assert_array_equal(masters, np.full(3, 1 - 2.0**-9, np.float32))
