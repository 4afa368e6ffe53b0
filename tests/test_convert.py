"""`jadam.convert_moments`: from every format to every other, and what a saved state's version is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jadam

FORMATS = ["float32", "bfloat16", "int8"]
WIDTH = {"float32": 0, "bfloat16": 2**-7, "int8": 0.05}  # of a moment's own size, or for int8 of its block's largest


def params():
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    return {"kernel": normal(64, 200), "bias": normal(200), "none": None}


def state_of(tx, steps=3):
    p = params()
    state = tx.init(p)
    for i in range(steps):
        g = jax.tree.map(lambda x, i=i: jnp.cos(x + i), p)
        _, state = jax.jit(tx.update)(g, state, p)
    return state


@pytest.mark.every(7)
@pytest.mark.parametrize("wrap", ["alone", "chain", "exact_bf16"])
@pytest.mark.parametrize("old", FORMATS)
@pytest.mark.parametrize("new", FORMATS)
def test_every_format_to_every_other(old, new, wrap):
    """The avals are those of ``init`` and the moments are kept as well as the narrower format can."""
    wrapped = {
        "alone": lambda moments: jadam.adam(1e-3, moments=moments),
        "chain": lambda moments: optax.chain(optax.clip(1.0), jadam.nadamw(1e-3, lambda t: 0.9, moments=moments)),
        "exact_bf16": lambda moments: jadam.exact_bf16(jadam.adamw(1e-3, moments=moments)),
    }[wrap]
    state = state_of(wrapped(old))
    converted = jadam.convert_moments(state, new)
    expected = jax.eval_shape(wrapped(new).init, params())
    avals = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)
    assert avals(converted) == avals(expected)
    before, after = (jadam.convert_moments(x, "float32") for x in (state, converted))
    for name in ("mu", "nu"):
        for x, y in zip(*(jax.tree.leaves(optax.tree.get(s, name)) for s in (before, after)), strict=True):
            size = jnp.abs(x) if new != "int8" or x.ndim < 2 else jnp.abs(x).max(axis=1, keepdims=True)
            assert (jnp.abs(x - y) <= WIDTH[new] * size).all()
    p = params()
    jax.jit(wrapped(new).update)(p, converted, p)  # is accepted


def test_widening_is_exact_and_there_and_back_the_same():
    state = state_of(jadam.adam(1e-3, moments="bfloat16"))
    wide = jadam.convert_moments(state, "float32")
    np.testing.assert_array_equal(wide[0].mu["kernel"], state[0].mu["kernel"].astype(jnp.float32))
    back = jadam.convert_moments(wide, "bfloat16")  # what bfloat16 holds is not rounded
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_optax_states():
    """Of float32 parameters unchanged, of bfloat16 ones widened, after which jadam goes on."""
    p = params()
    state = optax.adam(1e-3).init(p)
    jax.tree.map(np.testing.assert_array_equal, jadam.convert_moments(state, "float32"), state)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    state = jadam.convert_moments(optax.adam(1e-3).init(narrow), "float32")
    jadam.adam(1e-3).update(narrow, state, narrow)
    state = jadam.convert_moments(optax.amsgrad(1e-3).init(narrow), "bfloat16")
    jadam.amsgrad(1e-3, moments="bfloat16").update(narrow, state, narrow)


def test_a_function_and_shardings():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    p = {"a": jax.device_put(jnp.ones((64, 768)), columns), "b": jnp.ones((64, 768))}
    state = jadam.convert_moments(jadam.adam(1e-3).init(p), lambda path, leaf: "int8" if "a" in path else "bfloat16")
    assert (state[0].mu["a"].dtype, state[0].mu["b"].dtype) == (jnp.int8, jnp.bfloat16)
    assert state[0].mu_scale["a"].shape == (64, 8)  # 96 a block, which fits a shard
    assert state[0].mu["a"].sharding.is_equivalent_to(columns, 2)


def test_non_finite_moments_stay_so():
    state = jadam.adam(1e-3).init(params())
    state[0].nu["kernel"] = state[0].nu["kernel"].at[3, 5].set(jnp.inf)
    for to in ("bfloat16", "int8"):
        nu = jadam.convert_moments(jadam.convert_moments(state, to), "float32")[0].nu["kernel"]
        assert not jnp.isfinite(nu[3, 5])


@pytest.mark.parametrize("wrap", [lambda tx: tx, jadam.exact_bf16], ids=["int8", "exact_bf16"])
def test_a_version_that_is_not_known(wrap):
    """Under jit too, and where a state is only read."""
    tx = wrap(jadam.scale_by_adam(moments="int8"))
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = tx.init(p)._replace(version=jnp.zeros(7, jnp.int8))
    for use in (jax.jit(tx.update), lambda g, s, p: jax.jit(lambda g, s, p: jadam.step(tx, g, s, p))(g, s, p)):
        with pytest.raises(ValueError, match=r"state.version must be 1, got 7: a \w+ saved by another version"):
            use(p, state, p)
    read = jadam.float32_params if wrap is jadam.exact_bf16 else lambda p, s: jadam.convert_moments(s, "float32")
    with pytest.raises(ValueError, match=r"state.version must be 1, got 7"):
        read(p, state)


@pytest.mark.parametrize("to", FORMATS)
def test_groups_of_leaves(to):
    """`jadam.by_path` goes on with what comes out, on the bits of adamw's moments."""
    rules = lambda moments: jadam.by_path([("bias", jadam.FROZEN), ("", {"moments": moments})], 1e-3)
    state = jadam.convert_moments(jadam.exact_bf16(rules("int8")).init(params()), to)  # within another state too
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(rules(to).init(params()))
    state = jadam.convert_moments(state_of(rules("int8")), to)
    alone = jadam.convert_moments(state_of(jadam.adamw(1e-3, moments="int8")), to)[0]
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(getattr(state.moments, name)["kernel"], getattr(alone, name)["kernel"])
    jadam.step(rules(to), params(), state, params())
    assert jadam.convert_moments(state, "int8").moments.mu["kernel"].dtype == jnp.int8
