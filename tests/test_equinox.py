"""jadam with Equinox models: training loops with `update` and with `step`, and the dtypes of `exact_bf16`."""

import functools
from collections.abc import Callable

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CPU, assert_steps_agree, count_kernel_calls, parametrize, zip_leaves

import jadam

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((64, 33)).astype(np.float32)
Y = np.sin(X[:, :1]) * X[:, 1:2]
WEIGHTS = [RANDOM.uniform(-(n**-0.5), n**-0.5, (m, n)) for m, n in ((130, 33), (1, 130))]


class Net(eqx.Module):
    """A model with a matrix large enough for int8, a function, and an array that is not trained."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    activation: Callable
    order: jax.Array

    def __init__(self, dtype=jnp.float32):
        linear = functools.partial(eqx.filter_eval_shape, eqx.nn.Linear, dtype=dtype, key=jax.random.key(0))
        filled = lambda linear, w: eqx.tree_at(
            lambda x: (x.weight, x.bias), linear, (jnp.asarray(w, dtype), jnp.asarray(w[:, 0], dtype))
        )
        self.hidden, self.out = (filled(linear(*w.shape[::-1]), w) for w in WEIGHTS)
        self.activation = jax.nn.relu
        self.order = jnp.asarray(np.arange(33)[::-1])

    def __call__(self, x):
        return self.out(self.activation(self.hidden(x[self.order])))


def loss_of(model):
    return jnp.mean((jax.vmap(model)(X.astype(model.hidden.weight.dtype)) - Y).astype(jnp.float32) ** 2)


gradients = eqx.filter_jit(eqx.filter_grad(loss_of))


def update_and_apply(tx, grads, state, model):
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state


def one_pass(tx, grads, state, model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = jadam.step(tx, grads, state, params)
    return eqx.combine(params, static), state


def cast_back(tx, grads, state, model):
    """`update_and_apply`, then a cast to the parameters' dtypes."""
    new, state = update_and_apply(tx, grads, state, model)
    return jax.tree.map(lambda p, q: q.astype(p.dtype) if eqx.is_inexact_array(p) else q, model, new), state


def train(step, tx, model, steps=20, donate="none"):
    """Returns ``(model, state)`` and the losses; traces once."""
    traces = []

    @eqx.filter_jit(donate=donate)
    def train_step(model, state):
        traces.append(step)
        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        return *step(tx, grads, state, model), loss

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for _ in range(steps):
        model, state, loss = train_step(model, state)
        losses.append(float(loss))
    assert traces == [step]
    return (model, state), losses


def assert_equal(tree, expected):
    helpers.assert_equal(*(eqx.filter(x, eqx.is_array) for x in (tree, expected)))


@parametrize("moments", ["float32", "int8"], default=["int8"])  # small leaves stay float32
def test_loop(moments, monkeypatch):
    """`update`, `step` by XLA, and `step` with donation train to the same bits, and the loss falls."""
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    tx = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-2, moments=moments))
    expected, losses = train(update_and_apply, tx, Net())
    assert losses[-1] < 0.3 * losses[0]
    for donate in ("none", "all"):
        trained, equal_losses = train(one_pass, tx, Net(), donate=donate)
        assert equal_losses == losses
        assert_equal(trained, expected)
    model, state = trained
    assert model.activation is jax.nn.relu
    np.testing.assert_array_equal(model.order, np.arange(33)[::-1])
    assert state[1][0].mu.hidden.weight.dtype == moments
    assert state[1][0].mu.order is None


@parametrize("moments", ["float32", "int8"], default=["int8"])  # small leaves stay float32
def test_kernel(moments):
    """One step at learning rate 1, as `assert_steps_agree` assumes."""
    tx = jadam.adamw(1.0, moments=moments)
    model = Net()
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = gradients(model)
    state = tx.init(params)
    new, expected = (
        eqx.filter_jit(functools.partial(f, tx))(grads, state, model) for f in (one_pass, update_and_apply)
    )
    (new, new_state), (expected, expected_state) = new, expected
    arrays = lambda model: eqx.filter(model, eqx.is_inexact_array)
    assert_steps_agree((arrays(new), new_state), (arrays(expected), expected_state), (params, state), moments == "int8")
    kernel = CPU.kernel is not None
    step = lambda grads, state, params: one_pass(tx, grads, state, eqx.combine(params, model))[1]
    assert count_kernel_calls(step, grads, state, params) == kernel


@pytest.mark.slow
def test_exact_bf16_with_eqx_apply_updates():
    """``eqx.apply_updates`` returns float32 parameters with the bfloat16 values of `optax.apply_updates`."""
    tx = jadam.exact_bf16(jadam.adam(1e-2))
    model = Net(jnp.bfloat16)
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = gradients(model)
    updates, state = eqx.filter_jit(tx.update)(grads, tx.init(params), params)
    loose = eqx.filter_jit(eqx.apply_updates)(params, updates)
    tight = eqx.filter_jit(optax.apply_updates)(params, updates)
    assert {x.dtype for x in jax.tree.leaves(loose)} == {np.dtype(np.float32)}
    assert_equal(loose, jax.tree.map(lambda x: x.astype(jnp.float32), tight))
    assert_equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), loose), tight)
    masters = jadam.float32_params(tight, state)
    assert_equal(jadam.from_float32(masters, tx)[0], tight)
    assert all((x != y).any() for x, y in zip_leaves(masters, loose))
    with pytest.raises(TypeError, match=r"hidden\.weight was bfloat16.*leave float32 parameters to be cast back"):
        tx.update(grads, state, loose)


def test_exact_bf16_trains_as_float32(monkeypatch):
    """With `exact_bf16` the weights stay bfloat16 and move; without, small steps round to nothing."""
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    tx = jadam.exact_bf16(jadam.adam(1e-4, moments="int8"))
    (model, state), losses = train(cast_back, tx, Net(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))} == {jnp.dtype("bfloat16")}
    trained, equal_losses = train(one_pass, tx, Net(jnp.bfloat16))
    assert losses == equal_losses
    assert_equal(trained, (model, state))
    start = Net(jnp.bfloat16)
    (plain, _), _ = train(cast_back, jadam.adam(1e-4, moments="int8"), start)
    # bfloat16 numbers from 0.125 to 0.174 = 33**-0.5 are 9.8e-4 apart. A step of 1e-4 is less than half of that and
    # lost; twenty are twice that, but not all gradients keep their sign.
    weight = lambda model: np.asarray(model.hidden.weight, np.float32)
    large = np.abs(weight(start)) > 0.125
    moved = lambda model: np.mean((weight(model) != weight(start))[large])
    assert moved(plain) == 0
    assert moved(model) > 0.5
