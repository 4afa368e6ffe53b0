"""Parameters that `jadam.by_path` freezes pass untouched through every wrapper, whatever their type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MESH, normal, ones

import jadam

FLOAT0 = jax.dtypes.float0
WEIGHTS = {"w": normal(8, 16), "bf16": ones(4, jnp.bfloat16)}
FROZEN = {  # parameter, gradient
    "ids": (np.arange(3, dtype=np.int32), np.zeros(3, FLOAT0)),
    "flag": (np.array([True, False]), np.zeros(2, FLOAT0)),
    "key": (jax.random.key(0), np.zeros((), FLOAT0)),
    "float8": (np.ones(3, jnp.float8_e4m3fn), np.ones(3, jnp.float8_e4m3fn)),
    "float32 with an integer gradient": (np.ones(2, np.float32), np.arange(2)),
    "half with a float0 gradient": (np.ones(2, jnp.bfloat16), np.zeros(2, FLOAT0)),
    "text": ("a name", None),
    "function": (jnp.tanh, None),
}
PARAMS = WEIGHTS | {name: p for name, (p, _) in FROZEN.items()}
GRADS = WEIGHTS | {name: g for name, (_, g) in FROZEN.items()}

by_path = lambda: jadam.by_path([("^..(w|bf16)", {}), ("", jadam.FROZEN)], 0.1)
zero1 = lambda tx: jadam.sharding.zero1(tx, PARAMS, MESH, "data")
WRAPPERS = {
    "none": by_path,
    "chain": lambda: jadam.chain(jadam.clip_by_global_norm(1.0), by_path()),
    "exact_bf16": lambda: jadam.exact_bf16(by_path()),
    "record": lambda: jadam.record(by_path(), every=1),
    "zero1": lambda: zero1(by_path()),
    "optax.chain": lambda: optax.chain(by_path(), optax.scale(1.0)),
    "all": lambda: zero1(jadam.record(jadam.exact_bf16(jadam.chain(jadam.clip(1.0), by_path())), every=1)),
}


def assert_untouched(params):
    for name, (p, _) in FROZEN.items():
        assert params[name] is p or params[name].dtype == p.dtype
        if name != "key":
            np.testing.assert_array_equal(params[name], p)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_leaf_may_be_frozen(wrapper):
    tx = WRAPPERS[wrapper]()
    state = tx.init(PARAMS)
    new, new_state = jadam.step(tx, GRADS, state, PARAMS)
    assert_untouched(new)
    trained = lambda params: {name: params[name] for name in WEIGHTS}
    alone = lambda: jadam.by_path([("", {})], 0.1)
    tx_alone = jadam.exact_bf16(alone()) if wrapper in ("exact_bf16", "all") else alone()
    expected, _ = jadam.step(tx_alone, WEIGHTS, tx_alone.init(WEIGHTS), WEIGHTS)
    for name in WEIGHTS:
        # The first update is rate * g / (|g| + eps). |g| >= 4e-3 and its norm 11, so clipping changes the update by
        # 0.1 * 1e-8 * 11 / 4e-3 = 2.8e-6. Two sums round |w| < 4 by 2**-23 each.
        np.testing.assert_allclose(np.float32(new[name]), np.float32(expected[name]), rtol=0, atol=3.1e-6)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    updates, new_state = tx.update(GRADS, state, PARAMS)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for name in ("ids", "flag", "float8", "float32 with an integer gradient", "half with a float0 gradient"):
        assert not np.any(updates[name])
    assert updates["key"] is None  # no number, so it has no zero
    assert trained(updates).keys() == WEIGHTS.keys()


def test_a_jitted_step_and_optax_s_apply_updates():
    """A step with integers among the frozen ones is one program, and so is the two-call form."""
    names = ["w", "ids", "flag"]
    params, grads = ({name: tree[name] for name in names} for tree in (PARAMS, GRADS))
    tx = jadam.by_path([("w", {}), ("", jadam.FROZEN)], 0.1)
    state = tx.init(params)
    loss = lambda params: jnp.sum(params["w"][params["ids"]] ** 2)
    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["ids"].dtype == FLOAT0
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert (updates["ids"].dtype, updates["flag"].dtype) == (params["ids"].dtype, bool)
    two_calls = optax.apply_updates(params, updates)
    one_call, _ = jax.jit(lambda g, s, p: jadam.step(tx, g, s, p))(grads, state, params)
    for name in names:
        assert two_calls[name].dtype == one_call[name].dtype
        # the update is rounded, 2**-25 of at most 0.1 * (1 + 2**-20), and the sum, 2**-24 of |w| < 4
        np.testing.assert_allclose(two_calls[name], one_call[name], rtol=0, atol=2**-22 + 2**-28)


def test_they_are_described_and_have_no_statistics():
    tx = by_path()
    state = tx.init(PARAMS)
    leaves = {leaf.name: leaf for leaf in jadam.describe(tx, PARAMS).leaves}
    for name in ("ids", "flag", "key", "float8"):
        leaf = leaves[f"['{name}']"]
        assert (leaf.format, leaf.bytes, leaf.reason) == ("none", 0, "jadam.FROZEN")
    assert leaves["['w']"].bytes == 2 * 4 * WEIGHTS["w"].size
    assert jadam.statistics(tx, state, PARAMS).leaves.keys() == {"['bf16']", "['w']"}
    numbers = {name: p for name, p in PARAMS.items() if name not in ("text", "function")}
    parts = jadam.plan(tx, numbers, {"data": 2}, "data")
    assert parts.parameters > parts.gradients


def test_what_is_trained_is_still_checked():
    rules = [("w", jadam.FROZEN), ("", {})]
    with pytest.raises(TypeError, match=r"params\['ids'\] must be floating or complex to be trained, got int32"):
        jadam.by_path(rules, 0.1).init({name: PARAMS[name] for name in ("w", "ids")})


def test_a_pattern_may_match_only_what_cannot_be_trained():
    """Also in wrappers, which leave such leaves out before `by_path` sees the tree."""
    params, frozen = {"w": WEIGHTS["w"], "ids": PARAMS["ids"]}, [("ids", jadam.FROZEN), ("", {})]
    tx = jadam.by_path(frozen, 0.1)
    half = {"w": params["w"].astype(jnp.bfloat16), "ids": params["ids"]}
    for wrapped, p in (
        (jadam.record(tx), params),
        (jadam.exact_bf16(tx), half),
        (jadam.chain(jadam.clip(1.0), tx), half),
    ):
        new, _ = jadam.step(wrapped, p | {"ids": None}, wrapped.init(p), p)
        np.testing.assert_array_equal(new["ids"], p["ids"])
    assert [leaf.name for leaf in jadam.describe(tx, params).leaves] == ["['ids']", "['w']"]
    jadam.plan(tx, params, {"data": 2}, "data")
    jadam.sharding.zero1(tx, params, MESH, "data").init(params)
    with pytest.raises(ValueError, match="by_path's pattern 'other' matches no path"):
        jadam.by_path([("other", jadam.FROZEN), ("", {})], 0.1).init(params)


def test_a_frozen_number_keeps_its_type():
    """NumPy's float64 is not rounded to float32, and a Python number stays one, although a gradient is given."""
    params = {"w": WEIGHTS["w"], "f": np.array([0.1]), "g": 0.1}
    tx = jadam.by_path([("f|g", jadam.FROZEN), ("", {})], 0.1)
    new, _ = jadam.step(tx, params, tx.init(params), params)
    assert new["f"] is params["f"]
    assert new["g"] is params["g"]


NEED_GRADIENTS = {  # they keep something of every floating parameter
    "exact_bf16": lambda tx, params: jadam.exact_bf16(tx),
    "record": lambda tx, params: jadam.record(jadam.exact_bf16(tx), every=1),
    "zero1": lambda tx, params: jadam.sharding.zero1(tx, params, MESH, "data"),
    "zero1 of record": lambda tx, params: jadam.sharding.zero1(
        jadam.record(jadam.exact_bf16(tx), every=1), params, MESH, "data"
    ),
}


@pytest.mark.parametrize("wrapper", NEED_GRADIENTS)
def test_a_frozen_floating_parameter_without_a_gradient(wrapper):
    """It gets zero gradients."""
    params = {"w": ones((8, 16), jnp.bfloat16), "f": ones(8, jnp.bfloat16), "g": ones(3)}
    tx = NEED_GRADIENTS[wrapper](jadam.by_path([("f|g", jadam.FROZEN), ("", {})], 0.1), params)
    grads = params | {"f": None, "g": None}
    for call in (jadam.step, lambda tx, g, s, p: (optax.apply_updates(p, tx.update(g, s, p)[0]), None)):
        new, _ = call(tx, grads, tx.init(params), params)
        np.testing.assert_array_equal(new["f"], 1)
        np.testing.assert_array_equal(new["g"], 1)
        assert not np.any(new["w"] == 1)


def test_a_frozen_number_keeps_its_type_in_a_chain_that_is_not_fused():
    params = {"w": ones(4, jnp.bfloat16), "f": np.array([0.1])}
    tx = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.by_path([("f", jadam.FROZEN), ("", {})], 0.1))
    assert not jadam.describe(tx, params).one_pass
    new, _ = jadam.step(tx, params | {"f": np.zeros(1)}, tx.init(params), params)
    assert new["f"] is params["f"]
