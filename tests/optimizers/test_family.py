"""Every optimizer and option against its oracle in float64, and against PyTorch's trajectories."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from family import FAMILY, MOMENTS, VARIANTS
from helpers import MEMBERS
from programs import torch_trajectories

import jadam
from jadam._core import numerics
from jadam._optimizers import radam as _radam

TORCH = np.load(torch_trajectories.FILE)


def normal(steps=60, coordinates=50, dtype=np.float32):
    return np.random.default_rng(1).standard_normal((steps, coordinates)).astype(dtype)


# {id: (member, settings, oracle)}. Tolerance 1e-6: ten float32 roundings, 2**-24 each, of directions up to 4.
DEFAULTS = {f"{m.name} defaults": (m.name, {}, m.oracle) for m in FAMILY}
SETTINGS = {f"{m.name} settings": (m.name, m.settings, functools.partial(m.oracle, **m.settings)) for m in FAMILY}
OPTIONS = {
    " ".join([name, *(x for x, value in settings.items() if value != MOMENTS.get(x))]): (name, settings, expected)
    for name, settings, expected in VARIANTS
}
LOOPS = SETTINGS | DEFAULTS | OPTIONS

SCHEDULES = {
    "theorem 4.1": (lambda t: 0.9 * 0.99**t, lambda t: 0.999),
    "both": (lambda t: 0.5 + 0.3 * 0.9**t, lambda t: 1 - 0.5 / (t + 2.0)),
    "from zero": (lambda t: 0.0 * t, lambda t: 0.95 + 0.0 * t),
}


def momentum(t):
    return 0.9 * (1 - 0.5 * 0.96 ** (t / 10))


def scan(txs, gradients, params):
    """Updates and parameters at each step, for all of ``{name: tx}``, in one program."""

    def body(carry, g):
        params, states = carry
        found = {name: tx.update(g, states[name], params[name]) for name, tx in txs.items()}
        updates, states = ({name: x[i] for name, x in found.items()} for i in range(2))
        params = {name: optax.apply_updates(params[name], u) for name, u in updates.items()}
        return (params, states), (updates, params)

    def run(params, gradients):
        start = dict.fromkeys(txs, params), {name: tx.init(params) for name, tx in txs.items()}
        return jax.lax.scan(body, start, gradients)[1]

    return jax.device_get(jax.jit(run)(params, gradients))


@functools.cache
def directions(dtype):
    """``{id: directions}`` for `LOOPS`, `SCHEDULES` and NAdam with a scheduled momentum."""
    no_decay = lambda member: {"weight_decay": 0.0} if member.decays else {}
    make = lambda member, settings: member.make(1.0, **settings, **no_decay(member))
    txs = {row: make(MEMBERS[name], settings) for row, (name, settings, _) in LOOPS.items()}
    txs |= {row: jadam.adam(1.0, b1=b1, b2=b2) for row, (b1, b2) in SCHEDULES.items()}
    txs["momentum"] = jadam.nadam(1.0, b1=momentum)
    gradients = normal(dtype=dtype)
    updates, _ = scan(txs, gradients, np.zeros_like(gradients[0]))
    return {name: -u for name, u in updates.items()}


@pytest.mark.parametrize("row", LOOPS)
def test_direction_matches_the_oracle(row):
    expected = LOOPS[row][-1](list(normal()))
    np.testing.assert_allclose(directions(np.float32)[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", LOOPS)
def test_direction_matches_the_oracle_in_float64(row):
    expected = LOOPS[row][-1](list(normal(dtype=np.float64)))
    np.testing.assert_allclose(directions(np.float64)[row], expected, rtol=0, atol=1e-12)


def test_the_oracles_differ():
    # The tolerance tells the oracles apart: no two different ones are within it.
    gradients = list(normal())
    rows = [*SETTINGS.values(), *DEFAULTS.values(), *VARIANTS[:2]]
    loops = {str(expected): np.array(expected(gradients)) for _, _, expected in rows}
    values = list(loops.values())
    distinct = {}
    for i, a in enumerate(values):
        if not any(np.allclose(a, b, rtol=1e-6, atol=1e-6) for b in distinct.values()):
            distinct[i] = a
    # An optimizer and its ...w share an oracle: each oracle with 2 settings, and 2 variants.
    assert len(distinct) == 2 * len({member.oracle for member in FAMILY}) + 2


def as_float32(schedule):
    """The schedule with its values rounded to float32, as a traced schedule gives them, for the oracle."""
    if isinstance(schedule(np.arange(2)), float):  # a constant, which stays a Python number
        return schedule
    values = jax.jit(lambda t: jax.lax.map(schedule, t))(np.arange(100, dtype=np.int32))
    return lambda t: float(values[t])


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduled_betas_are_corrected_by_their_product(name):
    b1, b2 = SCHEDULES[name]
    gradients = list(normal())
    found = directions(np.float32)[name]
    expected = oracle.adam_scheduled(gradients, as_float32(b1), as_float32(b2))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    if name == "theorem 4.1":  # the current beta to the power t would be wrong
        wrong = [oracle.adam(gradients[: t + 1], b1=b1(t))[-1] for t in range(20)]
        assert np.abs(np.array(wrong) - found[:20]).max() > 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduled_betas_in_float64(name):
    b1, b2 = SCHEDULES[name]
    expected = oracle.adam_scheduled(list(normal(dtype=np.float64)), as_float32(b1), as_float32(b2))
    np.testing.assert_allclose(directions(np.float64)[name], expected, rtol=0, atol=1e-12)


def test_nadam_with_a_scheduled_momentum():
    expected = oracle.nadam_scheduled(list(normal()), as_float32(momentum))
    np.testing.assert_allclose(directions(np.float32)["momentum"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_nadam_with_a_scheduled_momentum_in_float64():
    expected = oracle.nadam_scheduled(list(normal(dtype=np.float64)), as_float32(momentum))
    np.testing.assert_allclose(directions(np.float64)["momentum"], expected, rtol=0, atol=1e-12)


def joint_update(txs):
    """Jitted ``update(g, states, params)`` of all of ``{name: tx}``; returns updates and states by name."""

    @jax.jit
    def update(g, states, params):
        found = {name: tx.update(g, states[name], params) for name, tx in txs.items()}
        return [{name: x[i] for name, x in found.items()} for i in range(2)]

    return update


@functools.cache
def train_on_scheduled_betas():
    """All states of 20 steps with scheduled betas, the last updates, and the number of programs."""
    params = {"w": np.ones((2, 3), np.float32), "b": None}
    betas = {"b1": optax.linear_schedule(0.9, 0.5, 10), "b2": optax.constant_schedule(0.99)}
    txs = {m.name: m.make(1e-2, **betas) for m in FAMILY}
    update = joint_update(txs)
    path = [{name: tx.init(params) for name, tx in txs.items()}]
    for _ in range(20):
        updates, states = update(params, path[-1], params)
        path.append(states)
    return path, updates, update._cache_size()


@pytest.mark.parametrize("member", FAMILY, ids=str)
def test_scheduled_betas_keep_shape_and_do_not_recompile(member):
    path, updates, compiled = train_on_scheduled_betas()
    for before, after in itertools.pairwise(states[member.name] for states in path):
        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert list(map(jax.typeof, jax.tree.leaves(after))) == list(map(jax.typeof, jax.tree.leaves(before)))
    assert compiled == 1
    assert np.isfinite(updates[member.name]["w"]).all()


# ---------------------------------------------------------------- PyTorch

TORCH_CALLS = {
    "adam": jadam.adam,
    "adamax": jadam.adamax,
    "amsgrad": functools.partial(jadam.amsgrad, max_of="v"),
    "nadam": functools.partial(jadam.nadam, momentum_decay=4e-3),
    "radam": functools.partial(jadam.radam, eps_mode="hat"),
    "adamw": functools.partial(jadam.adamw, weight_decay=0.1),
}


NOT_TORCH = {f"jadam.{name}": getattr(jadam, name) for name in ("amsgrad", "nadam", "radam")}


@functools.cache
def trajectories(dtype):
    """Parameters at each step of `TORCH_CALLS` and of `NOT_TORCH`, whose defaults differ from PyTorch's."""
    lr, (b1, b2), eps = torch_trajectories.LR, torch_trajectories.BETAS, torch_trajectories.EPS
    txs = {name: make(lr, b1=b1, b2=b2, eps=eps) for name, make in (TORCH_CALLS | NOT_TORCH).items()}
    p = np.linspace(-1, 1, torch_trajectories.COORDINATES, dtype=dtype)
    return scan(txs, TORCH["gradients"].astype(dtype), p)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TORCH_CALLS)
def test_pytorch_trajectories(name):
    assert name in torch_trajectories.OPTIMIZERS
    np.testing.assert_allclose(trajectories(np.float64)[name], TORCH[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TORCH_CALLS)
def test_pytorch_trajectories_in_float32(name):
    # 60 steps of 0.01: the direction is off by at most 1e-6 and p by half an ulp of 1 a step. RAdam's first updates are
    # not scaled: 1e-6 of up to 1e3, which rtol covers.
    atol = 60 * (0.01 * 1e-6 + 2**-25)
    np.testing.assert_allclose(trajectories(np.float32)[name], TORCH[name], rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["amsgrad", "nadam", "radam"])
def test_defaults_that_differ_from_pytorch(name):
    assert np.abs(trajectories(np.float64)[f"jadam.{name}"] - TORCH[name]).max() > 1e-6


# ---------------------------------------------------------------- single formulas


LENGTHS = (0.5, 0.9, 0.999, 0.9999, 0.999999)


@jax.jit
def average_lengths(t):
    """Length of the moving average at step ``t`` and its limit, for each of `LENGTHS`."""
    beta = lambda b2: numerics.constant_beta(b2, t, np.dtype("float32"))
    return [_radam.sma_length(beta(b2), t) for b2 in LENGTHS]


@pytest.mark.parametrize("b2", LENGTHS)
def test_sma_length(b2):
    # float64 is exact enough: its cancellation costs 1e-16 * 2 / (1-b2) / rho <= 4e-11.
    for t in [1, 2, 3, 4, 5, 6, 10, 100, 999, 1000, 1001, 10**4, 10**6]:
        rho, rho_inf = average_lengths(np.float32(t))[LENGTHS.index(b2)]
        power = b2**t
        expected = 2 / (1 - b2) - 1 - 2 * t * power / -np.expm1(t * np.log1p(-(1 - b2)))
        # Both terms are at most twice rho and have some 20 roundings of 2**-24.
        np.testing.assert_allclose(rho, expected, rtol=2e-6)
        np.testing.assert_allclose(rho_inf, 2 / (1 - b2) - 1, rtol=3 * 2**-24)


def test_radam_finite_derivative_where_never_rectified():
    tx = jadam.scale_by_radam(b2=0.5)
    g = np.array([0.0, 1.0], np.float32)
    assert np.isfinite(jax.jit(jax.grad(lambda g: tx.update(g, tx.init(g))[0].sum()))(g)).all()


# ---------------------------------------------------------------- weight decay

DECAYS = {
    f"{member.name}-{'scheduled' if scheduled else 'constant'}": (member, scheduled)
    for member in FAMILY
    if member.decays
    for scheduled in (False, True)
}


@functools.cache
def decay_updates():
    """Updates of five steps with zero gradients on a parameter of 2, by row and ``max_lr``."""
    rate = optax.cosine_decay_schedule(0.2, 10)
    make = lambda member, scheduled, max_lr: member.make(
        rate, weight_decay=(lambda count: 0.3 / (1 + count)) if scheduled else 0.3, max_lr=max_lr
    )
    txs = {f"{row} {max_lr}": make(*x, max_lr) for row, x in DECAYS.items() for max_lr in (None, 0.2)}
    p, update = np.float32([2.0]), joint_update(txs)
    states, path = {name: tx.init(p) for name, tx in txs.items()}, []
    for _ in range(5):
        updates, states = update(0 * p, states, p)
        path.append(updates)
    return path


@pytest.mark.parametrize("row", DECAYS)
def test_decay_coupled_and_decoupled(row):
    _, scheduled = DECAYS[row]
    for max_lr, over in ((None, 1.0), (0.2, 0.2)):
        for t, updates in enumerate(decay_updates()):
            rate = 0.2 * 0.5 * (1 + np.cos(np.pi * t / 10))
            expected = -rate / over * (0.3 / (1 + t) if scheduled else 0.3) * 2.0
            np.testing.assert_allclose(updates[f"{row} {max_lr}"], expected, rtol=1e-6)


# ---------------------------------------------------------------- hyperparameters that change


@functools.cache
def train_on_injected_betas():
    """Third updates with b1 = 0.9, 0.8, 0.7; third updates with b1 = 0.7 from the same states; the number of programs.

    ``b2`` is a number that float32 holds exactly.
    """
    g = np.float32([1.0, -2.0])
    txs = {m.name: optax.inject_hyperparams(m.make)(learning_rate=1.0, b2=0.5) for m in FAMILY}
    states, update = {name: tx.init(g) for name, tx in txs.items()}, joint_update(txs)
    for b1 in (0.9, 0.8, 0.7):
        for state in states.values():
            state.hyperparams["b1"] = jnp.float32(b1)
        before = {name: state.inner_state for name, state in states.items()}
        updates, states = update(g, states, 0 * g)
    constant = joint_update({m.name: m.make(1.0, b1=0.7, b2=0.5) for m in FAMILY})
    return updates, constant(g, before, 0 * g)[0], update._cache_size()


@pytest.mark.parametrize("member", FAMILY, ids=str)
def test_injected_betas_are_corrected_by_their_current_power(member):
    updates, constant, compiled = train_on_injected_betas()
    assert compiled == 1
    # As if b1 had been 0.7 since step 1, except for the moments; float32(0.7) instead of 0.7 is 4e-8 of 1 - b1.
    np.testing.assert_allclose(updates[member.name], constant[member.name], rtol=2e-6)
