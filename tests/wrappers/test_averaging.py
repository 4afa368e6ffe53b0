"""`jadam.average_params`: values, dtypes, and use within wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_equal

import jadam


def run(rows, params, gradients):
    """Parameters at each step and last states of all of ``{name: tx}``, from one scan.

    ``params`` and ``gradients`` are keyed by the same names.
    """

    def body(carry, g):
        params, states = carry
        found = {name: tx.update(g[name], states[name], params[name]) for name, tx in rows.items()}
        params = {name: optax.apply_updates(params[name], u) for name, (u, _) in found.items()}
        return (params, {name: state for name, (_, state) in found.items()}), params

    def whole(params, gradients):
        start = params, {name: tx.init(params[name]) for name, tx in rows.items()}
        (_, states), path = jax.lax.scan(body, start, gradients)
        return path, states

    return jax.jit(whole)(params, gradients)


def gradients(steps=50, dtype=np.float32):
    return np.random.default_rng(0).standard_normal((steps, 7)).astype(dtype)


DECAYS = {"None": None, "0.0": 0.0, "0.9": 0.9, "0.999": 0.999, "an array": jnp.float32(0.9)}
DTYPES = {x.__name__: x for x in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)}


@functools.cache
def averaged(dtypes, decays):
    """``{(dtype, decay): (parameters at each step, state, average)}``."""
    pairs = [(dtype, decay) for dtype in dtypes for decay in decays]
    txs = {pair: optax.chain(jadam.adam(0.1), jadam.average_params(DECAYS[pair[1]])) for pair in pairs}
    params = {pair: np.ones(7, DTYPES[pair[0]]) for pair in pairs}
    path, states = run(txs, params, {pair: gradients(dtype=DTYPES[pair[0]]) for pair in pairs})
    average = jax.jit(lambda states: {pair: jadam.averaged_params(x) for pair, x in states.items()})(states)
    return {pair: (np.asarray(path[pair], np.float64), states[pair], average[pair]) for pair in pairs}


def expected(path, decay):
    weights = np.ones(50) if decay is None else (1 - float(decay)) * float(decay) ** np.arange(49, -1, -1.0)
    return (weights[:, None] * path).sum(0) / weights.sum()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_average(decay, dtype):
    path, state, average = averaged(("float32", "bfloat16", "float16"), tuple(DECAYS))[dtype, decay]
    assert average.dtype == DTYPES[dtype]
    # 50 float32 roundings of values up to 5, as a random walk, and those of the weights; then one of the dtype.
    spacing = float(jnp.finfo(DTYPES[dtype]).eps)
    wanted = expected(path, DECAYS[decay])
    np.testing.assert_allclose(np.asarray(average, np.float64), wanted, rtol=spacing, atol=3e-6)
    stored = state[-1].average
    assert stored.dtype == jnp.float32
    np.testing.assert_allclose(stored, wanted, atol=3e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay", ["None", "0.999"])
def test_float64(decay):
    path, _, average = averaged(("float64",), ("None", "0.999"))["float64", decay]
    np.testing.assert_allclose(average, expected(path, DECAYS[decay]), rtol=0, atol=1e-12)


def test_before_the_first_step():
    params = {"w": np.arange(3, dtype=np.float32), "b": None, "s": np.float32(2), "e": np.zeros((0, 2), np.float32)}
    state = jadam.average_params().init(params)
    assert_equal(jadam.averaged_params(state), params)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, True),
    "named_chain": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
}


@functools.cache
def wrapped():
    """Parameters at each of four steps, and states, by wrapper."""
    txs = {name: wrap(optax.chain(jadam.adamw(0.1), jadam.average_params(0.9))) for name, wrap in WRAPPERS.items()}
    same = lambda x: dict.fromkeys(txs, x)
    return run(txs, same(np.ones(7, np.float32)), same(gradients(4)))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_found_within_wrappers(wrap):
    path, states = wrapped()
    average = jadam.averaged_params(states[wrap])
    assert average.shape == (7,)
    assert not np.array_equal(average, path[wrap][-1])


def test_donated_parameters_and_state():
    params = jnp.asarray(np.ones(3, np.float32))
    tx = optax.chain(jadam.adam(0.1), jadam.average_params())
    step = jax.jit(lambda g, p, s: tx.update(g, s, p), donate_argnums=(1, 2))
    _, state = step(np.ones(3, np.float32), params, tx.init(params))
    jax.block_until_ready(state)


def test_structure_is_a_fixed_point_under_scan_and_one_trace():
    _, state, _ = averaged(("float32", "bfloat16", "float16"), tuple(DECAYS))["float32", "0.9"]
    assert state[-1].count == 50
