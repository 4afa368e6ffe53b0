"""`jadam.step` and ``tx.update`` are ordinary JAX functions, whatever mode, schedule or class meets them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import checkify

import jadam
import jadam.flax

PARAMS = {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
GRADS = {"w": np.full((3, 4), 0.5, np.float32), "b": np.full(4, 0.5, np.float32)}
SETTING = {"rate": 0.1}


def follows(count):
    """A schedule that reads a Python variable."""
    del count
    return SETTING["rate"]


OPTIMIZERS = {
    "learning_rate": lambda: jadam.adam(follows),
    "weight_decay": lambda: jadam.adamw(0.1, weight_decay=follows),
    "by_path": lambda: jadam.by_path([("", {})], follows, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_steps_follow_a_python_variable(monkeypatch, name):
    tx = OPTIMIZERS[name]()
    grads = GRADS if name != "weight_decay" else jax.tree.map(np.zeros_like, GRADS)
    params, state = jadam.step(tx, grads, tx.init(PARAMS), PARAMS)
    assert (params["b"] < 1).all()
    monkeypatch.setitem(SETTING, "rate", 0.0)
    again, _ = jadam.step(tx, grads, state, params)
    np.testing.assert_array_equal(again["b"], params["b"])


def test_flax_s_optimizer_follows_a_python_variable(monkeypatch):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = jadam.flax.Optimizer(model, jadam.adam(follows), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    before = np.asarray(model.bias[...])
    monkeypatch.setitem(SETTING, "rate", 0.0)
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.bias[...], before)


RATES = np.array([0.1, 0.01, 0.001])
SCHEDULES = {
    "if": lambda count: 0.1 if count < 2 else 0.01,
    "np.cos": lambda count: 0.1 * np.cos(count),
    "a table": lambda count: RATES[count],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_want_numbers(name):
    """In eager `step` and `describe` as in two calls, also for a decay rate."""
    tx = jadam.adam(SCHEDULES[name], b1=lambda count: 0.9 if count < 5 else 0.8)
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    params, _ = jadam.step(tx, GRADS, state, PARAMS)
    for u, p, new in zip(*map(jax.tree.leaves, (updates, PARAMS, params)), strict=True):
        np.testing.assert_allclose(new, p + u, rtol=2.0**-22)  # a rounding of each side, and of the update
    assert jadam.describe(tx, PARAMS).one_pass == (jadam.backends()["cpu"].kernel is not None)


def nan_step(take):
    """The second step divides infinity by infinity."""
    tx = jadam.adam(0.1)
    params = np.ones(3, np.float32)
    state = tx.init(params)
    for g in (1e20, 1.0, 1.0):
        params, state = take(tx, np.full(3, g, np.float32), state, params)


def updated(tx, g, state, params):
    _, state = tx.update(g, state, params)
    return params, state


@pytest.mark.parametrize(
    "take",
    [jadam.step, jax.jit(jadam.step, static_argnums=0), updated, jax.jit(updated, static_argnums=0)],
    ids=["step", "step, jit", "update", "update, jit"],
)
def test_debug_nans_sees_one_that_is_born_in_the_step(take):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        nan_step(take)


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_checkify_sees_a_nan(moments):
    tx = jadam.adam(0.1, moments=moments)
    params = np.ones((32, 128), np.float32)
    grads = np.full_like(params, 0.5)
    step = checkify.checkify(jax.jit(functools.partial(jadam.step, tx)), errors=checkify.float_checks)
    error, _ = step(grads, tx.init(params), params)
    assert error.get() is None
    grads[3, 4] = np.nan
    error, _ = step(grads, tx.init(params), params)
    assert "nan" in error.get()


def test_what_checkify_needs_costs_nothing():
    tx = jadam.adam(0.1)
    step = jax.jit(functools.partial(jadam.step, tx), donate_argnums=(1, 2))
    text = step.lower(PARAMS, tx.init(PARAMS), PARAMS).compile().as_text()
    entry = text[text.index("ENTRY") :]
    if jadam.backends()["cpu"].kernel is not None:
        assert "jadam_step" in entry
        assert "f32[3,4]{1,0} multiply" not in text


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["adam", "decay", "by_path", "record", "betas"])
def test_optax_s_schedules_under_strict_promotion(name):
    """They promote, and fail in `optax.adam` there."""
    rate = optax.cosine_decay_schedule(0.1, 10)
    tx = {
        "adam": lambda: jadam.adam(rate),
        "decay": lambda: jadam.adamw(rate, weight_decay=rate, max_lr=0.1),
        "by_path": lambda: jadam.by_path([("w", {"weight_decay": rate}), ("", {})], rate),
        "record": lambda: jadam.record(jadam.adam(rate), every=1, keep=2),
        "betas": lambda: jadam.adam(
            rate, b1=optax.linear_schedule(0.9, 0.8, 10), eps=optax.linear_schedule(0.0, 1.0, 9)
        ),
    }[name]()
    state = tx.init(PARAMS)
    jadam.step(tx, GRADS, state, PARAMS)
    jax.eval_shape(functools.partial(jadam.step, tx), GRADS, state, PARAMS)
    jadam.describe(tx, PARAMS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """Takes arrays only, and none but matrices for weights."""

    weight: jax.Array
    bias: jax.Array

    def __post_init__(self):
        self.weight, self.bias = jnp.asarray(self.weight), jnp.asarray(self.bias)
        if self.weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got {self.weight}")


CHECKED = {
    "adam": lambda: jadam.adam(0.1),
    "int8": lambda: jadam.adamw(0.1, moments="int8"),
    "mask": lambda: jadam.adamw(0.1, mask={"layer": True, "scale": False}),
    "amsgrad": lambda: jadam.amsgrad(0.1, moments="bfloat16"),
    "by_path": lambda: jadam.by_path([("scale", jadam.FROZEN), ("", {})], 0.1),
    "record": lambda: jadam.record(jadam.radam(0.1), every=1, keep=2),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adam(0.1)),
    "chain": lambda: jadam.chain(jadam.clip(1.0), jadam.adam(0.1)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_a_class_that_checks_what_it_is_made_of(name):
    params = {"layer": Layer(np.ones((32, 128), np.float32), np.ones(3, np.float32)), "scale": np.ones(2, np.float32)}
    tx = CHECKED[name]()
    state = jax.jit(tx.init)(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    expected = jax.tree.map(lambda p, u: p + u, params, updates)
    found, _ = jadam.step(tx, params, state, params)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2.0**-22, atol=5e-8)  # 5e-7 of an update of 0.1
    assert jadam.describe(tx, params).leaves[0].name == "['layer'].weight"


def test_a_plan_is_made_once(monkeypatch):
    """In a trace, and in an eager step."""
    tx, plans = jadam.adam(0.1), []
    plan = tx.update.plan
    monkeypatch.setattr(tx.update, "plan", lambda *args: plans.append(1) or plan(*args))
    state = tx.init(PARAMS)
    jax.jit(functools.partial(jadam.step, tx)).lower(GRADS, state, PARAMS).compile()
    assert len(plans) == 1
    jadam.step(tx, GRADS, state, PARAMS)
    assert len(plans) == 2


def test_a_further_transformation_of_the_same_kind_compiles_nothing(programs_compiled):
    """Other rates are other numbers in the same program."""
    take = lambda rate: jadam.step(tx := jadam.adam(rate), GRADS, tx.init(PARAMS), PARAMS)
    take(0.1)
    before = programs_compiled()
    take(0.2)
    assert programs_compiled() == before
