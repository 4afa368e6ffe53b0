"""Import and export of PyTorch's Adam states: training continues, and one error lists all that does not match."""

import functools
import inspect
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from helpers import parametrize, parametrize_grid, update_and_apply, zip_leaves
from programs import torch_states

import jadam
from jadam import torch_state

TORCH = safetensors.numpy.load_file(torch_states.FILE)
NAMES = {
    "['conv']['bias']": "0.bias",
    "['conv']['kernel']": ("0.weight", torch_state.CONV2D),
    "['dense']['bias']": "3.bias",
    "['dense']['kernel']": ("3.weight", torch_state.LINEAR),
}
SETTINGS = dict(zip(("b1", "b2"), torch_states.BETAS, strict=True), eps=torch_states.EPS)
MAKE = {
    "adam": functools.partial(jadam.adam, **SETTINGS),
    "adamw": functools.partial(jadam.adamw, weight_decay=0.1, **SETTINGS),
    "amsgrad": functools.partial(jadam.amsgrad, max_of="v", **SETTINGS),
}
# Wrappers that do not change the steps. The schedule has the right learning rate only from PyTorch's step on.
WRAPPED = {
    "plain": lambda make: make(torch_states.LR),
    "schedule": lambda make: make(lambda count: jnp.where(count < torch_states.BEFORE, 1e3, torch_states.LR)),
    "optax.chain": lambda make: optax.chain(optax.clip(1e3), make(torch_states.LR)),
    "jadam.chain": lambda make: jadam.chain(jadam.clip(1e3), make(torch_states.LR)),
    "exact_bf16": lambda make: jadam.exact_bf16(make(torch_states.LR)),
}
SHAPE = (64, 256)  # two int8 blocks a row; one shape for all tests, as eager `from_torch` compiles for each
W = {"w.exp_avg": np.zeros(2), "w.exp_avg_sq": np.zeros(2), "w.step": 1}
STATE = jadam.adam(1e-3).init(jnp.zeros(2))
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}


def entries(prefix):
    """Entries of the fixture that start with ``prefix``, without it."""
    return {key.removeprefix(prefix): x for key, x in TORCH.items() if key.startswith(prefix)}


def tree(flat, suffix=""):
    """Entries in JAX's tree and layouts. Leading axes, such as that of steps, are kept."""
    conv, dense = flat[f"0.weight{suffix}"], flat[f"3.weight{suffix}"]
    return {
        "conv": {"bias": flat[f"0.bias{suffix}"], "kernel": np.moveaxis(conv, (-4, -3), (-1, -2))},  # OIHW to HWIO
        "dense": {"bias": flat[f"3.bias{suffix}"], "kernel": np.swapaxes(dense, -1, -2)},
    }


PARAMS = jax.tree.map(jnp.asarray, tree(entries("adam/before/params/")))


def moments_in(state):
    """The only NamedTuple with moments in ``state``."""
    has = lambda x: hasattr(x, "mu")
    (found,) = (x for x in jax.tree.leaves(state, is_leaf=has) if has(x))
    return found


def assert_same_bits(a, b):
    """Same structure, shapes, dtypes and bits, those of NaN included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip_leaves(a, b):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ---------------------------------------------------------------- continued training


@functools.cache
def programs(name, wrap, make=None):
    """The fixture's parameters, their initial state, a jitted step, and a function that returns float32 parameters."""
    tx = WRAPPED[wrap](make or MAKE[name])
    params = tree(entries(f"{name}/before/params/"))
    if wrap == "exact_bf16":
        return *jax.jit(lambda p: jadam.from_float32(p, tx))(params), jitted(tx), jax.jit(jadam.float32_params)
    params = jax.tree.map(jnp.asarray, params)
    return params, tx.init(params), jitted(tx), lambda params, state: params


def jitted(tx):
    return jax.jit(lambda g, params, state: update_and_apply(tx, g, state, params))


def continue_training(name, wrap, step=torch_states.BEFORE, make=None):
    """Parameters and moments after the fixture's steps, started from PyTorch's state with the count ``step``."""
    params, state, update, float32 = programs(name, wrap, make)
    flat = entries(f"{name}/before/state/")
    flat |= {key: np.float32(step) for key in flat if key.endswith(".step")}
    state = torch_state.from_torch(flat, state, NAMES)
    gradients = tree(entries(f"{name}/gradients/"))
    for t in range(torch_states.STEPS):
        params, state = update(jax.tree.map(lambda g, t=t: g[t], gradients), params, state)
    return float32(params, state), moments_in(state)


def distances(name, params, state):
    """Differences from PyTorch's parameters and moments, relative to a bound of both sides' rounding errors.

    Let e = 2**-24 and M the largest |m| and |g| of the fixture. Both sides take 4 steps. In each, each side rounds

    * m at most 4 times, numbers up to 2 M. Bound: 4 * 2 * 4 * 2 e M = 64 e M.
    * v, a sum of positive terms, by 5 e v (b2, its product, g**2, its product, the sum). Bound: 40 e v. AMSGrad's
      maximum has the same bound.
    * the direction m_hat / (sqrt(v_hat) + eps) 10 times. With the errors of m and v: below (64 + 20 + 20) e D, where
      D = M / (1 - b1**t) / sqrt(v) is largest for the first t and the smallest v, which is at least b2**4 of the first.
    * p at most 4 times, numbers up to |p| + 0.1, as p moves by less than 0.1. Bound: 8 e (|p| + 0.1) a step.
    """
    e, steps, (b1, b2) = 2.0**-24, torch_states.STEPS, torch_states.BETAS
    before, after = (entries(f"{name}/{when}/state/") for when in ("before", "after"))
    largest = jax.tree.map(
        lambda m, g: np.maximum(np.abs(m), np.abs(g).max(0)),
        tree(before, ".exp_avg"),
        tree(entries(f"{name}/gradients/")),
    )
    smallest = jax.tree.map(lambda v: b2**steps * v, tree(before, ".exp_avg_sq"))
    first = torch_states.BEFORE + 1
    d = jax.tree.map(lambda m, v: m / (1 - b1**first) / np.sqrt(v), largest, smallest)
    p = tree(entries(f"{name}/after/params/"))
    bound = lambda d, p: steps * (torch_states.LR * 104 * e * d + 8 * e * (np.abs(p) + 0.1))

    def worst(found, expected, tolerance):
        off = jax.tree.map(lambda x, y, most: np.max(np.abs(np.float64(x) - y) / most), found, expected, tolerance)
        return max(jax.tree.leaves(off))

    found = {"params": worst(params, p, jax.tree.map(bound, d, p))}
    found["mu"] = worst(state.mu, tree(after, ".exp_avg"), jax.tree.map(lambda m: 64 * e * m, largest))
    for field in ("nu", "nu_max")[: 1 + (name == "amsgrad")]:
        v = tree(after, f".{MOMENTS[field]}")
        found[field] = worst(getattr(state, field), v, jax.tree.map(lambda v: 40 * e * v, v))
    return found


@parametrize_grid(
    {"name": list(MAKE), "wrap": list(WRAPPED)},
    default=["adam-plain", "adam-exact_bf16", "adamw-schedule", "adamw-jadam.chain", "amsgrad-optax.chain"],
)
def test_training_continues_from_pytorch(name, wrap):
    params, state = continue_training(name, wrap)
    assert state.count == torch_states.BEFORE + torch_states.STEPS
    found = distances(name, params, state)
    assert max(found.values()) <= 1, found


def test_the_bound_detects_wrong_states():
    """Without steps, with a wrong count, or with the maximum of v_hat instead of v, the bound is exceeded."""
    start = torch_state.from_torch(entries("amsgrad/before/state/"), MAKE["amsgrad"](1e-3).init(PARAMS), NAMES)[0]
    assert min(distances("amsgrad", PARAMS, start).values()) > 100
    for step in (torch_states.BEFORE - 1, torch_states.BEFORE + 1):
        assert distances("adam", *continue_training("adam", "plain", step))["params"] > 100, step
    of_v_hat = functools.partial(jadam.amsgrad, **SETTINGS)
    found = distances("amsgrad", *continue_training("amsgrad", "plain", make=of_v_hat))
    assert min(found["params"], found["nu_max"]) > 100


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", MAKE)
def test_round_trip_to_the_bit(name, tmp_path):
    flat, state = entries(f"{name}/before/state/"), MAKE[name](1e-3).init(PARAMS)
    file, copy = tmp_path / "adam.safetensors", tmp_path / "copy.safetensors"
    safetensors.numpy.save_file(flat, file)
    filled = torch_state.from_torch(file, state, NAMES)
    assert_same_bits(filled, torch_state.from_torch(flat, state, NAMES))
    for field, entry in MOMENTS.items():
        if hasattr(state[0], field):
            assert_same_bits(jax.tree.map(np.asarray, getattr(filled[0], field)), tree(flat, f".{entry}"))
    back = torch_state.to_torch(filled, NAMES, copy)
    assert_same_bits(back, flat)
    assert_same_bits(safetensors.numpy.load_file(copy), flat)
    assert all(x.flags.c_contiguous for x in back.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "moments"),
    [("adam", "int8"), ("adam", "bfloat16"), ("amsgrad", "bfloat16"), ("amsgrad", lambda path, leaf: "bfloat16")],
    ids=["int8", "bfloat16", "amsgrad", "amsgrad by leaf"],
)
def test_moments_are_stored_as_a_step_stores_them(rule, moments):
    """`from_torch` encodes moments as a step does: compare with a step from zero, whose moments are known."""
    params = {"a": jnp.zeros((65, 67)), "b": jnp.zeros(5)}
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    names = {"['a']": ("w", (1, 0)), "['b']": "b"}
    one, many = getattr(jadam, rule)(1e-3), getattr(jadam, rule)(1e-3, moments=moments)

    def stepped(tx):
        inner, *rest = tx.init(params)
        return tx.update(gradients, (inner._replace(count=jnp.int32(6)), *rest), params)[1]

    expected = stepped(many)
    flat = torch_state.to_torch(stepped(one), names)
    assert {x.dtype for x in flat.values()} == {np.dtype(np.float32)}
    filled = torch_state.from_torch(flat, many.init(params), names)
    assert_same_bits(filled, expected)
    assert filled[0].nu["a"].dtype in (jnp.uint8, jnp.bfloat16)
    other = torch_state.from_torch(flat | {"w.step": np.int64(8), "b.step": np.int64(8)}, many.init(params), names)
    assert (other[0].nu["a"] != filled[0].nu["a"]).any()  # the dither depends on the step


def test_round_trip_of_int8_and_bfloat16_within_a_level():
    """A code is one of the two neighbouring levels, less than one level away; 0.01 more for float32's rounding."""
    params = {"w": jnp.zeros(SHAPE)}
    rng = np.random.default_rng(0)
    v = rng.chisquare(1, SHAPE).astype(np.float32)
    m = (np.sqrt(v) * rng.uniform(-1, 1, v.shape)).astype(np.float32)
    flat = {"w.exp_avg": m, "w.exp_avg_sq": v, "w.step": np.float32(9)}

    def passed_through(moments):
        state = torch_state.from_torch(flat, jadam.adam(1e-3, moments=moments).init(params), {"['w']": "w"})
        back = torch_state.to_torch(state, {"['w']": "w"})
        assert back["w.step"] == 9
        return back["w.exp_avg"], back["w.exp_avg_sq"]

    def scaled(x, top):
        blocks = np.abs(x).reshape(64, 2, 128)
        return top * blocks / blocks.max(-1, keepdims=True)

    # exact codes, before they are rounded to integers: see `jadam._moments.int8`
    r_code = lambda r: ((2 + scaled(r, 5.9375)).astype(np.float32).view(np.uint32) & 0xFFFFFF) / 2**17
    v_code = lambda v: ((scaled(v, 31 / 32).view(np.uint32) >> 3) + np.uint32(0x3B900000)).view(np.float32)
    m8, v8 = passed_through("int8")
    assert np.abs(v_code(v8) - v_code(v)).max() < 1.01
    assert np.abs(r_code(m8 / np.sqrt(v8)) - r_code(m / np.sqrt(v))).max() < 1.01
    assert (m8 * m >= 0).all()
    for x16, x in zip(passed_through("bfloat16"), (m, v), strict=True):
        assert (np.abs(x16 - x) < 2.0**-7 * np.abs(x)).all()  # bfloat16's spacing is at most 2**-7
        assert (x16 != x).any()


def test_mu_dtype():
    flat = entries("adam/before/state/")
    state = torch_state.from_torch(flat, jadam.adam(1e-3, mu_dtype=jnp.bfloat16).init(PARAMS), NAMES)
    assert_same_bits(
        jax.tree.map(np.asarray, state[0].mu), tree({k: x.astype(jnp.bfloat16) for k, x in flat.items()}, ".exp_avg")
    )


@pytest.mark.usefixtures("x64")
def test_round_trip_of_float64():
    flat = {"w.exp_avg": np.array([0.1, np.nan]), "w.exp_avg_sq": np.array([np.inf, 0.3]), "w.step": np.float32(1)}
    state = torch_state.from_torch(flat, jadam.adam(1e-3).init(jnp.zeros(2)), {"": "w"})
    assert_same_bits(torch_state.to_torch(state, {"": "w"}), {key: np.asarray(x) for key, x in flat.items()})


def test_round_trip_of_non_finite_values():
    flat = {"w.exp_avg": np.float32([np.nan, -np.inf]), "w.exp_avg_sq": np.float32([np.inf, 0]), "w.step": np.int64(1)}
    state = torch_state.from_torch(flat, jadam.adam(1e-3).init(jnp.zeros(2)), {"": "w"})
    assert_same_bits(torch_state.to_torch(state, {"": "w"}), flat | {"w.step": np.array(1, np.float32)})


@pytest.mark.parametrize("step", [np.float32(0), np.int64(7), 7, 7.0, np.array(2.0**31, np.float32), np.int64(2**40)])
def test_the_step_in_any_dtype_and_size(step):
    flat = {"w.exp_avg": np.zeros(2, np.float16), "w.exp_avg_sq": np.zeros(2, jnp.bfloat16), "w.step": step}
    state = torch_state.from_torch(flat, jadam.adam(lambda count: 1e-3).init(jnp.zeros(2)), {"": "w"})
    for count in (state[0].count, state[1].count):
        assert count == min(int(step), 2**31 - 1)
        assert jax.typeof(count) == jax.typeof(jnp.int32(0))


# ---------------------------------------------------------------- structure, shardings, other states


AVALS = {
    "float32": MAKE["adam"](1e-3),
    "amsgrad": MAKE["amsgrad"](1e-3),
    "int8": jadam.exact_bf16(jadam.adamw(lambda count: 1e-3, moments="int8")),
    "bfloat16": optax.chain(optax.clip_by_global_norm(1.0), jadam.adam(1e-3, moments="bfloat16")),
    "injected": optax.inject_hyperparams(jadam.adamw)(learning_rate=lambda count: 1e-3),
    "multi": optax.MultiSteps(jadam.adam(1e-3), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", AVALS)
def test_a_jitted_step_is_not_compiled_again(name):
    tx, params = AVALS[name], {"w": jnp.asarray(np.ones(SHAPE, np.float32))}
    state = tx.init(params)
    flat = {f"w.{x}": np.ones(SHAPE[::-1], np.float32) for x in MOMENTS.values()} | {"w.step": np.float32(3)}
    if name != "amsgrad":
        del flat["w.max_exp_avg_sq"]
    filled = torch_state.from_torch(flat, state, {"['w']": ("w", torch_state.LINEAR)})
    assert jax.tree.structure(filled) == jax.tree.structure(state)
    assert list(map(jax.typeof, jax.tree.leaves(filled))) == list(map(jax.typeof, jax.tree.leaves(state)))
    step = jax.jit(tx.update)
    for x in (state, filled):
        _, after = step(params, x, params)
        step(params, after, params)
    assert step._cache_size() == 1


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


PLACED = {"float32-auto": ("float32", AUTO), "bfloat16-auto": ("bfloat16", AUTO), "int8-explicit": ("int8", EXPLICIT)}


@parametrize("placed", PLACED, default=["float32-auto", "int8-explicit"])
def test_eight_devices(placed):
    moments, kind = placed
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    w = np.random.default_rng(0).standard_normal((256, 64))  # float64, NumPy's default
    flat = {"w.exp_avg": w, "w.exp_avg_sq": w * w, "w.step": np.float32(3)}
    names = {"": ("w", torch_state.LINEAR)}
    tx, params = jadam.adam(1e-3, moments=moments), jnp.zeros(SHAPE)
    state = tx.init(jax.device_put(params, sharding))
    filled = torch_state.from_torch(flat, state, names)
    assert_same_bits(jax.device_get(filled), jax.device_get(torch_state.from_torch(flat, tx.init(params), names)))
    assert filled[0].mu.sharding == sharding
    for x, old in zip_leaves(filled, state):
        assert (x.sharding, x.committed) == (old.sharding, old.committed)
    assert torch_state.to_torch(filled, names)["w.exp_avg"].shape == (256, 64)


@pytest.mark.parametrize("committed", [False, True])
def test_the_source_is_not_aliased(committed):
    """The state must not alias the source: JAX shares NumPy memory that is aligned to 64 bytes."""
    memory = np.zeros(2 * 64 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    x = memory[start : start + 128].view(np.float32)
    params = jax.device_put(jnp.zeros(32), jax.devices()[0] if committed else None)
    state = jadam.adam(1e-3).init(params)
    assert state[0].mu.committed == committed
    filled = torch_state.from_torch(W | {"w.exp_avg": x, "w.exp_avg_sq": x}, state, {"": "w"})
    x[:] = 7
    assert not np.any(filled[0].mu)


def test_another_mesh_than_at_init():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AUTO,))
    with jax.set_mesh(mesh):
        inside = jadam.adam(1e-3).init(jnp.zeros(2))
        filled = torch_state.from_torch(W, STATE, {"": "w"})
    assert inside[0].count.sharding != STATE[0].count.sharding
    for new, old in ((filled, STATE), (torch_state.from_torch(W, inside, {"": "w"}), inside)):
        assert [x.sharding for x in jax.tree.leaves(new)] == [x.sharding for x in jax.tree.leaves(old)]


def test_other_parts_of_the_state_are_kept():
    flat = entries("adam/before/state/")
    tx = optax.chain(jadam.adam(1e-3), jadam.average_params(0.9))
    state = tx.init(PARAMS)
    filled = torch_state.from_torch(flat, state, NAMES)
    assert filled[1].count == 0
    assert_same_bits(filled[1], state[1])
    state = optax.MultiSteps(jadam.adam(1e-3), 4).init(PARAMS)
    filled = torch_state.from_torch(flat, state, NAMES)
    assert_same_bits(filled._replace(inner_opt_state=None), state._replace(inner_opt_state=None))


class OtherState(NamedTuple):
    """A state with a field that jadam does not know."""

    version: Any
    nu: Any
    mu: Any
    mu_scale: Any
    nu_scale: Any
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]


def test_other_fields_are_kept():
    zeros, placeholder = {"w": jnp.zeros(3), "none": None}, {"w": jnp.full(1, 7, jnp.int8), "none": None}
    state = OtherState(jnp.full(2, 1, jnp.int8), zeros, zeros, placeholder, placeholder, np.int32(0))
    flat = {"w.exp_avg": np.full(3, 2.0), "w.exp_avg_sq": np.full(3, 3.0), "w.step": 4}
    filled = torch_state.from_torch(flat, [state], {"['w']": "w"})[0]
    expected = {"nu": {"w": jnp.full(3, 3.0), "none": None}, "mu": {"w": jnp.full(3, 2.0), "none": None}}
    assert_same_bits(filled, state._replace(**expected, count=jnp.int32(4)))


def test_only_some_leaves_have_moments():
    labels = {"conv": "frozen", "dense": {"bias": "slow", "kernel": "fast"}}
    tx = optax.partition(
        {"frozen": optax.set_to_zero(), "slow": jadam.adam(1e-4), "fast": jadam.amsgrad(1e-3, max_of="v")}, labels
    )
    names = {key: name for key, name in NAMES.items() if "dense" in key}
    flat = {key: x for key, x in entries("amsgrad/before/state/").items() if key.startswith("3.")}
    del flat["3.bias.max_exp_avg_sq"]
    assert_same_bits(torch_state.to_torch(torch_state.from_torch(flat, tx.init(PARAMS), names), names), flat)


def test_in_flax_nnx():
    model = nnx.Conv(4, 5, (3, 2), kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jadam.adam(1e-3), wrt=nnx.Param)
    names = {"['kernel']": ("0.weight", torch_state.CONV2D), "['bias']": "0.bias"}
    flat = {key: x for key, x in entries("adam/before/state/").items() if key.startswith("0.")}
    optimizer.opt_state = torch_state.from_torch(flat, optimizer.opt_state, names)
    assert_same_bits(torch_state.to_torch(optimizer.opt_state, names), flat)
    nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))(model, optimizer)
    after = torch_state.to_torch(optimizer.opt_state, names)
    assert after["0.bias.step"] == torch_states.BEFORE + 1
    np.testing.assert_allclose(after["0.bias.exp_avg"], 0.9 * flat["0.bias.exp_avg"], rtol=2e-7)  # the bias is 0


# ---------------------------------------------------------------- errors


def test_every_problem_at_once():
    """One error lists all problems, in the order of leaves, then entries that are left over."""
    params = {
        "complex": jnp.zeros(2, jnp.complex64),
        "layout": jnp.zeros((2, 3)),
        "nameless": jnp.zeros((2, 3)),
        "same": jnp.zeros(1),
        "tied": jnp.zeros(1),
        "w": jnp.zeros((2, 3)),
        "x": jnp.zeros(2),
        "y": jnp.zeros(2),
        "z": jnp.zeros(2),
    }
    names = {f"['{key}']": key for key in params if key != "nameless"} | {
        "['layout']": ("layout", (0, 2)),
        "['tied']": "same",
        "['gone']": "gone",
        "['w']": ("w", (1, 0)),
    }
    flat = {
        "same.exp_avg": np.zeros(1),
        "same.exp_avg_sq": np.zeros(1),
        "same.step": np.float32(5),
        "w.exp_avg": np.zeros((2, 3)),
        "w.exp_avg_sq": np.zeros((3, 2), np.int32),
        "w.step": np.float32(7),
        "w.max_exp_avg_sq": np.zeros((3, 2)),
        "x.exp_avg": np.zeros(2, np.complex64),
        "x.exp_avg_sq": np.zeros(2, bool),
        "x.step": np.float32(2.5),
        "y.exp_avg_sq": np.array([None, None]),
        "y.step": np.zeros(1),
        "z.exp_avg": np.zeros(2),
        "z.exp_avg_sq": np.zeros(2),
        "z.step": np.float32(5),
        "left.over": np.zeros(1),
    }
    with pytest.raises(ValueError, match="from_torch found") as error:
        torch_state.from_torch(flat, jadam.adam(1e-3).init(params), names)
    assert str(error.value).splitlines() == [
        "from_torch found 16 problem(s):",
        """"['complex']" must be real, got complex64 (PyTorch's exp_avg_sq is then complex)""",
        """names["['layout']"] must be a name in PyTorch or (name, layout) with a permutation of the 2 axes, got """
        "('layout', (0, 2))",
        """"['nameless']" of shape (2, 3) is not in names""",
        """names gives 'same' to both "['same']" and "['tied']\"""",
        """names has "['gone']", but state has no moments for it""",
        """w.exp_avg must have shape (3, 2) for "['w']" of shape (2, 3) and layout (1, 0), got (2, 3)""",
        "w.exp_avg_sq must be floating, got int32",
        "x.exp_avg must be floating, got complex64",
        "x.exp_avg_sq must be floating, got bool",
        "x.step must be a whole number >= 0, got 2.5 of float32",
        "y.exp_avg is missing",
        "y.exp_avg_sq must be floating, got object",
        """y.step must have shape () for "['y']" of shape (2,) and layout (0,), got (1,)""",
        "w.max_exp_avg_sq matches no leaf in names. Only amsgrad has it: use jadam.amsgrad(max_of='v') here and "
        "amsgrad=True in PyTorch",
        "left.over matches no leaf in names",
        "steps must be equal, because jadam has one count, got 5 (same.step), 7 (w.step). Set them to one value",
    ]
    with pytest.raises(ValueError, match="to_torch found 5 problem"):
        torch_state.to_torch(jadam.adam(1e-3).init(params), names)


@pytest.mark.parametrize("step", [-1, np.nan, np.inf, 0.5, True, "1", None])
def test_no_step(step):
    with pytest.raises(ValueError, match=r"w\.step must be a whole number >= 0, got"):
        torch_state.from_torch(W | {"w.step": step}, STATE, {"": "w"})


@pytest.mark.parametrize("name", [None, 1, (), ("w",), (1, (0,)), ("w", 0), ("w", (True,)), ("w", (1,)), ("w", "0")])
def test_no_name(name):
    with pytest.raises(
        ValueError, match=r"names\[''\] must be a name in PyTorch or \(name, layout\) with a permutation"
    ):
        torch_state.from_torch(W, STATE, {"": name})


@pytest.mark.parametrize("tx", [jadam.adam(1e-3, b1=lambda count: 0.9), jadam.nadam(1e-3, momentum_decay=4e-3)])
def test_scheduled_betas_are_refused(tx):
    """Their products are not in PyTorch's state; without them the next step would be ten times too large."""
    with pytest.raises(ValueError, match="state must have constant betas, got betas that follow a schedule"):
        torch_state.from_torch(W, tx.init(jnp.zeros(2)), {"": "w"})
    assert torch_state.to_torch(tx.init(jnp.zeros(2)), {"": "w"}).keys() == W.keys()


def test_wrong_states():
    with pytest.raises(ValueError, match=r"state must have the moments of an Adam .*, found none"):
        torch_state.from_torch(W, optax.sgd(1e-3).init(jnp.zeros(2)), {"": "w"})
    with pytest.raises(ValueError, match="'' has moments in two places of state"):
        torch_state.from_torch(W, (STATE, STATE), {"": "w"})
    with pytest.raises(ValueError, match=r"(?s)w\.step is missing.*0 matches no leaf"):
        torch_state.from_torch({0: {"exp_avg": np.zeros(2)}}, STATE, {"": "w"})  # PyTorch's nested dict
    with pytest.raises(ValueError, match=r"max_exp_avg_sq is missing\. Only amsgrad has it"):
        torch_state.from_torch(W, jadam.amsgrad(1e-3).init(jnp.zeros(2)), {"": "w"})


def test_nothing_is_unpickled(tmp_path):
    for call in (torch_state.from_torch, lambda path, *args: torch_state.to_torch(*args, path)):
        with pytest.raises(ValueError, match=r"must end in \.safetensors, got '.*adam\.pt'. Pickles are not supported"):
            call(tmp_path / "adam.pt", STATE, {"": "w"})
    assert not any(tmp_path.iterdir())


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    torch_state.from_torch(W, STATE, {"": "w"})
    for call in (torch_state.from_torch, lambda path, *args: torch_state.to_torch(*args, path)):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tmp_path / "adam.safetensors", STATE, {"": "w"})


def test_a_failed_save_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "adam.safetensors"
    torch_state.to_torch(STATE, {"": "w"}, path)
    old = path.read_bytes()

    def full(flat, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            torch_state.to_torch(STATE, {"": "other"}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    torch_state.to_torch(STATE, {"": "other"}, str(path))
    assert "other.step" in safetensors.numpy.load_file(path)


def test_docstring_has_the_code_that_made_the_fixture():
    script = {line.strip() for line in inspect.getsource(torch_states).splitlines()}
    code = [line.strip() for line in torch_state.__doc__.splitlines() if line.startswith("    ")]
    assert len(code) == 11
    assert set(code) <= script
