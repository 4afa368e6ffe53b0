"""`jadam.sharding` on eight virtual devices: an eighth of the state on each, and the bits of one device."""

import functools
import importlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import CPU, FORMATS, MESH, assert_equal, parametrize, parametrize_grid, zip_leaves
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import jadam
import jadam.flax
from jadam.sharding import sharded, state_shardings, zero1

WHOLE = NamedSharding(MESH, P())


def params(dtype=jnp.float32, seed=0):
    """Parameters with an odd number of rows, partial int8 blocks, a vector, and a size that 8 does not divide."""
    normal = functools.partial(helpers.normal, seed=seed, dtype=dtype)
    return {
        "embed": normal(257, 768),
        "kernel": normal(128, 300),
        "stacked": normal(3, 16, 300),
        "bias": normal(24),
        "scale": normal(3),
        "none": None,
    }


def transformations():
    clipped = lambda tx: jadam.chain(jadam.clip(3.0), tx)
    for moments in FORMATS:
        adamw = clipped(jadam.adamw(optax.cosine_decay_schedule(1e-2, 10), moments=moments))
        yield moments, adamw, jnp.float32
        yield f"{moments}, bf16 weights", jadam.exact_bf16(adamw), jnp.bfloat16
    yield "bfloat16, amsgrad", jadam.amsgrad(1e-2, moments="bfloat16"), jnp.float32
    rules = [("embed", {"moments": "int8", "b1": lambda count: 0.9}), ("bias", jadam.FROZEN), ("", {})]
    yield "by_path", jadam.by_path(rules, 1e-2), jnp.float32
    yield "Optax's chain", optax.chain(optax.clip(1.0), jadam.adamw(1e-2, moments="int8")), jnp.float32
    yield "Optax's own", jadam.exact_bf16(optax.MultiSteps(optax.adamw(1e-2), 2)), jnp.bfloat16


ALL = {name: (tx, dtype) for name, tx, dtype in transformations()}


@functools.cache
def divided(name):
    """`zero1` of the optimizer ``name``, and its initial state, which must not be donated."""
    p = params_of(name)
    divided = zero1(ALL[name][0], p, MESH, "data")
    return divided, divided.init(p)


def params_of(name):
    """Parameters; fewer for Optax's optimizers, which are slow to compile."""
    p = params(ALL[name][1])
    return {k: p[k] for k in ("kernel", "bias", "scale", "none")} if name == "Optax's own" else p


def start(name, place):
    """Parameters and state that may be donated, on eight devices or on one."""
    tx, state = divided(name)
    p, state = params_of(name), jax.tree.map(np.array, state)
    if place == "eight":
        return jax.device_put(jax.device_get(p), WHOLE), jax.device_put(state, tx.shardings)
    return p, jax.device_put(state)


def gradient(i, p):
    return {
        k: x if x is None else np.cos(np.asarray(x) * np.float32(i + 1)) for k, x in params(seed=1).items() if k in p
    }


@functools.cache
def compiled(name, place):
    """`jadam.step`, compiled for these avals and shardings, with donated arguments."""
    tx = divided(name)[0] if place == "eight" else ALL[name][0]
    p, state = start(name, place)
    return jax.jit(functools.partial(jadam.step, tx), donate_argnums=(1, 2)).lower(gradient(0, p), state, p).compile()


def trained(name, place, p, state, steps=3):
    for i in range(steps):
        p, state = compiled(name, place)(gradient(i, p), state, p)
    return p, state


@parametrize(
    "name",
    [*ALL],
    default=["float32, bf16 weights", "bfloat16, bf16 weights", "int8", "bfloat16, amsgrad", "Optax's own"],
)
def test_bits_of_one_device(name):
    """Parameters, moments, codes and scales are those of one device, bit for bit."""
    got, expected = (trained(name, place, *start(name, place)) for place in ("eight", "one"))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    exact = not name.startswith("Optax")  # XLA may fuse its stages otherwise: 1 ulp of lr * u
    for a, b in zip_leaves(got, expected):
        if exact:
            np.testing.assert_array_equal(a, b)
        elif a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    wanted = divided(name)[0].shardings
    for state in (divided(name)[1], got[1]):
        shardings = jax.tree.map(lambda x: x.sharding, state)
        assert all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip_leaves(shardings, wanted, state))
    assert all(x.sharding.is_equivalent_to(WHOLE, x.ndim) for x in jax.tree.leaves(got[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bits_of_one_device_along_several_axes(dtype):
    """As above, for parameters that are sharded themselves: stacked layers are cut along both their other axes."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = jadam.by_path([(name, {"moments": name}) for name in FORMATS], 1e-2)
    tx = jadam.exact_bf16(tx) if dtype == jnp.bfloat16 else tx
    host = {name: helpers.normal(3, 16, 256, seed=i, dtype=dtype) for i, name in enumerate(FORMATS)}
    p = jax.device_put(host, NamedSharding(mesh, P(None, None, "model")))
    divided = zero1(tx, p, mesh, "data")
    assert {x.state_sharding.spec for x in divided.layout.leaves} == {P(None, "data", "model")}

    def train(tx, p, state):
        step = jax.jit(functools.partial(jadam.step, tx))
        for i in range(2):
            p, state = step({k: np.cos(np.float32(x) * (i + 1)) for k, x in host.items()}, state, p)
        return p, state

    assert_equal(train(divided, p, divided.init(p)), train(tx, host, tx.init(host)))


@pytest.mark.parametrize("name", ALL)
def test_bytes_on_each_device(name):
    """A device holds an eighth of each array, and all of scalars and of the leaf that 8 does not divide."""
    p = params_of(name)
    tx, state = divided(name)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    described = jadam.describe(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state), p)
    whole = sum(leaf.bytes for leaf in described.leaves if leaf.name in tx.undivided)
    assert set(tx.undivided) == {"['scale']"}
    single = sum(x.nbytes for x in jax.tree.leaves(state) if x.size == 1)
    assert here <= (described.bytes - whole) / 8 + whole + single + described.other_bytes
    planned = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tx.layout.state))
    assert here == planned


@pytest.mark.parametrize("moments", FORMATS)
def test_communication(moments):
    """Only parameters are gathered, once each; the kernel steps the shards."""
    p = params(jnp.bfloat16)
    text = compiled(f"{moments}, bf16 weights", "eight").as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    sizes = [x.size for x in jax.tree.leaves(p) if x.size > 3]
    assert sorted(np.prod([int(n) for n in shape.split(",")]) for _, shape in gathered) == sorted(sizes)
    assert {dtype for dtype, _ in gathered} <= {"bf16", "f32"}  # on a CPU XLA gathers bfloat16 as float32
    assert not re.search(r" (all-to-all|collective-permute)\(", text)
    assert ("jadam_step" in text) == (CPU.kernel is not None)


def test_the_clipping_norm_is_global():
    tx = jadam.chain(
        jadam.clip_by_global_norm(1.0), jadam.adamw(1e-2, eps=10.0)
    )  # eps is so large that the scale of gradients matters
    p = {"w": jax.device_put(np.ones((16, 8), np.float32))}
    divided = zero1(tx, p, MESH, "data")
    by_rows = NamedSharding(MESH, P("data"))
    g = {"w": np.arange(128, dtype=np.float32).reshape(16, 8)}
    got, _ = jax.jit(functools.partial(jadam.step, divided))(jax.device_put(g, by_rows), divided.init(p), p)
    expected, _ = jax.jit(functools.partial(jadam.step, tx))(g, tx.init(p), p)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-7)  # another order of the sum of squares


def losses(tx, p, state, x, y):
    """Losses of five steps of a two-layer network."""

    def loss(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

    @jax.jit
    def step(p, state, x, y):
        value, grads = jax.value_and_grad(loss)(p, x, y)
        return *jadam.step(tx, grads, state, p), value

    values = []
    for _ in range(5):
        p, state, value = step(p, state, x, y)
        values.append(float(value))
    return values


@functools.cache
def trained_alone(tx):
    """Weights, a batch, and the losses on one device."""
    rng = np.random.default_rng(0)
    host = {name: rng.standard_normal(shape, np.float32) for name, shape in (("a", (64, 128)), ("b", (128, 64)))}
    batch = [rng.standard_normal((32, 64), np.float32) for _ in range(2)]
    p = jax.device_put(host)
    return host, batch, losses(tx, p, tx.init(p), *batch)


ADAMW_INT8 = jadam.adamw(1e-2, moments="int8")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_in_training(kind):
    """Data-parallel training with parameters sharded over a second axis has the losses of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    host, batch, alone = trained_alone(ADAMW_INT8)
    homes = {"a": on(None, "model"), "b": on("model", None)}
    if kind is AxisType.Explicit:
        homes = {"a": on(), "b": on()}
    p = jax.tree.map(jax.device_put, host, homes)
    divided = zero1(ADAMW_INT8, p, mesh, "data")
    assert not divided.undivided
    many = losses(divided, p, divided.init(p), *(jax.device_put(x, on()) for x in batch))
    # another order of the gradients' sums: 1e-6 of a gradient, or another code, which moves one coordinate by lr
    np.testing.assert_allclose(many, alone, rtol=1e-3)
    assert many[-1] < many[0]


def test_states_move_between_meshes():
    """A state moves from eight devices to one with the same blocks and bits."""
    host = jax.tree.map(np.array, trained("int8", "eight", *start("int8", "eight"), 2))
    back = jax.device_put(host[0], WHOLE), jax.device_put(host[1], divided("int8")[0].shardings)
    alone = jax.device_put(host)
    assert_equal(trained("int8", "eight", *back, 1), trained("int8", "one", *alone, 1))


def test_update_and_describe():
    tx = jadam.adamw(1e-2)
    p = {name: x for name, x in params().items() if name in ("kernel", "bias", "scale")}
    divided = zero1(tx, p, MESH, "data")
    state = divided.init(p)
    updates, _ = jax.jit(divided.update)(p, state, jax.device_put(p, WHOLE))
    expected, _ = jax.jit(tx.update)(p, tx.init(p), p)
    for a, b in zip_leaves(updates, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert jadam.describe(divided, p).bytes == jadam.describe(tx, p).bytes


def test_extra_arguments_reach_the_optimizer():
    plateau = optax.chain(jadam.adam(0.5), contrib.reduce_on_plateau(0.5, patience=1))
    p = {"w": helpers.ones((8, 4))}
    tx = zero1(plateau, p, MESH, "data")
    updates, _ = jax.jit(tx.update)(p, tx.init(p), p, value=1.0)
    expected, _ = jax.jit(plateau.update)(p, plateau.init(p), p, value=1.0)
    assert_equal(updates, expected)


FSDP = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"kernel": P("fsdp", "tensor"), "stacked": P(None, "fsdp", "tensor"), "columns": P(None, ("fsdp", "tensor"))}
SPECS |= {"bias": P("tensor"), "scale": P()}


def on_fsdp(dtype=jnp.float32, seed=0):
    """Parameters on a mesh of two axes."""
    normal = functools.partial(helpers.normal, seed=seed, dtype=dtype)
    p = {"kernel": normal(64, 512), "stacked": normal(3, 16, 512), "columns": normal(64, 768), "bias": normal(64)}
    return jax.device_put(p | {"scale": normal(3)}, {k: NamedSharding(FSDP, spec) for k, spec in SPECS.items()})


@parametrize_grid(
    {"moments": FORMATS, "dtype": {"float32 weights": jnp.float32, "bf16 weights": jnp.bfloat16}},
    default=["float32-float32 weights", "int8-bf16 weights"],
    slow=[],
)
def test_sharded_like_the_parameters(moments, dtype):
    """`sharded`: the state lies where the parameters do, with blocks that fit; the bits of one device."""
    p, g = on_fsdp(dtype), on_fsdp(dtype, seed=1)
    tx = jadam.adamw(1e-2, moments=moments)
    tx = jadam.exact_bf16(tx) if dtype == jnp.bfloat16 else tx
    on_mesh = sharded(tx, p, FSDP)
    assert repr(on_mesh) == "sharded: the state has the shardings of the parameters"
    assert on_mesh.undivided == on_mesh.widened == {}
    state = on_mesh.init(p)
    assert jax.tree.map(lambda x: x.sharding, state) == on_mesh.shardings == state_shardings(tx, p)
    for x, shape in zip_leaves(state, jax.eval_shape(tx.init, p)):
        assert x.dtype == shape.dtype
    step = jax.jit(functools.partial(jadam.step, on_mesh), donate_argnums=(1, 2))
    host = jax.device_get((p, state, g))
    got = step(g, *jax.device_put((state, p), jax.tree.map(lambda x: x.sharding, (state, p))))
    assert_equal(jax.device_get(got), jax.device_get(jax.jit(functools.partial(jadam.step, tx))(host[2], *host[1::-1])))
    assert jax.tree.map(lambda x: x.sharding, got) == (jax.tree.map(lambda x: x.sharding, p), on_mesh.shardings)


def test_sharded_refuses_parameters_without_shardings():
    with pytest.raises(ValueError, match=r"params must have a jax\.sharding\.NamedSharding, got none that has one"):
        sharded(jadam.adamw(1e-3), params(), MESH)
    two = {"a": on_fsdp()["kernel"], "b": jax.device_put(np.ones(8, np.float32), WHOLE)}
    with pytest.raises(
        ValueError, match=r"params must lie on one mesh, got 2: {'fsdp': 4, 'tensor': 2} and {'data': 8}"
    ):
        state_shardings(jadam.adamw(1e-3), two)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_describe_tells_which_shards_a_kernel_updates(platform, monkeypatch):
    describe = importlib.import_module("jadam._diagnostics.describe")
    monkeypatch.setattr(describe, "platform_of", lambda device: platform)
    p, tx = {k: x for k, x in on_fsdp().items() if k != "stacked"}, jadam.adamw(1e-2, moments="int8")
    described = [jadam.describe(x, p) for x in (tx, sharded(tx, p, FSDP), zero1(tx, p, FSDP, "fsdp"))]
    assert [x.one_pass for x in described] == [platform == "cpu", True, True]
    if platform == "tpu":
        assert "except ['columns'] (on several devices it needs jadam.sharding.sharded) and 1 more" in described[0].step
    bytes = [sum(x.nbytes for x in jax.tree.leaves(s)) for s in (tx.init(p), sharded(tx, p, FSDP).init(p))]
    assert [x.bytes for x in described[:2]] == bytes


@parametrize("moments", ["bfloat16", "int8"], default=["int8"], slow=[])
def test_orbax_from_eight_devices_to_four_and_one(moments, tmp_path):
    """Saved on eight devices, restored on four and on one; the next step has the same bits."""
    tx, p, g = jadam.exact_bf16(jadam.adamw(1e-2, moments=moments)), on_fsdp(jnp.bfloat16), on_fsdp(jnp.bfloat16, 1)
    step = jax.jit(functools.partial(jadam.step, tx))
    p, state = step(g, tx.init(p), p)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (p, state))
    expected = jax.device_get(step(g, state, p))
    for devices in (4, 1):
        mesh = jax.make_mesh((devices, 1), ("fsdp", "tensor"), devices=jax.devices()[:devices])
        there = lambda x, mesh=mesh: NamedSharding(mesh, getattr(x.sharding, "spec", P()))
        like = jax.tree.map(
            lambda x, there=there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there(x)), (p, state)
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "saved", like)
        assert_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, (p, state)))
        grads = jax.device_put(jax.device_get(g), jax.tree.map(there, g))
        assert_equal(jax.device_get(step(grads, *restored[::-1])), expected)


def test_abstract_mesh():
    mesh = jax.sharding.AbstractMesh((256,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"w": jax.ShapeDtypeStruct((4096, 50257), jnp.bfloat16)}
    divided = zero1(jadam.exact_bf16(jadam.adamw(1e-3, moments="int8")), shapes, mesh, "data")
    assert divided.shardings.remainder["w"].spec == P("data")


def test_undivided_because_of_blocks():
    narrow = zero1(
        jadam.adamw(1e-3, moments="int8"),
        {"a": np.ones((33, 200), np.float32), "b": np.ones(8, np.float32)},
        MESH,
        "data",
    )
    assert (
        narrow.undivided["['a']"]
        == "its last dimension would be cut into shards of 25, which no int8 block of 32 to 128 divides"
    )


def test_other_parameters_are_refused():
    p = params()
    divided = zero1(jadam.adamw(1e-3), p, MESH, "data")
    state = divided.init(p)
    other = {**p, "scale": jax.device_put(np.ones(5, np.float32))}
    less = {**p, "scale": None}
    text = (
        r"must match the params given to zero1 \(number of arrays: 5\), got {}. First mismatch: shape {}, expected {}"
    )
    with pytest.raises(ValueError, match="params " + text.format(5, r"\(5,\)", r"\(3,\)")):
        divided.init(other)
    with pytest.raises(ValueError, match="grads " + text.format(4, r"\(3, 16, 300\)", r"\(3,\)")):
        jadam.step(divided, less, state, p)
    with pytest.raises(ValueError, match="updates " + text.format(4, r"\(3, 16, 300\)", r"\(3,\)")):
        divided.update(less, state, p)
    with pytest.raises(ValueError, match=r"params .* \(number of arrays: 5\), got 0"):
        jadam.step(divided, p, state, None)


def test_parameters_on_another_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for spec, own in ((P("data"), "{'data': 4}"), (P("model"), "{'model': 2}")):
        p = {"w": jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, spec))}
        text = re.escape(f"mesh must have the axes {own} that shard params['w'], got {{'data': 8}}.")
        with pytest.raises(ValueError, match=text):
            zero1(jadam.adamw(1e-3), p, MESH, "data")


def test_axes_of_size_1_do_not_recompile():
    mesh = jax.make_mesh((1, 8), ("one", "data"), axis_types=(AxisType.Auto,) * 2)
    p = jax.device_put(np.ones((16, 8), np.float32), NamedSharding(mesh, P()))
    divided = zero1(jadam.adamw(1e-3), p, mesh, ("one", "data"))
    step = jax.jit(functools.partial(jadam.step, divided))
    q, state = step(p, divided.init(p), p)
    step(p, state, q)
    assert step._cache_size() == 1


@nnx.jit
def gradient_of(model):
    return nnx.grad(lambda model: jnp.sum(model(jnp.ones((4, 64)))))(model)


@pytest.mark.parametrize("given", ["variables", "pure", "shapes"])
def test_nnx_with_any_tree_of_parameters(given):
    """`zero1` accepts the parameters in any of NNX's kinds of trees."""
    make = lambda: nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    model = make()
    variables = nnx.state(model, nnx.Param)
    shapes = lambda: nnx.state(nnx.eval_shape(make), nnx.Param)
    p = {"variables": variables, "pure": nnx.to_pure_dict(variables), "shapes": shapes()}[given]
    divided = zero1(jadam.adamw(1e-2, moments="int8"), p, MESH, "data")
    optimizer = jadam.flax.Optimizer(model, divided, wrt=nnx.Param)
    optimizer.update(model, gradient_of(model))
    np.testing.assert_allclose(model.bias[...], -1e-2, rtol=1e-6)  # the first direction is 1, to a few ulp
    parts = {(x.size, x.addressable_shards[0].data.size) for x in jax.tree.leaves(nnx.state(optimizer)) if x.size > 2}
    assert parts == {(64 * 128, 8 * 128), (64, 8), (128, 16)}  # codes, scales, moments of the bias
