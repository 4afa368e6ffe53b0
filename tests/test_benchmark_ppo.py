"""The benchmark `ppo`: its environment, its advantages, and short trainings with Optax and with `jadam.step`."""

import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT

sys.path.append(str(ROOT))  # behind an installed jadam

from benchmarks import cartpole, ppo

ULP = 2.0**-23  # the spacing of float32 numbers in [1, 2)


def cartpole_step(state, action):
    """CartPole's equations as Gymnasium has them, in float64."""
    x, x_dot, theta, theta_dot = state
    force = 10.0 if action == 1 else -10.0
    temp = (force + 0.05 * theta_dot**2 * math.sin(theta)) / 1.1
    theta_acc = (9.8 * math.sin(theta) - math.cos(theta) * temp) / (
        0.5 * (4.0 / 3.0 - 0.1 * math.cos(theta) ** 2 / 1.1)
    )
    x_acc = temp - 0.05 * theta_acc * math.cos(theta) / 1.1
    return np.array([x + 0.02 * x_dot, x_dot + 0.02 * x_acc, theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc])


def state_of(values, time=0):
    return cartpole.State._make([*jnp.asarray(values, jnp.float32), jnp.int32(time)])


def test_the_dynamics_are_gymnasiums():
    rng, advance = np.random.default_rng(0), jax.jit(cartpole.advance)
    for action in (0, 1):
        for values in rng.uniform([-2.4, -3, -0.2, -3], [2.4, 3, 0.2, 3], (20, 4)).astype(np.float32):
            found = np.array(advance(state_of(values), action)[:4])
            # A dozen roundings in the accelerations, which are below 32 and are multiplied by 0.02, then one of a sum
            # below 4. Intermediate results are below 32, too.
            np.testing.assert_allclose(
                found, cartpole_step(values.astype(float), action), rtol=0, atol=12 * 32 * ULP * 0.02 + 4 * ULP
            )


def test_a_new_episode_starts_near_zero():
    observation, state = cartpole.reset(jax.random.key(0))
    assert state.time == 0
    np.testing.assert_array_equal(observation, jnp.stack(state[:4]))
    assert 0 < np.abs(observation).max() <= 0.05
    assert len(set(np.array(observation).tolist())) == 4


def test_an_episode_ends_and_the_next_one_starts():
    cases = [  # state, time, done
        ([0, 0, 0, 0], 0, False),
        ([0, 0, 0, 0], 498, False),
        ([0, 0, 0, 0], 499, True),  # the 500th step
        ([2.39, 1, 0, 0], 0, True),
        ([-2.39, -1, 0, 0], 0, True),
        ([2.39, -1, 0, 0], 0, False),
        ([0, 0, 0.2, 1], 0, True),
        ([0, 0, -0.2, -1], 0, True),
        ([0, 0, 0.2, -1], 0, False),
    ]
    key, step = jax.random.key(1), jax.jit(cartpole.step)
    for values, time, expected in cases:
        observation, state, reward, done, _ = step(key, state_of(values, time), 1)
        assert (done, reward) == (expected, 1)
        np.testing.assert_array_equal(observation, jnp.stack(state[:4]))
        if done:
            np.testing.assert_array_equal(jnp.stack(state), jnp.stack(cartpole.reset(key)[1]))
        else:
            assert state.time == time + 1


@pytest.mark.parametrize("ends", [[False], [True], [False, False], [True, False], [False, True]])
def test_gymnax_has_one_or_two_ends_of_an_episode(ends, monkeypatch):
    env = SimpleNamespace(step=lambda *_: ("observation", "state", 1.0, *map(jnp.asarray, ends), {}))
    monkeypatch.setitem(sys.modules, "gymnax", SimpleNamespace(make=lambda name: (env, "params")))
    monkeypatch.setattr(ppo.importlib.metadata, "version", lambda name: "0")
    _, step, name = ppo.environment()
    assert name == "gymnax 0"
    observation, state, reward, done, _ = step(None, None, 0)
    assert (observation, state, reward, bool(done)) == ("observation", "state", 1.0, any(ends))


def test_advantages_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    steps, envs = 30, 3
    rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
    dones, last = rng.random((steps, envs)) < 0.1, rng.normal(size=envs).astype(np.float32)
    assert dones.any()
    expected, following, advantage = np.zeros((steps, envs)), last.astype(float), np.zeros(envs)
    for t in reversed(range(steps)):
        error = rewards[t] + 0.99 * following * ~dones[t] - values[t]
        expected[t] = advantage = error + 0.99 * 0.95 * ~dones[t] * advantage
        following = values[t].astype(float)
    found = ppo.advantages(*map(jnp.asarray, (rewards, values, dones, last)))
    # Each step adds at most 6 roundings of numbers below 16, and multiplies the earlier ones by 0.94: 1 / 0.06 < 17.
    assert np.abs(expected).max() < 16
    np.testing.assert_allclose(found, expected, rtol=0, atol=17 * 6 * 16 * ULP)


def trained(name, updates, programs_compiled):
    """Parameters and mean returns of a training, which is one program."""
    tx, make_step = ppo.sides(updates)[name]
    train, key = jax.jit(ppo.trainer(tx, make_step, updates, 4)), jax.random.key(0)
    before = programs_compiled()
    params, returns = train(key)
    assert programs_compiled() == before + 1
    return params, ppo.mean_returns(*returns)


def test_the_first_steps_agree(monkeypatch, programs_compiled):
    """With one minibatch and epoch an update is one step, which all sides take from the same gradient."""
    for name, value in (("EPOCHS", 1), ("MINIBATCHES", 1), ("POINTS", 1), ("RATE", 1.0), ("EPS", 1.0)):
        monkeypatch.setattr(ppo, name, value)
    (optax_params, optax_return), (params, mean_return) = (
        trained(name, 1, programs_compiled) for name in ("Optax", "jadam.step")
    )
    assert mean_return == optax_return
    start = jax.jit(lambda key: ppo.init(jax.random.split(key, 3)[0]))(jax.random.key(0))
    for old, a, b in zip(*map(jax.tree.leaves, (start, optax_params, params)), strict=True):
        # The programs differ in their fusions, so the elements of a gradient may differ by some roundings of its
        # largest, here 100. A step is g / (|g| + 1): its slope is at most 1, and |g| is at most twice a step up to 0.5.
        # Parameters are below 2 and rounded once by each side.
        step = np.abs(np.asarray(a) - old).max()
        assert 4 * ULP < step < 0.5
        np.testing.assert_allclose(a, b, rtol=0, atol=200 * ULP * step + ULP)


@pytest.mark.slow
def test_training_learns(monkeypatch, programs_compiled):
    monkeypatch.setattr(ppo, "POINTS", 4)
    _, returns = trained("jadam.step", 60, programs_compiled)
    assert returns[-1] > 3 * returns[0] > 0, returns
