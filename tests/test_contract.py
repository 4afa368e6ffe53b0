"""What every member of the family promises as an Optax transformation."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from family import FAMILY

import jadam

every_member = pytest.mark.parametrize("member", FAMILY, ids=str)

SCHEDULES = {
    "constant": optax.constant_schedule(1e-2),
    "cosine": optax.cosine_decay_schedule(1e-2, 50),
    "one-cycle": optax.cosine_onecycle_schedule(50, 1e-2),
    "linear one-cycle": optax.linear_onecycle_schedule(50, 1e-2),
    "warmup": optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 50),
    "piecewise": optax.piecewise_constant_schedule(1e-2, {20: 0.1}),
    "joined": optax.join_schedules([optax.constant_schedule(1e-2), optax.linear_schedule(1e-2, 0, 20)], [10]),
}


def tree(seed=0, dtype=np.float32):
    """Nested containers, a None, an empty and a zero-dimensional leaf, odd sizes."""
    rng = np.random.default_rng(seed)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {"layers": [(x(3, 5), x(5)), (x(5, 2), None)], "scale": x(), "empty": x(0, 4)}


def leaves(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def train(tx, params, gradients, jit=jax.jit):
    """The parameters and state after one `optax.apply_updates` per gradient."""
    state = tx.init(params)

    @jit
    def step(g, params, state):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in gradients:
        params, state = step(g, params, state)
    return params, state


@every_member
def test_signature_is_a_superset_of_optax(member):
    ours, theirs = (inspect.signature(f).parameters for f in (member.make, member.optax))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


@every_member
def test_matches_its_oracle(member):
    # A step of lr 0.01 is off by at most 1e-6 * 0.01, plus p's own rounding, |p| * 2**-24, at each of 60 steps.
    gradients = [tree(seed) for seed in range(1, 61)]
    rate = optax.cosine_decay_schedule(0.01, 60)
    kwargs = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(member.make).parameters else {}
    found, _ = train(member.make(rate, **member.settings, **kwargs), tree(), gradients)
    for p, start, *gs in leaves(found, tree(), *gradients):
        directions = member.oracle([np.asarray(g, np.float64) for g in gs], **member.settings)
        rates = lambda t: 0.01 * 0.5 * (1 + np.cos(np.pi * t / 60))
        expected = oracle.descend(start, directions, rates, **kwargs)[-1]
        np.testing.assert_allclose(p, expected, atol=60 * (1e-8 + 3 * 2**-24))


@every_member
@pytest.mark.usefixtures("x64")
def test_matches_its_oracle_in_float64(member):
    gradients = [tree(seed, np.float64) for seed in range(1, 61)]
    kwargs = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(member.make).parameters else {}
    found, state = train(member.make(0.01, **member.settings, **kwargs), tree(dtype=np.float64), gradients)
    assert all(x.dtype in (jnp.float64, jnp.int32) for x in jax.tree.leaves(state))
    for p, start, *gs in leaves(found, tree(dtype=np.float64), *gradients):
        directions = member.oracle(gs, **member.settings)
        expected = oracle.descend(start, directions, lambda t: 0.01, **kwargs)[-1]
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-12)


@every_member
def test_state_is_optax_s(member):
    params = tree()
    ours, theirs = member.make(1e-3).init(params), member.optax(1e-3).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in leaves(ours, theirs):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.every(3)
@every_member
def test_an_optax_state_goes_on_in_jadam_and_back(member):
    params, gradients = tree(), [tree(seed) for seed in range(1, 11)]
    _, state = train(member.optax(1e-3, **member.settings), params, gradients)
    ours, theirs = member.make(1e-3, **member.settings), member.optax(1e-3, **member.settings)
    a, after_ours = jax.jit(ours.update)(gradients[0], state, params)
    b, after_theirs = jax.jit(theirs.update)(gradients[0], state, params)
    for x, y in leaves(a, b):
        np.testing.assert_allclose(x, y, rtol=2e-4)  # Optax's own distance from the paper: 1e-4 (README)
    assert jax.tree.structure(after_ours) == jax.tree.structure(after_theirs)
    theirs.update(gradients[0], after_ours, params)


@every_member
@pytest.mark.parametrize("p_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("g_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_a_fixed_point(member, p_dtype, g_dtype):
    params, g = tree(dtype=p_dtype), tree(1, g_dtype)
    tx = member.make(1e-3)
    state = tx.init(params)
    updates, after = tx.update(g, state, params)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for a, b in leaves(state, after):
        assert jax.typeof(a) == jax.typeof(b)
        assert a.dtype in (jnp.float32, jnp.int32)
        assert not b.weak_type
    for u in jax.tree.leaves(updates):
        assert u.dtype == jnp.promote_types(p_dtype, g_dtype)


@pytest.mark.every(5)
@every_member
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_trace_whatever_the_schedule(member, name):
    tx = member.make(SCHEDULES[name])
    traces = 0

    @jax.jit
    def step(g, state, params):
        nonlocal traces
        traces += 1
        return tx.update(g, state, params)

    params = tree()
    state = tx.init(params)
    for _ in range(100):
        _, state = step(params, state, params)
    assert traces == 1
    assert step._cache_size() == 1


@every_member
def test_one_trace_for_a_learning_rate_that_changes_every_step(member):
    traces = 0

    @jax.jit
    def step(rate, g, state, params):
        nonlocal traces
        traces += 1
        return member.make(rate).update(g, state, params)

    params = tree()
    state = member.make(0.0).init(params)
    for t in range(100):
        updates, state = step(0.01 / (1 + t), params, state, params)
    assert traces == 1
    expected, _ = member.make(0.01 / 100).update(params, state, params)
    for u, e in leaves(updates, expected):
        np.testing.assert_allclose(u, e, atol=1e-5)  # one step later: of the same size, 1e-4


@every_member
def test_donated_state(member):
    params = tree()
    tx = member.make(1e-3)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update, donate_argnums=1)
    _, after = step(params, state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.size)
    _, again = step(params, after, params)
    assert int(optax.tree.get_all_with_path(again, "count")[0][1]) == 2


@every_member
def test_abstract_init(member):
    params = tree()
    tx = member.make(optax.cosine_decay_schedule(1e-3, 10))
    abstract = jax.eval_shape(tx.init, params)
    for a, b in leaves(abstract, tx.init(params)):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@pytest.mark.every(3)
@every_member
def test_scan_equals_a_loop(member):
    gradients = [tree(seed) for seed in range(1, 9)]
    tx = member.make(optax.cosine_onecycle_schedule(8, 1e-2))
    looped, state = train(tx, tree(), gradients)

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    (scanned, scanned_state), _ = jax.jit(lambda p, s: jax.lax.scan(body, (p, s), stacked))(tree(), tx.init(tree()))
    for a, b in leaves((looped, state), (scanned, scanned_state)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=8 * 1e-8)  # other fusions, other contractions: an ulp a step


@every_member
def test_eager_equals_jit(member):
    gradients = [tree(seed) for seed in range(1, 9)]
    tx = member.make(1e-2)
    for a, b in leaves(train(tx, tree(), gradients), train(tx, tree(), gradients, jit=lambda f: f)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=8 * 1e-8)


@pytest.mark.every(3)
@every_member
def test_vmap_over_models_and_hyperparameters(member):
    rates, b2s = jnp.array([1e-3, 1e-2]), jnp.array([0.9, 0.99])
    g = jnp.array([[1.0, -2.0], [3.0, 4.0]])

    def one(rate, b2, g):
        tx = member.make(rate, b2=b2)
        return tx.update(g, tx.init(g), g)[0]

    together = jax.vmap(one)(rates, b2s, g)
    for i in range(2):
        np.testing.assert_allclose(together[i], one(rates[i], b2s[i], g[i]), rtol=1e-6)


@pytest.mark.every(5)
@every_member
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_strict_promotion(member, dtype):
    params = tree(dtype=dtype)
    for rate in (1e-3, lambda count: jnp.float32(1e-3), jnp.float32(1e-3)):  # Optax's schedules promote
        tx = member.make(rate, b1=jnp.float32(0.9), b2=0.99)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
    jadam.statistics(tx, state, params)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.set_to_zero()}, lambda p: jax.tree.map(lambda x: "a" if x.ndim == 2 else "b", p)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "flatten": optax.flatten,
}


@pytest.mark.every(7)
@every_member
@pytest.mark.parametrize("p_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_optax_s_wrappers(member, wrapper, p_dtype):
    params = {"w": jnp.ones((2, 3), p_dtype), "b": jnp.zeros(3, p_dtype)}
    gradients = [jax.tree.map(lambda x, k=k: x + k, params) for k in range(4)]
    ours, theirs = (WRAPPERS[wrapper](make(1e-2)) for make in (member.make, member.optax))
    a, _ = train(ours, params, gradients)
    b, _ = train(theirs, params, gradients)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in leaves(a, b):
        assert x.dtype == y.dtype
        # Four steps of 1e-2, Optax's share of error 1e-4; in bf16 each step rounds to 2**-8 of |p| <= 1.
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=4e-6 if p_dtype == jnp.float32 else 4 * 2**-8
        )


@pytest.mark.every(3)
@every_member
def test_apply_if_finite_leaves_the_state_alone(member):
    params = tree()
    tx = optax.apply_if_finite(member.make(1e-3), 5)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, after = tx.update(bad, state, params)
    for a, b in leaves(state.inner_state, after.inner_state):
        np.testing.assert_array_equal(a, b)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


@every_member
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_is_never_laundered(member, bad):
    params = jnp.ones(3)
    g = jnp.array([1.0, bad, -1.0])
    tx = member.make(1e-3)
    _, state = jax.jit(tx.update)(g, tx.init(params), params)
    nu = np.asarray(optax.tree.get(state, "nu"))
    assert not np.isfinite(nu[1])
    assert np.isfinite(nu[[0, 2]]).all()


@every_member
def test_inject_hyperparams_on_float32(member):
    params, gradients = tree(), [tree(seed) for seed in range(1, 6)]
    tx = optax.inject_hyperparams(member.make)(learning_rate=1e-2)
    traces = 0

    @jax.jit
    def step(g, params, state):
        nonlocal traces
        traces += 1
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, p = tx.init(params), params
    numeric = [name for name, value in state.hyperparams.items()]
    for t, g in enumerate(gradients):
        for name in numeric:
            state.hyperparams[name] = state.hyperparams[name] * (1 - 1e-3 * t)
        p, state = step(g, p, state)
    assert traces == 1
    assert {"learning_rate", "b1", "b2", "eps"} <= set(numeric)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(p))


@pytest.mark.every(3)
@every_member
def test_inject_hyperparams_on_bf16(member):
    params = tree(dtype=jnp.bfloat16)
    # Without hyperparam_dtype Optax hands over b2 = bf16(0.999) = 1.
    with pytest.raises(TypeError, match=r"b1 must be float32 or wider, got bfloat16.*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(member.make)(learning_rate=1e-2).init(params)
    tx = optax.inject_hyperparams(member.make, hyperparam_dtype=jnp.float32)(learning_rate=1e-2)
    p, _ = train(tx, params, [tree(seed, jnp.bfloat16) for seed in range(1, 6)])
    q, _ = train(member.make(1e-2), params, [tree(seed, jnp.bfloat16) for seed in range(1, 6)])
    for a, b in leaves(p, q):
        # float32(0.999) is 1.3e-5 off in 1 - b2: the same bf16 but where that crosses a rounding edge:
        # a spacing, 2**-7 of the weight, or near 0 of the largest update, 1e-2.
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-7, atol=1e-4)


@every_member
def test_map_params_finds_the_moments(member):
    params = tree()
    tx = member.make(1e-3)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _: "moment", state, transform_non_params=lambda _: "other")
    assert jax.tree.leaves(marked).count("moment") == (len(jax.tree.leaves(state)) - 1)


@every_member
def test_sharded_state_follows_the_parameters(member):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    host = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    tx = member.make(1e-2)
    one, _ = train(tx, jnp.asarray(host), [jnp.asarray(host)] * 3)
    params = jax.device_put(host, sharding)
    eight, state = train(tx, params, [params] * 3)
    assert optax.tree.get(state, "mu").sharding.is_equivalent_to(sharding, 2)
    # Blocks of other shapes are vectorised otherwise, so one multiply-add may be contracted and another not.
    np.testing.assert_allclose(one, eight, rtol=2**-22)


def test_weight_decay_mask_and_schedule():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = jadam.adamw(0.1, weight_decay=lambda count: 0.5 / (1 + count), mask={"w": True, "b": False})
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(zero, state, params)
        np.testing.assert_allclose(updates["w"], -0.1 * 0.5 / (1 + t), rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], 0)


def test_mu_dtype_is_how_mu_is_stored():
    params = jnp.ones(4)
    tx = jadam.adam(1e-3, mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    u, after = jax.jit(tx.update)(params / 3, state, params)
    assert optax.tree.get(after, "mu").dtype == jnp.bfloat16
    assert optax.tree.get(after, "nu").dtype == jnp.float32
    np.testing.assert_allclose(u, -1e-3, rtol=1e-6)  # the direction is of the unrounded m
