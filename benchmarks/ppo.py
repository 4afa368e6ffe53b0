"""Environment steps per second of PPO on CartPole with Optax and with `jadam.step`: Adam on a very small network.

Proximal Policy Optimization (Schulman et al. 2017) with the settings of PureJaxRL. A whole training is one compiled
program. All sides have the same seed and take turns in one process; compile time is apart.

The networks have 9,155 parameters. With 4 environments, as for CartPole in PureJaxRL, an operation takes about a
microsecond, less than XLA needs on a CPU to hand it to another thread. Whether it does depends on the operations of the
innermost loop, and changes the speed of all others: the side without Adam, which has the least to compute, shows this.
So one case has a process in which XLA has one thread. With 64 environments the operations are larger.
"""

import importlib.metadata
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from benchmarks import cartpole
from benchmarks.gpu_sides import one_pass, update_and_apply
from benchmarks.speed import in_fresh_process

ROUNDS = 3
CPU_CASES = {  # environments, XLA's threads or None for its default
    "4 environments": (4, None),
    "4 environments, one thread": (4, 1),
    "64 environments": (64, None),
}
GPU_CASES = {"4 environments": (4, None), "64 environments": (64, None)}
ENV_STEPS, QUICK_ENV_STEPS = 500_000, 100_000
ROLLOUT, EPOCHS, MINIBATCHES = 128, 4, 4
RATE, EPS, MAX_NORM = 2.5e-4, 1e-5, 0.5
DISCOUNT, TRACE_DECAY = 0.99, 0.95  # gamma and lambda of generalized advantage estimation
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.01
HIDDEN = 64
POINTS = 50  # of the curve of returns
WITHOUT_KERNEL = "jadam.step, JADAM_KERNELS=xla"


def environment():
    """Return ``reset(key)`` and ``step(key, state, action)`` of CartPole, and where they are from."""
    try:
        import gymnax
    except ImportError:
        return cartpole.reset, cartpole.step, "benchmarks.cartpole"
    env, params = gymnax.make("CartPole-v1")
    reset = lambda key: env.reset(key, params)

    def step(key, state, action):
        observation, state, reward, *done, info = env.step(key, state, action, params)
        return observation, state, reward, sum(done) > 0, info  # from gymnax 1.0 on: terminated, truncated

    return reset, step, f"gymnax {importlib.metadata.version('gymnax')}"


def sides(updates):
    """Return ``{name: (optimizer, function that makes its step)}``; the learning rate falls to 0 over the training."""
    rate = lambda count: RATE * (1 - count // (EPOCHS * MINIBATCHES) / updates)
    adam = lambda package: package.chain(package.clip_by_global_norm(MAX_NORM), package.adam(rate, eps=EPS))
    return {
        "Optax": (adam(optax), update_and_apply),
        "jadam.step": (adam(jadam), one_pass),
        WITHOUT_KERNEL: (adam(jadam), one_pass),
        "no Adam": (optax.sgd(RATE), update_and_apply),
    }


def init(key):
    """Return the parameters of the actor and the critic, two layers of `HIDDEN` units each."""

    def network(key, outputs, scale):
        widths, scales = (cartpole.OBSERVATIONS, HIDDEN, HIDDEN, outputs), (2**0.5, 2**0.5, scale)
        layers = zip(jax.random.split(key, 3), scales, widths[:-1], widths[1:], strict=True)
        return [
            (jax.nn.initializers.orthogonal(scale)(key, shape), jnp.zeros(shape[1])) for key, scale, *shape in layers
        ]

    actor, critic = jax.random.split(key)
    return {"actor": network(actor, cartpole.ACTIONS, 0.01), "critic": network(critic, 1, 1.0)}


def apply(layers, x):
    """Return the output of a network with tanh after each hidden layer."""
    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = layers[-1]
    return x @ w + b


class Batch(NamedTuple):
    """What `loss` needs of each time step."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array


def advantages(rewards, values, dones, last_value):
    """Return the generalized advantage estimates of Schulman et al. 2016; the first axis is time."""

    def back(carry, now):
        advantage, next_value = carry
        reward, value, done = now
        error = reward + DISCOUNT * next_value * (1 - done) - value
        advantage = error + DISCOUNT * TRACE_DECAY * (1 - done) * advantage
        return (advantage, value), advantage

    start = jnp.zeros_like(last_value), last_value
    return jax.lax.scan(back, start, (rewards, values, dones), reverse=True)[1]


def loss(params, batch):
    """Return the clipped objective of PPO with the clipped value loss and the entropy bonus."""
    log_probs = jax.nn.log_softmax(apply(params["actor"], batch.observation))
    value = apply(params["critic"], batch.observation)[:, 0]
    log_prob = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    gain = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    policy_loss = -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * gain).mean()
    target = batch.value + batch.advantage
    clipped = batch.value + jnp.clip(value - batch.value, -CLIP, CLIP)
    value_loss = jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean() / 2
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * entropy


def trainer(tx, make_step, updates, num_envs):
    """Return the function ``key -> (parameters, (sum of returns, number of episodes))`` of a whole training.

    Both arrays have an entry per update, for the episodes that ended in it.
    """
    reset, env_step, _ = environment()
    optimizer_step = make_step(tx)

    def rollout(params, envs, key):
        def act(envs, key):
            state, observation, total = envs
            action_key, step_key = jax.random.split(key)
            log_probs = jax.nn.log_softmax(apply(params["actor"], observation))
            value = apply(params["critic"], observation)[:, 0]
            action = jax.random.categorical(action_key, log_probs)
            log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]
            step_keys = jax.random.split(step_key, num_envs)
            next_observation, state, reward, done, _ = jax.vmap(env_step)(step_keys, state, action)
            total = total + reward
            out = observation, action, log_prob, value, reward, done, total
            return (state, next_observation, jnp.where(done, 0, total)), out

        return jax.lax.scan(act, envs, jax.random.split(key, ROLLOUT))

    def minibatch(carry, batch):
        params, state = carry
        return optimizer_step(params, state, jax.grad(loss)(params, batch)), None

    def update(carry, key):
        learner, envs = carry
        rollout_key, *epoch_keys = jax.random.split(key, 1 + EPOCHS)
        envs, out = rollout(learner[0], envs, rollout_key)
        observation, action, log_prob, value, reward, done, total = out
        last_value = apply(learner[0]["critic"], envs[1])[:, 0]
        batch = Batch(observation, action, log_prob, value, advantages(reward, value, done, last_value))
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

        def epoch(learner, key):
            order = jax.random.permutation(key, num_envs * ROLLOUT).reshape(MINIBATCHES, -1)
            return jax.lax.scan(minibatch, learner, jax.tree.map(lambda x: x[order], batch))

        learner, _ = jax.lax.scan(epoch, learner, jnp.stack(epoch_keys))
        return (learner, envs), (jnp.sum(total * done), jnp.sum(done))

    def train(key):
        init_key, reset_key, updates_key = jax.random.split(key, 3)
        observation, state = jax.vmap(reset)(jax.random.split(reset_key, num_envs))
        params = init(init_key)
        carry = (params, tx.init(params)), (state, observation, jnp.zeros(num_envs))
        ((params, _), _), returns = jax.lax.scan(update, carry, jax.random.split(updates_key, updates))
        return params, returns

    return train


def mean_returns(returns, episodes):
    """Return the mean return of the episodes that ended in each of `POINTS` equal parts of the training."""
    parts = zip(*(np.array_split(x, POINTS) for x in (returns, episodes)), strict=True)
    return [round(float(total.sum() / max(1, count.sum())), 1) for total, count in parts]


def measure(env_steps: int, num_envs: int, threads: int | None, description: str) -> dict[str, dict]:
    """Return the results of every side; ``threads`` of XLA must be None if JAX's backend has started."""
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    updates = env_steps // (num_envs * ROLLOUT)
    key, programs, rows = jax.random.key(0), {}, {}
    console = Console(stderr=True)  # standard output is the result
    for name, (tx, make_step) in track(sides(updates).items(), f"ppo: {description}: compiling", console=console):
        os.environ["JADAM_KERNELS"] = "xla" if name == WITHOUT_KERNEL else ""  # read when a step is compiled
        start = time.perf_counter()
        programs[name] = jax.jit(trainer(tx, make_step, updates, num_envs)).lower(key).compile()
        rows[name] = {"compile seconds": round(time.perf_counter() - start, 2)}
    speeds = {name: [] for name in programs}
    for i in track(range(ROUNDS), f"ppo: {description}: training", console=console):
        for name in [*programs][:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            _, returns = jax.block_until_ready(programs[name](key))
            speeds[name].append(updates * num_envs * ROLLOUT / (time.perf_counter() - start))
            rows[name]["returns"] = mean_returns(*returns)
    for name, speed in speeds.items():
        ratios = [a / b for a, b in zip(speed, speeds["Optax"], strict=True)]
        rows[name] |= {
            "environment steps per second": round(statistics.median(speed)),
            "over Optax": [round(f(ratios), 3) for f in (statistics.median, min, max)],
            "final return": round(statistics.mean(rows[name]["returns"][-POINTS // 10 :]), 1),
        }
    return rows


def run(options) -> dict:
    """Train with every side, draw a picture, and return the results."""
    env_steps = QUICK_ENV_STEPS if options.quick else ENV_STEPS
    cases = {}
    for name, (num_envs, threads) in (CPU_CASES if jax.default_backend() == "cpu" else GPU_CASES).items():
        arguments = env_steps, num_envs, threads, name
        fresh = jax.default_backend() == "cpu"
        cases[name] = in_fresh_process(__name__, "measure", *arguments) if fresh else measure(*arguments)
        show(name, cases[name])
    if options.quick:
        return {}
    draw(cases, env_steps)
    return {"environment": environment()[2], "environment steps": env_steps, "rounds": ROUNDS, "cases": cases}


def show(case, rows):
    """Print a row for each side."""
    table = Table("", "env steps/s", "over Optax", "(least, most)", "final return", "compile, s", title=f"ppo: {case}")
    for name, row in rows.items():
        ratio, *extremes = row["over Optax"]
        cells = row["environment steps per second"], ratio, tuple(extremes), row["final return"], row["compile seconds"]
        table.add_row(name, *map(str, cells))
    Console().print(table)


def draw(cases, env_steps):
    """Draw the mean return over environment steps, with the speeds of the first case."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    case, rows = next(iter(cases.items()))
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    colors = ("#999999", "#e69f00", "#0072b2", "#000000")  # Okabe & Ito's
    styles = zip(rows.items(), colors, (4, 2, 1.2, 1), ("-", "-", "--", ":"), strict=True)
    for (name, row), color, width, line in styles:
        speed = f"{row['environment steps per second']:,} steps/s"
        x = env_steps * (np.arange(POINTS) + 0.5) / POINTS
        axis.plot(x, row["returns"], line, color=color, lw=width, label=f"{name}: {speed}")
    axis.set(title=f"PPO on CartPole, {case}", xlabel="environment steps", ylabel="mean episode return", ylim=(0, None))
    axis.legend(loc="lower right")
    figure.savefig(Path(__file__).parent / "results" / "ppo.png", dpi=110)
    pyplot.close(figure)
