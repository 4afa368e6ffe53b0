"""The contract of an Optax transformation, for every member of the family.

Most tests step all members in one program: XLA compiles eight optimizers together in a third of the time.
"""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from family import FAMILY
from helpers import MEMBERS, assert_equal, parametrize, zip_leaves

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
COSINE = optax.cosine_decay_schedule(0.01, 60)


def tree(seed=0, dtype=np.float32):
    """Random pytree with nested containers, a None, an empty and a zero-dimensional leaf."""
    rng = np.random.default_rng(seed)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {"layers": [(x(3, 5), None)], "scale": x(), "empty": x(0, 4)}


def matrix(x):
    """The matrix in ``tree()``."""
    return x["layers"][0][0]


def decay_settings(member):
    return {"weight_decay": 0.1} if member.decays else {}


def for_each_member(make):
    """``{name: make(member)}`` for every member."""
    return {name: make(member) for name, member in MEMBERS.items()}


def joint_step(txs):
    """Steps all of ``{name: tx}`` in one jitted ``step(g, params, states)``; ``traces`` grows by one a trace.

    ``params`` and ``states`` are keyed by name; ``g`` may be, else all have the same gradients.
    """
    traces = []

    def update(g, params, states):
        g = g if isinstance(g, dict) and g.keys() == txs.keys() else dict.fromkeys(txs, g)
        found = {name: tx.update(g[name], states[name], params[name]) for name, tx in txs.items()}
        updates, states = ({name: x[i] for name, x in found.items()} for i in range(2))
        return {name: optax.apply_updates(params[name], u) for name, u in updates.items()}, states, updates

    @jax.jit
    def step(*args):
        traces.append(None)
        return update(*args)

    init = lambda p: {name: tx.init(p) for name, tx in txs.items()}
    return SimpleNamespace(init=init, update=update, step=step, traces=traces)


@functools.cache
def family_on_schedule():
    """All members with non-default settings and a scheduled learning rate."""
    return joint_step(for_each_member(lambda m: m.make(COSINE, **m.settings, **decay_settings(m))))


@functools.cache
def family_at_constant_rate():
    """All members with non-default settings and a constant learning rate."""
    return joint_step(for_each_member(lambda m: m.make(0.01, **m.settings, **decay_settings(m))))


@functools.cache
def optax_on_schedule():
    """Optax's optimizers of the same names, settings and schedule."""
    return joint_step(for_each_member(lambda m: m.optax(COSINE, **m.settings, **decay_settings(m))))


@functools.cache
def trained(make, steps, dtype=np.float32):
    """Parameters, states and last updates of all members after ``steps`` steps."""
    program, start = make(), tree(dtype=dtype)
    params, states, updates = dict.fromkeys(MEMBERS, start), program.init(start), None
    for seed in range(1, steps + 1):
        params, states, updates = program.step(tree(seed, dtype), params, states)
    assert len(program.traces) == program.step._cache_size() == 1
    return params, states, updates


@every_member
def test_signature_is_a_superset_of_optax(member):
    ours, theirs = (inspect.signature(f).parameters for f in (member.make, member.optax))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    assert ("weight_decay" in ours) == member.decays


@every_member
def test_matches_its_oracle(member):
    # At each of 60 steps the update, of size 0.01, is off by 1e-6 of itself, and p is rounded: |p| * 2**-24, |p| <= 3.
    gradients = [tree(seed) for seed in range(1, 61)]
    found = trained(family_on_schedule, 60)[0][member.name]
    for p, start, *gs in zip_leaves(found, tree(), *gradients):
        directions = member.oracle([np.asarray(g, np.float64) for g in gs], **member.settings)
        rates = lambda t: 0.01 * 0.5 * (1 + np.cos(np.pi * t / 60))
        expected = oracle.scale_by_learning_rate_and_decay(start, directions, rates, **decay_settings(member))[-1]
        np.testing.assert_allclose(p, expected, atol=60 * (1e-8 + 3 * 2**-24))


@every_member
@pytest.mark.usefixtures("x64")
def test_matches_its_oracle_in_float64(member):
    gradients = [tree(seed, np.float64) for seed in range(1, 61)]
    params, states, _ = trained(family_at_constant_rate, 60, np.float64)
    assert all(x.dtype in (jnp.float64, jnp.int32) for x in jax.tree.leaves(states[member.name]))
    for p, start, *gs in zip_leaves(params[member.name], tree(dtype=np.float64), *gradients):
        directions = member.oracle([np.asarray(g) for g in gs], **member.settings)
        expected = oracle.scale_by_learning_rate_and_decay(start, directions, lambda t: 0.01, **decay_settings(member))[
            -1
        ]
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-12)


@every_member
def test_state_has_the_structure_of_optax(member):
    params = tree()
    ours, theirs = member.make(1e-3).init(params), member.optax(1e-3).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip_leaves(ours, theirs):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@every_member
def test_states_are_interchangeable_with_optax(member):
    a, b, after_ours, after_theirs, back = exchange_states()
    for x, y in zip_leaves(a[member.name], b[member.name]):
        np.testing.assert_allclose(x, y, rtol=2e-4)  # 1e-4 is Optax's own error (README)
    assert jax.tree.structure(after_ours[member.name]) == jax.tree.structure(after_theirs[member.name])
    for x, y in zip_leaves(back[member.name], after_ours[member.name]):
        assert jax.typeof(x) == jax.typeof(y)


@functools.cache
def exchange_states():
    """Steps both from Optax's state after ten steps, then Optax from ours; returns updates and states."""
    params, states, _ = trained(optax_on_schedule, 10)
    _, after_ours, a = family_on_schedule().step(tree(1), params, states)
    _, after_theirs, b = optax_on_schedule().step(tree(1), params, states)
    _, back, _ = optax_on_schedule().step(tree(1), params, after_ours)
    for program in (family_on_schedule(), optax_on_schedule()):
        assert len(program.traces) == 1  # the other's state causes no new trace
    return a, b, after_ours, after_theirs, back


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
PAIRS = {f"parameter {p.__name__}, gradient {g.__name__}": (p, g) for p in DTYPES for g in DTYPES}


@every_member
def test_dtypes_are_a_fixed_point(member):
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0, 4)}
    params, g = (
        {name: {x: jax.ShapeDtypeStruct(shape, pair[i]) for x, shape in shapes.items()} for name, pair in PAIRS.items()}
        for i in range(2)
    )
    tx = member.make(1e-3)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, g, state, params)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type), path
        assert a.dtype in (jnp.float32, jnp.int32), path
        assert not b.weak_type, path
    for name, pair in PAIRS.items():
        for u in updates[name].values():
            assert u.dtype == jnp.promote_types(*pair), name


@parametrize("schedule", SCHEDULES, default=["constant", "warmup", "joined"])
def test_one_trace_whatever_the_schedule(schedule):
    program = joint_step(for_each_member(lambda m: m.make(schedule)))
    params = dict.fromkeys(MEMBERS, matrix(tree()))
    states = program.init(matrix(tree()))
    for _ in range(100):
        _, states, _ = program.step(matrix(tree()), params, states)
    assert len(program.traces) == 1
    assert program.step._cache_size() == 1


@functools.cache
def train_at_traced_rates():
    """Updates and states after 100 steps with traced learning rates 0.01 / (1 + t), and the number of traces."""
    traces = []

    @jax.jit
    def step(rate, p, states):
        traces.append(None)
        found = for_each_member(lambda m: m.make(rate).update(p, states[m.name], p))
        return [{name: x[i] for name, x in found.items()} for i in range(2)]

    p = matrix(tree())
    states = for_each_member(lambda m: m.make(0.0).init(p))
    for t in range(100):
        updates, states = step(0.01 / (1 + t), p, states)
    return updates, states, len(traces)


@every_member
def test_one_trace_with_a_traced_learning_rate(member):
    updates, states, traces = train_at_traced_rates()
    assert traces == 1
    p = matrix(tree())
    expected, _ = member.make(0.01 / 100).update(p, states[member.name], p)
    np.testing.assert_allclose(updates[member.name], expected, atol=1e-5)  # the next update has the same size, 1e-4


@functools.cache
def train_with_donation():
    """The donated states and the states after two steps."""
    txs, p = for_each_member(lambda m: m.make(1e-3)), matrix(tree())
    step = jax.jit(
        lambda g, states, p: for_each_member(lambda m: txs[m.name].update(g, states[m.name], p)), donate_argnums=1
    )
    given = after = jax.jit(lambda p: for_each_member(lambda m: txs[m.name].init(p)))(p)
    for _ in range(2):
        after = {name: state for name, (_, state) in step(p, after, p).items()}
    return given, after


@every_member
def test_donated_state(member):
    given, after = (x[member.name] for x in train_with_donation())
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert int(optax.tree.get_all_with_path(after, "count")[0][1]) == 2


@every_member
def test_abstract_init(member):
    params = tree()
    tx = member.make(optax.cosine_decay_schedule(1e-3, 10))
    abstract = jax.eval_shape(tx.init, params)
    for a, b in zip_leaves(abstract, tx.init(params)):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@functools.cache
def train_in_scan():
    """Parameters and states after eight steps within one scan."""
    program = family_on_schedule()

    def body(carry, g):
        params, states, _ = program.update(g, *carry)
        return (params, states), None

    stacked = jax.tree.map(lambda *x: np.stack(x), *(tree(seed) for seed in range(1, 9)))
    start = dict.fromkeys(MEMBERS, tree())
    return jax.jit(lambda p, s: jax.lax.scan(body, (p, s), stacked)[0])(start, program.init(tree()))


@every_member
def test_scan_equals_a_loop(member):
    looped, found = trained(family_on_schedule, 8)[:2], train_in_scan()
    for a, b in zip_leaves(*([part[member.name] for part in x] for x in (looped, found))):
        np.testing.assert_allclose(
            a, b, rtol=1e-6, atol=8 * 1e-8
        )  # 1 ulp a step: the scan is fused and contracted otherwise


@every_member
def test_eager_equals_jit(member):
    tx = member.make(COSINE, **member.settings, **decay_settings(member))
    only = lambda x: {"layers": [(matrix(x), None)]}
    params = only(tree())
    state = tx.init(params)
    for seed in range(1, 9):
        updates, state = tx.update(only(tree(seed)), state, params)
        params = optax.apply_updates(params, updates)
    jitted, jitted_state = (x[member.name] for x in trained(family_on_schedule, 8)[:2])
    is_moment = lambda x: isinstance(x, dict)
    jitted_state = jax.tree.map(lambda x: only(x) if is_moment(x) else x, jitted_state, is_leaf=is_moment)
    for a, b in zip_leaves((params, state), (only(jitted), jitted_state)):
        assert jax.typeof(a) == jax.typeof(b)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=8 * 1e-8)


@functools.cache
def update_two_models():
    """Updates of two models with different hyperparameters: vmapped, and one by one."""
    rates, b2s = np.float32([1e-3, 1e-2]), np.float32([0.9, 0.99])
    g = np.float32([[1.0, -2.0], [3.0, 4.0]])

    def one(rate, b2, g):
        def update(member):
            tx = member.make(rate, b2=b2)
            return tx.update(g, tx.init(g), g)[0]

        return for_each_member(update)

    alone = jax.jit(one)
    return jax.jit(jax.vmap(one))(rates, b2s, g), [alone(*x) for x in zip(rates, b2s, g, strict=True)]


@every_member
def test_vmap_over_models_and_hyperparameters(member):
    together, alone = update_two_models()
    for i in range(2):
        np.testing.assert_allclose(together[member.name][i], alone[i][member.name], rtol=1e-6)


@every_member
@pytest.mark.usefixtures("strict")
def test_strict_promotion(member):
    params = {x.__name__: jax.ShapeDtypeStruct((3, 5), x) for x in (jnp.float32, jnp.bfloat16, jnp.complex64)}
    for rate in (
        1e-3,
        lambda count: jnp.float32(1e-3),
        jnp.float32(1e-3),
    ):  # no schedules of Optax's: they promote dtypes
        tx = member.make(rate, b1=jnp.float32(0.9), b2=0.99)
        _, state = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    jax.eval_shape(lambda state, params: jadam.statistics(tx, state, params), state, params)


@functools.cache
def step_with_nan_gradients():
    """States under `optax.apply_if_finite` after a step, states after a second with NaN gradients, and its updates."""
    program = joint_step(for_each_member(lambda m: optax.apply_if_finite(m.make(1e-3), 5)))
    p = {"w": matrix(tree()), "none": None}
    params = dict.fromkeys(MEMBERS, p)
    _, states, _ = program.step(p, params, program.init(p))
    bad = {"w": np.full((3, 5), np.nan, np.float32), "none": None}
    _, after, updates = program.step(bad, params, states)
    return states, after, updates


@every_member
def test_apply_if_finite_leaves_the_state_alone(member):
    state, after, updates = (x[member.name] for x in step_with_nan_gradients())
    assert_equal(state.inner_state, after.inner_state)
    assert np.any(optax.tree.get(state.inner_state, "mu")["w"])
    np.testing.assert_array_equal(updates["w"], 0)


@functools.cache
def states_after_bad_coordinate(bad):
    """States after one step whose gradient has ``bad`` in one coordinate."""
    g = tree(1)
    values = np.array(matrix(g))
    values[0, 1] = bad
    g["layers"] = [(jnp.asarray(values), None)]
    return family_on_schedule().step(g, dict.fromkeys(MEMBERS, tree()), family_on_schedule().init(tree()))[1]


@every_member
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_stays_visible(member, bad):
    nu = np.array(matrix(optax.tree.get(states_after_bad_coordinate(bad)[member.name], "nu")))
    assert not np.isfinite(nu[0, 1])
    nu[0, 1] = 0
    assert np.isfinite(nu).all()


@functools.cache
def train_injected():
    """Five float32 steps, hyperparameters changed in between: parameters, hyperparameters' names, traces."""
    program = joint_step(for_each_member(lambda m: optax.inject_hyperparams(m.make)(learning_rate=1e-2)))
    p = matrix(tree())
    params, states = dict.fromkeys(MEMBERS, p), program.init(p)
    numeric = {name: set(state.hyperparams) for name, state in states.items()}
    for t in range(5):
        for state in states.values():
            for name, value in state.hyperparams.items():
                state.hyperparams[name] = jnp.asarray(np.asarray(value) * np.asarray(1 - 1e-3 * t, value.dtype))
        params, states, _ = program.step(matrix(tree(t + 1)), params, states)
    return params, numeric, len(program.traces)


@every_member
def test_inject_hyperparams_on_float32(member):
    params, numeric, traces = train_injected()
    assert traces == 1
    assert {"learning_rate", "b1", "b2", "eps"} <= numeric[member.name]
    assert np.isfinite(params[member.name]).all()
    assert (params[member.name] != matrix(tree())).all()


@functools.cache
def train_bf16():
    """bfloat16 parameters after five steps, with injected hyperparameters and without."""
    injected = lambda m: optax.inject_hyperparams(m.make, hyperparam_dtype=jnp.float32)(learning_rate=1e-2)
    how = {"injected": injected, "plain": lambda m: m.make(1e-2)}
    program = joint_step({(name, x): make(m) for name, m in MEMBERS.items() for x, make in how.items()})
    p = matrix(tree(dtype=jnp.bfloat16))
    params, states = dict.fromkeys(program.init(p), p), program.init(p)
    for seed in range(1, 6):
        params, states, _ = program.step(matrix(tree(seed, jnp.bfloat16)), params, states)
    return {name: [np.asarray(params[name, x], np.float32) for x in how] for name in MEMBERS}


@every_member
def test_inject_hyperparams_on_bf16(member):
    params = {"w": matrix(tree(dtype=jnp.bfloat16))}
    # Without hyperparam_dtype Optax rounds b2 to bf16(0.999) = 1.
    with pytest.raises(TypeError, match=r"b1 must be float32 or wider, got bfloat16.*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(member.make)(learning_rate=1e-2).init(params)
    # float32(0.999) changes 1 - b2 by 1.3e-5. The weights differ where that crosses a bf16 rounding threshold: by one
    # spacing, at most 2**-7 of the weight; near 0, of the largest update, 1e-2.
    np.testing.assert_allclose(*train_bf16()[member.name], rtol=2**-7, atol=1e-4)


@every_member
def test_tree_map_params_finds_the_moments(member):
    params = tree()
    tx = member.make(1e-3)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _: "moment", state, transform_non_params=lambda _: "other")
    assert jax.tree.leaves(marked).count("moment") == (len(jax.tree.leaves(state)) - 1)


SHARDING = jax.sharding.PartitionSpec("data")


@functools.cache
def train_on_devices(n):
    """Parameters and states after three steps on ``n`` devices, and the parameters' sharding."""
    mesh = jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
    sharding = jax.sharding.NamedSharding(mesh, SHARDING)
    program = joint_step(for_each_member(lambda m: m.make(1e-2)))
    p = jax.device_put(np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32), sharding)
    params, states = dict.fromkeys(MEMBERS, p), program.init(p)
    for _ in range(3):
        params, states, _ = program.step(p, params, states)
    return params, states, sharding


@every_member
def test_sharded_state_follows_the_parameters(member):
    one, _, _ = train_on_devices(1)
    eight, states, sharding = train_on_devices(8)
    assert optax.tree.get(states[member.name], "mu").sharding.is_equivalent_to(sharding, 2)
    # Shards have another shape, so XLA may contract other multiply-adds.
    np.testing.assert_allclose(one[member.name], eight[member.name], rtol=2**-22)


def test_weight_decay_mask_and_schedule():
    params = {"w": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    zero = {"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    tx = jadam.adamw(0.1, weight_decay=lambda count: 0.5 / (1 + count), mask={"w": True, "b": False})
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        updates, state = update(zero, state, params)
        np.testing.assert_allclose(updates["w"], -0.1 * 0.5 / (1 + t), rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], 0)


def test_mu_dtype():
    params = np.ones(4, np.float32)
    tx = jadam.adam(1e-3, mu_dtype=jnp.bfloat16)
    u, after = jax.jit(tx.update)(params / 3, tx.init(params), params)
    assert optax.tree.get(after, "mu").dtype == jnp.bfloat16
    assert optax.tree.get(after, "nu").dtype == jnp.float32
    np.testing.assert_allclose(u, -1e-3, rtol=1e-6)  # the direction uses m before it is rounded
