"""Bad input: the exception and the whole of its message's sense, one row per wrong call."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam

W = {"w": jnp.ones((2, 3)), "b": {"c": jnp.zeros(3)}}


def updated(tx=None, params=W, **changed):
    """Update with W's gradients, some leaves changed."""
    tx = tx or jadam.adam(1e-3)
    return tx.update(changed.get("g", W), changed.get("state", tx.init(params)), changed.get("p", params))


HYPERPARAMETERS = [
    (lambda: jadam.adam(1e-3, b1=1.0), ValueError, "b1 must be in [0, 1), got 1. Did you swap it with learning_rate"),
    (lambda: jadam.adam(1e-3, b2=1.5), ValueError, "b2 must be in [0, 1), got 1.5. Did you swap it"),
    (lambda: jadam.adam(1e-3, b2=-0.1), ValueError, "b2 must be in [0, 1), got -0.1."),
    (lambda: jadam.adam(1e-3, b1=float("nan")), ValueError, "b1 must be in [0, 1), got nan."),
    (lambda: jadam.scale_by_adam(b1=jnp.float32(1.0)), ValueError, "b1 must be in [0, 1), got 1."),
    (lambda: jadam.scale_by_adam(b1=np.float32(2.0)), ValueError, "b1 must be in [0, 1), got 2."),
    (
        lambda: jadam.adam(1e-3, b1="0.9"),
        TypeError,
        "b1 must be a number or a schedule in [0, 1), got '0.9' of type str",
    ),
    (
        lambda: jadam.adam(1e-3, b2=True),
        TypeError,
        "b2 must be a number or a schedule in [0, 1), got True of type bool",
    ),
    (lambda: jadam.adam(1e-3, b2=None), TypeError, "b2 must be a number or a schedule in [0, 1), got None"),
    (lambda: jadam.adam(1e-3, b2=0.9j), TypeError, "b2 must be a number or a schedule in [0, 1), got 0.9j"),
    (lambda: jadam.adam(1e-3, b2=jnp.ones(3) * 0.9), ValueError, "b2 must be a scalar, got an array of shape (3,)"),
    (lambda: jadam.adam(1e-3, b2=np.ones(3) * 0.9), ValueError, "b2 must be a scalar, got an array of shape (3,)"),
    (lambda: jadam.adam(1e-3, b2=jnp.int32(0)), TypeError, "b2 must be a real floating number in [0, 1), got an array"),
    (lambda: jadam.adam(1e-3, b2=jnp.bfloat16(0.9)), TypeError, "b2 must be float32 or wider, got bfloat16"),
    (lambda: jadam.adam(1e-3, eps=jnp.float16(1e-3)), TypeError, "eps must be float32 or wider, got float16"),
    (lambda: jadam.adam(1e-3, eps=-1e-8), ValueError, "eps must be >= 0, got -1e-08."),
    (lambda: jadam.adam(1e-3, eps_root=-1), ValueError, "eps_root must be >= 0, got -1."),
    (lambda: jadam.adam(1e-3, eps=float("inf")), ValueError, "eps must be >= 0, got inf."),
    (lambda: jadam.adam(-1e-3), ValueError, "learning_rate must be >= 0, got -0.001. To maximise, negate the loss."),
    (
        lambda: jadam.adam("1e-3"),
        TypeError,
        "learning_rate must be a number or a schedule >= 0, got '1e-3' of type str",
    ),
    (lambda: jadam.adam(None), TypeError, "learning_rate must be a number or a schedule >= 0, got None"),
    (lambda: jadam.adamw(1e-3, weight_decay=-0.1), ValueError, "weight_decay must be >= 0, got -0.1."),
    (
        lambda: jadam.adamw(1e-3, weight_decay="a"),
        TypeError,
        "weight_decay must be a number or a schedule >= 0, got 'a'",
    ),
    (
        lambda: jadam.adam(1e-3, mu_dtype=jnp.int8),
        TypeError,
        "mu_dtype must be a floating dtype such as jnp.bfloat16, got",
    ),
    (
        lambda: jadam.adam(1e-3, mu_dtype="half-ish"),
        TypeError,
        "mu_dtype must be a floating dtype such as jnp.bfloat16",
    ),
]

INT = {"w": jnp.ones(2), "ids": jnp.arange(3)}

TREES = [
    (
        lambda: jadam.adam(1e-3).init(INT),
        TypeError,
        "params['ids'] must be floating or complex to be trained, got int32",
    ),
    (lambda: jadam.adam(1e-3).init({"m": jnp.ones(2, bool)}), TypeError, "params['m'] must be floating or complex"),
    (lambda: updated(g={"w": W["w"]}), ValueError, "params['b']['c'] has no counterpart in updates"),
    (lambda: updated(g={"w": W["w"]}, p=None), ValueError, "updates['b']['c'] is missing (or None), state.mu has it"),
    (lambda: updated(g={**W, "z": W["w"]}, p=None), ValueError, "updates['z'] has no counterpart in state.mu"),
    (lambda: updated(g={**W, "b": {"c": None}}, p=None), ValueError, "updates['b']['c'] is missing (or None)"),
    (
        lambda: updated(g={**W, "b": {"c": jnp.zeros(4)}}, p=None),
        ValueError,
        "updates['b']['c'] has shape (4,), state.mu",
    ),
    (lambda: updated(g=(W["w"],), p=None), ValueError, "updates[0] has no counterpart in state.mu"),
    (lambda: updated(jadam.scale_by_adam(), g=[W], p=None), ValueError, "updates[0]['b']['c'] has no counterpart"),
    (lambda: updated(p={**W, "w": jnp.ones(2)}), ValueError, "params['w'] has shape (2,), updates has (2, 3)"),
    (lambda: updated(g=jax.tree.map(lambda x: x.astype(int), W)), TypeError, "updates['b']['c'] must be floating"),
    (lambda: updated(jadam.adamw(1e-3), p=None), ValueError, "weight_decay needs params: call update(updates, state, params)."),
    (
        lambda: updated(state=optax.adam(1e-3).init(optax.tree.cast(W, jnp.bfloat16))),
        TypeError,
        "state.mu['b']['c'] must be float32 or wider, got bfloat16",
    ),
    (
        lambda: updated(state=optax.adam(1e-3, mu_dtype=jnp.float32).init(optax.tree.cast(W, jnp.float16))),
        TypeError,
        "state.nu['b']['c'] must be float32 or wider, got float16",
    ),
    (
        lambda: updated(jadam.adam(1e-3, mu_dtype=jnp.bfloat16), g=jnp.ones(2, jnp.complex64), params=jnp.ones(2)),
        TypeError,
        "mu_dtype must be complex for complex gradients, got bfloat16 for updates. Leave it out.",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), HYPERPARAMETERS + TREES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_same_under_jit():
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape"):
        jax.jit(lambda g: updated(g=g, p=None))({**W, "w": jnp.ones(7)})


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_traced_out_of_range_is_nan_not_silence(name, value):
    # Nothing under jit can raise: the updates are NaN, so that loss and apply_if_finite see it.
    step = jax.jit(lambda x: updated(jadam.adam(1e-3, **{name: x}))[0]["w"])
    fine = (name, value) == ("eps", 1.5)
    assert bool(jnp.isnan(step(value)).all()) != fine


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_scheduled_out_of_range(name):
    tx = jadam.adam(1e-3, **{name: lambda count: 0.5 + 0.5 * count})  # traced: 0.5, then 1
    state = tx.init(W)
    first, state = jax.jit(tx.update)(W, state)
    second, _ = jax.jit(tx.update)(W, state)
    assert np.isfinite(first["w"]).all()
    assert np.isnan(second["w"]).all()
    tx = jadam.adam(1e-3, **{name: lambda count: 1.0})  # a Python number: known at once
    with pytest.raises(ValueError, match=f"{name} must be in \\[0, 1\\), got 1"):
        tx.update(W, tx.init(W))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_traced_rate_out_of_range_is_seen(name):
    """Negated, it would climb."""
    p = jnp.ones((8, 8))
    for make in (jadam.adamw, lambda **how: jadam.by_path([("", {})], **how)):
        for bad in (lambda v: v, lambda v: lambda count: v):  # a scalar and a schedule

            def update(v, make=make, bad=bad):
                tx = make(**{"learning_rate": 1e-3, name: bad(v)})
                return tx.update(p, tx.init(p), p)[0]

            assert jnp.isnan(jax.jit(update)(-1.0)).all()
            assert jnp.isfinite(jax.jit(update)(0.5)).all()


def test_a_state_in_the_place_of_parameters():
    p = {"w": jnp.ones(3)}
    for tx in (jadam.adam(1e-3), jadam.chain(jadam.clip(1.0), jadam.adam(1e-3))):
        with pytest.raises(TypeError, match=r"state must be the tuple of 2 .* got dict of 1"):
            jadam.step(tx, p, p, tx.init(p))
