"""`jadam.exact_bf16`: bfloat16 weights and remainders hold the float32 weights of ordinary training, bit for bit."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import float32_params, update_and_apply
from hypothesis import strategies as st
from properties import property_test

import jadam
from jadam._wrappers import exact_bf16 as _exact_bf16

CHAINS = {
    "adamw": lambda: jadam.adamw(1e-3),
    "optax": lambda: optax.adamw(1e-3),
    "int8": lambda: jadam.adam(1e-3, moments="int8"),
    "clip and schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), jadam.adam(optax.cosine_decay_schedule(1e-3, 1000))
    ),
}


def step_of(tx):
    """``step(params, state, g)`` with `update_and_apply`."""
    return lambda params, state, g: update_and_apply(tx, g, state, params)


def scan_of(tx):
    """Jitted scan of all steps."""
    step = step_of(tx)
    return jax.jit(
        lambda params, state, gradients: jax.lax.scan(lambda c, g: (step(*c, g), None), (params, state), gradients)[0]
    )


def start_of(tx):
    return jax.jit(lambda params32: jadam.from_float32(params32, tx))


@functools.cache
def example():
    """Float32 weights and 1000 bfloat16 gradients."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((32, 128), np.float32), rng.standard_normal((1000, 32, 128)).astype(jnp.bfloat16)


@functools.cache
def exact(name):
    """``exact_bf16`` of `CHAINS` [name] and its jitted scan."""
    tx = jadam.exact_bf16(CHAINS[name]())
    return tx, scan_of(tx)


@functools.cache
def trained(name):
    """Parameters and state after the steps of `example`."""
    tx, scan = exact(name)
    w, gradients = example()
    return scan(*start_of(tx)(w), gradients)


@pytest.mark.parametrize("name", CHAINS)
def test_masters_equal_float32_training(name):
    # XLA may contract other products in the two programs. With jax 0.10.2 all masters are equal to the bit; with jax
    # 0.7.1 and Optax's Adam half of them end an ulp or two off, at most 4.8e-7. Hence 2e-6 of the weights' scale, 1.
    w, gradients = example()
    params, state = trained(name)
    plain = CHAINS[name]()
    expected = np.asarray(scan_of(plain)(w, plain.init(jax.device_put(w)), gradients.astype(np.float32))[0])
    assert params.dtype == jnp.bfloat16
    masters = np.asarray(float32_params(params, state))
    assert (np.abs(masters - expected) <= 2e-6 * np.maximum(1, np.abs(expected))).all()
    assert np.abs(expected - w).max() > 0.01
    np.testing.assert_array_equal(params, masters.astype(jnp.bfloat16))  # random numbers have no ties


def split_reference(x):
    """Reference for `split_reference`, in Python integers."""
    bits = np.float32(x).view(np.uint32).item()
    high = (bits + 0x8000 >> 16) & 0xFFFF
    return high, bits - (high << 16)


def test_against_numpy():
    """Bits of the masters against NumPy float32, with SGD, which has only one way to round."""
    rng = np.random.default_rng(0)
    master = rng.standard_normal(512).astype(np.float32)
    tx = jadam.exact_bf16(optax.sgd(2.0**-7))  # a power of two: the product is exact, contracted or not
    gradients = rng.standard_normal((1000, 512)).astype(jnp.bfloat16)
    params, state = scan_of(tx)(*start_of(tx)(master), gradients)
    for g in gradients:
        master = master + g.astype(np.float32) * np.float32(-(2.0**-7))
    np.testing.assert_array_equal(float32_params(params, state), master)
    high, rest = zip(*map(split_reference, master), strict=True)
    np.testing.assert_array_equal(np.asarray(params).view(np.uint16), high)
    np.testing.assert_array_equal(state.remainder, rest)


SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.0e38, 3.4028235e38, -3.4028235e38, 1e-38, 1.1e-45, -1e-40, np.inf, -np.inf, np.nan]


split_by_jax, join = jax.jit(_exact_bf16.split), jax.jit(_exact_bf16.join)


@property_test(few=300, bits=st.integers(0, 2**32 - 1))
def test_split_and_join(bits):
    x = np.uint32(bits).view(np.float32)
    p, remainder = split_by_jax(x)
    joined = np.asarray(join(p, remainder))
    assert joined.view(np.uint32) == bits or (np.isnan(x) and joined.view(np.uint32) == 0x7FC00000)
    if not np.isnan(x):
        assert (np.asarray(p).view(np.uint16).item(), remainder.item()) == split_reference(x)


def test_weights_set_from_outside():
    """A weight set by the user keeps its value, whatever the remainder."""
    pairs = [*itertools.product(SPECIAL, [0.0, -0.0, np.inf, -np.inf, np.nan])]
    x, outside = np.array(pairs, np.float32).T
    with np.errstate(over="ignore"):
        rest = np.asarray(split_by_jax(x * np.float32(1 + 2.0**-12))[1])
    for remainder in (rest, -np.abs(rest)):
        joined = np.asarray(join(outside.astype(jnp.bfloat16), remainder))
        with np.errstate(invalid="ignore"):
            kept = (np.abs(joined - outside) < 1e-38) | (joined == outside) | (np.abs(joined) > 3e38)
        right = np.where(np.isnan(outside), np.isnan(joined), kept & ~np.isnan(joined))
        assert right.all(), [pair for pair, ok in zip(pairs, right, strict=True) if not ok]


@pytest.mark.parametrize("under_jit", [False, True])
def test_state_matches_apply_updates(under_jit):
    """The state describes the weight after `apply_updates`, for updates between any two numbers."""
    tx = jadam.exact_bf16(optax.stateless(lambda updates, params: jax.tree.map(lambda u, p: u - p, updates, params)))
    pairs = [*itertools.product(SPECIAL, SPECIAL)]
    start, end = np.array(pairs, np.float32).T
    params, state = start_of(tx)(start)
    params, state = (jax.jit if under_jit else lambda f: f)(step_of(tx))(params, state, jax.device_put(end))
    master = np.asarray(float32_params(params, state))
    rounded = np.asarray(split_by_jax(master)[0])
    same = (rounded == params) | (np.isnan(rounded) & np.isnan(params)) | np.isinf(np.float32(params))
    assert same.all(), [pair for pair, ok in zip(pairs, same, strict=True) if not ok]
    with np.errstate(invalid="ignore", over="ignore"):
        reached = master == start + (end - start)
    ordinary = [all(np.isfinite(x) and (x == 0 or 1e-37 < abs(x) < 1e38) for x in pair) for pair in pairs]
    assert reached[ordinary].all(), [x for x, ok, y in zip(pairs, reached, ordinary, strict=True) if y and not ok]


def test_a_weight_that_rounds_to_zero():
    """-2**-18 - 64 is not a float32, so the weight becomes 0; then the master must be 0 too."""
    tx = jadam.exact_bf16(optax.identity())
    params, state = start_of(tx)(np.float32(63.875))
    assert params == 64
    params, state = jax.jit(step_of(tx))(params, state, np.float32(-63.875 - 2.0**-18))
    assert params == 0
    assert float32_params(params, state) == 0


def test_mixed_trees_and_keep():
    tree = {
        "w": jax.device_put(np.full((2, 3), 0.1, np.float32)),
        "norm": jax.device_put(np.full(3, 0.1, np.float32)),
        "half": jax.device_put(np.ones(2, np.float16)),
        "none": None,
    }
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    params, state = jadam.from_float32(tree, tx, keep=lambda path, leaf: "norm" in path)
    assert [params[k].dtype for k in ("w", "norm", "half")] == [jnp.bfloat16, jnp.float32, jnp.float16]
    assert [x.size for x in jax.tree.leaves(state.remainder)] == [1, 1, 6]
    jax.tree.map(np.testing.assert_array_equal, jadam.float32_params(params, state), tree)
    step = jax.jit(step_of(tx))
    for _ in range(3):
        params, state = step(params, state, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params))
    assert step._cache_size() == 1
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


def test_multi_steps_accumulates_in_float32():
    # gradients 1, then 255 of 1/256: a bfloat16 sum would stall at 1
    tx = jadam.exact_bf16(optax.MultiSteps(optax.sgd(1.0), 256))
    gradients = np.array([[1.0], *[[1 / 256]] * 255], jnp.bfloat16)
    params, state = scan_of(tx)(*start_of(tx)(np.zeros(1, np.float32)), gradients)
    np.testing.assert_allclose(float32_params(params, state), -(1 + 255 / 256) / 256, rtol=1e-5)


def test_apply_if_finite_inside():
    tx = jadam.exact_bf16(optax.apply_if_finite(jadam.adam(0.1), 5))
    step = jax.jit(step_of(tx))
    params, state = step(*start_of(tx)(np.float32([0.1])), np.array([np.nan], jnp.bfloat16))
    np.testing.assert_array_equal(float32_params(params, state), np.float32([0.1]))
    params, state = step(params, state, np.array([1.0], jnp.bfloat16))
    np.testing.assert_allclose(float32_params(params, state), [0.0], atol=1e-7)


def test_not_finite_gradients_reach_the_masters():
    tx = jadam.exact_bf16(jadam.adam(0.1))
    params, state = jax.jit(step_of(tx))(*start_of(tx)(np.float32([0.1, 0.1])), np.array([np.nan, 1.0], jnp.bfloat16))
    np.testing.assert_array_equal(np.isnan(float32_params(params, state)), [True, False])


def test_with_equinox():
    """`eqx.apply_updates` returns float32 parameters, which must be cast back before the next step."""
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    update = jax.jit(tx.update)
    params, state = start_of(tx)(np.float32([0.1, -3.0]))
    g = np.ones(2, jnp.bfloat16)
    updates, state = update(g, state, params)
    loose = eqx.apply_updates(params, updates)
    assert loose.dtype == jnp.float32
    np.testing.assert_array_equal(loose, optax.apply_updates(params, updates))
    with pytest.raises(
        TypeError, match=r"(?s)params was bfloat16.*eqx.apply_updates and p .* leave float32 parameters"
    ):
        tx.update(g, state, loose)
    params = loose.astype(params.dtype)
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(float32_params(params, state), [0.098, -3.002], rtol=1e-6)


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    w, gradients = example()
    tx, scan = exact("adamw")
    params, state = jadam.from_float32(jax.device_put(w, sharding), tx)
    assert state.remainder.sharding == sharding
    result = scan(params, state, gradients)
    jax.tree.map(np.testing.assert_array_equal, float32_params(*result), float32_params(*trained("adamw")))


@pytest.mark.parametrize("make", [optax.sgd, jadam.adam])
def test_zero_updates_keep_extreme_masters(make):
    """Zero updates change no bit: of -0.0, infinity, and numbers between bfloat16's and float32's maximum."""
    masters = np.float32([-0.0, 0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1.0])
    tx = jadam.exact_bf16(make(1.0))
    step = jax.jit(step_of(tx))
    params, state = start_of(tx)(masters)
    for _ in range(2):
        params, state = step(params, state, np.zeros(7, jnp.bfloat16))
        np.testing.assert_array_equal(
            np.asarray(float32_params(params, state)).view(np.uint32), masters.view(np.uint32)
        )


def test_float32_params_of_flax_variables():
    """`float32_params` accepts the state of `nnx.Optimizer`, whose leaves are variables of another class."""
    model = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jadam.exact_bf16(jadam.adam(1e-3)), wrt=nnx.Param)
    nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))(model, optimizer)
    masters = float32_params(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype(np.float32)}


def test_from_float32_keeps_other_dtypes():
    dtypes = {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.float16}
    params = {k: jax.device_put(np.ones((2, 3), dtype)) for k, dtype in dtypes.items()}
    tx = jadam.exact_bf16(jadam.adam(1e-3))
    narrow, state = jadam.from_float32(params, tx)
    assert [x.dtype for x in narrow.values()] == [jnp.bfloat16, jnp.bfloat16, jnp.float16]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(narrow))
