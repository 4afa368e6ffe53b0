"""Faults that users' programs found: each input, and others of its kind."""

import copy
import dataclasses
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MESH, assert_equal

import jadam
from jadam._fused import step
from jadam._fused.backends import Backend

# ---------------------------------------------------------------- copies

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: cloudpickle.loads(cloudpickle.dumps(x)),
}
RULES = [("b", jadam.FROZEN), ("", {})]


@dataclasses.dataclass
class Configuration:
    rules: list


@pytest.mark.parametrize("how", COPIES)
def test_frozen_is_one_object(how):
    assert COPIES[how](jadam.FROZEN) is jadam.FROZEN
    assert COPIES[how](RULES)[0][1] is jadam.FROZEN


def test_frozen_in_a_configuration():
    rules = dataclasses.asdict(Configuration(RULES))["rules"]
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = jadam.by_path(rules, 1e-2)
    new, _ = jadam.step(tx, params, tx.init(params), params)
    np.testing.assert_array_equal(new["b"], 1)
    assert not np.any(new["a"] == 1)


# ---------------------------------------------------------------- derivatives at zero

AT_ZERO = {
    "adam": lambda: jadam.adam(0.1),
    "adam, eps=0": lambda: jadam.adam(0.1, eps=0.0),
    "nadam": lambda: jadam.nadam(0.1),
    "adamax, eps=0": lambda: jadam.adamax(0.1, eps=0.0),
    "amsgrad": lambda: jadam.amsgrad(0.1),
    "radam": lambda: jadam.radam(0.1),
    "clip": lambda: jadam.chain(jadam.clip(1.0), jadam.adam(0.1)),
    "clip_by_global_norm": lambda: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "both": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "in optax.chain": lambda: optax.chain(jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "record": lambda: jadam.record(jadam.adam(0.1), every=1),
}


@pytest.mark.parametrize("name", AT_ZERO)
@pytest.mark.parametrize("call", ["step", "update"])
def test_derivative_at_zero_gradients_is_finite(call, name):
    tx, w = AT_ZERO[name](), jnp.ones(3)
    state = tx.init(w)
    if call == "step":
        f = lambda g: jadam.step(tx, g, state, w)[0].sum()
    else:
        f = lambda g: tx.update(g, state, w)[0].sum()
    found = jax.grad(f)(jnp.zeros(3))
    # without clipping u = m_hat / eps at 0: the derivative is -0.1 / eps, which is finite
    assert np.all(np.isfinite(found)), found


@pytest.mark.parametrize("name", AT_ZERO)
def test_zero_gradients_make_no_nan(name):
    tx, w = AT_ZERO[name](), jnp.ones(3)
    state = tx.init(w)
    with jax.debug_nans(True):
        new, _ = jadam.step(tx, 0 * w, state, w)
        updates, _ = tx.update(0 * w, state, w)
        jax.jit(tx.update)(0 * w, state, w)
        if name != "in optax.chain":
            jadam.statistics(tx, state, w)
    np.testing.assert_array_equal(new, w)
    np.testing.assert_array_equal(updates, 0)


def test_clipping_by_norm_is_optax_s_to_the_bit():
    """Although it is not Optax's code, which divides by a norm of 0."""
    for scale in (0.0, 1e-3, 1.0, 1e3):
        g = {"a": scale * jnp.linspace(-1, 1, 50), "b": scale * jnp.ones(3, jnp.bfloat16)}
        clips = jadam.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
        ours, theirs = (clip.update(g, optax.EmptyState())[0] for clip in clips)
        assert_equal(ours, theirs)


def test_statistics_have_a_derivative_at_zero():
    tx, w = jadam.adam(0.1), jnp.zeros(3)
    state = tx.init(w)
    found = jax.grad(lambda w: jadam.statistics(tx, state, w).total.update_rms)(w)
    assert np.all(np.isfinite(found))


# ---------------------------------------------------------------- donation


def donate(tree):
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)(tree))


def test_a_kept_average_survives_donation():
    tx = optax.chain(optax.sgd(0.1), jadam.average_params(None))
    state = tx.init(jnp.ones(3))
    kept = jadam.averaged_params(state)
    donate(state)
    np.testing.assert_array_equal(kept, 1)


def test_float32_masters_survive_donation():
    tx = jadam.exact_bf16(jadam.adam(0.1))
    start = {"w": jnp.ones(3), "b": jnp.ones(3)}
    params, state = jadam.from_float32(start, tx, keep=lambda path, _: "b" in path)
    kept = jadam.float32_params(params, state)
    donate((params, state))
    for tree in (start, kept):
        np.testing.assert_array_equal(tree["w"], 1)
        np.testing.assert_array_equal(tree["b"], 1)


# ---------------------------------------------------------------- what describe and convert_moments say


def test_describe_looks_into_zero1():
    params = {"w": jnp.ones((8, 16))}
    inner = jadam.adam(1e-3)
    tx = jadam.sharding.zero1(inner, params, MESH, "data")
    assert jadam.describe(tx, params).step == jadam.describe(inner, params).step


def test_moments_of_a_cast_state_are_not_converted():
    """Its codes would be taken for moments."""
    state = jadam.adam(1e-3, moments="int8").init(jnp.ones((64, 128)))
    cast = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype in (jnp.int8, jnp.uint8) and x.size > 1 else x, state
    )
    with pytest.raises(TypeError, match=r"state\.mu must be int8 because it has scales, got float32"):
        jadam.convert_moments(cast, "float32")


def test_a_cpu_without_its_kernel_warns_once(monkeypatch, caplog):
    step._warn_once.cache_clear()
    without = dict.fromkeys(("cpu", "cuda", "tpu"), Backend(None, "no extension was built"))
    monkeypatch.setattr(step, "backends", lambda: without)
    params = jnp.ones(5)
    for rate in (0.1, 0.2):
        tx = jadam.chain(jadam.clip(rate), jadam.adam(rate))
        jax.jit(lambda p, tx=tx: jadam.step(tx, p, tx.init(p), p))(params)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.endswith("without its kernel: no extension was built")
    step._warn_once.cache_clear()
