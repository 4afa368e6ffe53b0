"""What the relatives and the options add: each against its own loop in float64, and PyTorch's trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import torch_trajectories
from family import FAMILY, VARIANTS

import jadam
from jadam import _numerics, _radam

MEMBERS = {member.name: member for member in FAMILY}
TORCH = np.load(torch_trajectories.FILE)


def directions(make, gradients, params=None, **settings):
    """Directions of steps at learning rate 1, as one scan."""
    tx = make(1.0, **settings)
    params = jnp.zeros_like(gradients[0]) if params is None else params

    def body(state, g):
        u, state = tx.update(g, state, params)
        return state, -u

    return np.asarray(jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g)[1])(jnp.asarray(gradients)))


def normal(steps=60, coordinates=50, dtype=np.float32):
    return np.random.default_rng(1).standard_normal((steps, coordinates)).astype(dtype)


# Direction of size 1 to 4, float32: about ten roundings of half an ulp, those of v's average halved by the root.
EVERY = [(m.name, m.settings, functools.partial(m.oracle, **m.settings)) for m in FAMILY] + [
    (m.name, {}, m.oracle) for m in FAMILY
]


@pytest.mark.parametrize(("name", "settings", "expected"), EVERY + VARIANTS)
def test_every_member_and_option_against_its_loop(name, settings, expected):
    gradients = normal()
    found = directions(MEMBERS[name].make, gradients, **settings)
    np.testing.assert_allclose(found, expected(list(gradients)), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "settings", "expected"), EVERY + VARIANTS)
def test_every_member_and_option_against_its_loop_in_float64(name, settings, expected):
    gradients = normal(dtype=np.float64)
    found = directions(MEMBERS[name].make, gradients, **settings)
    np.testing.assert_allclose(found, expected(list(gradients)), rtol=0, atol=1e-12)


def test_the_loops_differ():
    # An oracle that agrees with everything proves nothing: no two of these are within the tolerance above.
    gradients = list(normal())
    loops = {str(expected): np.array(expected(gradients)) for _, _, expected in EVERY + VARIANTS[:2]}
    values = list(loops.values())
    distinct = {}
    for i, a in enumerate(values):
        if not any(np.allclose(a, b, rtol=1e-6, atol=1e-6) for b in distinct.values()):
            distinct[i] = a
    # adam and adamw, nadam and nadamw, adamax and adamaxw share a loop: 5 loops at 2 settings, and 2 variants.
    assert len(distinct) == 12


SCHEDULES = {
    "theorem 4.1": (lambda t: 0.9 * 0.99**t, lambda t: 0.999),
    "both": (lambda t: 0.5 + 0.3 * 0.9**t, lambda t: 1 - 0.5 / (t + 2.0)),
    "from zero": (lambda t: 0.0 * t, lambda t: 0.95 + 0.0 * t),
}


def rounded(schedule):
    """What a traced float32 schedule gives: the float64 oracle must be told the same betas."""
    return lambda t: float(schedule(jnp.int32(t)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduled_betas_are_corrected_by_their_product(name):
    b1, b2 = SCHEDULES[name]
    gradients = normal()
    found = directions(jadam.adam, gradients, b1=b1, b2=b2)
    expected = oracle.adam_scheduled(list(gradients), rounded(b1), rounded(b2))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    if name == "theorem 4.1":  # today's beta to the power t is another, wrong thing
        wrong = [oracle.adam(list(gradients[: t + 1]), b1=b1(t))[-1] for t in range(20)]
        assert np.abs(np.array(wrong) - found[:20]).max() > 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduled_betas_in_float64(name):
    b1, b2 = SCHEDULES[name]
    gradients = normal(dtype=np.float64)
    found = directions(jadam.adam, gradients, b1=b1, b2=b2)
    expected = oracle.adam_scheduled(list(gradients), rounded(b1), rounded(b2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_nadam_with_a_scheduled_momentum():
    mu = lambda t: 0.9 * (1 - 0.5 * 0.96 ** (t / 10))
    gradients = normal()
    found = directions(jadam.nadam, gradients, b1=mu)
    np.testing.assert_allclose(found, oracle.nadam_scheduled(list(gradients), rounded(mu)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("member", FAMILY, ids=str)
def test_scheduled_betas_keep_shape_and_do_not_recompile(member):
    params = {"w": jnp.ones((2, 3)), "b": None}
    tx = member.make(1e-2, b1=optax.linear_schedule(0.9, 0.5, 10), b2=optax.constant_schedule(0.99))
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(20):
        updates, after = step(params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert list(map(jax.typeof, jax.tree.leaves(after))) == list(map(jax.typeof, jax.tree.leaves(state)))
        state = after
    assert step._cache_size() == 1
    assert np.isfinite(updates["w"]).all()


# ---------------------------------------------------------------- PyTorch

TORCH_CALLS = {
    "adam": jadam.adam,
    "adamax": jadam.adamax,
    "amsgrad": functools.partial(jadam.amsgrad, max_of="v"),
    "nadam": functools.partial(jadam.nadam, momentum_decay=4e-3),
    "radam": functools.partial(jadam.radam, eps_mode="hat"),
    "adamw": functools.partial(jadam.adamw, weight_decay=0.1),
}


def trajectory(make, dtype):
    lr, (b1, b2), eps = torch_trajectories.LR, torch_trajectories.BETAS, torch_trajectories.EPS
    tx = make(lr, b1=b1, b2=b2, eps=eps)
    p = jnp.linspace(-1, 1, torch_trajectories.COORDINATES, dtype=dtype)

    def body(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    return np.asarray(
        jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g)[1])(p, TORCH["gradients"].astype(dtype))
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TORCH_CALLS)
def test_pytorch_s_trajectories(name):
    assert name in torch_trajectories.OPTIMIZERS
    np.testing.assert_allclose(trajectory(TORCH_CALLS[name], np.float64), TORCH[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TORCH_CALLS)
def test_pytorch_s_trajectories_in_float32(name):
    # 60 steps of 0.01: each direction is off by 1e-6 at most (RAdam's first, unscaled ones by 1e-6 of 1e3), and p by
    # half an ulp of 1 a step.
    atol = 60 * (0.01 * 1e-6 + 2**-25)
    np.testing.assert_allclose(trajectory(TORCH_CALLS[name], np.float32), TORCH[name], rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["amsgrad", "nadam", "radam"])
def test_the_default_is_not_pytorch_s(name):
    assert np.abs(trajectory(getattr(jadam, name), np.float64) - TORCH[name]).max() > 1e-6


# ---------------------------------------------------------------- single formulas


@pytest.mark.parametrize("b2", [0.5, 0.9, 0.999, 0.9999, 0.999999])
def test_length_of_the_average(b2):
    # Exact in rationals' stead: float64 loses 1e-16 * 2 / (1-b2) / rho <= 4e-11 to the same cancellation.
    for t in [1, 2, 3, 4, 5, 6, 10, 100, 999, 1000, 1001, 10**4, 10**6]:
        beta = _numerics.constant_beta(b2, jnp.float32(t), np.dtype("float32"))
        rho, rho_inf = _radam.average_length(beta, jnp.float32(t))
        power = b2**t
        expected = 2 / (1 - b2) - 1 - 2 * t * power / -np.expm1(t * np.log1p(-(1 - b2)))
        # 2*t - 1 and the last term are at most twice rho; some 20 roundings of 2**-24 among them.
        np.testing.assert_allclose(rho, expected, rtol=2e-6)
        np.testing.assert_allclose(rho_inf, 2 / (1 - b2) - 1, rtol=3 * 2**-24)


def test_radam_finite_derivative_where_never_rectified():
    tx = jadam.scale_by_radam(b2=0.5)
    g = jnp.array([0.0, 1.0])
    assert np.isfinite(jax.grad(lambda g: tx.update(g, tx.init(g))[0].sum())(g)).all()


# ---------------------------------------------------------------- weight decay


@pytest.mark.parametrize("member", [m for m in FAMILY if m.decays], ids=str)
@pytest.mark.parametrize("scheduled", [False, True])
def test_decay_coupled_and_decoupled(member, scheduled):
    rate = optax.cosine_decay_schedule(0.2, 10)
    weight_decay = (lambda count: 0.3 / (1 + count)) if scheduled else 0.3
    p = jnp.array([2.0])
    for max_lr, over in ((None, 1.0), (0.2, 0.2)):
        tx = member.make(rate, weight_decay=weight_decay, max_lr=max_lr)
        state = tx.init(p)
        for t in range(5):
            u, state = jax.jit(tx.update)(0 * p, state, p)
            expected = -float(rate(t)) / over * (0.3 / (1 + t) if scheduled else 0.3) * 2.0
            np.testing.assert_allclose(u, expected, rtol=1e-6)


# ---------------------------------------------------------------- hyperparameters that change


@pytest.mark.parametrize("member", FAMILY, ids=str)
def test_injected_betas_are_corrected_by_today_s_power(member):
    g = jnp.array([1.0, -2.0])
    tx = optax.inject_hyperparams(member.make)(learning_rate=1.0)
    state = tx.init(g)
    step = jax.jit(tx.update)
    for b1 in (0.9, 0.8, 0.7):
        state.hyperparams["b1"] = jnp.float32(b1)
        u, state = step(g, state, 0 * g)
    assert step._cache_size() == 1
    m = 0.0
    for b1 in (0.9, 0.8, 0.7):
        m = b1 * m + (1 - b1)
    ratio = m / (1 - 0.7**3)  # of m_hat to g, which is constant, so v_hat is g**2
    if member.name in ("nadam", "nadamw"):
        ratio = 0.7 * m / (1 - 0.7**4) + 0.3 / (1 - 0.7**3)
    expected = -ratio * (np.asarray(g) if member.name == "radam" else np.sign(g))  # three steps: RAdam still waits
    np.testing.assert_allclose(u, expected, rtol=2e-6)  # float32(b2) in place of b2 cancels for a constant g
