"""`jadam.step` agrees with `update` + `apply_updates`, on every path that may execute it."""

import functools
import shutil
import sys
from pathlib import Path

import handler
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    CPU,
    RULES,
    assert_equal,
    assert_same_finite,
    assert_steps_agree,
    check_output,
    count_kernel_calls,
    jitted_steps,
    make_optimizer,
    needs_kernel,
    ones,
    parametrize,
    random_tree,
    subprocess_env,
    takes_int8,
    unwrap_exact_bf16,
    zip_leaves,
)
from jax.sharding import PartitionSpec as P

import jadam
from jadam._fused import step as _step
from jadam._fused.cpu import kernel as cpu
from jadam._fused.native import call, extension

INT8 = list(filter(takes_int8, RULES))
MOMENTS = {"float32": [*RULES], "bfloat16": [name for name in RULES if name != "adamax"], "int8": INT8}
CASES = {f"{name}-{moments}": (name, moments) for moments, names in MOMENTS.items() for name in names}


@needs_kernel
@parametrize(
    "case",
    CASES,
    default=[
        "adam-float32",
        "adam, scheduled b1-float32",
        "adam, hat-float32",
        "adamax-float32",
        "amsgrad-float32",
        "adam-bfloat16",
        "radam of nadam-bfloat16",
        "both-bfloat16",
        "adam-int8",
        "nadamw, momentum-int8",
    ],
    slow=[
        *("adam, eps_root-float32", "adamw, masked-float32", "amsgrad of v-float32", "clip by norm-float32"),
        *("amsgrad-bfloat16", "adamaxw-bfloat16", "nadam-bfloat16", "adamw, scheduled-int8", "both-int8"),
    ],
)
def test_kernel_matches_update_and_apply(case):
    rule, moments = case
    tx = make_optimizer(rule, moments)
    step, update_and_apply = jitted_steps(tx)
    params = random_tree(0)
    state = tx.init(params)
    for t in range(12):
        grads = random_tree(t + 1)
        expected = update_and_apply(grads, state, params)
        assert_steps_agree(step(grads, state, params), expected, (params, state), moments == "int8")
        params, state = expected
    assert count_kernel_calls(functools.partial(jadam.step, tx), grads, state, params) == 1


@needs_kernel
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_bf16_weights_with_remainder(moments):
    """The float32 masters agree as float32 weights do. ``wide`` has float32 gradients, other leaves bfloat16 ones."""
    tx = jadam.exact_bf16(jadam.adamw(1.0, moments=moments))
    step, update_and_apply = jitted_steps(tx)
    of = lambda seed, dtype: {**random_tree(seed, dtype), "wide": random_tree(100 + seed)["a"][:15]}
    keep = lambda path, _: "c" in path
    params, state = jax.jit(lambda masters: jadam.from_float32(masters, tx, keep=keep))(of(0, np.float32))
    for t in range(12):
        grads = of(t + 1, jnp.bfloat16)
        expected = update_and_apply(grads, state, params)
        assert_steps_agree(
            *(unwrap_exact_bf16(*x) for x in (step(grads, state, params), expected, (params, state))), moments == "int8"
        )
        params, state = expected
    assert count_kernel_calls(functools.partial(jadam.step, tx), grads, state, params) == 1


@needs_kernel
def test_comparison_detects_wrong_hyperparameters():
    """Another beta fails the comparison, and so does another step count, which changes the dither."""
    params, grads = random_tree(0), random_tree(1)
    other = jitted_steps(jadam.adam(1.0, b2=0.99901))[0]
    state = make_optimizer("adam").init(params)
    expected = jitted_steps(make_optimizer("adam"))[0](grads, state, params)
    with pytest.raises(AssertionError):
        assert_steps_agree(other(grads, state, params), expected, (params, state))
    state = make_optimizer("adam", "int8").init(params)
    step = jitted_steps(make_optimizer("adam", "int8"))[0]
    shifted = state[0]._replace(count=np.asarray(state[0].count) + 1), state[1]
    with pytest.raises(AssertionError):
        assert_steps_agree(step(grads, shifted, params), step(grads, state, params), (params, state))


@needs_kernel
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_not_finite(moments):
    """NaN and infinity appear where they do with `update_and_apply`."""
    tx = make_optimizer("adam", moments)
    step, update_and_apply = jitted_steps(tx)
    params, grads = random_tree(0), random_tree(1)
    a = np.array(grads["a"])
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 1e30, 1e-30, -0.0)):
        a[i, 7 * i] = bad
    grads["a"] = jax.device_put(a)
    state = tx.init(params)
    for _ in range(3):
        new, expected = step(grads, state, params), update_and_apply(grads, state, params)
        assert_same_finite(new, expected)
        params, state = expected


@needs_kernel
def test_smallest_second_moments():
    """v is in [2**-126, 2**-125): normal, but its half is denormal, which XLA's threads flush to 0."""
    tx = jadam.adam(1.0, eps=1e-30, moments="int8")
    params = jnp.zeros((32, 128))
    grads = jnp.asarray(np.sqrt(np.linspace(1.1, 1.9, params.size) * 2.0**-126 / 0.001), jnp.float32)
    args = grads.reshape(params.shape), tx.init(params), params
    step, update_and_apply = jitted_steps(tx)
    assert_steps_agree(step(*args), update_and_apply(*args), (params, args[1]), int8=True)


@needs_kernel
def test_largest_second_moments():
    """v is 1e38, near float32's largest number, and 1 / v denormal, which XLA's threads flush to 0."""
    tx = jadam.adam(1.0, 0.1, 0.3, moments="int8")
    params = jnp.zeros((32, 128))
    grads = jnp.linspace(-1.2e19, -0.6e19, params.size).reshape(params.shape)
    for take in jitted_steps(tx):
        _, state = take(grads, tx.init(params), params)
        nu = np.asarray(optax.tree.get(jadam.convert_moments(state, "float32"), "nu"))
        # where v is at least 1/256 of the largest, two levels are at most 1/16 of it apart
        np.testing.assert_allclose(nu, 0.7 * np.float64(grads) ** 2, rtol=1 / 16)


@needs_kernel
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_in_place(moments):
    """With donated arguments a step allocates a few scalars only, here at most 0.01 byte a parameter."""
    tx = jadam.exact_bf16(jadam.adam(1e-3, moments=moments))
    params = jax.device_put(np.zeros((512, 512), jnp.bfloat16))
    state = tx.init(params)
    f = jax.jit(lambda params, state, grads: jadam.step(tx, grads, state, params), donate_argnums=(0, 1))
    in_place = f.lower(params, state, params).compile()
    assert in_place.memory_analysis().temp_size_in_bytes <= 0.01 * params.size
    grads = ones((512, 512), jnp.bfloat16)
    expected = jax.device_get(jax.jit(functools.partial(jadam.step, tx))(grads, state, params))
    assert_equal(in_place(params, state, grads), expected)
    assert params.is_deleted()


@needs_kernel
def test_one_call_for_many_leaves():
    params = [jax.ShapeDtypeStruct((3, i + 1), jnp.float32) for i in range(2 * cpu.LEAVES_PER_CALL + 1)]
    tx = jadam.adam(1e-3)
    assert count_kernel_calls(functools.partial(jadam.step, tx), params, jax.eval_shape(tx.init, params), params) == 3


@needs_kernel
@pytest.mark.parametrize(("leaves", "shape"), [(1, (256, 256)), (1, (255, 256)), (200, (8, 64))])
def test_large_steps_are_asynchronous(leaves, shape):
    """XLA executes a program on the calling thread if it counts fewer than 1000 operations, none in the kernel."""
    p = [jax.ShapeDtypeStruct(shape, jnp.float32)] * leaves
    tx = jadam.adam(0.1)
    compiled = jax.jit(functools.partial(jadam.step, tx)).lower(p, jax.eval_shape(tx.init, p), p).compile()
    assert (compiled.cost_analysis()["flops"] >= 1000) == (leaves * np.prod(shape) >= cpu.ASYNC_SIZE)


def test_one_trace_and_fixed_avals():
    tx = jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-3, moments="int8")))
    params = {"a": ones((64, 128), jnp.bfloat16), "b": ones(3)}
    state = tx.init(params)
    traces = []

    @jax.jit
    def train(params, state, grads):
        traces.append(0)
        return jadam.step(tx, grads, state, params)

    for _ in range(3):
        params, state = train(params, state, params)
    _, scanned = jax.lax.scan(lambda c, _: (train(*c, c[0]), 0), (params, state), None, length=2)
    assert len(traces) == 1
    assert scanned.shape == (2,)


# -- without a kernel --------------------------------------------------------------------------------------------------

ODD = {
    "empty": ones((0, 3)),
    "none": None,
    "complex": ones(3, np.complex64),
    "half": ones(5, np.float16),
    "bf16": ones(5, jnp.bfloat16),
    "plain": ones((2, 3)),
}


@parametrize("rule", ["adamw, scheduled", "nadamw, momentum", "adam, hat"], default=["adamw, scheduled"])
def test_leaves_without_a_kernel(rule):
    """Leaves that the kernel cannot take are stepped by XLA, beside one that it takes."""
    tx = make_optimizer(rule)
    grads = jax.tree.map(lambda x: np.asarray(0.3, x.dtype) * np.asarray(x), ODD)
    state = tx.init(ODD)
    new, expected = (f(grads, state, ODD) for f in jitted_steps(tx))
    for a, b in zip_leaves(new, expected):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, complex), np.asarray(b, complex), rtol=3e-7, atol=3e-7)  # 2 ulp of 1


def test_float64_leaves(x64):
    tx = jadam.adamw(1e-3, weight_decay=0.1)
    params = {"wide": ones(7, np.float64), "plain": ones(7)}
    grads = {k: np.asarray(x) / np.asarray(3, x.dtype) for k, x in params.items()}
    new, expected = (f(grads, tx.init(params), params)[0] for f in jitted_steps(tx))
    assert new["wide"].dtype == jnp.float64
    np.testing.assert_allclose(new["wide"], expected["wide"], rtol=4e-16)  # 2 ulp


TRACED = {
    "learning rate": lambda x: jadam.adam(x),
    "weight decay, int8": lambda x: jadam.adamw(0.1, weight_decay=x, moments="int8"),
    "beta, bfloat16": lambda x: jadam.nadamw(0.1, b1=x, moments="bfloat16"),
    "within a schedule": lambda x: jadam.amsgrad(lambda count: x / (count + 1)),
    "bounds": lambda x: jadam.chain(jadam.clip(x), jadam.clip_by_global_norm(x), jadam.adam(0.1, eps=1.0)),
    "groups": lambda x: jadam.by_path([("a", {"lr_mult": 2.0}), ("b", jadam.FROZEN), ("", {})], x),
    "exact_bf16": lambda x: jadam.exact_bf16(jadam.by_path([("a", {"moments": "int8"}), ("b", jadam.FROZEN)], x)),
}


@parametrize("name", [*TRACED], default=["learning rate", "bounds", "exact_bf16"])
def test_traced_hyperparameters(name):
    """Still one pass, with the bits of the same values as Python numbers."""
    make = TRACED[name]
    params = random_tree(0, jnp.bfloat16 if name == "exact_bf16" else np.float32)
    params = {k: params[k] for k in "ab"} if name == "exact_bf16" else params
    value = jnp.float32(0.3)
    step = lambda tx, state: jadam.step(tx, params, state, params)
    traced = lambda x, state: step(make(x), state)
    state = make(value).init(params)
    expected = jax.jit(functools.partial(step, make(value)))(state)
    new = jax.jit(traced)(value, state)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for a, b in zip_leaves(new, expected):
        assert a.dtype == b.dtype
        if name == "bounds":  # another order of the norm's sum: 1 ulp of the norm, 2 ulp of the scaled gradient
            np.testing.assert_allclose(a, b, rtol=4e-7, atol=4e-7 * 0.1)  # lr = 0.1
        else:
            np.testing.assert_array_equal(a, b)
    if CPU.kernel is not None:
        assert count_kernel_calls(traced, value, state) == 1
    several = jax.jit(jax.vmap(lambda x: traced(x, state)[0]["a"]))(np.float32([0.3, 0.15]))
    assert_steps_agree((several[0], state), (expected[0]["a"], state), (params["a"], state))


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_with_jit_disabled(moments):
    """Under `jax.disable_jit`: the eager step's bits, with and without `jax.jit`."""
    tx, p = (
        jadam.adamw(0.1, moments=moments),
        jax.device_put(np.linspace(-1, 1, 4096, dtype=np.float32).reshape(32, 128)),
    )
    state = tx.init(p)
    expected = jadam.step(tx, p, state, p)
    with jax.disable_jit():
        for step in (jadam.step, jax.jit(jadam.step, static_argnums=0)):
            assert_equal(step(tx, p, state, p), expected)


def test_no_leaked_tracers():
    params = random_tree(0)
    make = lambda x: jadam.chain(jadam.clip(x), jadam.adamw(x, b1=x, weight_decay=x))
    state = make(0.1).init(params)
    with jax.checking_leaks():
        jax.jit(lambda x: jadam.step(make(x), params, state, params))(jnp.float32(0.1))


def test_derivative_with_respect_to_a_hyperparameter():
    """The derivative through two steps is that of `update_and_apply`."""
    params = np.float32([1.0, -2.0, 3.0])

    def loss(step, x):
        tx = jadam.adamw(lambda count: x * (count + 1), weight_decay=x)
        p, state = params, tx.init(params)
        for _ in range(2):
            p, state = step(tx, jnp.sin(p), state, p)
        return jnp.sum(p**2)

    new, expected = (jax.jit(jax.grad(functools.partial(loss, f)))(0.1) for f in (jadam.step, _step.update_and_apply))
    np.testing.assert_allclose(new, expected, rtol=1e-6)  # same operations, other contractions


def test_vmap_and_grad():
    tx = jadam.adam(0.1)
    params = ones(3)
    state = tx.init(params)
    many = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = jax.jit(lambda g: jadam.step(tx, g, state, params)[0])
    batched = jax.jit(jax.vmap(one))(many)
    np.testing.assert_allclose(batched, np.stack([one(g) for g in many]), rtol=3e-7)
    loss = lambda f, g: f(tx, g, state, params)[0].sum()
    np.testing.assert_array_equal(
        *(jax.jit(jax.grad(functools.partial(loss, f)))(many[1]) for f in (jadam.step, _step.update_and_apply))
    )


def assert_same_jaxpr(tx, *args):
    """`jadam.step` traces to the jaxpr of `update_and_apply`."""
    traced = [str(jax.make_jaxpr(functools.partial(f, tx))(*args)) for f in (jadam.step, _step.update_and_apply)]
    assert traced[0] == traced[1]
    assert "jadam_step" not in traced[0]


@pytest.mark.parametrize(
    "tx",
    [optax.adam(1e-3), optax.chain(jadam.adam(1e-3)), jadam.chain(optax.trace(0.9), jadam.adam(1e-3))],
    ids=["optax", "optax.chain", "another stage"],
)
def test_other_transformations_use_update_and_apply(tx):
    params = random_tree(0)
    state = tx.init(params)
    assert_same_jaxpr(tx, random_tree(1), state, params)
    assert count_kernel_calls(functools.partial(jadam.step, tx), random_tree(1), state, params) == 0


def test_chain_equals_optax_chain():
    stages = optax.clip_by_global_norm(1.0), optax.clip(0.5), optax.scale_by_schedule(lambda count: 1.0 + count)
    mine = jadam.chain(jadam.clip_by_global_norm(1.0), jadam.clip(0.5), stages[2])
    params = random_tree(0)
    both = mine, optax.chain(*stages)
    updates = [jax.jit(tx.update) for tx in both]
    states = [tx.init(params) for tx in both]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for t in range(3):
        results = [update(random_tree(t), s, params) for update, s in zip(updates, states, strict=True)]
        states = [state for _, state in results]
        assert_equal(*results)


# -- several devices, other platforms ----------------------------------------------------------------------------------


@needs_kernel
def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = make_optimizer("adam")
    params, grads = (np.asarray(random_tree(seed)["a"])[:32, :256] for seed in range(2))
    state = tx.init(params)
    spec = jax.tree.map(lambda x: P("x") if x.ndim else P(), state)
    step = jax.shard_map(
        functools.partial(jadam.step, tx),
        mesh=mesh,
        in_specs=(P("x"), spec, P("x")),
        out_specs=(P("x"), spec),
        check_vma=False,
    )
    assert count_kernel_calls(step, grads, state, params) == 1
    step = jax.jit(step).lower(grads, state, params).compile()
    assert "all-gather" not in step.as_text()
    assert_steps_agree(step(grads, state, params), jitted_steps(tx)[1](grads, state, params), (params, state))


@pytest.mark.parametrize(
    "tx",
    [
        jadam.adamw(0.1),
        jadam.exact_bf16(jadam.adam(0.1)),
        jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.scale_by_radam()),
    ],
)
def test_transformation_survives_tree_map(tx):
    """A transformation is a NamedTuple, hence a pytree; Flax maps over it, in older versions within nnx.jit."""
    again = jax.tree.map(lambda function: function, tx)
    assert type(again) is type(tx)
    params = ones(3)
    assert _step.why_not_fused(again, params, tx.init(params), params) is None


def test_clipping_survives_tree_map():
    clip = jax.tree.map(lambda function: function, jadam.clip(1.0))
    tx = jadam.chain(clip, jadam.adam(1.0))
    params = ones(3)
    assert _step.why_not_fused(tx, params, tx.init(params), params) is None


@needs_kernel
def test_export_for_two_platforms():
    """The export's CPU branch calls the kernel; the TPU branch does not."""
    tx = jadam.adam(1.0)
    params = ones((4, 5))
    step = jax.jit(functools.partial(jadam.step, tx))
    args = params, tx.init(params), params
    allow = [jax.export.DisabledSafetyCheck.custom_call("jadam_step")]
    both = jax.export.export(step, platforms=["cpu", "tpu"], disabled_checks=allow)(*args)
    assert "@jadam_step" in both.mlir_module()
    assert "@jadam_step" not in jax.export.export(step, platforms=["tpu"])(*args).mlir_module()
    assert_equal(both.call(*args), step(*args))


# -- the extension -----------------------------------------------------------------------------------------------------


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    tx = jadam.adam(1.0, b1=0.5)
    assert {x.kernel for x in jadam.backends().values()} == {None}
    assert "JADAM_KERNELS=xla" in str(jadam.backends()["cpu"])
    p = ones(3)
    assert count_kernel_calls(functools.partial(jadam.step, tx), p, tx.init(p), p) == 0
    monkeypatch.setenv("JADAM_KERNELS", "none")
    with pytest.raises(ValueError, match=r"^JADAM_KERNELS must be unset or 'xla', got 'none'\. Unset it\.$"):
        jadam.backends()


def run_python(program, cwd, **env):
    """Output of ``program`` in a new Python process."""
    env = subprocess_env(**{"JAX_PLATFORMS": "cpu", **env})
    return check_output([sys.executable, "-c", program], cwd=cwd, env=env).strip()


@needs_kernel
def test_source_folder_uses_the_installed_extension(tmp_path):
    """A Python started in a clone imports the clone's ``jadam/`` with the installed extension, if the sources match."""
    shutil.copytree(Path(jadam.__file__).parent, tmp_path / "clone" / "jadam", ignore=shutil.ignore_patterns("*.so"))
    installed = tmp_path / "site" / "jadam" / "_fused" / "native"
    installed.mkdir(parents=True)
    shutil.copy(CPU.reason, installed)
    program = "import jadam; print(jadam.__file__, jadam.backends()['cpu'], sep='\\n')"
    file, backend = run_python(program, tmp_path / "clone", PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(file).is_relative_to(tmp_path / "clone")
    assert backend == f"{CPU.kernel}: {installed / Path(CPU.reason).name}"
    for name in (extension.SOURCES[0], extension.SOURCES[-1]):  # cpu.cc and rules.h
        source = tmp_path / "clone" / "jadam" / "_fused" / name
        text = source.read_text()
        source.write_text(text + "// changed\n")
        _, backend = run_python(program, tmp_path / "clone", PYTHONPATH=str(tmp_path / "site")).splitlines()
        assert backend.startswith("XLA: ")
        assert backend.endswith("was built from other sources; reinstall jadam")
        source.write_text(text)


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["portable", "avx2"])
def test_other_instructions(instructions, tmp_path):
    """The same step with other instruction sets."""
    program = """if True:
        import helpers as t, jadam
        for moments in ("float32", "bfloat16", "int8"):
            for rule in ("adam", "nadam", "both"):
                tx = t.make_optimizer(rule, moments)
                params = t.random_tree(0)
                state = tx.init(params)
                for i in range(3):
                    new, expected = (f(t.random_tree(i + 1), state, params) for f in t.jitted_steps(tx))
                    t.assert_steps_agree(new, expected, (params, state), moments == "int8")
                    params, state = expected
        print(jadam.backends()["cpu"].kernel)
    """
    printed = run_python(program, tmp_path, JADAM_INSTRUCTIONS=instructions)
    assert printed in (f"FFI, {instructions}", "FFI, portable")


GOOD = {
    "scalars": ones((1, len(call.SCALARS)), jnp.float32),
    "count": jax.device_put(np.zeros(2, np.uint32)),
    "leaves": [0, 0, 0, 0, 0, 0, 12, 0],
    "digits": [],
    "inputs": [ones((2, 6))] * 4,
    "outputs": [jax.ShapeDtypeStruct((2, 6), jnp.float32)] * 3,
}
INT8_INPUTS = [ones((2, 6))] * 2 + [ones((2, 6), jnp.int8), ones((2, 6), jnp.uint8)] + [ones((2, 2))] * 2
INT8_OUTPUTS = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in INT8_INPUTS[1:]]
RUN = "leaf 0: run must be whole rows, run and digits the whole leaf"
WRONG = [
    ({"leaves": [0, 0]}, "each attribute must have one number per leaf"),
    ({"leaves": [len(call.load().rules), 0, 0, 0, 0, 0, 12, 0]}, "leaf 0: rule is out of range"),
    ({"leaves": [0, -1, 0, 0, 0, 0, 12, 0]}, "leaf 0: format is out of range"),
    ({"leaves": [0, 0, 4, 0, 0, 0, 12, 0]}, "leaf 0: clipping is out of range"),
    ({"leaves": [0, 0, 0, 1, 0, 0, 12, 0]}, "leaf 0: scalars are out of range"),
    (
        {"leaves": [0, 2, 0, 0, 0, 0, 12, 0], "inputs": INT8_INPUTS, "outputs": INT8_OUTPUTS},
        "leaf 0: block is out of range",
    ),
    (
        {"leaves": [0, 2, 0, 0, 0, 2, 12, 0], "inputs": INT8_INPUTS, "outputs": INT8_OUTPUTS},
        "leaf 0: scale has the wrong size",
    ),
    ({"leaves": [3, 2, 0, 0, 0, 3, 12, 0], "inputs": INT8_INPUTS, "outputs": INT8_OUTPUTS}, "leaf 0: "),
    ({"scalars": ones((1, 5))}, "scalars must be float32 in rows of"),
    ({"scalars": ones((1, len(call.SCALARS)), jnp.bfloat16)}, "scalars must be float32 in rows of"),
    ({"count": jax.device_put(np.zeros(2, np.int32))}, "count must be uint32, the step count and one offset per leaf"),
    ({"count": jax.device_put(np.zeros(1, np.uint32))}, "count must be uint32, the step count and one offset per leaf"),
    ({"leaves": [0, 0, 0, 0, 0, 0, 0, 0]}, RUN),
    ({"leaves": [0, 0, 0, 0, 0, 0, 5, 0]}, RUN),
    (
        {"leaves": [0, 2, 0, 0, 0, 3, 4, 0], "inputs": INT8_INPUTS, "outputs": INT8_OUTPUTS},
        RUN,
    ),
    ({"leaves": [0, 0, 0, 0, 0, 0, 6, 0]}, RUN),
    ({"leaves": [0, 0, 0, 0, 0, 0, 4, 1], "digits": [2, 4]}, RUN),
    ({"leaves": [0, 0, 0, 0, 0, 0, 4, 1], "digits": [0, 4]}, RUN),
    ({"leaves": [0, 0, 0, 0, 0, 0, 4, 2], "digits": [-1, 4, -3, 4]}, RUN),
    ({"leaves": [0, 0, 0, 0, 0, 0, 4, 1]}, "leaf 0: digits are out of range"),
    ({"leaves": [0, 0, 0, 0, 0, 0, 4, 2**62], "digits": [3, 4]}, "leaf 0: digits are out of range"),
    ({"leaves": [0, 0, 0, 0, 0, 0, 12, -1]}, "leaf 0: digits are out of range"),
    ({"digits": [1, 1]}, "too many digits"),
    ({"digits": [1]}, "each digit must have a size and a stride"),
    ({"inputs": [ones((2, 6))] * 3}, "leaf 0: moment is missing"),
    ({"inputs": [ones((2, 6))] * 5}, "too many buffers"),
    ({"inputs": [ones((2, 6), jnp.int32)] + [ones((2, 6))] * 3}, "leaf 0: gradient has the wrong dtype"),
    ({"inputs": [ones((2, 6)), ones((2, 7))] + [ones((2, 6))] * 2}, "leaf 0: parameter has the wrong size"),
    ({"outputs": GOOD["outputs"][:2]}, "leaf 0: new moment is missing"),
    ({"outputs": [jax.ShapeDtypeStruct((2, 6), jnp.int32)] * 3}, "leaf 0: new parameter has the wrong dtype"),
    ({"outputs": [jax.ShapeDtypeStruct((1, 6), jnp.float32)] * 3}, "leaf 0: new parameter has the wrong size"),
]


@needs_kernel
@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_handler_checks_its_arguments(changed, message):
    given = {**GOOD, **changed}
    call = jax.ffi.ffi_call("jadam_step", given["outputs"])
    attributes = handler.attributes(given["leaves"], given["digits"])
    with pytest.raises(Exception, match=f"jadam: {message}"):
        jax.block_until_ready(call(given["scalars"], given["count"], *given["inputs"], **attributes))


@needs_kernel
def test_handler_refuses_a_wrong_alias():
    """The new parameter may not overwrite a moment."""
    call = jax.ffi.ffi_call("jadam_step", GOOD["outputs"], input_output_aliases={4: 0})
    with pytest.raises(Exception, match="jadam: an output overlaps another buffer"):
        jax.block_until_ready(
            call(GOOD["scalars"], GOOD["count"], *GOOD["inputs"], **handler.attributes(GOOD["leaves"]))
        )


P32, P16, C64 = (ones((4, 4), dtype) for dtype in (np.float32, jnp.bfloat16, np.complex64))
CLIP, NORM, ADAM = jadam.clip(0.5), jadam.clip_by_global_norm(0.5), jadam.adam(0.1)
NOT_FUSED = [
    (jadam.chain(NORM, CLIP, ADAM), P32, "jadam.chain has jadam.clip after another clipping"),
    (jadam.chain(CLIP, CLIP, ADAM), P32, "jadam.chain has jadam.clip after another clipping"),
    (jadam.chain(NORM, NORM, ADAM), P32, "jadam.chain has jadam.clip_by_global_norm more than once"),
    (jadam.chain(ADAM, CLIP), P32, "jadam.chain's last stage is not a jadam optimizer"),
    (jadam.chain(optax.trace(0.9), ADAM), P32, "trace"),
    (
        jadam.chain(CLIP, ADAM),
        P16,
        "kernels clip in float32, Optax in 16 bits (for bfloat16 parameters, use jadam.exact_bf16)",
    ),
    (
        jadam.exact_bf16(optax.adam(0.1)),
        P16,
        "the optimizer inside jadam.exact_bf16 is not a jadam optimizer or jadam.chain",
    ),
    (optax.adam(0.1), P32, "not a jadam optimizer (for a chain, use jadam.chain)"),
]


@pytest.mark.parametrize(("tx", "p", "reason"), NOT_FUSED)
def test_why_not_fused(tx, p, reason):
    """`why_not_fused` gives the reason, and `jadam.step` is `update_and_apply`."""
    state = tx.init(p)
    if reason != "trace":
        assert _step.why_not_fused(tx, p, state, p) == reason
    assert (_step.why_not_fused(tx, p, state, p) or "none") != "none"
    assert_same_jaxpr(tx, p, state, p)


def test_clipped_complex_gradients_are_not_fused():
    tx = jadam.chain(CLIP, ADAM)
    assert _step.why_not_fused(tx, C64, tx.init(C64), C64) == "jadam.chain clips complex gradients"


def test_leaves_without_a_cpu_kernel():
    why = lambda tx, p: _step.why_leaves_not_fused("cpu", tx, p, tx.init(p), p)[0][1]
    assert why(ADAM, P32) is None
    assert why(jadam.adam(0.1, mu_dtype=jnp.bfloat16), P32) == "no kernel for mu_dtype"
    assert why(ADAM, ones((0, 4))) == "no elements"
    assert "complex64" in why(ADAM, C64)
