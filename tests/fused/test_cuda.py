"""The CUDA kernel, compiled by the host's compiler, against the CPU's kernel and XLA; see `emulated`."""

import ctypes
import functools
import json
import platform
import re
import shutil

import emulated
import handler
import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FORMATS,
    assert_same_finite,
    assert_steps_agree,
    jitted_steps,
    make_optimizer,
    needs_kernel,
    parametrize_grid,
    takes_int8,
    unwrap_exact_bf16,
)
from programs import kernel as program

import jadam
from jadam._fused.cuda import driver, nvrtc
from jadam._fused.cuda import kernel as cuda
from jadam._fused.native import call, extension
from jadam._transformation.transformation import Shard, as_state_arrays, update_leaf

pytestmark = needs_kernel

# A last block that is shorter, rows that are no multiple of 4, several programs.
SHAPES = {"a": (40, 300), "b": (7, 129), "c": (9001,)}
AWKWARD = [(), (1,), (3,), (5,), (127,), (128,), (2049,), (1, 1), (4096, 1), (3, 5, 2), (2, 64), (33, 96), (2, 5000)]
random_tree = functools.partial(helpers.random_tree, shapes=SHAPES)
KINDS = {  # weights and gradients
    "float32": (jnp.float32, jnp.float32),
    "bf16 gradients": (jnp.float32, jnp.bfloat16),
    "exact_bf16": (jnp.bfloat16, jnp.bfloat16),
    "exact_bf16, float32 gradients": (jnp.bfloat16, jnp.float32),
}
CASES = {f"{rule}-{x}": (rule, x) for rule in helpers.RULES for x in FORMATS if x != "int8" or takes_int8(rule)}


def emulated_step(tx, grads, state, params, **options):
    """`jadam.step` with the emulated kernel; XLA's step for the leaves that it does not support."""
    leaf_updates, finish = tx.update.leafwise(grads, state, params)
    grads, (params, structure) = jax.tree.leaves(grads), jax.tree.flatten(params)
    rows = emulated.run_kernel(leaf_updates, grads, params, **options)
    rows = [row or update_leaf(*x) for row, *x in zip(rows, leaf_updates, grads, params, strict=True)]
    return structure.unflatten([p for p, _ in rows]), finish([stored for _, stored in rows])


@parametrize_grid(
    {"case": CASES, "kind": KINDS, "architecture": emulated.ARCHITECTURES},
    default=[
        "adam-float32-float32-900",
        "adam-bfloat16-float32-900",
        "adam-int8-float32-900",
        "adam-int8-exact_bf16-900",
        "nadamw, momentum-int8-bf16 gradients-900",
        "amsgrad-bfloat16-exact_bf16, float32 gradients-900",
        "adamax-float32-exact_bf16-900",
        "radam of nadam-bfloat16-bf16 gradients-900",
        "both-float32-float32-900",
    ],
    slow=["adam-int8-exact_bf16-700"]
    + [f"{rule}-{x}-exact_bf16-700" for rule in ("nadam", "amsgrad of v", "radam") for x in ("float32", "bfloat16")],
)
def test_kernel_matches_that_of_the_cpu_and_xla(case, kind, architecture):
    rule, moments = case
    weights, gradients = kind
    tx = make_optimizer(rule, moments)
    params = random_tree(0)
    if weights == jnp.bfloat16:
        tx = exact(tx)
        params, state = jax.jit(functools.partial(jadam.from_float32, tx=tx))(params)
        as_float32 = unwrap_exact_bf16
    else:
        state = tx.init(params)
        as_float32 = lambda *x: x
    ulps = 2 * helpers.ULPS if rule in ("clip by norm", "both") else helpers.ULPS  # the norm is another program's sum
    for t in range(3):
        grads = random_tree(t + 1, gradients)
        new = emulated_step(tx, grads, state, params, architecture=architecture)
        step, update_and_apply = (f(grads, state, params) for f in jitted_steps(tx))
        for expected in (step, update_and_apply):
            old = params, state
            assert_steps_agree(*(as_float32(*x) for x in (new, expected, old)), moments == "int8", ulps)
        params, state = step


exact = functools.cache(jadam.exact_bf16)


@pytest.mark.parametrize("moments", FORMATS)
def test_awkward_shapes(moments):
    tx = make_optimizer("adam", moments)
    random_leaves = functools.partial(helpers.random_tree, shapes={f"{i:02}": x for i, x in enumerate(AWKWARD)})
    params = random_leaves(0)
    state = jitted_steps(tx)[0](random_leaves(1), tx.init(params), params)[1]
    results = [f(random_leaves(2), state, params) for f in (functools.partial(emulated_step, tx), jitted_steps(tx)[0])]
    assert_steps_agree(*results, (params, state), moments == "int8")


FAST_DIVISION = """
#include <cmath>
#include <cstring>
#define inline __attribute__((noinline))  // or the compiler would simplify 1 / sqrt(x) twice to 1 / x
#include "shim.h"
#undef inline
#include "formats.h"
int lane;  // never used
const int* exchange(int) { return nullptr; }
extern "C" float v_inverse_step_of(float scale) { return jadam::v_inverse_step_of(scale); }
"""


def test_fast_division_by_large_scales(tmp_path):
    """The GPU's fast division gives 0 for divisors above 2**126, and so does that of -mrecip on x86."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("-mrecip is an option of g++ for x86")
    (tmp_path / "fast.cc").write_text(FAST_DIVISION)
    flags = ["-std=c++17", "-O2", "-ffast-math", "-mrecip", "-c", "-fPIC", "-D__CUDA_ARCH__=900"]
    flags += [f"-I{emulated.HERE}", f"-I{emulated.FUSED / 'native'}", "-o", "fast.o", "fast.cc"]
    helpers.check_output(["g++", *flags], cwd=tmp_path)
    # linked without -ffast-math, with which loading the library would make this process flush denormals
    helpers.check_output(["g++", "-shared", "-o", "fast.so", "fast.o"], cwd=tmp_path)
    step = ctypes.CDLL(str(tmp_path / "fast.so")).v_inverse_step_of
    step.argtypes, step.restype = [ctypes.c_float], ctypes.c_float
    for scale in (2.0**-126, 1e-20, 1.0, 8e37, 1e38, 3.2e38):
        assert step(scale) == pytest.approx(3.875 / scale, rel=1e-6)  # rsqrt, twice, and two products
    assert step(0.0) == 0.0
    assert 5e-324 * np.float64(1.0) > 0


def test_int8_codes_apart():
    """Codes differ only where a rounding threshold lies between two roundings of r, at most 1e-4 of them."""
    tx = make_optimizer("adam", "int8")
    params = random_tree(0, shapes={"a": (600, 1000)})
    state, apart = tx.init(params), []
    for t in range(3):
        grads = random_tree(t + 1, shapes={"a": (600, 1000)})
        new, expected = emulated_step(tx, grads, state, params)[1], jitted_steps(tx)[0](grads, state, params)
        for name in ("mu", "nu"):
            codes = (np.asarray(getattr(x[0], name)["a"], np.int32) for x in (new, expected[1]))
            apart.append(np.abs(np.subtract(*codes)))
        params, state = expected
    assert np.mean(np.stack(apart) != 0) <= 1e-4
    assert np.max(apart) <= 1


PARTS = [  # moments, weights have a remainder, shape of the whole, start and shape of the part
    ("float32", True, (3, 4, 24, 36), (1, 2, 8, 12), (2, 2, 16, 24)),
    ("bfloat16", False, (3, 4, 24, 36), (1, 2, 8, 12), (2, 2, 16, 24)),  # runs of quads
    ("bfloat16", True, (5, 7, 31), (1, 2, 3), (3, 4, 17)),  # a quad lies in two runs
    ("int8", False, (3, 4, 24, 384), (1, 2, 8, 128), (2, 2, 16, 256)),
    ("int8", True, (5, 40, 300), (1, 3, 0), (3, 20, 300)),
    ("bfloat16", False, (70, 90), (10, 0), (33, 90)),  # one run
]


@pytest.mark.parametrize(("moments", "has_remainder", "whole", "start", "shape"), PARTS)
def test_a_part_is_that_of_the_whole(moments, has_remainder, whole, start, shape):
    """The step of a shard, cut along several axes, is that part of XLA's step of the whole array."""
    tx = jadam.adamw(1.0, moments=moments)
    tx = jadam.exact_bf16(tx) if has_remainder else tx
    dtype = jnp.bfloat16 if has_remainder else np.float32
    shard = Shard(jnp.uint32(np.ravel_multi_index(start, whole)), whole)

    cut = functools.partial(helpers.cut_part, whole, start, shape)
    with_master = functools.partial(helpers.with_master, has_remainder)
    params, grads = (helpers.random_tree(seed, dtype, {"a": whole}) for seed in (0, 1))
    _, state = jax.jit(functools.partial(jadam.step, tx))(params, tx.init(params), params)
    (leaf,), g, p = tx.update.leafwise(grads, state, params).leaf_updates, grads["a"], params["a"]
    before = as_state_arrays((leaf.stored, leaf.remainder))
    remainder = None if leaf.remainder is None else cut(leaf.remainder)
    part = leaf._replace(stored=tuple(map(cut, leaf.stored)), remainder=remainder, shard=shard)
    (new,) = emulated.run_kernel([part], [cut(g)], [cut(p)])
    expected = jax.tree.map(cut, (jax.jit(lambda g, p: update_leaf(leaf, g, p))(g, p), (p, before)))
    assert_steps_agree(with_master(*new), *(with_master(*x) for x in expected), moments == "int8")


@pytest.mark.parametrize("rule", ["adam", "nadam"])
def test_not_finite(rule):
    """Non-finite values and blocks are those of `update_and_apply`."""
    tx = make_optimizer(rule, "int8")
    params, grads = random_tree(0), random_tree(1)
    a = np.array(grads["a"])
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 1e30, 1e-30, -0.0)):
        a[i, 50 * i] = bad
    grads["a"] = jax.device_put(a)
    state = tx.init(params)
    for _ in range(2):
        new, expected = emulated_step(tx, grads, state, params), jitted_steps(tx)[1](grads, state, params)
        assert_same_finite(new, expected)
        params, state = expected


@pytest.mark.parametrize("moments", FORMATS)
def test_buffers_that_are_not_donated(moments):
    """They are copied first."""
    tx = exact(make_optimizer("adam", moments))
    params, state = jax.jit(functools.partial(jadam.from_float32, tx=tx))(random_tree(0))
    grads = random_tree(1, jnp.bfloat16)
    copied = emulated.library(emulated.ARCHITECTURES[0]).emulator_copied_bytes
    before = copied()
    expected = emulated_step(tx, grads, state, params)
    assert copied() == before
    new = emulated_step(tx, grads, state, params, donate=False)
    taken = jax.tree.leaves((params, state), is_leaf=lambda x: False)
    taken = sum(x.nbytes for x in taken if np.ndim(x)) - (16 if moments == "int8" else 0)
    assert copied() - before >= 0.99 * taken
    helpers.assert_equal(new, expected)


def launches(leaf_updates, grads, params, **options):
    """How often the emulated kernel is launched."""
    count = emulated.library(emulated.ARCHITECTURES[0]).emulator_launches
    before = count()
    emulated.run_kernel(leaf_updates, grads, params, **options)
    return count() - before


def test_one_launch_for_a_group_of_leaves():
    """A call's leaves are launched at once, those of other formats and dtypes apart, empty ones not at all."""
    n = cuda.LEAVES_PER_CALL
    shapes = {f"{i:03}": (3, 5 + i) for i in range(2 * n + 3)}
    tx = make_optimizer("adam")
    params = random_tree(0, shapes=shapes)
    leaf_updates = list(tx.update.leafwise(params, tx.init(params), params).leaf_updates)
    leaves = jax.tree.leaves(params)
    assert launches(leaf_updates, leaves, leaves) == 3
    assert launches(leaf_updates, leaves, leaves, leaves_per_call=1000) == 3  # a table has n entries
    narrow = [x.astype(jnp.bfloat16) if i % 2 else x for i, x in enumerate(leaves)]
    assert launches(leaf_updates[:n], narrow[:n], leaves[:n]) == 2
    many = [x._replace(shard=Shard(jnp.uint32(0), (9, 3, 9, 3, 9, 3, 7, 100))) for x in leaf_updates[:n]]
    parts = [jnp.ones((2,) * 7 + (5,), jnp.float32)] * n
    many = [x._replace(stored=(p, p)) for x, p in zip(many, parts, strict=True)]
    digits = len(many[0].shard.strides(parts[0].shape)) - 1
    assert launches(many, parts, parts) == -(-n // (56 // digits))  # a table has 56 digits


def arrays_of_call(*leaf):
    """The inputs of a call for one leaf. The outputs are those from the fourth on."""
    return [np.ones((1, len(call.SCALARS)), np.float32), np.zeros(2, np.uint32), *leaf]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leaves": [0, 2, 0, 0, 0, 129, 12, 0]}, "jadam: leaf 0: block is out of range"),
        ({"leaves": [0, 0, 0, 0, 0, 0, 1, 57], "digits": [1, 1] * 56 + [12, 1]}, "jadam: leaf 0 has too many digits"),
    ],
)
def test_limits_of_the_table(changes, message):
    g, p, m, v = np.ones((4, 2, 6), np.float32)
    int8 = m.astype(np.int8), v.astype(np.uint8), *np.ones((2, 2, 1), np.float32)
    arrays = arrays_of_call(g, p, *(int8 if changes["leaves"][1] == 2 else (m, v)))
    buffers = list(map(emulated.buffer, arrays))
    assert emulated.run_call(buffers, buffers[3:], changes["leaves"], changes.get("digits", ())) == message


def test_execute_needs_initialize():
    arrays = arrays_of_call(*np.ones((4, 12), np.float32))
    buffers = list(map(emulated.buffer, arrays))
    attributes = handler.attributes([0, 0, 0, 0, 0, 0, 12, 0])
    error = handler.call_with_attributes(buffers, buffers[3:], attributes, None, "cuda", 77, [handler.EXECUTE])
    assert error == "jadam: a program was executed before it was initialized"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("place", [0, 1])
def test_outputs_do_not_overlap_scalars(name, place):
    """CUDA's kernel reads the scalars and the step count while it writes."""
    arrays = [np.ones((1, len(call.SCALARS)), np.float32), np.zeros(2, np.uint32), *np.ones((4, 2), np.float32)]
    buffers = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in arrays]
    outputs = [buffers[place]._replace(shape=(2,), dtype="float32"), *buffers[4:]]
    run_call = emulated.run_call if name == "cuda" else handler.call
    assert run_call(buffers, outputs, [0, 0, 0, 0, 0, 0, 2, 0]) == "jadam: an output overlaps another buffer"


@pytest.mark.parametrize("result", [0, 77])
def test_a_resolver_that_fails_silently(result):
    """As a callback does that raises: the exception cannot pass through C++, and the result is any number."""
    arrays = [np.ones((1, len(call.SCALARS)), np.float32), np.zeros(2, np.uint32), *np.ones((4, 2), np.float32)]
    buffers = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in arrays]
    library, silent = handler.library(), extension.RESOLVE(lambda *_: result)
    library.jadam_cuda_set_resolve(silent)
    try:
        error = handler.call(buffers, buffers[3:], [0, 0, 0, 0, 0, 0, 2, 0], platform="cuda", device=79)
    finally:
        library.jadam_cuda_set_resolve(extension._resolve)
    assert error == "jadam: Python did not give the CUDA kernel"


def test_a_program_without_the_driver_says_so(monkeypatch):
    """As where a program runs that was compiled or exported elsewhere."""
    monkeypatch.setattr(driver, "LIBRARY", "no such library")
    driver._library.cache_clear()
    arrays = arrays_of_call(*np.ones((4, 12), np.float32))
    buffers = list(map(emulated.buffer, arrays))
    error = handler.call(buffers, buffers[3:], [0, 0, 0, 0, 0, 0, 12, 0], platform="cuda", device=78)
    assert error.startswith("jadam: the CUDA kernel cannot run: the NVIDIA driver does not load (no such library: ")
    assert error.endswith(": install it. Or compile the step with JADAM_KERNELS=xla in the environment.")


@pytest.mark.parametrize("number", [70, 80, 90, 100, 120])
def test_nvrtc_compiles_the_kernel(number):
    """``python -m benchmarks cuda`` compiles every variant, also with the NVRTC of CUDA 13."""
    found = [x for x in nvrtc.installed(None)[0] if x.version[0] == 12]
    if not found:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    for variant in (nvrtc.Variant(0, 0, 0, 0), nvrtc.Variant(1, 2, 1, 1), nvrtc.Variant(3, 1, 0, 1)):
        options = nvrtc.options(variant, f"sm_{number}")
        code, log = nvrtc.compile_source(found[0], (*options, "--ptxas-options=-v"))
        assert variant.name.encode() in code
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
        assert spilled <= (0 if number in (80, 90) else 256), log  # bytes, stored and loaded


def test_large_leaves_without_int8_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(cuda, "XLA_SIZE", 6000)
    params = random_tree(0, shapes={"a": (60, 99), "b": (60, 100), "c": (60, 128)})
    taken = {}
    for moments in ("float32", "bfloat16", "int8"):
        tx = make_optimizer("adam", moments)
        step = jax.jit(functools.partial(jadam.step, tx))
        allow = [jax.export.DisabledSafetyCheck.custom_call("jadam_step")]
        exported = jax.export.export(step, platforms=["cuda"], disabled_checks=allow)(params, tx.init(params), params)
        (kernel_call,) = re.findall(r"@jadam_step\((.*?)\)", exported.mlir_module())
        taken[moments] = kernel_call.count("%") - 2  # without scalars and count
    assert taken == {"float32": 4, "bfloat16": 4, "int8": 3 * 6}  # one leaf of three; all


@pytest.mark.parametrize(
    ("calls", "messages"),
    [(60, 10), pytest.param(400, 20, marks=pytest.mark.slow), pytest.param(3_000, 20, marks=pytest.mark.nightly)],
)
def test_every_call_is_right_or_an_error(calls, messages):
    """Random calls, some with mistakes, as of the CPU's handler. Nothing beyond the buffers is read or written."""
    counts = json.loads(helpers.run_program(program, "fuzz_cuda", calls, timeout=120 + calls))
    codes, apart, right, other = (counts.pop(key, 0) for key in ("codes", "codes apart", "right", "other scalars"))
    assert right + other + sum(counts.values()) == calls
    assert right > 0.2 * calls  # a third of the calls has no mistake
    assert all(message.startswith("jadam: ") for message in counts)
    assert apart <= 1e-3 * codes  # as in test_step.py
    assert len(counts) >= messages
