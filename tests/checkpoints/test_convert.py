"""`jadam.convert_moments` between all formats, and the version of saved states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FORMATS, normal, parametrize_grid, zip_leaves

import jadam

WIDTH = {
    "float32": 0,
    "bfloat16": 2**-7,
    "int8": 0.05,
}  # error relative to a moment; int8: to the block's maximum


def params():
    return {"kernel": normal(64, 200), "bias": normal(200), "none": None}


by_path = lambda moments: jadam.by_path([("bias", jadam.FROZEN), ("", {"moments": moments})], 1e-3)
WRAPPED = {
    "alone": lambda moments: jadam.adam(1e-3, moments=moments),
    "chain": lambda moments: optax.chain(optax.clip(1.0), jadam.nadamw(1e-3, lambda t: 0.9, moments=moments)),
    "exact_bf16": lambda moments: jadam.exact_bf16(jadam.adamw(1e-3, moments=moments)),
    "adamw": lambda moments: jadam.adamw(1e-3, moments=moments),
    "by_path": by_path,
}


@functools.cache
def state_of(wrap, moments):
    """State after three steps."""
    p, tx = params(), WRAPPED[wrap](moments)
    state, update = tx.init(p), jax.jit(tx.update)
    for i in range(3):
        _, state = update(jax.tree.map(lambda x, i=i: np.cos(np.asarray(x) + np.float32(i)), p), state, p)
    return state


@parametrize_grid(
    {"new": FORMATS, "old": FORMATS, "wrap": ["alone", "chain", "exact_bf16"]},
    default=[
        "float32-bfloat16-alone",
        "int8-float32-alone",
        "bfloat16-int8-chain",
        "int8-bfloat16-exact_bf16",
    ],
)
def test_every_format_to_every_other(new, old, wrap):
    """Shapes and dtypes are those of ``init``; moments have the error of the narrower format."""

    @jax.jit
    def convert(state):
        converted = jadam.convert_moments(state, new)
        return converted, *(jadam.convert_moments(x, "float32") for x in (state, converted))

    converted, before, after = convert(state_of(wrap, old))
    tx = WRAPPED[wrap](new)
    expected = jax.eval_shape(tx.init, params())
    avals = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)
    assert avals(converted) == avals(expected)
    for name in ("mu", "nu"):
        for x, y in zip_leaves(*(optax.tree.get(s, name) for s in (before, after))):
            x, y = np.asarray(x), np.asarray(y)
            size = np.abs(x) if new != "int8" or x.ndim < 2 else np.abs(x).max(axis=1, keepdims=True)
            assert (np.abs(x - y) <= WIDTH[new] * size).all(), name
    jax.eval_shape(tx.update, params(), converted, params())  # is accepted


def test_round_trip_of_bfloat16():
    state = state_of("alone", "bfloat16")
    wide = jadam.convert_moments(state, "float32")
    np.testing.assert_array_equal(wide[0].mu["kernel"], state[0].mu["kernel"].astype(jnp.float32))
    back = jadam.convert_moments(wide, "bfloat16")  # bfloat16 values are exact
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_optax_states():
    """Optax's states: with float32 parameters unchanged, with bfloat16 ones widened; jadam accepts both."""
    p = params()
    state = optax.adam(1e-3).init(p)
    jax.tree.map(np.testing.assert_array_equal, jadam.convert_moments(state, "float32"), state)
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), p)
    state = jadam.convert_moments(optax.adam(1e-3).init(narrow), "float32")
    jax.eval_shape(jadam.adam(1e-3).update, narrow, state, narrow)
    state = jadam.convert_moments(optax.amsgrad(1e-3).init(narrow), "bfloat16")
    jax.eval_shape(jadam.amsgrad(1e-3, moments="bfloat16").update, narrow, state, narrow)


def test_a_function_and_shardings():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    ones = np.ones((64, 768), np.float32)
    p = {"a": jax.device_put(ones, columns), "b": jnp.asarray(ones)}
    state = jadam.convert_moments(jadam.adam(1e-3).init(p), lambda path, leaf: "int8" if "a" in path else "bfloat16")
    assert (state[0].mu["a"].dtype, state[0].mu["b"].dtype) == (jnp.int8, jnp.bfloat16)
    assert state[0].mu_scale["a"].shape == (64, 8)  # blocks of 96, the width of a shard
    assert state[0].mu["a"].sharding.is_equivalent_to(columns, 2)


def test_non_finite_moments():
    state = jadam.adam(1e-3).init(params())
    nu = np.array(state[0].nu["kernel"])
    nu[3, 5] = np.inf
    state[0].nu["kernel"] = jnp.asarray(nu)
    there_and_back = lambda state, to: jadam.convert_moments(jadam.convert_moments(state, to), "float32")
    found = jax.jit(lambda state: {to: there_and_back(state, to)[0].nu["kernel"] for to in ("bfloat16", "int8")})(state)
    for to, nu in found.items():
        assert not np.isfinite(nu[3, 5]), to


@pytest.mark.parametrize("wrap", [lambda tx: tx, jadam.exact_bf16], ids=["int8", "exact_bf16"])
def test_unknown_version(wrap):
    """An unknown version is an error under jit too, and in functions that only read the state."""
    tx = wrap(jadam.scale_by_adam(moments="int8"))
    p = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params())
    state = tx.init(p)._replace(version=np.zeros(7, np.int8))
    known = 1 if wrap is jadam.exact_bf16 else 2
    for use in (jax.jit(tx.update), lambda g, s, p: jax.jit(lambda g, s, p: jadam.step(tx, g, s, p))(g, s, p)):
        with pytest.raises(ValueError, match=rf"state.version must be {known}, got 7: a \w+ saved by another version"):
            use(p, state, p)
    read = jadam.float32_params if wrap is jadam.exact_bf16 else lambda p, s: jadam.convert_moments(s, "float32")
    with pytest.raises(ValueError, match=f"state.version must be {known}, got 7"):
        read(p, state)


@pytest.mark.parametrize("version", [None, 1])
def test_not_a_version(version):
    """`convert_moments` raises for these, so that no error names it as the remedy."""
    p, error = {"kernel": normal(64, 128)}, f"got {version}: a \\w+ saved by another version of jadam. Restore it"
    tx = jadam.scale_by_adam(moments="int8")
    state = tx.init(p)._replace(version=version)
    for use in (lambda: jadam.convert_moments(state, "int8"), lambda: tx.update(p, state, p)):
        with pytest.raises(ValueError, match=error):
            use()
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    state = jadam.exact_bf16(tx).init(p)._replace(version=version)
    with pytest.raises(ValueError, match=error):
        jadam.float32_params(p, state)


@pytest.mark.parametrize("to", FORMATS)
def test_states_of_by_path(to):
    """States of `jadam.by_path` are converted to the bits of adamw's."""
    within = jadam.exact_bf16(by_path("int8"))  # another state
    state = jax.eval_shape(lambda p: jadam.convert_moments(within.init(p), to), params())
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(jax.eval_shape(by_path(to).init, params()))
    state, alone = jax.jit(lambda states: [jadam.convert_moments(x, to) for x in states])(
        [state_of("by_path", "int8"), state_of("adamw", "int8")]
    )
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(getattr(state.moments, name)["kernel"], getattr(alone[0], name)["kernel"])
    jadam.step(by_path(to), params(), state, params())
    again = jax.eval_shape(lambda state: jadam.convert_moments(state, "int8"), state)
    assert again.moments.mu["kernel"].dtype == jnp.int8
