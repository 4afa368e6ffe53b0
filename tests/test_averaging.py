"""Averages of the parameters: the loop, the dtypes, the wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam


def run(tx, params, gradients):
    state = tx.init(params)
    step = jax.jit(lambda g, p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    path = []
    for g in gradients:
        params, state = step(g, params, state)
        path.append(np.asarray(params, np.float64))
    return path, state


def gradients(steps=50, dtype=np.float32):
    return [jnp.asarray(g, dtype) for g in np.random.default_rng(0).standard_normal((steps, 7))]


@pytest.mark.parametrize("decay", [None, 0.0, 0.9, 0.999, jnp.float32(0.9)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_average_of_what_was_trained(decay, dtype):
    tx = optax.chain(jadam.adam(0.1), jadam.average_params(decay))
    path, state = run(tx, jnp.ones(7, dtype), gradients(dtype=dtype))
    weights = np.ones(50) if decay is None else (1 - float(decay)) * float(decay) ** np.arange(49, -1, -1.0)
    expected = (weights[:, None] * np.array(path)).sum(0) / weights.sum()
    average = jadam.averaged_params(state)
    assert average.dtype == dtype
    # In float32: 50 roundings of values up to 5 as a random walk, and the float32 weights; then the dtype's own.
    spacing = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(average, np.float64), expected, rtol=spacing, atol=3e-6)
    stored = state[-1].average
    assert stored.dtype == jnp.float32
    np.testing.assert_allclose(stored, expected, atol=3e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay", [None, 0.99])
def test_float64(decay):
    tx = optax.chain(jadam.adam(0.1), jadam.average_params(decay))
    path, state = run(tx, jnp.ones(7, np.float64), gradients(dtype=np.float64))
    weights = np.ones(50) if decay is None else decay ** np.arange(49, -1, -1.0)
    expected = (weights[:, None] * np.array(path)).sum(0) / weights.sum()
    np.testing.assert_allclose(jadam.averaged_params(state), expected, rtol=0, atol=1e-12)


def test_before_the_first_step_it_is_the_parameters():
    params = {"w": jnp.arange(3.0), "b": None, "s": jnp.float32(2), "e": jnp.zeros((0, 2))}
    state = jadam.average_params().init(params)
    for a, b in zip(jax.tree.leaves(jadam.averaged_params(state)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    ],
)
def test_found_anywhere(wrap):
    tx = wrap(optax.chain(jadam.adamw(0.1), jadam.average_params(0.9)))
    path, state = run(tx, jnp.ones(7), gradients(4))
    average = jadam.averaged_params(state)
    assert average.shape == (7,)
    assert not np.array_equal(average, path[-1])


def test_donated_parameters_and_state():
    params = jnp.ones(3)
    tx = optax.chain(jadam.adam(0.1), jadam.average_params())
    step = jax.jit(lambda g, p, s: tx.update(g, s, p), donate_argnums=(1, 2))
    _, state = step(jnp.ones(3), params, tx.init(params))
    jax.block_until_ready(state)


def test_structure_is_a_fixed_point_under_scan_and_one_trace():
    tx = optax.chain(jadam.adam(0.1), jadam.average_params(0.9))
    params = jnp.ones(7)

    def body(carry, g):
        p, state = carry
        u, state = tx.update(g, state, p)
        return (optax.apply_updates(p, u), state), None

    (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.stack(gradients()))
    assert state[-1].count == 50
