"""A step exported or compiled in one process and run in another; `jax.export` with symbolic shapes."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_equal, check_output, needs_kernel, normal, ones, subprocess_env, zip_leaves
from jax import export

import jadam

# As a list of arrays, because `serialize` of jax.export knows no named tuples.
SAVE = """
import pickle, sys
import jax, jadam, numpy as np
from jax import export
from jax.experimental import serialize_executable
tx, params = jadam.adam(0.1), np.float32([1, 2, 3])
args, structure = jax.tree.flatten((params, tx.init(params), params))
args = list(map(np.asarray, args))
step = jax.jit(lambda *args: jax.tree.leaves(jadam.step(tx, *jax.tree.unflatten(structure, args))))
allow = [export.DisabledSafetyCheck.custom_call("jadam_step")]
exported = export.export(step, disabled_checks=allow)(*args)
assert "@jadam_step" in exported.mlir_module()
compiled = serialize_executable.serialize(step.lower(*args).compile())
with open(sys.argv[1], "wb") as file:
    pickle.dump((exported.serialize(), compiled, args, list(map(np.asarray, step(*args)))), file)
"""

LOAD = """
import pickle, sys
import jax, numpy as np
from jax import export
from jax.experimental import serialize_executable
{first}
with open(sys.argv[1], "rb") as file:
    exported, compiled, args, expected = pickle.load(file)
for run in (export.deserialize(exported).call, serialize_executable.deserialize_and_load(*compiled)):
    for x, y in zip(run(*args), expected, strict=True):
        np.testing.assert_array_equal(x, y)
print([name for name in sys.modules if name == "jadam._fused.step"])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with a step, exported and compiled, its arguments and results."""
    path = tmp_path_factory.mktemp("export") / "step.pickle"
    run_python(SAVE, path)
    return path


def run_python(program, path):
    """Output of ``program`` in a new process with one device."""
    return check_output([sys.executable, "-c", program, path], cwd=path.parent, env=subprocess_env(XLA_FLAGS=""))


@needs_kernel
@pytest.mark.parametrize("first", ["", "import jadam"])
def test_in_a_process_that_has_not_lowered_a_step(first, saved):
    """JAX registers the kernel's handler when it starts, by the entry point ``jax_plugins`` of the installed jadam."""
    assert run_python(LOAD.format(first=first), saved) == "[]\n"


# What opening a file of CUDA's looks like. JAX imports the empty package `nvidia` where a wheel has installed it.
WATCH = """
import sys
opened = []
def watch(event, arguments):
    name = str(arguments[0]) if arguments and event in ("open", "ctypes.dlopen") else ""
    of_cuda = "libcuda", "nvrtc.so", "nvrtc-builtins", "/nvidia/", "/usr/local/cuda", "/dev/nvidia"
    if any(x in name for x in of_cuda) and "/nvidia/__" not in name:
        opened.append(name)
sys.addaudithook(watch)
"""
ON_CUDA = """
import functools, os, sys
import jax, jadam, jax.numpy as jnp
from jax import export
allow = [export.DisabledSafetyCheck.custom_call("jadam_step")]
for moments in ("float32", "bfloat16", "int8"):
    for wrap, dtype in ((lambda tx: tx, jnp.float32), (jadam.exact_bf16, jnp.bfloat16)):
        tx, params = wrap(jadam.adamw(0.1, moments=moments)), jax.ShapeDtypeStruct((64, 256), dtype)
        step, args = functools.partial(jadam.step, tx), (params, jax.eval_shape(tx.init, params), params)
        for platforms in (["cuda"], ["cpu", "cuda", "tpu"]):
            text = export.export(jax.jit(step), platforms=platforms, disabled_checks=allow)(*args).mlir_module()
            assert text.count("custom_call @jadam_step") == (1 if len(platforms) == 1 else 2), (moments, platforms)
os.environ["JADAM_KERNELS"] = "xla"
text = export.export(jax.jit(lambda *args: step(*args)), platforms=["cuda"])(*args).mlir_module()
assert "custom_call @jadam_step" not in text
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(opened, "libcuda" in maps, "nvrtc" in maps)
"""


@needs_kernel
def test_for_a_gpu_that_is_not_there(tmp_path):
    """Every format is exported with the kernel, and no library of CUDA's is opened."""
    program = WATCH + ON_CUDA
    command = [sys.executable, "-c", program]
    assert check_output(command, cwd=tmp_path, env=subprocess_env(XLA_FLAGS="")) == "[] False False\n"


SYMBOLIC = {
    "adam": lambda: jadam.adam(0.1),
    "bfloat16": lambda: jadam.amsgrad(0.1, moments="bfloat16"),
    "scheduled": lambda: jadam.adamw(lambda t: 0.1 / (t + 1), b1=lambda t: 0.9),
    "radam": lambda: jadam.radam(0.1),
    "adamax": lambda: jadam.adamax(0.1),
    "chain": lambda: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adam(0.1)),
    "by_path": lambda: jadam.by_path([("", {"lr_mult": 0.5})], 0.1),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.adam(0.1)),
    "average_params": lambda: optax.chain(jadam.adam(0.1), jadam.average_params()),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_shapes(name, caplog):
    """XLA does the step. At 64 rows it is what a step of 64 rows is, but for how XLA contracts products and sums."""
    tx = SYMBOLIC[name]()
    dtype = jnp.bfloat16 if name == "exact_bf16" else jnp.float32
    (rows,) = export.symbolic_shape("rows")
    params = jax.ShapeDtypeStruct((rows, 16), dtype)
    step = jax.jit(functools.partial(jadam.step, tx))
    exported = export.export(step)(params, jax.eval_shape(tx.init, params), params)
    assert not caplog.records  # no warning that the CPU has no kernel
    x = normal(64, 16).astype(dtype)
    found, expected = (f(x, tx.init(x), x) for f in (exported.call, step))
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    if name == "exact_bf16":
        found, expected = jadam.float32_params(*found), jadam.float32_params(*expected)
    for a, b in zip_leaves(found, expected):
        # an ulp of the new parameter, |p| < 4, is 2**-22; moments are sums of two products, two ulps apart
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize(
    ("tx", "text"),
    [
        (jadam.adam(0.1, moments="int8"), r"moments='int8' needs constant shapes, got \(rows, 128\): it divides rows"),
        (jadam.record(jadam.adam(0.1), every=1), r"record need constant shapes, got \(rows, 128\) for params"),
    ],
)
def test_what_needs_constant_shapes_says_so(tx, text):
    params = jax.ShapeDtypeStruct((export.symbolic_shape("rows")[0], 128), jnp.float32)
    first_step = jax.jit(lambda params: jadam.step(tx, params, tx.init(params), params))
    with pytest.raises(ValueError, match=text):
        export.export(first_step)(params)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this version of JAX has no jax.new_ref")
def test_a_ref_is_no_parameter():
    ref, tx = jax.new_ref(ones(3)), jadam.adam(0.1)
    state = tx.init(ref[...])
    for call in (
        lambda: tx.init({"w": ref}),
        lambda: tx.update(ref, state, ref),
        lambda: jadam.step(tx, ones(3), state, ref),
    ):
        with pytest.raises(TypeError, match=r"must be an array, got .* of type Ref\. Pass its value: ref\[\.\.\.\]"):
            call()
    assert_equal(tx.init(ref[...]), tx.init(ones(3)))
