"""`jadam.step` and ``tx.update`` under JAX's transformations and debug modes, with any schedule and pytree class."""

import copy
import dataclasses
import functools
import traceback
from pathlib import Path

import cloudpickle
import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import CPU, parametrize, update_and_apply, zip_leaves
from jax.experimental import checkify

import jadam
import jadam.flax
from jadam._transformation.transformation import Rule, scale_by_learning_rate_and_decay, scale_by_rule

PARAMS = {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
GRADS = {"w": np.full((3, 4), 0.5, np.float32), "b": np.full(4, 0.5, np.float32)}
SETTING = {"rate": 0.1}


def schedule_of_setting(count):
    """A schedule that reads a Python variable."""
    del count
    return SETTING["rate"]


OPTIMIZERS = {
    "learning_rate": lambda: jadam.adam(schedule_of_setting),
    "weight_decay": lambda: jadam.adamw(0.1, weight_decay=schedule_of_setting),
    "by_path": lambda: jadam.by_path([("", {})], schedule_of_setting, weight_decay=0.0),
    "zero1": lambda: jadam.sharding.zero1(
        jadam.adam(schedule_of_setting), PARAMS, jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), "data"
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_step_calls_the_schedule_every_time(monkeypatch, name):
    tx = OPTIMIZERS[name]()
    grads = GRADS if name != "weight_decay" else jax.tree.map(np.zeros_like, GRADS)
    params, state = jadam.step(tx, grads, tx.init(PARAMS), PARAMS)
    assert (params["b"] < 1).all()
    monkeypatch.setitem(SETTING, "rate", 0.0)
    again, _ = jadam.step(tx, grads, state, params)
    np.testing.assert_array_equal(again["b"], params["b"])


def test_flax_optimizer_calls_the_schedule_every_time(monkeypatch):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = jadam.flax.Optimizer(model, jadam.adam(schedule_of_setting), wrt=nnx.Param)
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
def test_schedules_that_need_concrete_counts(name):
    """Schedules that need a concrete count work in eager steps, in `update` and in `describe`; so do those of b1."""
    tx = jadam.adam(SCHEDULES[name], b1=lambda count: 0.9 if count < 5 else 0.8)
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    params, _ = jadam.step(tx, GRADS, state, PARAMS)
    for u, p, new in zip_leaves(updates, PARAMS, params):
        np.testing.assert_allclose(new, p + u, rtol=2.0**-22)  # one rounding on each side and one of the update
    assert jadam.describe(tx, PARAMS).one_pass == (CPU.kernel is not None)


def take_nan_steps(take):
    """Three steps; the second divides infinity by infinity."""
    tx = jadam.adam(0.1)
    params = np.ones(3, np.float32)
    state = tx.init(params)
    for g in (1e20, 1.0, 1.0):
        params, state = take(tx, np.full(3, g, np.float32), state, params)


def update_only(tx, g, state, params):
    _, state = tx.update(g, state, params)
    return params, state


@pytest.mark.parametrize(
    "take",
    [jadam.step, jax.jit(jadam.step, static_argnums=0), update_only, jax.jit(update_only, static_argnums=0)],
    ids=["step", "step, jit", "update", "update, jit"],
)
def test_debug_nans_detects_a_nan_within_the_step(take):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        take_nan_steps(take)


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_checkify_detects_a_nan(moments):
    tx = jadam.adam(0.1, moments=moments)
    params = np.ones((32, 128), np.float32)
    grads = np.full_like(params, 0.5)
    step = checkify.checkify(jax.jit(functools.partial(jadam.step, tx)), errors=checkify.float_checks)
    error, _ = step(grads, tx.init(params), params)
    assert error.get() is None
    grads[3, 4] = np.nan
    error, _ = step(grads, tx.init(params), params)
    assert "nan" in error.get()


def test_checkify_support_costs_nothing():
    tx = jadam.adam(0.1)
    step = jax.jit(functools.partial(jadam.step, tx), donate_argnums=(1, 2))
    text = step.lower(PARAMS, tx.init(PARAMS), PARAMS).compile().as_text()
    entry = text[text.index("ENTRY") :]
    if CPU.kernel is not None:
        assert "jadam_step" in entry
        assert "f32[3,4]{1,0} multiply" not in text


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["adam", "decay", "by_path", "record", "betas"])
def test_optax_schedules_under_strict_promotion(name):
    """Optax's schedules promote dtypes; with `optax.adam` they fail in strict mode."""
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
    """A pytree class that accepts only matrices as weights."""

    weight: jax.Array
    bias: jax.Array

    def __post_init__(self):
        self.weight, self.bias = jnp.asarray(self.weight), jnp.asarray(self.bias)
        if self.weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got {self.weight}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Converting:
    """A pytree class that casts to float32."""

    weight: jax.Array

    def __post_init__(self):
        self.weight = jnp.asarray(self.weight, jnp.float32)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_class_that_cannot_hold_narrow_moments(moments):
    params = {"layer": Converting(np.ones((32, 128)))}
    with pytest.raises(
        TypeError, match=r"params\['layer'\].weight is in a pytree class that must keep .*int8|bfloat16"
    ):
        jadam.adam(0.1, moments=moments).init(params)
    tx = jadam.adam(0.1)
    new, _ = jadam.step(tx, params, tx.init(params), params)
    np.testing.assert_allclose(new["layer"].weight, 0.9, rtol=1e-6)  # the first step, rounded at 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Narrowing:
    """A pytree class that casts to bfloat16."""

    weight: jax.Array

    def __post_init__(self):
        self.weight = jnp.asarray(self.weight, jnp.bfloat16)


def test_a_class_that_cannot_hold_float32_moments():
    with pytest.raises(
        TypeError, match=r"params\['layer'\].weight is in a pytree class that must keep float32.*got bfloat16"
    ):
        jadam.adam(0.1).init({"layer": Narrowing(np.ones((32, 128)))})


CHECKED = {
    "adam": lambda: jadam.adam(0.1),
    "int8": lambda: jadam.adamw(0.1, moments="int8"),
    "mask": lambda: jadam.adamw(0.1, mask={"layer": True, "scale": False}),
    "amsgrad": lambda: jadam.amsgrad(0.1, moments="bfloat16"),
    "by_path": lambda: jadam.by_path([("scale", jadam.FROZEN), ("", {})], 0.1),
    "record": lambda: jadam.record(jadam.radam(0.1), every=1, keep=2),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adam(0.1)),
    "chain": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
}


@parametrize("name", list(CHECKED), default=["adam", "int8", "by_path", "chain", "exact_bf16"])
def test_a_class_that_validates_its_fields(name):
    params = {"layer": Layer(np.ones((32, 128), np.float32), np.ones(3, np.float32)), "scale": np.ones(2, np.float32)}
    tx = CHECKED[name]()
    state = jax.jit(tx.init)(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    expected = jax.tree.map(lambda p, u: p + u, params, updates)
    found, _ = jadam.step(tx, params, state, params)
    for x, y in zip_leaves(found, expected):
        np.testing.assert_allclose(x, y, rtol=2.0**-22, atol=5e-8)  # 5e-7 of an update of 0.1
    assert jadam.describe(tx, params).leaves[0].name == "['layer'].weight"


def test_fuse_is_called_once(monkeypatch):
    """`fuse` is called once in a trace and once in an eager step."""
    tx, plans = jadam.adam(0.1), []
    plan = tx.update.leafwise
    monkeypatch.setattr(tx.update, "leafwise", lambda *args: plans.append(1) or plan(*args))
    state = tx.init(PARAMS)
    jax.jit(functools.partial(jadam.step, tx)).lower(GRADS, state, PARAMS).compile()
    assert len(plans) == 1
    jadam.step(tx, GRADS, state, PARAMS)
    assert len(plans) == 2


def test_another_learning_rate_compiles_nothing(programs_compiled):
    """Hyperparameters are inputs of the compiled program."""
    take = lambda rate: jadam.step(tx := jadam.adam(rate), GRADS, tx.init(PARAMS), PARAMS)
    take(0.1)
    before = programs_compiled()
    take(0.2)
    assert programs_compiled() == before


class Model(eqx.Module):
    """A model with leaves that are not trained: a function, a string, an int, a bool, an array of integers."""

    weight: jax.Array
    bias: jax.Array
    order: jax.Array
    activation: object = jax.nn.relu
    name: object = "model"
    width: object = 4
    is_last: object = True


MODEL = Model(jnp.full((64, 128), 0.5), jnp.ones(3), jnp.arange(3))
WRAPPED = {
    "adamw, mask": lambda: jadam.adamw(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    "int8": lambda: jadam.adam(0.1, moments="int8"),
    "by_path": lambda: jadam.by_path([("bias", jadam.FROZEN), ("", {})], 0.1),
    "chain": lambda: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(0.1)),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adamw(0.1)),
    "exact_bf16 of Optax's": lambda: jadam.exact_bf16(optax.adamw(0.1)),
    "record": lambda: jadam.record(jadam.adamw(0.1), every=1, keep=2),
    "average": lambda: optax.chain(jadam.adamw(0.1), jadam.average_params()),
    "zero1": lambda: jadam.sharding.zero1(
        jadam.adamw(0.1), eqx.filter(MODEL, eqx.is_inexact_array), jax.make_mesh((8,), ("data",)), "data"
    ),
}


@parametrize("name", list(WRAPPED), default=["adamw, mask", "by_path", "exact_bf16", "zero1"])
def test_a_whole_equinox_model_as_params(name):
    """Leaves without a gradient are returned unchanged."""
    tx, model = WRAPPED[name](), MODEL
    if "bf16" in name:
        model = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)
    trained = eqx.filter(model, eqx.is_inexact_array)
    state = jax.jit(tx.init)(trained)
    update, step = tx.update, functools.partial(jadam.step, tx)
    if name != "adamw, mask":  # left eager
        update, step = eqx.filter_jit(update), eqx.filter_jit(step)
    expected, _ = step(trained, state, trained)
    for found, wanted in (
        (update(trained, state, model), update(trained, state, trained)),
        (step(trained, state, model)[0], eqx.combine(expected, model)),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for x, y in zip_leaves(found, wanted):
            if eqx.is_inexact_array(y):  # two programs: one rounding of the update, which is at most 0.11, and one of p
                np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (x, y)), rtol=2.0**-22, atol=5.5e-8)
            else:
                assert x is y or np.array_equal(x, y)


def failing_rule(step, g, m, v):
    raise RuntimeError("within the rule")


FAILING = scale_by_learning_rate_and_decay(
    scale_by_rule(Rule(failing_rule, optax.ScaleByAdamState), {"b1": 0.9, "b2": 0.999}, {"eps": 1e-8}), 0.1
)


@pytest.mark.parametrize(
    ("call", "most"),
    [(FAILING.update, 4), (functools.partial(jadam.step, FAILING), 6)],
    ids=["update", "step"],
)
@pytest.mark.parametrize("transformed", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_few_frames_between_the_user_and_the_rule(call, most, transformed):
    with pytest.raises(RuntimeError, match="within the rule") as caught:
        transformed(call)(GRADS, FAILING.init(PARAMS), PARAMS)
    folder = str(Path(jadam.__file__).parent)
    ours = [x for x in traceback.extract_tb(caught.value.__traceback__) if x.filename.startswith(folder)]
    assert 0 < len(ours) <= most, ours


def fused_step(tx):
    return functools.partial(jadam.step, tx)


def two_calls(tx):
    return functools.partial(update_and_apply, tx)


step_and_update = pytest.mark.parametrize("take", [fused_step, two_calls], ids=["step", "two calls"])


def assert_close(found, expected):
    """Same structure and dtypes; values to 2 ulp, as compiled programs may contract products and sums."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip_leaves(found, expected):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2.0**-22, atol=5e-8)  # 5e-7 of an update of 0.1


@pytest.fixture(scope="module")
def one_step():
    tx = jadam.adam(0.1)
    state = tx.init(PARAMS)
    return tx, (GRADS, state, PARAMS), jax.jit(functools.partial(jadam.step, tx))(GRADS, state, PARAMS)


@step_and_update
def test_disable_jit(one_step, take, programs_compiled):
    tx, args, expected = one_step
    with jax.disable_jit():
        assert_close(take(tx)(*args), expected)


@step_and_update
def test_vmap(one_step, take):
    tx, (grads, state, params), expected = one_step
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    state = state[0]._replace(count=jnp.array([0, 0])), *state[1:]
    many = (twice(grads), (state[0]._replace(mu=twice(state[0].mu), nu=twice(state[0].nu)), *state[1:]), twice(params))
    assert_close(jax.vmap(take(tx))(*many), twice(expected))


@step_and_update
def test_derivative_with_respect_to_gradients(one_step, take):
    """Derivative of the sum of new parameters by a factor on the gradients. Without eps Adam's first step has none."""
    tx, (grads, state, params), _ = one_step
    loss = lambda tx, scale: sum(
        map(jnp.sum, jax.tree.leaves(take(tx)(jax.tree.map(lambda g: scale * g, grads), state, params)[0]))
    )
    slope_of = lambda tx: jax.jit(jax.grad(functools.partial(loss, tx)))(1.0)
    assert abs(slope_of(tx)) < 1e-5  # 16 elements, each 0.1 times a rounding
    slope = slope_of(jadam.adam(0.1, eps=0.5))
    # u = s g / (s g + eps), du/ds = g eps / (s g + eps)**2 = 0.25 at g = eps = 0.5; 16 elements, times -0.1.
    assert slope == pytest.approx(-16 * 0.1 * 0.25, rel=1e-5)


@step_and_update
def test_checkpoint(one_step, take):
    """Derivatives through `jax.checkpoint` are those without it."""
    tx, (grads, state, params), _ = one_step
    loss = lambda wrap, g: sum(map(jnp.sum, jax.tree.leaves(wrap(take(tx))(g, state, params)[0])))
    slopes = (jax.jit(jax.grad(functools.partial(loss, wrap))) for wrap in (lambda f: f, jax.checkpoint))
    expected, found = (slope(grads) for slope in slopes)
    for x, y in zip_leaves(found, expected):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@step_and_update
def test_export_and_ahead_of_time(one_step, take):
    """`jax.export` for three platforms, and a step compiled ahead of time."""
    tx, args, expected = one_step
    jitted = jax.jit(take(tx))
    shapes = jax.eval_shape(lambda *args: args, *args)
    assert_close(jitted.lower(*shapes).compile()(*args), expected)
    checks = [jax.export.DisabledSafetyCheck.custom_call("jadam_step")]
    flat, tree = jax.tree.flatten(args)  # NamedTuples would have to be registered
    exported = jax.export.export(
        jax.jit(lambda *flat: jax.tree.leaves(take(tx)(*tree.unflatten(flat)))),
        platforms=["cpu", "cuda", "tpu"],
        disabled_checks=checks,
    )(*flat)
    assert_close(jax.tree.unflatten(jax.tree.structure(expected), exported.call(*flat)), expected)


@step_and_update
def test_donation(one_step, take):
    tx, (grads, state, params), expected = one_step
    params, state = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, state))
    found = jax.jit(take(tx), donate_argnums=(1, 2))(grads, state, params)
    assert_close(found, expected)
    moments = state[0]
    assert all(x.is_deleted() for x in jax.tree.leaves((params, moments.mu, moments.nu)))


def test_transformations_compare_by_identity():
    tx, other = jadam.adam(0.1), jadam.adam(0.1)
    assert tx.update == tx.update
    assert tx.update != other.update
    assert len({tx.update, other.update, tx.update}) == 2


def pickled(tx):
    return cloudpickle.loads(cloudpickle.dumps(tx))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("name", [*CHECKED, "schedule"])
def test_copies_of_a_transformation(copied, name):
    tx = CHECKED.get(name, lambda: jadam.adam(optax.cosine_decay_schedule(0.1, 10)))()
    again = copied(tx)
    assert type(again) is type(tx)
    params = {"layer": Layer(np.ones((32, 128), np.float32), np.ones(3, np.float32)), "scale": np.ones(2, np.float32)}
    expected = jadam.step(tx, params, tx.init(params), params)
    assert_close(jadam.step(again, params, again.init(params), params), expected)
    assert repr(again) == repr(tx)


def in_nnx_jit(tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = jadam.flax.Optimizer(model, tx, wrt=nnx.Param)
    graph, state = nnx.split(optimizer)
    optimizer = nnx.merge(graph, state)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2)))))(model))

    before = model.bias[...]
    step(model, optimizer)
    return before - model.bias[...]


def in_train_state(tx):
    state = jadam.flax.TrainState.create(apply_fn=None, params=jnp.ones(3), tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=jnp.ones(3)))
    return 1 - step(state).params


def in_multi_steps(tx):
    tx = optax.MultiSteps(tx, 2)
    params, state = jnp.ones(3), tx.init(jnp.ones(3))
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jnp.ones(3), state, params)
        params = optax.apply_updates(params, updates)
    return 1 - params


def in_filter_jit(tx):
    @eqx.filter_jit
    def step(tx, params):
        return jadam.step(tx, jnp.ones(3), tx.init(params), params)[0]

    return 1 - step(tx, jnp.ones(3))


@pytest.mark.parametrize("place", [in_nnx_jit, in_train_state, in_multi_steps, in_filter_jit])
def test_inside_other_libraries(place):
    np.testing.assert_allclose(place(jadam.adam(0.1)), 0.1, rtol=1e-6)  # the first step, rounded at 1


FAMILY = {
    "adamw": lambda: jadam.adamw(0.1),
    "int8": lambda: jadam.adam(0.1, moments="int8"),
    "amsgrad": lambda: jadam.amsgrad(0.1),
    "by_path": lambda: jadam.by_path([("", {})], 0.1),
    "chain": lambda: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adam(0.1)),
    "record": lambda: jadam.record(jadam.adam(0.1), every=1, keep=2),
}


@step_and_update
@parametrize("name", list(FAMILY), default=["adamw", "by_path", "exact_bf16"])
def test_a_state_of_numpy_arrays(name, take):
    """A state as `jax.device_get` and checkpoint libraries return it."""
    tx = FAMILY[name]()
    state = tx.init(PARAMS)
    expected = take(tx)(GRADS, state, PARAMS)
    assert_close(take(tx)(GRADS, jax.device_get(state), PARAMS), expected)
    assert_close(jax.jit(lambda grads: take(tx)(grads, jax.device_get(state), PARAMS))(GRADS), expected)


@step_and_update
def test_a_numpy_count_saturates_and_compiles_once(take, programs_compiled):
    tx = jadam.scale_by_adam()
    state = tx.init(PARAMS)._replace(count=np.int32(2**31 - 2))
    for _ in range(2):
        params, state = take(tx)(GRADS, state, PARAMS)
    before = programs_compiled()
    params, state = take(tx)(GRADS, state, PARAMS)
    assert programs_compiled() == before
    assert int(state.count) == 2**31 - 1
    assert (params["b"] != 1).all()


@step_and_update
@pytest.mark.parametrize("name", FAMILY)
def test_no_parameters(name, take):
    tx = FAMILY[name]()
    for params in ({}, {"a": None}):
        if params or name != "by_path":  # there its pattern matches no path
            new, _ = take(tx)(params, tx.init(params), params)
            assert new == params


DECREASING = lambda count: 0.1 / (1 + int(count))
CONCRETE_SCHEDULES = {
    "learning rate": lambda: jadam.adam(DECREASING),
    "weight decay": lambda: jadam.adamw(0.1, weight_decay=DECREASING),
    "b1": lambda: jadam.adam(0.1, b1=DECREASING),
    "eps": lambda: jadam.adam(0.1, eps=DECREASING),
    "by_path": lambda: jadam.by_path([("w", {"weight_decay": DECREASING}), ("", {"b1": DECREASING})], DECREASING),
    "injected": lambda: optax.inject_hyperparams(jadam.amsgrad)(DECREASING),
}


@step_and_update
@pytest.mark.parametrize("name", CONCRETE_SCHEDULES)
def test_a_schedule_that_returns_python_numbers_compiles_once(name, take, programs_compiled):
    tx = CONCRETE_SCHEDULES[name]()
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = take(tx)(GRADS, state, params)
    before = programs_compiled()
    for _ in range(3):
        params, state = take(tx)(GRADS, state, params)
    assert programs_compiled() == before


def test_many_leaves_share_programs(programs_compiled):
    """An eager update of 100 equal leaves uses two programs: one of 32 leaves, one of the last 4."""
    tx = jadam.adam(0.1)
    for count in (32, 4):  # compiles both, and the scalars' program
        params = {str(i): jnp.ones((5, 7)) for i in range(count)}
        tx.update(params, tx.init(params), params)
    params = {str(i): jnp.ones((5, 7)) for i in range(100)}
    state = tx.init(params)
    before = programs_compiled()
    updates, _ = tx.update(params, state, params)
    assert programs_compiled() == before
    np.testing.assert_allclose(list(updates.values()), -0.1, rtol=1e-6)  # the first step is -lr, up to roundings


@pytest.mark.parametrize("axis", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_eager_steps_have_the_shardings_of_jitted_ones(axis):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    put = lambda x, *names: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*names)))
    tx = jadam.adam(0.1)
    with jax.set_mesh(mesh):
        params = put(jnp.ones(8))
        state, grads = tx.init(params), put(jnp.ones(8), "data")
        eager, jitted = (f(grads, state, params) for f in (fused_step(tx), jax.jit(fused_step(tx))))
        for x, y in zip_leaves(eager, jitted):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert_close(eager, jitted)


@step_and_update
def test_arrays_on_different_devices(take):
    first, second = jax.devices()[1:3]
    params = {"a": jax.device_put(jnp.ones(3), first), "b": jax.device_put(jnp.ones(3), second)}
    tx = jadam.adam(0.1)
    with pytest.raises(ValueError, match=r"\w+, state, params must be on the same devices, got \w+\['b'\] on"):
        take(tx)(params, tx.init(params), params)


@step_and_update
@pytest.mark.parametrize("clip", [jadam.clip, jadam.clip_by_global_norm])
def test_python_numbers_as_gradients(take, clip):
    tx = jadam.chain(clip(1.0), jadam.adam(0.1))
    if take is fused_step or clip is jadam.clip:  # Optax's norm needs arrays
        new, _ = take(tx)({"w": 0.5}, tx.init({"w": 1.0}), {"w": 1.0})
        np.testing.assert_allclose(new["w"], 0.9, rtol=1e-6)  # the first step, rounded at 1


@step_and_update
def test_numpy_float64_becomes_float32_without_a_warning(take):
    tx = jadam.adam(0.1)
    grads, params = (jax.tree.map(lambda x: x.astype(np.float64), tree) for tree in (GRADS, PARAMS))
    assert_close(take(tx)(grads, tx.init(params), params), take(tx)(GRADS, tx.init(PARAMS), PARAMS))


@step_and_update
def test_varying_values_are_not_called_replicated(take):
    """Within `jax.shard_map`: a missing `pmean` of the gradients is an error, not silently different replicas."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = jadam.adam(1.0)
    step = lambda g: take(tx)(g, tx.init(jnp.ones(1)), jnp.ones(1))[0]
    mapped = lambda out, f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=jax.P("data"), out_specs=out))
    grads = jnp.arange(8.0) - 4
    with pytest.raises(ValueError, match="replica"):
        mapped(jax.P(), step)(grads)
    np.testing.assert_allclose(mapped(jax.P(), lambda g: step(jax.lax.pmean(g, "data")))(grads), 2.0, rtol=1e-6)
    signs = 1 - np.sign(np.arange(8.0) - 4)
    np.testing.assert_allclose(mapped(jax.P("data"), step)(grads), signs, rtol=1e-6, atol=2e-7)  # the first step
