"""`jadam.step` on a mesh of eight virtual devices: one pass over every shard, with the bits of one device."""

import functools
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FORMATS,
    assert_equal,
    assert_steps_agree,
    check_output,
    needs_kernel,
    normal,
    parametrize,
    parametrize_grid,
    subprocess_env,
    unwrap_exact_bf16,
    zip_leaves,
)
from jax import export
from jax.experimental import checkify, serialize_executable
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam._fused import backends
from jadam.sharding import sharded, state_shardings, zero1

pytestmark = needs_kernel

LAYOUTS = {
    "matrix": ((256, 1024), P("fsdp", "tensor")),
    "columns": ((256, 1024), P(None, "fsdp")),
    "rows": ((256, 1024), P("fsdp")),
    "stacked": ((2, 128, 1024), P(None, "fsdp", "tensor")),
    "whole": ((256, 1024), P()),
}
COLLECTIVE = re.compile(r" = .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def make_mesh(*axis_types, shape=(4, 2)):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=axis_types)


MESHES = {"auto": make_mesh(AxisType.Auto, AxisType.Auto), "explicit": make_mesh(AxisType.Explicit, AxisType.Explicit)}


def make_tx(moments, exact=False):
    tx = jadam.chain(jadam.clip(2.0), jadam.adamw(1e-2, moments=moments))
    return jadam.exact_bf16(tx) if exact else tx


def make_params(layouts, exact=False, seed=0):
    """Parameters, or gradients, on one device."""
    dtype = jnp.bfloat16 if exact else jnp.float32
    return {name: normal(*shape, seed=seed, dtype=dtype) for name, (shape, _) in layouts.items()}


def on_mesh(params, layouts, mesh):
    """Parameters sharded as in ``layouts``, with the specs that JAX returns: on an explicit mesh one for each axis."""
    full = lambda shape, spec: P(*spec, *[None] * (len(shape) - len(spec))) if mesh.are_all_axes_explicit else spec
    return jax.device_put(params, {name: NamedSharding(mesh, full(*x)) for name, x in layouts.items()})


def train(step, params, state, grads, steps=2):
    for _ in range(steps):
        params, state = step(params, state, grads)
    return params, state


def make_step(tx, how="jit"):
    """A training step ``(params, state, grads) -> (params, state)``."""
    step = lambda params, state, grads: jadam.step(tx, grads, state, params)
    if how == "nested jit":
        return lambda *args: jax.jit(step)(*args)
    if how == "scan":
        return lambda *args: jax.lax.scan(lambda x, _: (step(*x, args[2]), None), args[:2], length=1)[0]
    return step


def kernels(compiled):
    """The number of leaves in each kernel call of a compiled program."""
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="jadam' in line]
    return [int(re.search(r"rule = dense<.*?> : tensor<(\d+)xi64>", line).group(1)) for line in calls]


def collectives(compiled):
    return COLLECTIVE.findall(compiled.as_text())


def local_size(params):
    return sum(np.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(params))


@functools.cache
def one_device(moments, exact):
    """The result on one device."""
    tx, params, grads = make_tx(moments, exact), make_params(LAYOUTS, exact), make_params(LAYOUTS, exact, seed=1)
    return jax.device_get(train(jax.jit(make_step(tx)), params, tx.init(params), grads))


@parametrize_grid(
    {
        "moments": FORMATS,
        "exact": {"float32 weights": False, "bf16 weights": True},
        "axes": MESHES,
        "how": ["jit", "nested jit", "scan"],
    },
    default=[
        "float32-float32 weights-auto-jit",
        "bfloat16-bf16 weights-auto-scan",
        "int8-bf16 weights-auto-nested jit",
        "int8-bf16 weights-explicit-jit",
    ],
    slow=[
        "float32-float32 weights-explicit-scan",
        "float32-bf16 weights-auto-jit",
        "bfloat16-float32 weights-explicit-nested jit",
        "int8-float32 weights-auto-scan",
    ],
)
def test_one_pass_over_every_shard(moments, exact, axes, how):
    """One kernel call, no collective, one compilation, no temporaries; the bits of one device."""
    tx = make_tx(moments, exact)
    with jax.set_mesh(axes):
        params, grads = (on_mesh(make_params(LAYOUTS, exact, seed), LAYOUTS, axes) for seed in range(2))
        state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
        step = jax.jit(make_step(tx, how), donate_argnums=(0, 1))
        compiled = step.lower(params, state, grads).compile()
        assert kernels(compiled) == [len(LAYOUTS)]
        assert collectives(compiled) == []
        # A scalar row and an offset for each leaf, not a copy of an array; 0.05 bytes for each parameter is the limit.
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * local_size(params)
        got = train(step, params, state, grads)
    assert step._cache_size() == 1
    assert_equal(jax.device_get(got), one_device(moments, exact))


@parametrize("where", ["eager init", "init under jit", "replicated"], default=["init under jit"], slow=[])
def test_states_from_any_init(where):
    """A state that is less sharded than the parameters follows them: parameters and gradients are not gathered."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(LAYOUTS), LAYOUTS, mesh)
    init = tx.init if where == "eager init" else jax.jit(tx.init)
    state = init(params)
    if where == "replicated":
        state = jax.device_put(state, NamedSharding(mesh, P()))
    got = jax.jit(make_step(tx))(params, state, params)
    expected = jax.jit(make_step(tx))(*jax.device_get((params, state, params)))
    assert_equal(jax.device_get(got), jax.device_get(expected))
    for p, new, mu in zip_leaves(params, got[0], got[1][1][0].mu):
        assert new.sharding.is_equivalent_to(p.sharding, p.ndim)
        assert mu.sharding.is_equivalent_to(p.sharding, p.ndim)


def test_gradient_accumulation_and_out_shardings():
    """Gradients that are summed in a loop, given shardings of arguments and results, a loss with a collective."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(LAYOUTS), LAYOUTS, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params), state_shardings(tx, params)

    def step(params, state, batches):
        loss = lambda params, x: sum(jnp.sum((p * x) ** 2) for p in jax.tree.leaves(params))
        add = lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None)
        grads = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]
        return jadam.step(tx, grads, state, params)

    batches = jnp.float32([0.5, 0.25])  # powers of two, so that XLA's sums are exact in any order
    jitted = jax.jit(step, in_shardings=(*shardings, None), out_shardings=shardings, donate_argnums=(0, 1))
    host = jax.device_get(params)
    state = jax.device_put(tx.init(host), shardings[1])
    assert kernels(jitted.lower(params, state, batches).compile()) == [len(LAYOUTS)]
    got = train(jitted, params, state, batches)
    assert_equal(jax.device_get(got), jax.device_get(train(jax.jit(step), host, tx.init(host), batches)))
    assert jitted._cache_size() == 1


@parametrize_grid({"moments": ["float32", "int8"], "mesh": MESHES}, default=["int8-auto", "float32-explicit"], slow=[])
def test_zero_by_hand(moments, mesh):
    """Parameters replicated, state sharded by the user: only the new parameters are gathered."""
    tx = make_tx(moments)
    layouts = {"a": ((256, 1024), P("fsdp")), "b": ((256, 1024), P("fsdp", "tensor"))}
    whole = {name: (shape, P()) for name, (shape, _) in layouts.items()}
    params = make_params(layouts)
    states = state_shardings(tx, on_mesh(params, layouts, mesh))
    expected = jax.jit(make_step(tx))(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        replicated = on_mesh(params, whole, mesh)
        out = jax.tree.map(lambda x: x.sharding, replicated), states
        args = replicated, jax.device_put(tx.init(params), states), replicated
        compiled = jax.jit(make_step(tx), out_shardings=out).lower(*args).compile()
        got = compiled(*args)
    assert kernels(compiled) == [2]
    gathered = [line for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]
    assert gathered
    assert all(re.search(r"= \(?f32\[\S+ all-gather", line) for line in gathered)
    assert_equal(jax.device_get(got), jax.device_get(expected))


# ---------------------------------------------------------------- shards that cut int8 blocks

CUT = {"w": ((64, 768), P(None, ("fsdp", "tensor")))}  # 96 columns for each device, blocks of 128


@pytest.fixture
def warnings(caplog):
    """Messages of jadam's logger in this test."""
    backends._warned.clear()
    with caplog.at_level(logging.WARNING, "jadam"):
        yield lambda: [x.getMessage() for x in caplog.records if x.name == "jadam"]
    backends._warned.clear()


@parametrize_grid(
    {"mesh": MESHES, "exact": {"float32 weights": False, "bf16 weights": True}},
    default=["auto-bf16 weights", "explicit-float32 weights"],
    slow=[],
)
@pytest.mark.usefixtures("strict")
def test_cut_blocks(mesh, exact, warnings):
    """A state whose blocks the shards cut: the values of one device, nothing gathered, a warning with the remedy."""
    tx, params = make_tx("int8", exact), make_params(CUT, exact)
    params["w"] = params["w"].at[3, 100].set(100.0)  # the largest of a block, which is not on its first device
    state = tx.init(params)
    cut = lambda x: NamedSharding(mesh, CUT["w"][1] if x.shape == (64, 768) else P())
    for _ in range(2):
        expected = jax.jit(make_step(tx))(params, state, params)
        args = jax.device_put((params, state, params), jax.tree.map(cut, (params, state, params)))
        with jax.set_mesh(mesh):
            compiled = jax.jit(make_step(tx)).lower(*args).compile()
            got = compiled(*args)
        wide = unwrap_exact_bf16 if exact else lambda *args: args
        assert_steps_agree(wide(*got), wide(*expected), wide(params, state), int8=True)
        assert set(collectives(compiled)) == {"all-reduce"}
        params, state = expected
    (message,) = warnings()
    assert message.startswith("jadam.step is slow for ['w']: its shards, ")
    assert "jadam.sharding.sharded(tx, params, mesh)" in message


@pytest.mark.parametrize("how", ["sharded", "eager init", "explicit axes"])
def test_blocks_that_fit(how, warnings):
    """Blocks are chosen to fit the shards: the kernel serves."""
    tx, mesh = make_tx("int8"), MESHES["explicit" if how == "explicit axes" else "auto"]
    params = on_mesh(make_params(CUT), CUT, mesh)
    with jax.set_mesh(mesh):
        if how == "sharded":
            tx = sharded(tx, params, mesh)
        state = jax.jit(tx.init)(params) if how == "explicit axes" else tx.init(params)
        scales = state[1][0].mu_scale["w"]
        assert scales.shape == (64, 8)
        assert state_shardings(tx, params)[1][0].mu_scale["w"].is_equivalent_to(scales.sharding, 2)
        compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
        got = compiled(params, state, params)
    assert kernels(compiled) == [1]
    assert collectives(compiled) == []
    host = jax.device_get((params, state, params))
    assert_equal(jax.device_get(got), jax.device_get(jax.jit(make_step(make_tx("int8")))(*host)))
    assert warnings() == []


# ---------------------------------------------------------------- programs in which JAX refuses custom partitioning

SMALL = {"w": ((64, 1024), P("fsdp", "tensor")), "b": ((64,), P())}


def test_two_meshes():
    """JAX refuses a second mesh in a program whose trace holds custom partitioning; ours is made when it is lowered."""
    tx = make_tx("int8")
    meshes = MESHES["auto"], make_mesh(AxisType.Auto, AxisType.Auto, shape=(2, 4))
    params = [on_mesh(make_params(SMALL, seed=i), SMALL, mesh) for i, mesh in enumerate(meshes)]
    states = [jax.device_put(tx.init(p), state_shardings(tx, p)) for p in params]
    both = jax.jit(lambda *args: [jadam.step(tx, p, s, p) for p, s in args])
    args = list(zip(params, states, strict=True))
    assert kernels(both.lower(*args).compile()) == [2, 2]
    assert_equal(jax.device_get(both(*args)), jax.device_get(both(*jax.device_get(args))))


def test_an_abstract_mesh(warnings):
    """Lowered without devices, for a platform with and one without custom partitioning."""
    mesh, tx = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2), make_tx("int8")
    aval = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    params = {name: aval(*x) for name, x in SMALL.items()}
    shapes = jax.eval_shape(tx.init, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()})
    at = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(at, shapes, state_shardings(tx, params))
    traced = jax.jit(make_step(tx)).trace(params, state, params)
    assert "CustomSPMDPartitioning" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert warnings() == []
    assert "custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    (message,) = warnings()
    assert message.startswith("jadam.step takes several passes over memory for narrow moments")
    assert "JAX cannot partition a kernel on tpu" in message
    assert "jadam.sharding.sharded(tx, params, mesh)" in message


def test_export_for_several_devices():
    """It cannot hold the callback of custom partitioning: XLA does the step."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(SMALL), SMALL, mesh)
    arrays, structure = jax.tree.flatten((params, tx.init(params), params))
    on_devices = lambda x: x.sharding if len(x.sharding.device_set) == 8 else NamedSharding(mesh, P())
    arrays = [jax.device_put(x, on_devices(x)) for x in arrays]
    step = jax.jit(lambda *args: jax.tree.leaves(make_step(tx)(*structure.unflatten(args))))
    again = export.deserialize(export.export(step)(*arrays).serialize())
    for got, expected in zip(again.call(*arrays), step(*arrays), strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=1e-5, atol=1)  # of codes: 1 at most


WITHOUT_SHARDY = """
import jax, jax.numpy as jnp, numpy as np, jadam
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_use_shardy_partitioner", False)
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
tx, params = jadam.adamw(0.1), jax.device_put(np.ones((64, 128), np.float32), NamedSharding(mesh, P("x")))
compiled = jax.jit(lambda p, s: jadam.step(tx, p, s, p)).lower(params, tx.init(params)).compile()
print("jadam_step" in compiled.as_text(), round(float(compiled(params, tx.init(params))[0][0, 0]), 3))
"""


def test_without_shardy():
    """Custom partitioning would abort the process: XLA does the step."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_SHARDY]
    assert check_output(command, env=subprocess_env()).split() == ["False", "0.9"]


def test_mixed_axes():
    """A mesh of which one axis is explicit: the kernel serves; the types are kept."""
    tx, mesh = make_tx("int8", exact=True), make_mesh(AxisType.Explicit, AxisType.Auto)
    params = make_params(SMALL, exact=True)
    expected = jax.jit(make_step(tx))(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        params = on_mesh(params, SMALL, mesh)
        state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
        step = jax.jit(make_step(tx))
        assert kernels(step.lower(params, state, params).compile()) == [2]
        got = step(params, state, params)
        assert jax.typeof(got[0]["w"]).sharding.spec == jax.typeof(params["w"]).sharding.spec
    assert_equal(jax.device_get(got), jax.device_get(expected))


@pytest.mark.parametrize("declare", [sharded, functools.partial(zero1, axis="tensor")], ids=["sharded", "zero1"])
def test_declared_on_mixed_axes(declare):
    """`sharded` and `zero1` on such a mesh, traced: explicit and auto axes need different constraints."""
    tx, mesh = make_tx("int8"), make_mesh(AxisType.Explicit, AxisType.Auto)
    params = make_params(SMALL)
    expected = jax.jit(make_step(tx))(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        params = on_mesh(params, SMALL, mesh)
        tx = declare(tx, params, mesh=mesh)
        state = tx.init(params)
        step = jax.jit(make_step(tx))
        assert kernels(step.lower(params, state, params).compile()) == [2]
        new_params, new_state = step(params, state, params)
        for p, new in zip_leaves((params, state), (new_params, new_state)):
            assert new.sharding.is_equivalent_to(p.sharding, p.ndim)
    assert_equal(jax.device_get((new_params, new_state)), jax.device_get(expected))


def test_shard_map_over_one_of_two_axes():
    """The other stays auto: XLA does the step."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = make_params(SMALL)
    state = tx.init(params)
    spec = lambda tree: jax.tree.map(lambda x: P("fsdp") if x.ndim == 2 and x.shape[0] == 64 else P(), tree)
    run = jax.shard_map(
        make_step(tx),
        mesh=mesh,
        axis_names={"fsdp"},
        in_specs=(spec(params), spec(state), spec(params)),
        out_specs=(spec(params), spec(state)),
        check_vma=False,
    )
    got = jax.jit(run)(params, state, params)
    assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(got))


def test_vmap_and_derivatives():
    """Custom partitioning has no rules for them; the primitive's stand outside of it."""
    layout = {"b": ((64,), P("fsdp"))}
    tx, host = make_tx("float32"), jax.device_get(make_params(layout))
    params = on_mesh(host, layout, MESHES["auto"])
    state = jax.device_get(tx.init(host))
    of_sum = jax.jit(jax.grad(lambda p: jnp.sum(make_step(tx)(p, state, params)[0]["b"])))
    # 1 - lr * weight_decay: a product and a sum
    np.testing.assert_allclose(of_sum(params)["b"], of_sum(host)["b"], rtol=2.0**-22)
    two = lambda tree: jax.tree.map(lambda x: np.stack([x, x]), tree)
    got = jax.jit(jax.vmap(make_step(tx), in_axes=(None, 0, None)))(params, two(state), params)
    second = jax.tree.map(lambda x: x[1], jax.device_get(got))
    assert_steps_agree(second, jax.jit(make_step(tx))(params, state, params), (params, state))


def test_no_leaked_tracers():
    """The program keeps the functions given to custom partitioning, which must not hold traced arrays."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(SMALL), SMALL, mesh)
    state = tx.init(params)
    with jax.checking_leaks():
        jax.jit(make_step(tx)).lower(params, state, params).compile()


def test_checkify():
    """A NaN in a shard is found."""
    tx, mesh = make_tx("float32"), MESHES["auto"]
    params = on_mesh({"w": normal(64, 1024).at[40, 3].set(jnp.nan), "b": normal(64)}, SMALL, mesh)
    error, _ = jax.jit(checkify.checkify(make_step(tx), checkify.nan_checks))(params, tx.init(params), params)
    assert "nan" in error.get()


def test_serialized_executable():
    """A compiled program is saved and loaded: what custom partitioning needed to compile it is left out."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(SMALL), SMALL, mesh)
    state = jax.device_put(tx.init(params), state_shardings(tx, params))
    compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
    again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    assert kernels(again) == [2]
    assert_equal(jax.device_get(again(params, state, params)), jax.device_get(compiled(params, state, params)))


def test_cache_keys_differ_between_versions(monkeypatch):
    """A program that another version compiled may call its kernel with other arguments."""
    tx, mesh = make_tx("int8"), MESHES["auto"]
    params = on_mesh(make_params(SMALL), SMALL, mesh)
    state = tx.init(params)
    # The pointer to the callback, which differs each time, is left out of the key.
    text = lambda: jax.jit(make_step(tx)).lower(params, state, params).as_text()
    lowered = lambda: re.sub(r'backend_config = "\d+"', "", text())
    before = lowered()
    assert lowered() == before
    monkeypatch.setattr(jadam, "__version__", "0.0.1")
    assert lowered() != before


CACHE = """
import sys
import jax, numpy as np, jadam
from jax import monitoring
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
for name in "ab":  # names seed the random bits; nothing else distinguishes the programs
    tx, params = jadam.adamw(0.1, moments="int8"), {name: np.random.default_rng(0).normal(size=(64, 128)).astype("f")}
    expected = jax.jit(lambda p, s: jadam.step(tx, p, s, p))(params, tx.init(params))
    params = jax.device_put(params, NamedSharding(mesh, P("x")))
    arrays, structure = jax.tree.flatten((params, tx.init(params)))
    hits.clear()
    def step(*arrays):
        params, state = structure.unflatten(arrays)
        return tuple(jax.tree.leaves(jadam.step(tx, params, state, params)))
    for x, y in zip(jax.jit(step)(*arrays), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    print(len(hits))
"""


def test_compilation_cache(tmp_path):
    """Two settings with equal shapes do not share an entry; the next process finds both."""
    run = lambda: check_output([sys.executable, "-c", CACHE, tmp_path], env=subprocess_env()).split()
    assert run() == ["0", "0"]
    assert run() == ["1", "1"]
