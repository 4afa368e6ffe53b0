"""bf16 weights with a remainder: the masters are float32 training's, bit for bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from properties import holds

import jadam
from jadam import _exact_bf16

CHAINS = {
    "adamw": lambda: jadam.adamw(1e-3),
    "optax": lambda: optax.adamw(1e-3),
    "int8": lambda: jadam.adam(1e-3, moments="int8"),
    "clip and schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), jadam.adam(optax.cosine_decay_schedule(1e-3, 1000))
    ),
}


def steps(tx, params, state, gradients):
    @jax.jit
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), gradients)[0]


@pytest.mark.parametrize("name", CHAINS)
def test_masters_are_those_of_float32(name):
    # Under jit XLA may contract a product and a sum in one program and not in the other. With jax 0.10.2 all masters
    # are equal to the bit; with jax 0.7.1 and Optax's own Adam half of them end an ulp or two off, 4.8e-7 at most,
    # which for the weights that end near 0 is more than 2e-6 of themselves. So 2e-6 is of the weights' scale.
    w = jax.random.normal(jax.random.key(0), (32, 128))
    gradients = jax.random.normal(jax.random.key(1), (1000, *w.shape)).astype(jnp.bfloat16)
    tx = jadam.exact_bf16(CHAINS[name]())
    params, state = steps(tx, *jadam.from_float32(w, tx), gradients)
    plain = CHAINS[name]()
    expected, _ = steps(plain, w, plain.init(w), gradients.astype(jnp.float32))
    assert params.dtype == jnp.bfloat16
    masters = jadam.float32_params(params, state)
    assert (jnp.abs(masters - expected) <= 2e-6 * jnp.maximum(1, jnp.abs(expected))).all()
    assert np.abs(expected - w).max() > 0.01
    np.testing.assert_array_equal(params, masters.astype(jnp.bfloat16))  # no ties in random numbers


def split(x):
    """The oracle, in integers of any size."""
    bits = np.float32(x).view(np.uint32).item()
    high = (bits + 0x8000 >> 16) & 0xFFFF
    return high, bits - (high << 16)


def test_against_numpy():
    """The whole step in NumPy: float32 masters under SGD, whose one multiplication and subtraction leave no choice."""
    rng = np.random.default_rng(0)
    master = rng.standard_normal(512).astype(np.float32)
    tx = jadam.exact_bf16(optax.sgd(2.0**-7))  # a power of two: a contracted product rounds the same
    params, state = jadam.from_float32(jnp.asarray(master), tx)
    for _ in range(1000):
        g = rng.standard_normal(512).astype(jnp.bfloat16)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        master = master + g.astype(np.float32) * np.float32(-(2.0**-7))
    np.testing.assert_array_equal(jadam.float32_params(params, state), master)
    high, rest = zip(*map(split, master), strict=True)
    np.testing.assert_array_equal(np.asarray(params).view(np.uint16), high)
    np.testing.assert_array_equal(state.remainder, rest)


SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.0e38, 3.4028235e38, -3.4028235e38, 1e-38, 1.1e-45, -1e-40, np.inf, -np.inf, np.nan]


@holds(few=300, bits=st.integers(0, 2**32 - 1))
def test_split_and_join(bits):
    x = np.uint32(bits).view(np.float32)
    p, remainder = _exact_bf16.split(jnp.asarray(x))
    joined = np.asarray(_exact_bf16.join(p, remainder))
    assert joined.view(np.uint32) == bits or (np.isnan(x) and joined.view(np.uint32) == 0x7FC00000)
    if not np.isnan(x):
        assert (np.asarray(p).view(np.uint16).item(), remainder.item()) == split(x)


@pytest.mark.parametrize("x", SPECIAL)
@pytest.mark.parametrize("outside", [0.0, -0.0, np.inf, -np.inf, np.nan])
def test_weights_set_from_outside(x, outside):
    _, rest = _exact_bf16.split(jnp.float32(x) * (1 + 2.0**-12))
    for remainder in (rest, -jnp.abs(rest)):
        joined = _exact_bf16.join(jnp.bfloat16(outside), remainder)
        assert np.isnan(joined) == np.isnan(outside)
        assert np.isnan(outside) or abs(joined - outside) < 1e-38 or joined == np.float32(outside) or abs(joined) > 3e38


@pytest.mark.parametrize("start", SPECIAL)
@pytest.mark.parametrize("end", SPECIAL)
def test_state_tells_what_apply_updates_does(start, end):
    """From anywhere to anywhere: the master is the one aimed at, or what the weight has really become."""
    tx = jadam.exact_bf16(optax.stateless(lambda updates, params: jax.tree.map(lambda u, p: u - p, updates, params)))
    params, state = jadam.from_float32(jnp.float32(start), tx)
    aim = jnp.float32(end)
    updates, state = tx.update(aim, state, params)
    params = optax.apply_updates(params, updates)
    master = jadam.float32_params(params, state)
    rounded = np.asarray(params, np.float32)
    assert np.array_equal(_exact_bf16.split(master)[0], params, equal_nan=True) or np.isinf(rounded)
    if all(np.isfinite(x) and (x == 0 or 1e-37 < abs(x) < 1e38) for x in (start, end)):
        assert master == start + (aim - np.float32(start))


def test_a_weight_that_collapses_across_zero():
    """-2**-18 - 64 is no float32: the weight lands on 0, and so does its master."""
    tx = jadam.exact_bf16(optax.identity())
    params, state = jadam.from_float32(jnp.float32(63.875), tx)
    assert params == 64
    updates, state = tx.update(jnp.float32(-63.875 - 2.0**-18), state, params)
    params = optax.apply_updates(params, updates)
    assert params == 0
    assert jadam.float32_params(params, state) == 0


def test_mixed_trees_and_keep():
    tree = {
        "w": jnp.full((2, 3), np.float32(0.1)),
        "norm": jnp.full(3, np.float32(0.1)),
        "half": jnp.ones(2, jnp.float16),
        "none": None,
    }
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    params, state = jadam.from_float32(tree, tx, keep=lambda path, leaf: "norm" in path)
    assert [params[k].dtype for k in ("w", "norm", "half")] == [jnp.bfloat16, jnp.float32, jnp.float16]
    assert [x.size for x in jax.tree.leaves(state.remainder)] == [1, 1, 6]
    jax.tree.map(np.testing.assert_array_equal, jadam.float32_params(params, state), tree)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    np.testing.assert_allclose(jadam.float32_params(params, state)["w"], 0.097, rtol=1e-6)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.float32


def test_bytes():
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    p = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    tx = jadam.adam(1e-3, moments="int8")
    version = 1
    assert (
        size(jax.eval_shape(jadam.exact_bf16(tx).init, p)) - size(jax.eval_shape(tx.init, p)) == 2 * 1024**2 + version
    )


def test_multi_steps_inside_sums_in_float32():
    # 256 gradients of 1 and 1/256: in bf16 the sum would stall at 1
    tx = jadam.exact_bf16(optax.MultiSteps(optax.sgd(1.0), 256))
    params, state = jadam.from_float32(jnp.zeros(1), tx)
    gradients = jnp.concatenate([jnp.ones((1, 1)), jnp.full((255, 1), 1 / 256)]).astype(jnp.bfloat16)
    params, state = steps(tx, params, state, gradients)
    np.testing.assert_allclose(jadam.float32_params(params, state), -(1 + 255 / 256) / 256, rtol=1e-5)


def test_apply_if_finite_inside():
    tx = jadam.exact_bf16(optax.apply_if_finite(jadam.adam(0.1), 5))
    params, state = jadam.from_float32(jnp.array([0.1]), tx)
    updates, state = tx.update(jnp.array([jnp.nan], jnp.bfloat16), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(jadam.float32_params(params, state), np.float32([0.1]))
    updates, state = tx.update(jnp.array([1.0], jnp.bfloat16), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jadam.float32_params(params, state), [0.0], atol=1e-7)


def test_not_finite_gradients_reach_the_masters():
    tx = jadam.exact_bf16(jadam.adam(0.1))
    params, state = jadam.from_float32(jnp.array([0.1, 0.1]), tx)
    updates, state = tx.update(jnp.array([jnp.nan, 1.0], jnp.bfloat16), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(jnp.isnan(jadam.float32_params(params, state)), [True, False])


def test_with_equinox():
    """``p + u`` leaves float32 parameters: the rounded masters, to be cast back before the next step."""
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    params, state = jadam.from_float32(jnp.array([0.1, -3.0]), tx)
    g = jnp.ones(2, jnp.bfloat16)
    updates, state = tx.update(g, state, params)
    loose = eqx.apply_updates(params, updates)
    assert loose.dtype == jnp.float32
    np.testing.assert_array_equal(loose, optax.apply_updates(params, updates))
    with pytest.raises(
        TypeError, match=r"(?s)params was bfloat16.*eqx.apply_updates and p .* leave float32 parameters"
    ):
        tx.update(g, state, loose)
    params = loose.astype(params.dtype)
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jadam.float32_params(params, state), [0.098, -3.002], rtol=1e-6)


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    w = jax.random.normal(jax.random.key(0), (32, 128))
    gradients = jax.random.normal(jax.random.key(1), (20, *w.shape)).astype(jnp.bfloat16)
    tx = jadam.exact_bf16(jadam.adamw(1e-3))
    expected = steps(tx, *jadam.from_float32(w, tx), gradients)
    params, state = jadam.from_float32(jax.device_put(w, sharding), tx)
    assert state.remainder.sharding == sharding
    result = steps(tx, params, state, gradients)
    jax.tree.map(np.testing.assert_array_equal, jadam.float32_params(*result), jadam.float32_params(*expected))


@pytest.mark.parametrize("make", [optax.sgd, jadam.adam])
def test_extreme_masters_stay_what_they_are(make):
    """No step, no change: at -0.0, at infinity, and between bfloat16's largest number and float32's."""
    masters = jnp.array([-0.0, 0.0, jnp.inf, -jnp.inf, 3.4e38, -3.4e38, 1.0])
    tx = jadam.exact_bf16(make(1.0))
    params, state = jadam.from_float32(masters, tx)
    for _ in range(2):
        updates, state = tx.update(jnp.zeros(7, jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(
            np.asarray(jadam.float32_params(params, state)).view(np.uint32), np.asarray(masters).view(np.uint32)
        )


def test_float32_params_of_flax_variables():
    """The state that `nnx.Optimizer` keeps is a tree of other variables than the parameters."""
    model = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jadam.exact_bf16(jadam.adam(1e-3)), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    masters = jadam.float32_params(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype(np.float32)}


def test_from_float32_leaves_others_alone():
    params = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(3, jnp.float16)}
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    narrow, state = jadam.from_float32(params, tx)
    assert [x.dtype for x in narrow.values()] == [jnp.bfloat16, jnp.bfloat16, jnp.float16]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(narrow))
