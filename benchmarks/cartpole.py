"""CartPole-v1 in JAX: the cart and pole of Barto, Sutton & Anderson 1983 with Gymnasium's constants and limits.

The functions have gymnax's interface, without its parameters. `step` resets an environment whose episode has ended.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MAX_X, MAX_ANGLE, MAX_STEPS = 2.4, math.radians(12), 500
START = 0.05  # the state starts uniformly in [-START, START]
OBSERVATIONS, ACTIONS = 4, 2


class State(NamedTuple):
    """Position and velocity of the cart, angle and angular velocity of the pole, steps since the reset."""

    x: jax.Array
    x_dot: jax.Array
    theta: jax.Array
    theta_dot: jax.Array
    time: jax.Array


def reset(key):
    """Return ``(observation, state)`` of a new episode."""
    start = jax.random.uniform(key, (OBSERVATIONS,), minval=-START, maxval=START)
    return start, State._make([*start, jnp.int32(0)])


def advance(state, action):
    """Return the state after one step of Euler's method; action 1 pushes to the right, 0 to the left."""
    x, x_dot, theta, theta_dot, time = state
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    mass = CART_MASS + POLE_MASS
    push = (FORCE * (2 * action - 1) + POLE_MASS * HALF_LENGTH * theta_dot**2 * sin) / mass
    theta_acc = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / mass))
    x_acc = push - POLE_MASS * HALF_LENGTH * theta_acc * cos / mass
    moved = x + SECONDS * x_dot, x_dot + SECONDS * x_acc, theta + SECONDS * theta_dot, theta_dot + SECONDS * theta_acc
    return State(*moved, time + 1)


def ended(state):
    """Return whether the pole fell, the cart left the track, or the time is over."""
    return (jnp.abs(state.x) > MAX_X) | (jnp.abs(state.theta) > MAX_ANGLE) | (state.time >= MAX_STEPS)


def step(key, state, action):
    """Return ``(observation, state, reward, done, info)``; if ``done``, the first two are those of a new episode."""
    state = advance(state, action)
    done = ended(state)
    observation = jnp.stack(state[:OBSERVATIONS])
    observation, state = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(key), (observation, state))
    return observation, state, jnp.float32(1), done, {}
