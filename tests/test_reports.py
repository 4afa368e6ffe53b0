"""Faults that users' programs found: each input, and others of its kind."""

import copy
import dataclasses
import decimal
import fractions
import functools
import pickle
import re
import warnings

import cloudpickle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import MESH, assert_equal

import jadam
import jadam.flax
from jadam._fused import backends, primitive
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
    backends._warned.clear()
    without = dict.fromkeys(("cpu", "cuda", "tpu"), Backend(None, "no extension was built"))
    monkeypatch.setattr(primitive, "backends", lambda: without)
    params = jnp.ones(5)
    for rate in (0.1, 0.2):
        tx = jadam.chain(jadam.clip(rate), jadam.adam(rate))
        jax.jit(lambda p, tx=tx: jadam.step(tx, p, tx.init(p), p))(params)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.endswith("without its kernel: no extension was built")
    backends._warned.clear()


# ---------------------------------------------------------------- Flax's objects in place of states and parameters


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


NAMES = [f"['layers'][{i}]['{name}']" for i in range(2) for name in ("bias", "kernel")]


@pytest.mark.parametrize("kind", [jadam.flax.Optimizer, nnx.Optimizer])
def test_an_nnx_optimizer_and_its_model(kind):
    """They are understood, and a parameter has one name everywhere."""
    model, tx = Model(), jadam.record(jadam.by_path([("kernel", {}), ("", {"lr_mult": 0.5})], 0.1), every=1)
    optimizer = kind(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    for described in (jadam.describe(optimizer, model), jadam.describe(tx, model)):
        assert [leaf.name for leaf in described.leaves] == NAMES
        assert {leaf.format for leaf in described.leaves} == {"float32"}
    assert [*jadam.statistics(tx, optimizer, model).leaves] == NAMES
    assert [*jadam.history(optimizer).leaves] == NAMES
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    assert [leaf.name for leaf in jadam.sharding.zero1(jadam.adam(0.1), model, mesh, "data").layout.leaves] == NAMES
    assert jadam.plan(tx, model, {"data": 2}, "data").num_parameters == 4 * 8 + 8 + 8 * 2 + 2


def test_an_nnx_model_in_bfloat16():
    model, tx = Model(), jadam.exact_bf16(jadam.adam(0.1))
    params, _ = jadam.from_float32(model, tx)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    nnx.update(model, params)
    optimizer = jadam.flax.Optimizer(model, tx, wrt=nnx.Param)
    masters = jadam.float32_params(model, optimizer)
    assert_equal(masters, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_a_train_state():
    params, tx = {"w": jnp.ones((4, 4))}, optax.chain(jadam.adam(0.1), jadam.average_params())
    train_state = jadam.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
    for given in (params, train_state):
        (leaf,) = jadam.describe(train_state, given).leaves
        assert (leaf.name, leaf.format) == ("['w']", "float32")
    assert_equal(jadam.averaged_params(train_state), params)


def test_what_is_not_understood_says_what_to_pass():
    model, tx = Model(), jadam.adam(0.1)
    optimizer = jadam.flax.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    for call, text in [
        (lambda: jadam.describe(tx, optimizer), r"got Optimizer\. Pass the model, or nnx\.state\(model, nnx\.Param\)"),
        (lambda: jadam.step(optimizer, grads, optimizer.opt_state, grads), r"step needs .* Pass its tx\."),
        (lambda: optimizer.update(grads, model), r"got State\. Argument order: optimizer\.update\(model, grads\)"),
        (lambda: jadam.step(tx, grads, optimizer, grads), r"state must be the tuple of 2 that init returns"),
    ]:
        with pytest.raises(TypeError, match=text):
            call()


# ---------------------------------------------------------------- what passed silently


def exact_bf16_over_float32():
    return jadam.exact_bf16(jadam.adam(0.1)).init(jnp.ones(3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jadam.adam(1e-3, 1e-8), "b1 is usually near 0.9, got 1e-08. Did you mean eps=1e-08?"),
        (lambda: jadam.nadam(1e-3, 0.999, 0.9), "b1 is usually at most b2, got b1=0.999 and b2=0.9. Are they swapped?"),
        (
            lambda: jadam.by_path([("", {"b1": 0.9995})], 1e-3),
            "b1 is usually at most b2, got b1=0.9995 and b2=0.999. Are they swapped?",
        ),
        (
            exact_bf16_over_float32,
            "exact_bf16 changes nothing: no parameter is bfloat16, the first is float32. Convert them: "
            "params, state = jadam.from_float32(params, tx).",
        ),
    ],
)
def test_a_warning_at_the_users_line(make, text):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        make()
    assert [str(x.message) for x in found] == [text]
    assert found[0].filename == __file__


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.0, 0.0), (0.9, 0.9), (0.95, 0.95)])
def test_usual_decay_rates_give_no_warning(betas):
    jadam.adam(1e-3, *betas)  # pytest turns warnings into errors


def test_exact_bf16_over_some_bfloat16_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jadam.exact_bf16(jadam.adam(0.1)).init({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)})
        jadam.exact_bf16(jadam.adam(0.1)).init({})


def test_describe_says_that_exact_bf16_changes_nothing():
    says = lambda params: "exact_bf16 changes nothing" in jadam.describe(jadam.exact_bf16(jadam.adam(0.1)), params).step
    assert says(jnp.ones(3))
    assert not says(jnp.ones(3, jnp.bfloat16))
    assert not says({})


@pytest.mark.parametrize("dtype", [jnp.int8, np.int8, np.dtype(np.int8), jnp.bfloat16, jnp.float32])
def test_moments_may_be_a_dtype(dtype):
    params = jnp.ones((64, 128))
    name = np.dtype(dtype).name
    expected = jadam.adam(0.1, moments=name).init(params)
    assert_equal(jadam.adam(0.1, moments=dtype).init(params), expected)
    per_leaf = jadam.adam(0.1, moments=lambda path, leaf: name).init(params)
    assert_equal(jadam.adam(0.1, moments=lambda path, leaf: dtype).init(params), per_leaf)
    by_path = [jadam.by_path([("", {"moments": x})], 0.1).init(params) for x in (dtype, name)]
    assert_equal(*by_path)
    assert_equal(jadam.convert_moments(expected, dtype), jadam.convert_moments(expected, name))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jadam.adam(0.1, moments="bf16"), "got 'bf16'. Did you mean 'bfloat16'?"),
        (lambda: jadam.adam(0.1, moments="fp32"), "got 'fp32'. Did you mean 'float32'?"),
        (lambda: jadam.adam(0.1, 0.9, 0.999, 1e-8, 0.0, "int8"), "got int8. For int8 moments: moments='int8'."),
        (lambda: jadam.adam(0.1, 0.9, 0.999, 1e-8, 0.0, "bf16"), "got 'bf16'. Did you mean 'bfloat16'?"),
        (lambda: jadam.adam(0.1, b2=np.float16(0.999)), "b2 must be float32 or wider, got float16"),
        (lambda: jadam.adam(0.1, b2=ml_dtypes.bfloat16(0.999)), "b2 must be float32 or wider, got bfloat16"),
    ],
)
def test_a_name_or_a_number_of_another_kind(make, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        make()


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_a_numpy_number_as_learning_rate(kind):
    """A scalar or an array of no dimensions."""
    rate = kind(0.125)
    params = jnp.ones(3)
    expected, _ = jadam.adam(0.125).update(params, jadam.adam(0.125).init(params))
    for tx in (jadam.adam(rate), jadam.adam(np.asarray(rate)), jadam.adam(jnp.asarray(rate))):
        assert_equal(tx.update(params, tx.init(params))[0], expected)


# ---------------------------------------------------------------- tables, plots, statistics


def test_describe_of_no_parameters():
    described = jadam.describe(jadam.adam(0.1), {})
    assert np.isnan(described.bytes_per_parameter)
    assert str(described).splitlines()[1].split() == ["total", "4", "-"]


def test_columns_align_under_wide_and_combining_characters():
    """A CJK character takes two columns of a terminal, a combining accent none."""
    names = ["層", "e\u0301", "e", "한글"]
    lines = str(jadam.describe(jadam.adam(0.1), {name: jnp.ones(3) for name in names})).splitlines()[1:5]
    columns = {"層": 2, "e\u0301": 1, "e": 1, "한글": 4}
    starts = {line.index("3") - len(name) + columns[name] for name in names for line in lines if f"'{name}'" in line}
    assert len(starts) == 1


@jax.tree_util.register_pytree_with_keys_class
class Pair:
    """Two children with the same key."""

    def __init__(self, a, b):
        self.children = a, b

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("w"), x) for x in self.children], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_two_leaves_of_one_path():
    params = {"x": Pair(jnp.ones((64, 128)), jnp.full(4, 2.0))}
    names = ["['x'].w", "['x'].w (2)"]
    tx = jadam.record(jadam.adam(0.1, moments="int8"), every=1)
    state = tx.init(params)
    described = jadam.describe(tx, params)
    assert [(leaf.name, leaf.shape, leaf.format) for leaf in described.leaves] == [
        (names[0], (64, 128), "int8"),
        (names[1], (4,), "float32"),
    ]
    params, state = jadam.step(tx, params, state, params)
    found = jadam.statistics(tx, state, params).leaves
    assert [*found] == [*jadam.history(state).leaves] == names
    # The update is the rate, and so are parameters 1 and 2 less the rate, to 3 %: an int8 moment's error.
    ratios = [float(x.update_ratio) for x in found.values()]
    np.testing.assert_allclose(ratios, [0.1 / 0.9, 0.1 / 1.9], rtol=0.03)
    masters = jadam.exact_bf16(jadam.adam(0.1))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"x": Pair(jnp.ones(4), jnp.full(4, 2.0))})
    assert_equal(jadam.float32_params(half, masters.init(half))["x"].children, (jnp.ones(4), jnp.full(4, 2.0)))


def test_names_no_font_has_are_escaped(recwarn):
    """Else matplotlib would draw boxes and warn. Legends are below the axes."""
    tx = jadam.record(jadam.adam(0.1), every=1)
    params = {"層": jnp.ones(3), "\U0001fbff": jnp.ones(3), "w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        params, state = jadam.step(tx, params, state, params)
    figure = jadam.plot(jadam.history(state))
    figure.canvas.draw()
    assert not [str(x.message) for x in recwarn if "Glyph" in str(x.message)]
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert "['w']" in labels
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_the_step_at_which_v_overflows():
    """Its update is 0, not NaN, and so it is in the statistics."""
    tx, params = jadam.adam(0.1), jnp.ones(3)
    new, state = jadam.step(tx, jnp.full(3, 3e19), tx.init(params), params)
    assert np.isinf(state[0].nu).all()
    np.testing.assert_array_equal(new, params)
    total = jadam.statistics(tx, state, new).total
    assert (total.update_rms, total.snr) == (0, 0)


# ---------------------------------------------------------------- NumPy's float64

WITH_FLOAT64 = {
    "adam": lambda: jadam.adam(np.float64(0.1), np.float64(0.9)),
    "schedules": lambda: jadam.adamw(lambda t: np.float64(0.1), b1=lambda t: np.float64(0.9)),
    "mu_dtype": lambda: jadam.adam(0.1, mu_dtype=np.float64),
    "bfloat16": lambda: jadam.amsgrad(0.1, moments="bfloat16"),
    "int8": lambda: jadam.adam(0.1, moments="int8"),
    "chain": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "by_path": lambda: jadam.by_path([("", {})], 0.1),
    "average_params": lambda: optax.chain(jadam.adam(0.1), jadam.average_params()),
    "mean of params": lambda: optax.chain(jadam.radam(0.1), jadam.average_params(None)),
    "record": lambda: jadam.record(jadam.adam(0.1), every=1),
}


@pytest.mark.parametrize("name", WITH_FLOAT64)
def test_float64_of_numpy_gives_no_warning(name):
    """pytest turns warnings into errors. Results are float32, as JAX's are, and those of float32 arrays."""
    tx = WITH_FLOAT64[name]()
    params = {"w": np.ones((64, 128)), "b": np.ones(3)}
    single = jax.tree.map(np.float32, params)
    assert_equal(tx.init(params), tx.init(single))
    state = tx.init(single)
    assert_equal(tx.update(params, state, params), tx.update(single, state, single))
    assert_equal(jadam.step(tx, params, state, params), jadam.step(tx, single, state, single))
    jadam.describe(tx, params)
    jadam.checksum((params, state))
    if name in ("adam", "int8"):
        assert_equal(jadam.statistics(tx, state, params).leaves, jadam.statistics(tx, state, single).leaves)
        jadam.convert_moments(state, "bfloat16")
        mesh = jax.sharding.AbstractMesh((2,), ("data",))
        jadam.sharding.zero1(tx, params, mesh, "data")


# ---------------------------------------------------------------- an old state and another optimizer

COSINE = optax.cosine_decay_schedule(1e-2, 10)
B1_SCHEDULE = {"b1": lambda count: 0.9}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (jadam.adam(1e-2), jadam.adam(COSINE), "state[1] must have the step count of a schedule, got EmptyState"),
        (jadam.adamw(1e-2), jadam.adamw(COSINE), "state[2] must have the step count of a schedule, got EmptyState"),
        (
            jadam.adamw(1e-2),
            jadam.adamw(1e-2, weight_decay=COSINE),
            "state[1] must have the step count of a schedule, got EmptyState: it was made with a constant weight_decay",
        ),
        (jadam.record(jadam.adam(1e-2)), jadam.record(jadam.adam(COSINE)), "state[1] must have the step count"),
        (
            jadam.adam(1e-2, **B1_SCHEDULE),
            jadam.adam(1e-2, b2=lambda count: 0.99),
            "state.corrections must have b2, got b1: it was made with schedules for other decay rates.",
        ),
        (
            jadam.adam(1e-2, **B1_SCHEDULE),
            jadam.nadam(1e-2, momentum_decay=4e-3),
            "state.corrections must have momentum, got b1",
        ),
    ],
)
def test_a_state_without_what_a_schedule_needs(old, new, text):
    params = jnp.ones(3)
    state = old.init(params)
    for call in (lambda: jadam.step(new, params, state, params), lambda: new.update(params, state, params)):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()


def test_the_moments_are_kept_with_the_schedules_part_of_a_new_state():
    """As the error says."""
    params, old, new = jnp.ones(3), jadam.adam(1e-2), jadam.adam(COSINE)
    params, state = jadam.step(old, params, old.init(params), params)
    _, after = jadam.step(new, params, (state[0], new.init(params)[1]), params)
    assert after[0].count == 2


def test_donated_arrays_are_named():
    params, tx = jnp.ones(3), optax.chain(jadam.adam(0.1), jadam.average_params())
    state = tx.init(params)
    donate(state)
    for call in (lambda: jadam.averaged_params(state), lambda: jadam.checksum(state)):
        with pytest.raises(ValueError, match=r"was donated to an earlier step; use the value that step returned"):
            call()


def test_bfloat16_as_numpy_loads_it(tmp_path):
    """NumPy gives it the dtype V2; the remedy works."""
    tx, params = jadam.amsgrad(0.1, moments="bfloat16"), {"w": jnp.ones(3, jnp.bfloat16)}
    np.savez(tmp_path / "saved.npz", w=params["w"], nu=tx.init(params)[0].nu["w"])
    with np.load(tmp_path / "saved.npz") as file:
        loaded = dict(file)
    state = tx.init(params)
    broken = state[0]._replace(nu={"w": loaded["nu"]}), *state[1:]
    for call, name in (
        (lambda: jadam.checksum({"w": loaded["w"]}), r"tree\['w'\]"),
        (lambda: tx.init({"w": loaded["w"]}), r"params\['w'\]"),
        (lambda: tx.update(params, broken, params), r"state.*nu\['w'\]"),
        (lambda: jadam.convert_moments(broken, "float32"), r"state.*nu\['w'\]"),
        (lambda: jadam.describe(tx, {"w": loaded["w"]}), r"params\['w'\]"),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be .* as NumPy loads bfloat16\. View it: x\.view"):
            call()
    assert_equal(tx.init({"w": loaded["w"].view(ml_dtypes.bfloat16)}), state)


def test_a_transformation_in_place_of_its_state():
    tx = jadam.record(jadam.adam(0.1))
    for call in (
        lambda: jadam.history(tx),
        lambda: jadam.convert_moments(tx, "int8"),
        lambda: jadam.averaged_params(tx),
        lambda: jadam.statistics(tx, tx, jnp.ones(3)),
    ):
        with pytest.raises(TypeError, match=r"state must be an optimizer's state, got jadam\.record.* Pass what"):
            call()
    with pytest.raises(TypeError, match=r"got <function adam at .*Call it: jadam\.adam\(1e-3\)"):
        jadam.describe(jadam.adam, jnp.ones(3))


def test_the_recorded_update_has_the_weight_decay_that_was_applied():
    """A decay of half of the parameter, which is not that of the parameter after the step."""
    tx, params = jadam.record(jadam.adamw(0.1, weight_decay=5.0), every=1), jnp.ones(4)
    new, state = jadam.step(tx, params, tx.init(params), params)
    update = float(np.abs(new - params)[0])
    assert update == pytest.approx(0.6, rel=1e-6)
    np.testing.assert_allclose(jadam.history(state).total["update_rms"], update, rtol=1e-6)
    np.testing.assert_allclose(jadam.statistics(tx, state, new).total.update_rms, update, rtol=1e-6)


def test_a_plan_for_one_device():
    shapes = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    planned = jadam.plan(jadam.adam(0.1), shapes, {"data": 1}, "data")
    assert (planned.parameters, planned.gradients, planned.moments) == (4 * 8192, 4 * 8192, 8 * 8192)


# ---------------------------------------------------------------- odd leaves


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("call", ["step", "update"])
def test_exact_bf16_has_the_derivative_of_float32_training(call, moments):
    """With respect to parameters and learning rate."""

    def loss(make, p, rate):
        tx = make(jadam.adam(rate, moments=moments))
        state, g = tx.init(p), jnp.full_like(p, 1.5)
        if call == "step":
            new, _ = jadam.step(tx, g, state, p)
        else:
            new = optax.apply_updates(p, tx.update(g, state, p)[0])
        return jnp.sum(new.astype(jnp.float32) ** 2)

    half = jnp.linspace(0.5, 2, 8 * 512).reshape(8, 512).astype(jnp.bfloat16)
    by_p, by_rate = jax.grad(functools.partial(loss, jadam.exact_bf16), (0, 1))(half, jnp.float32(0.1))
    p, rate = jax.grad(functools.partial(loss, lambda tx: tx), (0, 1))(half.astype(jnp.float32), jnp.float32(0.1))
    # the new parameter and the derivative are rounded to bfloat16, by 2**-9 each; their sum of one sign is as exact
    np.testing.assert_allclose(np.float32(by_p), p, rtol=2**-7)
    np.testing.assert_allclose(by_rate, rate, rtol=2**-8)


@jax.tree_util.register_pytree_node_class
class ToFloat16:
    """A class that casts what is put into it."""

    def __init__(self, x):
        self.x = x.astype(jnp.float16) if hasattr(x, "astype") and jnp.issubdtype(x.dtype, jnp.floating) else x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize(
    ("tx", "what"),
    [
        (jadam.adam(0.1), "moments"),
        (jadam.by_path([("", {})], 0.1), "moments"),
        (jadam.by_path([("", {"moments": "bfloat16"})], 0.1), "moments"),
        (jadam.average_params(), "averages"),
    ],
)
def test_a_class_that_narrows_what_a_state_keeps(tx, what):
    with pytest.raises(TypeError, match=rf"in a pytree class that must keep (float32|bfloat16) {what}, got float16"):
        tx.init(ToFloat16(jnp.ones((8, 8))))


FOREIGN = {
    "big-endian": (np.ones(3, ">f4"), "must have a dtype that JAX has, got >f4. Cast it: x.astype(np.float32)."),
    "80 bits": (np.ones(3, np.longdouble), "must have a dtype that JAX has, got float128."),
    "Decimal": (decimal.Decimal(1), "must be an array, got Decimal('1') of type Decimal."),
    "Fraction": (fractions.Fraction(1, 2), "must be an array, got Fraction(1, 2) of type Fraction."),
    "masked": (np.ma.ones(3), "must be an array, got masked_array("),
    "structured": (
        np.zeros(3, [("a", "f4")]),
        "must be an array, got array([(0.,), (0.,), (0.,)], dtype=[('a', '<f4')])",
    ),
}


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize != 16, reason="this machine has no 80-bit numbers")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_leaf_that_jax_does_not_have(name):
    """A clear error; frozen it passes."""
    leaf, text = FOREIGN[name]
    w, tx = jnp.ones(3), jadam.adam(0.1)
    for call, what in (
        (lambda: tx.init({"a": leaf}), "params['a'] "),
        (lambda: tx.update({"a": leaf}, tx.init({"a": w}), {"a": w}), "updates['a'] "),
        (lambda: jadam.average_params().init({"a": leaf}), "params['a'] "),
    ):
        with pytest.raises(TypeError, match=re.escape(what + text)):
            call()
    params = {"w": w, "a": leaf}
    frozen = jadam.by_path([("a", jadam.FROZEN), ("", {})], 0.1)
    for grads in (params, params | {"a": None}):
        assert jadam.step(frozen, grads, frozen.init(params), params)[0]["a"] is leaf


def test_integer_gradients_of_a_parameter():
    tx, params = jadam.adam(0.1), {"w": jnp.ones(3)}
    with pytest.raises(
        TypeError, match=r"updates\['w'\] must be floating or complex to be trained, got int32\. Cast it"
    ):
        tx.update({"w": jnp.arange(3)}, tx.init(params), params)


def test_python_numbers_are_averaged():
    tx, params = optax.chain(optax.sgd(0.5), jadam.average_params(0.0)), {"a": 1.0}
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(jadam.averaged_params(state)["a"], 0.5)


@pytest.mark.parametrize("make", [lambda: jadam.adam(0.1, eps=1e39), lambda: jadam.adam(1e300)])
def test_a_number_beyond_float32(make):
    with pytest.raises(ValueError, match="must be >= 0 and finite in float32, got 1e"):
        make()


@pytest.mark.parametrize("dtype", [np.dtype(jnp.float8_e4m3fn), np.dtype(">f4")])
def test_a_first_moment_that_cannot_be(dtype):
    with pytest.raises(TypeError, match=rf"mu_dtype must be a floating dtype such as jnp\.bfloat16, got {dtype}"):
        jadam.adam(0.1, mu_dtype=dtype)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this version of JAX has no jax.new_ref")
def test_checksum_of_a_ref():
    with pytest.raises(TypeError, match=r"tree\['w'\] must be an array, got Ref.*Pass its value: ref\[\.\.\.\]"):
        jadam.checksum({"w": jax.new_ref(jnp.ones(4))})


def test_rules_for_leaves_of_one_path():
    """Patterns match the names that `describe` prints."""
    params = {"x": Pair(jnp.ones(3), jnp.ones(4))}
    tx = jadam.by_path([(r"\(2\)", jadam.FROZEN), ("", {})], 0.1)
    new, _ = jadam.step(tx, params, tx.init(params), params)
    np.testing.assert_array_equal(new["x"].children[1], 1)
    np.testing.assert_allclose(new["x"].children[0], 1 - 0.1 * (1 + 1e-4), rtol=1e-6)  # 1e-4 is the weight decay


def test_the_state_of_several_models():
    """As `jax.vmap` makes it: its version is not another one."""
    tx, many = jadam.exact_bf16(jadam.adam(0.1)), jnp.ones((3, 4), jnp.bfloat16)
    state = jax.vmap(tx.init)(many)
    with pytest.raises(ValueError, match=r"state\.version must have one dimension, got shape \(3, 1\)\. Use jax\.vmap"):
        jadam.float32_params(many, state)
