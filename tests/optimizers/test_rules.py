"""Each function of `jadam._optimizers.adam` on one array, against NumPy float64, and its public functions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam
from jadam._core import checks
from jadam._core.numerics import constant_beta
from jadam._optimizers import adam as _adam
from jadam._transformation.transformation import Hyperparams

B1, B2, EPS, EPS_ROOT, T = 0.9, 0.99, 1e-3, 1e-2, 3
G, M, V = np.array([0.5, -2.0, 0.0, 1e-3]), np.array([0.25, 1.0, 0.0, -3e-3]), np.array([0.1, 4.0, 0.0, 2e-4])
# Some ten roundings, no cancellation.
CLOSE = {"rtol": 10 * 2.0**-24, "atol": 0}
DTYPE = np.dtype("float32")


def make_hyperparams(**more):
    betas = {name: constant_beta(b, jnp.float32(T), DTYPE) for name, b in (("b1", B1), ("b2", B2))}
    return Hyperparams(t=jnp.float32(T), **betas, eps=DTYPE.type(EPS), eps_root=DTYPE.type(EPS_ROOT), **more)


def arrays(*xs):
    return [jnp.asarray(np.float32(x)) for x in xs]


def moments():
    return B1 * M + (1 - B1) * G, B2 * V + (1 - B2) * G**2


def expected_direction(m_hat, v_hat, eps=EPS):
    return m_hat / (np.sqrt(v_hat + EPS_ROOT) + eps)


def test_adam_rule():
    m, v = moments()
    u, new_m, new_v = jax.jit(lambda *x: _adam.adam_rule(make_hyperparams(), *x))(*arrays(G, M, V))
    np.testing.assert_allclose(new_m, m, **CLOSE)
    np.testing.assert_allclose(new_v, v, **CLOSE)
    np.testing.assert_allclose(u, expected_direction(m / (1 - B1**T), v / (1 - B2**T)), **CLOSE)


def test_direction():
    m_hat, v_hat = arrays(M, V)
    np.testing.assert_allclose(
        _adam.adam_direction(make_hyperparams(), m_hat, v_hat), expected_direction(M, V), **CLOSE
    )
    nothing = make_hyperparams().replace(eps=DTYPE.type(0), eps_root=DTYPE.type(0))
    assert _adam.adam_direction(nothing, jnp.zeros(1), jnp.zeros(1)) == 0


def expected_nesterov_m_hat(m, g, momentum=B1):
    return momentum * m / (1 - momentum ** (T + 1)) + (1 - momentum) * g / (1 - momentum**T)


def test_nadam_rule():
    m, v = moments()
    u, new_m, new_v = jax.jit(lambda *x: _adam.nadam_rule(make_hyperparams(), *x))(*arrays(G, M, V))
    np.testing.assert_allclose(new_m, m, **CLOSE)
    np.testing.assert_allclose(new_v, v, **CLOSE)
    np.testing.assert_allclose(
        u, expected_direction(expected_nesterov_m_hat(m, G), v / (1 - B2**T)), rtol=20 * 2.0**-24
    )


@pytest.mark.parametrize("momentum", [None, 0.6])
def test_nesterov_m_hat(momentum):
    given = {} if momentum is None else {"momentum": constant_beta(momentum, jnp.float32(T), DTYPE)}
    found = _adam.nesterov_m_hat(make_hyperparams(**given), *arrays(M, G))
    # m and g may cancel: error relative to the larger term
    exact = expected_nesterov_m_hat(M, G, momentum or B1)
    assert (np.abs(found - exact) <= 10 * 2.0**-24 * (np.abs(M) + np.abs(G)) * 2).all()


def test_eps_before_correction():
    """The paper's section 2: alpha * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps_hat)."""
    hat = _adam.eps_before_correction(make_hyperparams())
    np.testing.assert_allclose(hat.eps, EPS / np.sqrt(1 - B2**T), **CLOSE)
    assert {**vars(hat), "eps": 0} == {**vars(make_hyperparams()), "eps": 0}


def test_without_correction():
    plain = _adam.without_correction(make_hyperparams(), "b2")
    assert plain.b1 == make_hyperparams().b1
    assert plain.b2 == make_hyperparams().b2._replace(correction=1, next_correction=1)
    assert plain.b2.correction.dtype == jnp.float32


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("eps_mode", ["paper", "hat"])
def test_hyperparam_transform(eps_mode, bias_correction):
    adjusted = _adam.hyperparam_transform(eps_mode, () if bias_correction else ("b1", "b2"))(make_hyperparams())
    for beta in (adjusted.b1, adjusted.b2):
        assert (beta.correction == 1) != bias_correction
    hat = EPS / np.sqrt(1 - B2**T) if bias_correction else EPS
    np.testing.assert_allclose(adjusted.eps, hat if eps_mode == "hat" else EPS, **CLOSE)
    assert _adam.hyperparam_transform(eps_mode)(make_hyperparams()).b1.correction != 1


@pytest.mark.parametrize(("make", "theirs"), [(f, getattr(optax, f.__name__)) for f in (jadam.adam, jadam.adamw)])
def test_defaults(make, theirs):
    """Defaults are Optax's; of options that Optax lacks, Algorithm 1's."""
    ours, other = (inspect.signature(f).parameters for f in (make, theirs))
    for name, parameter in other.items():
        assert ours[name].default == parameter.default
    assert ours["eps_mode"].default == "paper"
    assert ours["bias_correction"].default is True
    assert ours["nesterov"].default is False
    assert ours["moments"].default == "float32"


SETTINGS = {"b1": 0.8, "b2": 0.95, "eps": 0.1, "eps_root": 0.01, "nesterov": True, "eps_mode": "hat"}


@pytest.mark.parametrize("bias_correction", [True, False])
def test_public_functions_pass_on_what_they_are_given(bias_correction):
    """All options reach the rule: two steps of each function agree."""
    settings = {**SETTINGS, "bias_correction": bias_correction}
    p, rate, decay = np.float32([1, -2]), 0.5, 0.25
    sides = [jadam.scale_by_adam(**settings), jadam.adam(rate, **settings)]
    sides += [jadam.adamw(rate, weight_decay=decay, mask=mask, **settings) for mask in (None, False)]
    sides += [jadam.adamw(rate, weight_decay=decay, max_lr=2.0, **settings)]

    @jax.jit
    def last(p, gradients):
        states, found = [tx.init(p) for tx in sides], []
        for g in gradients:
            found, states = zip(*(tx.update(g, x, p) for tx, x in zip(sides, states, strict=True)), strict=True)
        return found

    direction, adam, adamw, masked, decoupled = map(np.asarray, last(p, np.float32([[0.3, -4], [1, 2]])))
    np.testing.assert_array_equal(adam, -np.float32(rate) * direction)
    np.testing.assert_array_equal(masked, adam)
    np.testing.assert_allclose(adamw, adam - rate * decay * p, rtol=4 * 2.0**-24)
    np.testing.assert_allclose(decoupled, adam - rate / 2.0 * decay * p, rtol=4 * 2.0**-24)


@pytest.mark.parametrize(
    "make", [jadam.scale_by_adam, lambda **k: jadam.adam(1.0, **k), lambda **k: jadam.adamw(1.0, **k)]
)
def test_public_functions_pass_on_how_moments_are_stored(make):
    p = np.zeros((64, 64), np.float32)
    inner = lambda state: state if hasattr(state, "mu") else state[0]
    init = lambda **how: inner(jax.eval_shape(make(**how).init, p))
    assert init(mu_dtype=jnp.bfloat16).mu.dtype == jnp.bfloat16
    assert init(moments="int8").mu.dtype == jnp.int8
    assert init(moments="bfloat16").nu.dtype == jnp.bfloat16


def test_switches_are_checked():
    for name, value in (("eps_mode", "Hat"), ("bias_correction", 1), ("bias_correction", "yes"), ("nesterov", 2)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            jadam.adam(1e-3, **{name: value})
    checks.check_one_of("eps_mode", "paper", ("paper", "hat"))
