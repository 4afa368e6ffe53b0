"""Moments in bfloat16 and int8: their size, their error, their bound, and what they must never hide."""

import contextlib
import functools
import math

import family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from properties import holds

import jadam
from jadam import _formats

NARROW = ["bfloat16", "int8"]
ADAMS = [
    jadam.scale_by_adam,
    *(functools.partial(f, 1.0) for f in (jadam.adam, jadam.adamw, jadam.nadam, jadam.nadamw)),
]


def state_bytes(tx, *shape):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, jnp.zeros(shape))))


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


# Gradients are N(0, 1) times a lognormal scale of each coordinate's own.
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
    shape, steps = (16, 512), 1500
    scale = np.exp(sigma * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    sides = {name: jadam.scale_by_adam(**settings, moments=name) for name in ("float32", *NARROW)}

    def step(states, key_and_t):
        key, t = key_and_t
        g = jax.random.normal(key, shape) * scale * jnp.where(t < steps // 2, 1, shift)
        u, states = {}, dict(states)
        for name, tx in sides.items():
            u[name], states[name] = tx.update(g, states[name])
        exact = u.pop("float32")
        return states, {name: (jnp.sum((x - exact) ** 2), jnp.sum(exact**2)) for name, x in u.items()}

    start = {name: tx.init(jnp.zeros(shape)) for name, tx in sides.items()}
    keys = jax.random.split(jax.random.key(1), steps)
    _, sums = jax.lax.scan(step, start, (keys, jnp.arange(steps)))
    errors = {name: math.sqrt(error.sum() / exact.sum()) for name, (error, exact) in sums.items()}
    assert all(0 < errors[name] <= most[name] for name in errors), errors


def bound(b1, b2, t, nesterov):
    """Of the update's size, for every sequence of gradients: Cauchy-Schwarz, see `jadam._int8`."""
    newest = (1 - b1) / jnp.sqrt(1 - b2)
    ratio = newest / jnp.sqrt(1 - b1 * b1 / b2)
    adam = ratio / (1 - b1**t)
    nadam = b1 * ratio / (1 - b1 ** (t + 1)) + newest / (1 - b1**t)
    return (nadam if nesterov else adam) * jnp.sqrt(1 - b2**t)


@functools.partial(jax.jit, static_argnames="nesterov")
def worst_breach(b1, b2, gradients, nesterov=False):
    """The largest |u| over its bound, along a sequence of gradients."""
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
    elif kind == "growing":  # equality in Cauchy-Schwarz: each gradient is b2/b1 times the one before
        g = np.broadcast_to(1e-15 * (0.999 / 0.9) ** np.arange(steps)[:, None, None], size)
    return g.astype(np.float32)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", ["normal", "spikes", "sparse", "constant", "sign flips", "growing"])
def test_the_bound_holds(kind, nesterov):
    # 1e-4: float32 sums of 200 terms and t-th powers of betas rounded once, each a few 1e-6
    g = adversary(kind, np.random.default_rng(0))
    ratio = worst_breach(jnp.float32(0.9), jnp.float32(0.999), g, nesterov=nesterov)
    assert ratio <= 1 + 1e-4
    if kind == "growing":
        assert ratio > 0.5  # the bound is not an idle one


@holds(
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
    int8, n = _formats.FORMATS["int8"], 4096
    w = np.concatenate([[1.0], 10.0 ** -np.random.default_rng(0).uniform(0, 3, 127)]).astype(np.float32)  # sqrt(v)
    v, m = jnp.asarray(w**2)[None], jnp.asarray(w * np.linspace(-1, 1, 128, dtype=np.float32))[None]
    stored = int8.init(jnp.zeros((1, 128)), 2)

    def decoded(count):
        return int8.decode(int8.encode((m, v), stored, _formats.random_for(m.shape, 0, count)), jnp.float32)

    many = jax.jit(jax.vmap(decoded))(jnp.arange(n))
    # The dither walks evenly round the circle, so the mean's error shrinks like 1/n, not like its root; the largest
    # gap between two levels of v is 25 times v, at w**2 = 1e-6.
    np.testing.assert_allclose(np.asarray(many[1], np.float64).mean(0), v, rtol=1e-3)
    ratio = np.asarray(many[0] / jnp.sqrt(many[1]), np.float64).mean(0)
    np.testing.assert_allclose(ratio, m / jnp.sqrt(v), atol=1e-3)
    bf16 = jax.vmap(lambda t: _formats.FORMATS["bfloat16"].encode((m, v), (m, v), _formats.random_for(m.shape, 0, t)))
    for x, exact in zip(bf16(jnp.arange(n)), (m, v), strict=True):
        # a spacing times the discrepancy of the walk, some log(n) / n
        np.testing.assert_allclose(np.asarray(x, np.float64).mean(0), exact, rtol=2**-7 / 500)


def test_a_gradient_that_dies_stops_its_weight():
    tx = jadam.scale_by_adam(moments="int8", eps=1e-12)
    dead = jnp.arange(128) % 2 == 0

    def step(state, t):
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (32, 128))
        u, state = tx.update(jnp.where(dead & (t > 100), 0, g), state)
        return state, (jnp.abs(u * dead).max(), jnp.abs(u).max())

    _, (of_dead, of_all) = jax.lax.scan(step, tx.init(jnp.zeros((32, 128))), jnp.arange(10_000))
    assert of_dead[50] > 0.1
    assert of_dead[-1] == 0
    assert of_all[-1] > 0.1


def test_betas_that_are_1_in_float32_have_a_bound():
    g = jnp.asarray(np.random.default_rng(0).standard_normal((32, 128)), jnp.float32)
    tx = jadam.scale_by_adam(1 - 1e-12, 1 - 1e-12, eps=0.0, moments="int8")
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], jnp.sign(g), rtol=1e-6)


@pytest.mark.every(3)
@pytest.mark.parametrize("moments", NARROW)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e20])
def test_nothing_not_finite_is_laundered(moments, bad):
    p = jnp.zeros((32, 256))
    g = jnp.ones_like(p).at[3, 5].set(bad)
    good = jnp.ones_like(p)
    plain, tx = jadam.scale_by_adam(), jadam.scale_by_adam(moments=moments)
    state, expected = tx.init(p), plain.init(p)
    for x in (good, g, good, good):
        u, state = tx.update(x, state)
        v, expected = plain.update(x, expected)
        assert not jnp.any(jnp.isfinite(u) & ~jnp.isfinite(v))
        others = u[:, 128:] if moments == "int8" else u.at[3, 5].set(0)
        assert jnp.isfinite(others).all()
        if jnp.isnan(v).any():
            held = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
            assert not all(jnp.isfinite(x).all() for x in held)


@pytest.mark.parametrize("moments", NARROW)
def test_apply_if_finite_leaves_the_state(moments):
    p = jnp.zeros((32, 256))
    tx = optax.apply_if_finite(jadam.adam(0.1, moments=moments), 5)
    _, state = tx.update(jnp.ones_like(p), tx.init(p), p)
    u, after = tx.update(jnp.full_like(p, jnp.nan), state, p)
    assert not u.any()
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, after.inner_state)


@pytest.mark.parametrize("moments", NARROW)
def test_same_bits_again_and_on_eight_devices(moments):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jnp.zeros((64, 1024))
    tx = jadam.scale_by_adam(moments=moments)
    update = jax.jit(tx.update)
    gradients = [jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((5, *p.shape)).astype(np.float32)]
    states = [tx.init(p)]
    for g in gradients:
        states.append(update(g, states[-1])[1])
    _, resumed = update(gradients[-1], jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[-2]))
    jax.tree.map(np.testing.assert_array_equal, resumed, states[-1])
    for spec in [("x", None), (None, "x")]:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        state = tx.init(jax.device_put(p, sharding))
        assert all(x.sharding == sharding for x in jax.tree.leaves(state) if x.ndim == 2)
        for g in gradients:
            g = jax.device_put(g, sharding)
            compiled = jax.jit(tx.update).lower(g, state).compile()
            assert "all-gather" not in compiled.as_text()
            _, state = compiled(g, state)
        jax.tree.map(np.testing.assert_array_equal, state, states[-1])


@pytest.mark.parametrize("under_jit", [False, True])
def test_blocks_fit_shards(under_jit):
    """Under jit shardings are known on a mesh with explicit axes."""
    kind = jax.sharding.AxisType.Explicit if under_jit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    sharded = lambda *shape: jax.device_put(jnp.zeros(shape), sharding)
    tx = jadam.scale_by_adam(moments="int8")
    init = jax.jit(tx.init) if under_jit else tx.init
    p = sharded(50, 768)  # 96 in a shard: six blocks of 128 would straddle
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with set_mesh(mesh) if under_jit else contextlib.nullcontext():
        state, other = init(p), init(sharded(600, 8 * 13))
    assert other.nu.dtype == jnp.float32  # no block divides 13: a documented fallback
    assert state.mu_scale.shape == (50, 8)
    assert all(x.sharding.spec == sharding.spec for x in jax.tree.leaves(state) if x.ndim == 2)
    g = jax.device_put(np.random.default_rng(0).standard_normal(p.shape).astype(np.float32), sharding)
    update = jax.jit(tx.update).lower(g, state).compile()
    assert "all-gather" not in update.as_text()
    np.testing.assert_allclose(update(jnp.sign(g), state)[0], np.sign(g), rtol=1e-6)


@pytest.mark.every(2)
@pytest.mark.parametrize("make", ADAMS)
def test_jit_is_eager(make):
    # Under jit a multiplication and an addition may be one operation, so a value may round to the neighbouring code.
    p = jnp.zeros((40, 300))
    tx = make(moments="int8")
    g = jnp.asarray(np.random.default_rng(0).standard_normal(p.shape), jnp.float32)
    u, state = tx.update(g, tx.init(p), p)
    v, other = jax.jit(tx.update)(g, tx.init(p), p)
    np.testing.assert_allclose(u, v, rtol=5e-7)
    for name in ("mu", "nu"):
        codes, others = (np.asarray(optax.tree.get(x, name)).astype(int) for x in (state, other))
        assert np.abs(codes - others).max() <= 1
        assert (codes != others).mean() < 1e-3


@pytest.mark.every(3)
@pytest.mark.parametrize("member", family.FAMILY, ids=str)
def test_bfloat16_throughout_the_family(member):
    p = {"w": jnp.ones((8, 16), jnp.bfloat16), "b": jnp.ones(3), "none": None, "empty": jnp.zeros((0, 3))}
    tx, plain = member.make(0.1, moments="bfloat16"), member.make(0.1)
    state, expected = tx.init(p), plain.init(p)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    update = jax.jit(tx.update)
    for t in range(20):
        g = jax.tree.map(lambda x, t=t: jnp.full_like(x, 1 + t % 3), p)
        u, state = update(g, state, p)
        v, expected = plain.update(g, expected, p)
        # a moment's error is at most bfloat16's spacing, 2**-7, of which v's counts half
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2**-6), u, v)
    assert update._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype(jnp.bfloat16), np.dtype("int32")}


@pytest.mark.parametrize(
    "member", [m for m in family.FAMILY if m.name not in ("adam", "adamw", "nadam", "nadamw")], ids=str
)
def test_int8_is_refused_elsewhere(member):
    with pytest.raises(ValueError, match="moments must be 'bfloat16' or 'float32' here, got 'int8'"):
        member.make(0.1, moments="int8")


def test_by_name():
    p = {"embed": jnp.zeros((64, 128)), "layer": {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}}
    tx = jadam.adam(0.1, moments=lambda path, leaf: "bfloat16" if "embed" in path else "int8")
    state = tx.init(p)
    nu = optax.tree.get(state, "nu")
    assert [x.dtype for x in jax.tree.leaves(nu)] == [jnp.bfloat16, jnp.float32, jnp.uint8]
    update = jax.jit(tx.update)
    for _ in range(3):
        u, state = update(jax.tree.map(jnp.ones_like, p), state, p)
    assert update._cache_size() == 1
    jax.tree.map(lambda x: np.testing.assert_allclose(x, -0.1, rtol=0.02), u)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
@pytest.mark.parametrize("moments", NARROW)
def test_wide_leaves_stay_wide(moments, dtype, x64):
    p = jnp.ones((64, 128), dtype)
    tx = jadam.scale_by_adam(moments=moments)
    state = tx.init(p)
    assert state.mu.dtype == dtype
    plain = jadam.scale_by_adam()
    np.testing.assert_array_equal(tx.update(p, state, p)[0], plain.update(p, plain.init(p), p)[0])


def test_scheduled_and_traced_betas():
    p = jnp.zeros((64, 128))
    g = jnp.ones_like(p)
    scheduled = jadam.scale_by_adam(b2=lambda count: jnp.where(count == 2, 0.5, 0.99), moments="int8")
    state = scheduled.init(p)
    for t in range(4):
        u, state = scheduled.update(g, state)
        assert jnp.isfinite(u).all() == (t < 2)  # from the third step on there is no bound, and no number
    make = functools.partial(optax.inject_hyperparams(jadam.adam, static_args=("moments",)), 0.1, moments="int8")
    for b2, finite in ((0.99, True), (0.5, False)):
        tx = make(b2=b2)
        u, _ = jax.jit(tx.update)(g, tx.init(p))
        assert jnp.isfinite(u).all() == finite


@pytest.mark.parametrize("wrap", [lambda tx: tx, jadam.exact_bf16])
def test_a_first_state_can_be_donated(wrap):
    """No two leaves of it are one buffer: XLA would refuse to take it twice."""
    params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128), "scale": jnp.ones(())}
    tx = wrap(jadam.adam(1e-3, b1=lambda count: 0.9, moments="int8"))
    state = tx.init(params)
    step = jax.jit(lambda state, params: tx.update(params, state, params)[1], donate_argnums=0)
    assert step(state, params) is not None


@pytest.mark.slow
def test_scheduled_betas_without_a_bound_are_nan():
    tx = jadam.adam(1e-2, b1=lambda count: 0.99, b2=0.9, moments="int8")
    p = jnp.ones((64, 128))
    assert np.isnan(tx.update(p, tx.init(p), p)[0]).all()


def test_derivative_through_two_steps_is_finite():
    """Where v is 0 too."""
    tx = jadam.adam(1.0, moments="int8")
    p = jnp.ones((64, 128)).at[0, 0].set(0)

    def twice(g):
        _, state = tx.update(g, tx.init(p), p)
        return tx.update(g, state, p)[0].sum()

    assert np.isfinite(jax.grad(twice)(p)).all()


@pytest.mark.parametrize(
    ("wrap", "moments"),
    [
        pytest.param(wrap, moments, id=f"{name}-{moments}", marks=pytest.mark.slow)
        for name, wrap in (("plain", lambda tx: tx), ("exact", jadam.exact_bf16))
        for moments in ("float32", *NARROW)
    ],
)
def test_strict_promotion_changes_no_bit(moments, wrap, strict):
    """Of both ways to take a step, of `jadam.statistics` and of `jadam.convert_moments`."""
    tx = wrap(jadam.adamw(1e-2, moments=moments))
    dtype = jnp.bfloat16 if wrap is jadam.exact_bf16 else jnp.float32
    params = {"kernel": jnp.ones((64, 129), dtype), "bias": jnp.ones(3, dtype)}
    numbers = np.random.default_rng(0).standard_normal((3, 64, 129))
    grads = [{"kernel": jnp.asarray(x, dtype), "bias": jnp.asarray(x[0, :3], dtype)} for x in numbers]

    def results():
        state, rows = tx.init(params), []
        for g in grads:
            rows.append(tx.update(g, state, params))
            new, state = jadam.step(tx, g, state, params)
            rows.append((new, state, jadam.statistics(tx, state, new)))
        return rows, [jadam.convert_moments(state, to) for to in ("float32", *NARROW)]

    found = results()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = results()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_strict_promotion_where_a_step_is_two_calls(strict):
    """The update of an `exact_bf16` is wider than the parameters, which `optax.apply_updates` then refuses."""
    tx = jadam.exact_bf16(optax.sgd(2.0**-9))
    p = jnp.ones(3, jnp.bfloat16)
    params, state = jadam.step(tx, p, tx.init(p), p)
    np.testing.assert_array_equal(jadam.float32_params(params, state), np.full(3, 1 - 2.0**-9, np.float32))
