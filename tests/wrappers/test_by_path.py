"""`jadam.by_path` trains each leaf as `jadam.adamw` with that leaf's settings."""

import functools
import re

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import CPU, assert_equal, float32_params, parametrize, parametrize_grid, zip_leaves

import jadam
from jadam._transformation.transformation import QuantizedAdamState

RULES = [
    ("embed", jadam.FROZEN),
    ("bias|scale", {"weight_decay": 0.0, "lr_mult": 2.0}),
    ("head", {"b1": 0.8, "b2": 0.99, "moments": "int8"}),
    ("", {}),
]


def params(seed=0, dtype=jnp.float32):
    normal = functools.partial(helpers.normal, seed=seed, dtype=dtype)
    return {
        "embed": normal(64, 128),
        "layers": [{"kernel": normal(30, 20), "bias": normal(20)}, None],
        "norm": {"scale": normal(20)},
        "head": normal(64, 128),
    }


def trained(step, tx, start=params, steps=5):
    p = start()
    state = tx.init(p)
    for i in range(steps):
        p, state = step(start(i + 1), state, p)
    return p, state


@jax.jit
def apply(p, u):
    return optax.apply_updates(p, u)


def update_and_apply(tx):
    """``step(g, state, p)`` with ``tx.update`` and `optax.apply_updates`, each jitted."""
    update = jax.jit(tx.update)

    def step(g, state, p):
        updates, state = update(g, state, p)
        return apply(p, updates), state

    return step


def one_pass(tx):
    """``step(g, state, p)`` with `jadam.step`, jitted."""
    return jax.jit(functools.partial(jadam.step, tx))


COSINE = optax.cosine_decay_schedule(1e-2, 10)


def at(tree, path):
    return functools.reduce(lambda x, key: x[key], path, tree)


def only(tree, *paths):
    """``tree`` with all leaves but ``paths`` replaced by None."""
    names = ["".join(f"[{key!r}]" for key in path) for path in paths]
    keep = lambda q, x: x if jax.tree_util.keystr(q) in names else None
    return jax.tree_util.tree_map_with_path(keep, tree)


@parametrize_grid(
    {"rate": {"schedule": COSINE, "constant": 1e-2}, "take": [update_and_apply, one_pass]},
    default=["schedule-update_and_apply", "schedule-one_pass"],
)
def test_each_leaf_is_trained_by_its_own_adamw(rate, take):
    """Moments are equal to the bit; parameters differ only by the rounding of -lr * u in Optax's stages."""
    tx = jadam.by_path(RULES, rate, weight_decay=0.1)
    got, state = trained(take(tx), tx)
    doubled = (lambda count: 2 * rate(count)) if callable(rate) else 2 * rate
    alone = {
        (("layers", 0, "kernel"),): jadam.adamw(rate, weight_decay=0.1),
        (("layers", 0, "bias"), ("norm", "scale")): jadam.adamw(doubled, weight_decay=0.0),
        (("head",),): jadam.adamw(rate, 0.8, 0.99, weight_decay=0.1, moments="int8"),
    }
    for paths, tx in alone.items():
        own, s = trained(take(tx), tx, lambda seed=0, paths=paths: only(params(seed), *paths))
        for path in paths:
            # 5 steps: updates differ by at most 2 ulp, and each side rounds p, |p| < 4
            atol, name = 5 * 2 * 2**-24 * 4, str(path)
            np.testing.assert_allclose(at(got, path), at(own, path), rtol=0, atol=atol, err_msg=name)
            mu = at(state.moments.mu, path)
            if mu.dtype == jnp.float32:
                np.testing.assert_array_equal(mu, at(s[0].mu, path), err_msg=name)
    np.testing.assert_array_equal(got["embed"], params()["embed"])


def test_frozen_leaves_stay_and_have_no_state():
    p = {**params(), "embed": jnp.asarray(np.full((64, 128), -0.0, np.float32))}  # adding 0 would make it 0.0
    tx = jadam.by_path(RULES, 1e-2)
    state = tx.init(p)
    assert state.moments.mu["embed"] is None
    described = jadam.describe(tx, p)
    embed = next(x for x in described.leaves if x.name == "['embed']")
    assert (embed.bytes, embed.format, embed.reason) == (0, "none", "'embed' jadam.FROZEN")
    assert described.bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    updates, _ = jax.jit(tx.update)(params(1), state, p)
    assert not np.any(updates["embed"])
    for take in (update_and_apply, one_pass):
        embed = np.asarray(take(tx)(params(1), state, p)[0]["embed"])
        assert np.signbit(embed).all() == (take is one_pass), take


@parametrize("moments", ["int8", "float32", "bfloat16"], default=["int8"])
def test_one_pass_under_exact_bf16_and_clipping(moments):
    """Each leaf gets its own scalars within one kernel call."""
    tx = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.by_path(RULES, 1e-2, moments=moments))
    tx = jadam.exact_bf16(tx)
    p32 = params()
    start = jax.jit(lambda p: jadam.from_float32(p, tx))(p32)
    results = []
    for take in (update_and_apply, one_pass):
        (p, state), step = start, take(tx)
        for i in range(3):
            p, state = step(params(i + 1, jnp.bfloat16), state, p)
        results.append(jax.device_get(float32_params(p, state)))
    # 1e-4 of the int8 codes are rounded to the other neighbour. That changes the element's next two updates, of lr on
    # average and at most lr * R = 0.07, by a few per cent.
    for a, b in zip_leaves(*results):
        assert np.mean(np.abs(a - b) > 1e-6) < 1e-2
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-3)
    np.testing.assert_array_equal(results[1]["embed"], p32["embed"])
    described = jadam.describe(tx, p)
    assert described.one_pass == (CPU.kernel is not None)


def test_one_compile_with_schedules_of_everything():
    schedule = lambda count: 0.9 + 0.01 / (1 + count)
    rules = [("head", {"b1": schedule, "weight_decay": lambda count: 0.1 / (1 + count)}), ("", {"b2": schedule})]
    tx = jadam.by_path(rules, optax.cosine_decay_schedule(1e-2, 10))
    step = jax.jit(functools.partial(jadam.step, tx))
    p = params()
    state = tx.init(p)
    for i in range(4):
        p, state = step(params(i), state, p)
    assert step._cache_size() == 1
    assert int(state.moments.count) == 4
    assert [sorted(x) for x in state.corrections] == [["b1"], ["b2"]]
    assert optax.tree.get(state, "mu")["head"].shape == (64, 128)


def test_inject_hyperparams():
    tx = optax.inject_hyperparams(jadam.by_path, hyperparam_dtype=jnp.float32)(RULES, learning_rate=1e-2)
    p = params()
    state = tx.init(p)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = jax.jit(tx.update)(params(1), state, p)
    assert not any(u.any() for u in jax.tree.leaves(updates))


def test_tree_map_params():
    tx = jadam.by_path([("", {})], 1e-2)
    p = params()
    added = optax.tree.map_params(tx, lambda x: np.asarray(x) + 1, tx.init(p))
    assert all(x.all() for x in jax.tree.leaves(added.moments.mu))


def test_scales_only_where_a_rule_may_choose_int8():
    """As in `jadam.scale_by_adam`. States of earlier versions always had them; they still take the same step."""
    p = params()
    state_type = lambda rules, **k: type(jadam.by_path(rules, 1e-2, **k).init(p).moments)
    mixed, int8 = [("bias", {"moments": "bfloat16"}), ("", {})], [("bias", {}), ("", {"moments": "int8"})]
    assert state_type(mixed) is optax.ScaleByAdamState
    assert state_type([("", {"moments": "bfloat16"})], moments="int8") is optax.ScaleByAdamState
    assert state_type(int8) is state_type(mixed, moments=lambda path, leaf: "float32") is QuantizedAdamState
    tx = jadam.by_path(mixed, 1e-2)
    state = tx.init(p)
    placeholders = jax.tree.map(lambda x: np.zeros((1,) * x.ndim, np.int8), p)
    old = state._replace(moments=QuantizedAdamState(*state.moments, placeholders, placeholders, np.ones(2, np.int8)))
    for step in (tx.update, jax.jit(tx.update)):
        (u, new), (u_old, new_old) = step(params(1), state, p), step(params(1), old, p)
        assert_equal(u_old, u)
        assert jax.tree.structure(new_old) == jax.tree.structure(old)
        assert_equal(tuple(new_old.moments[:3]), tuple(new.moments))
    assert_equal(jadam.convert_moments(old, "float32"), jadam.convert_moments(state, "float32"))
    to_int8 = jadam.convert_moments(state, "int8")
    assert_equal(to_int8, jadam.convert_moments(old, "int8"))
    int8_state = jadam.by_path([("", {})], 1e-2, moments="int8").init(p)
    assert jax.tree.map(jnp.shape, to_int8.moments) == jax.tree.map(jnp.shape, int8_state.moments)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.Dense(4)(x))


def test_paths_of_linen_nnx_and_equinox():
    """One pattern matches the biases of Linen, NNX and Equinox models, at init and in updates."""
    biases = [("bias$|bias'\\]$", jadam.FROZEN), ("", {})]
    x = np.ones((2, 3), np.float32)
    linen_params = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    names = [leaf.name for leaf in jadam.describe(jadam.by_path(biases, 1e-3), linen_params).leaves]
    assert names[:2] == ["['Dense_0']['bias']", "['Dense_0']['kernel']"]

    linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.constant(0.1), rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear(3, 4), linear(4, 1))
    optimizer = nnx.Optimizer(model, jadam.by_path(biases, 0.1), wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.as_pure(nnx.state(model)) if hasattr(nnx, "as_pure") else nnx.state(model))

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 3.0) ** 2))(model)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[1]
    first = before["layers"][0]
    np.testing.assert_array_equal(model.layers[0].bias[...], np.asarray(first["bias"]))
    assert (np.asarray(model.layers[0].kernel[...]) != np.asarray(first["kernel"])).any()

    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 3, 1, 4, 1, key=jax.random.key(0))
    equinox = eqx.filter(mlp, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    described = jadam.describe(jadam.by_path(biases, 1e-3), equinox)
    assert [(x.name, x.format) for x in described.leaves][:2] == [
        (".layers[0].weight", "float32"),
        (".layers[0].bias", "none"),
    ]


def test_empty_parameters():
    assert jax.tree.leaves(jadam.by_path([("", {})], 1e-3).init({}))


def test_unreachable_rules():
    text = "by_path's pattern 'bias' is never used: earlier patterns, such as 'layers', match all its paths"
    with pytest.raises(ValueError, match=text):
        jadam.by_path([("layers", {}), ("bias", jadam.FROZEN), ("", {})], 1e-3).init(params())
    partly = [("layers", {}), ("scale|bias", {}), ("norm", {}), ("embed|head", {}), ("", {})]
    with pytest.raises(ValueError, match="'norm' is never used"):
        jadam.by_path(partly, 1e-3).init(params())
    for rules in ([("kernel|b", {}), ("a", jadam.FROZEN)], [("", {}), ("a", jadam.FROZEN)]):  # it matches all paths
        with pytest.raises(ValueError, match="'a' is never used"):
            jadam.by_path(rules, 1e-3).init({"a": {"kernel": helpers.zeros(3), "b": helpers.zeros(3)}})
    partly.pop(2)
    jadam.by_path(partly, 1e-3).init(params())  # the last rule matches no leaf, which is allowed


def test_a_path_as_a_pattern():
    """Its brackets would match any of the characters within, so all paths."""
    p = {"embed": helpers.ones(3), "head": helpers.ones(3)}
    with pytest.raises(ValueError, match=r"must be a regular expression, got a path\. Escape it: re\.escape"):
        jadam.by_path([("['embed']", jadam.FROZEN), ("", {})], 0.1).init(p)
    tx = jadam.by_path([(re.escape("['embed']"), jadam.FROZEN), ("", {})], 0.1)
    new, _ = jadam.step(tx, p, tx.init(p), p)
    np.testing.assert_array_equal(new["embed"], 1)
    assert not np.any(new["head"] == 1)


def test_other_rules_for_an_old_state():
    """Rules may be added and removed between phases of training, but not with scheduled decay rates."""
    p = {"a": helpers.ones(3), "b": helpers.ones(3)}
    old, new = jadam.by_path([("", {})], 0.1), jadam.by_path([("b", {"lr_mult": 2.0}), ("", {})], 0.1)
    for first, second in ((old, new), (new, old)):
        _, state = jadam.step(first, p, first.init(p), p)
        after, state = jadam.step(second, p, state, p)
        expected, _ = jadam.step(second, p, jadam.step(second, p, second.init(p), p)[1], p)
        helpers.assert_equal(after, expected)
        assert len(state.corrections) == len(second.init(p).corrections)
    scheduled = jadam.by_path([("", {"b1": lambda count: 0.9})], 0.1)
    with pytest.raises(ValueError, match=r"state\.corrections must be of 2 rules, got 1"):
        jadam.step(new, p, scheduled.init(p), p)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": None}, "params['norm']['scale'] is missing or None, state.moments.mu has it."),
        ({"head": [params()["head"]]}, "state.moments.mu['head'][0] is missing or None, params has it."),
        ({"embed_2": params()["embed"]}, "state.moments.mu['embed_2'] is missing or None, params has it."),
        ({"embed": None}, "params['embed'] is missing or None, state.moments.mu has it."),
    ],
)
def test_another_tree_than_that_of_init(change, text):
    """The first leaf that differs is named, be it trained or frozen."""
    tx = jadam.by_path(RULES, 1e-3)
    other = {key: x for key, x in {**params(), **change}.items() if x is not None}
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.update(other, tx.init(params()), other)
