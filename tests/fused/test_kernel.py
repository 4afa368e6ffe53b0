"""Robustness of the CPU's handler: invalid calls, threads, child processes, long runs, huge leaves, build flags."""

import ctypes
import json
import platform
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import handler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CPU, FORMATS, assert_equal, needs_kernel, parametrize, run_program
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from programs import kernel as program
from properties import SEEDS, parts, property_test

import jadam
from jadam._core.numerics import linear_index
from jadam._fused import shards
from jadam._transformation.transformation import Shard

pytestmark = needs_kernel
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF, /proc or maps memory as Linux does")
nightly = pytest.mark.nightly


# -- valid and invalid calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "calls_by_xla", "messages"),
    [
        (60, 8, 15),
        pytest.param(120, 15, 15, marks=pytest.mark.slow),
        pytest.param(2_000, 150, 35, marks=nightly),
        pytest.param(100_000, 5_000, 40, marks=nightly),
    ],
)
def test_every_call_is_right_or_an_error(calls, calls_by_xla, messages):
    """Buffers are aligned only to their element size. Nothing beyond them is read or written."""
    all_counts = json.loads(run_program(program, "fuzz", calls, calls_by_xla, timeout=60 + calls + calls_by_xla))
    for counts, n in zip(all_counts, (calls, calls_by_xla), strict=True):
        codes, apart, right, other = (counts.pop(key, 0) for key in ("codes", "codes apart", "right", "other scalars"))
        assert right + other + sum(counts.values()) == n
        assert other <= 1 + 0.01 * n
        assert right > 0.2 * n  # a third of the calls has no mistake
        assert all(message.startswith("jadam: ") for message in counts)
        assert apart <= 1e-3 * codes  # as in test_step.py
    assert len(all_counts[0]) >= messages


def test_gradient_and_weight_are_one_donated_array():
    """XLA must pass a copy: the new weight may not overwrite an array that is also the gradient."""
    tx, p = jadam.adamw(1e-3), jax.device_put(np.linspace(-1, 1, 1001, dtype=np.float32))
    state = tx.init(p)
    step = lambda p, state: jadam.step(tx, p, state, p)
    expected = jax.device_get(jax.jit(step)(p, state))
    new = jax.jit(step, donate_argnums=(0, 1))(p, state)
    assert_equal(new, expected)


POOLS = [handler.Inline, handler.Full, handler.Late, handler.Threads]


def random_leaf(format, shape, seed=0, block=128, remainder=True):
    """Random gradient, weight, its remainder if it is to be bfloat16, and moments in ``format``."""
    rng = np.random.default_rng(seed)
    normal = lambda shape, dtype=program.BFLOAT16: rng.standard_normal(shape).astype(dtype)
    arrays = [normal(shape), normal(shape), rng.integers(-(2**15), 2**15, shape, np.int16)]
    if not remainder:
        arrays = [normal(shape), normal(shape, np.float32)]
    if format != "int8":
        dtype = program.BFLOAT16 if format == "bfloat16" else np.float32
        return [*arrays, normal(shape, dtype), np.abs(normal(shape, dtype))]
    scales = (*shape[:-1], program.num_blocks(shape, block))
    codes = [rng.integers(-127, 128, shape, np.int8), rng.integers(0, 256, shape, np.uint8)]
    return [*arrays, *codes, *(np.abs(normal(scales, np.float32)) for _ in range(2))]


def step_in_place(format, buffers, first=0, pool=None, block=128, strides=None):
    """Calls the handler on one leaf, outputs aliased with the inputs. ``strides`` are those of a shard."""
    scalars = program.scalars_row(program.random_hyperparams(np.random.default_rng(1)))[None]
    count, n = np.array([3, first % 2**32], np.uint32), int(np.prod(buffers[0].shape, dtype=object))
    (run, _), *digits = strides or [(n, 1)]
    leaves = [0, program.FORMATS.index(format), 0, 0, 12345, block, run, len(digits)]
    own = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in (scalars, count)]
    assert handler.call([*own, *buffers], buffers[1:], leaves, [x for digit in digits for x in digit], pool) is None


def step_leaf(format, arrays, first=0, pool=None, behind=None, **options):
    """Bytes of a leaf's outputs, from copies of ``arrays``."""
    rng = np.random.default_rng(7)
    blocks = [program.GuardedArray(rng, x, behind) for x in arrays]
    step_in_place(format, [x.buffer for x in blocks], first, pool, **options)
    if pool is not None:
        pool.after()
    return [x.values.tobytes() for x in blocks[1:]]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("format", "shape"), [("bfloat16", (2**18 + 13,)), ("int8", (523, 1000))])
def test_any_pool_of_threads(pool, format, shape):
    """The bits do not depend on how the pool runs tasks, or whether."""
    arrays = random_leaf(format, shape)
    assert step_leaf(format, arrays, pool=pool()) == step_leaf(format, arrays, pool=handler.Full())


def test_late_tasks_touch_no_buffer():
    arrays, pool = random_leaf("int8", (523, 1000)), handler.Late()
    buffers = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in arrays]
    step_in_place("int8", buffers, pool=pool)
    assert len(pool.tasks) == 3  # the caller is the fourth of four threads
    done = [x.copy() for x in arrays]
    pool.after()
    for a, b in zip(arrays, done, strict=True):
        np.testing.assert_array_equal(a, b)


# -- threads and children ----------------------------------------------------------------------------------------------


@parametrize("donate", [True, False], default=["True"])
def test_two_python_threads(donate):
    """Two threads train their own models at the same time, to the bits of training alone."""
    sides = [("float32", "few"), ("int8", "exact_bf16")]
    alone = [[program.trained(name, 200, donate) for name in names] for names in sides]
    start = threading.Barrier(2)

    def side(names):
        start.wait(timeout=60)
        return [program.trained(name, 200, donate) for name in names]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(side, sides)) == alone


@on_linux
def test_forked_children():
    """A forked child that does not use JAX exits cleanly; the parent's training keeps its bits.

    A forked child cannot compute with JAX, because it has no copy of JAX's threads: any jitted function hangs. The
    handler does not hang: it never waits for a task that no thread has started.
    """
    assert run_program(program, "forked", "int8", "few", timeout=120) == "forked"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_other_start_methods(method):
    """Children train to the same bits as their parent did before."""
    assert run_program(program, method, *program.TRAINED, timeout=120) == method


# -- long runs ---------------------------------------------------------------------------------------------------------


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", program.TRAINED)
def test_memory_is_flat(name):
    """Resident memory grows by less than 1 % in 20,000 steps: some 120 bytes a step."""
    sooner, later = map(
        int, run_program(program, "memory", name, 2_000, 22_000, timeout=300, MALLOC_ARENA_MAX="1").split()
    )
    assert later < 1.01 * sooner, (sooner, later)


# -- huge leaves -------------------------------------------------------------------------------------------------------


def global_index(element, shape, whole):
    """Index in the whole array of an element of its first shard, in Python's integers."""
    place, stride = 0, 1
    for n, size in zip(reversed(shape), reversed(whole), strict=True):
        element, i = divmod(element, n)
        place, stride = place + i * stride, stride * size
    return place


@pytest.mark.parametrize(
    ("whole", "shape"),
    [
        ((2**40, 2**33 + 5), (3, 5)),
        ((3, 2**32), (3, 5)),
        ((3, 2**32 - 1), (3, 5)),
        ((2**20, 3, 2**31 + 1), (1, 3, 5)),
        ((2**20, 2**31 + 1, 7, 2**32 + 3), (2, 3, 1, 4)),
        ((2**33, 2**33 - 1, 2**33 + 1), (2, 3, 1)),
        ((7, 5), (3, 5)),
    ],
)
def test_indices_of_huge_arrays(whole, shape):
    """Indices of a shard's elements are right modulo 2**32, however large the whole array."""
    size, first = int(np.prod(shape)), 2**32 - 7
    wanted = [global_index(i, shape, whole) for i in range(size)]
    np.testing.assert_array_equal(linear_index(shape, whole).ravel(), np.array([x % 2**32 for x in wanted], np.uint32))
    part = Shard(jnp.uint32(first), whole)
    indices = np.array([(first + x) % 2**32 for x in wanted], np.uint32)
    np.testing.assert_array_equal(part.global_indices(shape).ravel(), indices)
    strides = part.strides(shape)
    assert [handler.mixed_radix(i, strides) % 2**32 for i in range(size)] == [x % 2**32 for x in wanted]
    # The handler's indices show in its dither: compare with leaves of one element at the same offsets.
    arrays = [x.reshape(-1) for x in random_leaf("bfloat16", shape)]
    new = step_leaf("bfloat16", arrays, first, strides=strides)
    for i in range(size):
        one = step_leaf("bfloat16", [x[i : i + 1] for x in arrays], first=first + wanted[i])
        assert [x[2 * i : 2 * i + 2] for x in new] == one


@property_test(
    few=40,
    part=parts(1),
    format=st.sampled_from(FORMATS),
    remainder=st.booleans(),
    block=st.integers(1, 200),
    shorter=st.floats(0, 1, exclude_max=True),
    seed=SEEDS,
)
def test_a_part_has_the_bits_of_the_whole(part, format, remainder, block, shorter, seed):
    """However an array is cut, if between int8 blocks, of which the last in a row may be shorter."""
    *leading, blocks = part[0]
    whole = (*leading, blocks * block - int(shorter * block))
    bounds = [(start, start + n) for start, n in zip(*part[1:], strict=True)]
    of_blocks = tuple(slice(*x) for x in bounds)
    of_elements = (*of_blocks[:-1], slice(*(min(whole[-1], x * block) for x in bounds[-1])))
    arrays = random_leaf(format, whole, seed, block, remainder)
    cut = lambda x: x[of_elements if x.shape == whole else of_blocks]
    new = step_leaf(format, arrays, 5, block=block)
    new = [cut(np.frombuffer(x, old.dtype).reshape(old.shape)) for x, old in zip(new, arrays[1:], strict=True)]
    here = list(map(cut, arrays))
    first = int(np.ravel_multi_index([x.start for x in of_elements], whole))
    strides = Shard(jnp.uint32(first), whole).strides(here[0].shape)
    assert step_leaf(format, here, 5 + first, block=block, strides=strides) == [x.tobytes() for x in new]


@pytest.mark.parametrize("size", [2**31 + 8, 2**32 + 64, 2**35])
def test_shard_offsets_of_huge_arrays(size):
    """Only shapes: no array is allocated."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    first = jax.jit(
        jax.shard_map(
            lambda: shards.shard_offset((size, 3), P("x", None), mesh)[None],
            mesh=mesh,
            in_specs=(),
            out_specs=P("x"),
            check_vma=False,
        )
    )
    np.testing.assert_array_equal(first(), np.array([i * (size // 8) * 3 % 2**32 for i in range(8)], np.uint32))


ROW = 1000  # length of the int8 leaf's rows: seven blocks of 128 and one of 104


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(("format", "shape"), [("bfloat16", (2**32 + 54321,)), ("int8", (2**32 // ROW + 999, ROW))])
def test_more_than_2_to_the_32_elements(format, shape):
    """Compares windows at the start, at 2**31, at 2**32 and at the end with small leaves there, bit for bit."""
    rows = 9 if format == "int8" else 9 * ROW
    per_row = ROW if format == "int8" else 1
    starts = [0, *(2**k // per_row - rows // 2 for k in (31, 32)), shape[0] - rows]
    windows = [random_leaf(format, (rows, *shape[1:]), seed) for seed in range(len(starts))]
    whole = []
    try:
        for k, example in enumerate(windows[0]):
            width = int(np.prod(example.shape[1:]))
            values = [(start * width, window[k]) for start, window in zip(starts, windows, strict=True)]
            whole.append(handler.Sparse((shape[0], *example.shape[1:]), example.dtype, values))
        step_in_place(format, [x.buffer for x in whole], first=5)
        for start, window in zip(starts, windows, strict=True):
            new = [x.window(start * int(np.prod(w.shape[1:])), w.size) for x, w in zip(whole, window, strict=True)]
            assert [x.tobytes() for x in new[1:]] == step_leaf(format, window, first=5 + start * per_row)
            assert [x.tobytes() for x in new[1:]] != step_leaf(format, window, first=6 + start * per_row)
    finally:
        for x in whole:
            x.close()


@on_linux
@pytest.mark.nightly
def test_step_of_more_than_2_to_the_31_elements():
    """Through `jadam.step` and XLA. Needs 14 GB for the results; the inputs take little memory, as above."""
    assert run_program(program, "huge", timeout=1800) == "huge"


# -- build flags -------------------------------------------------------------------------------------------------------


def read_elf(path):
    """Program headers ``{type: flags}``, dynamic section ``{tag: value}``, dynamic symbol names, bytes of the file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    headers, sections = struct.unpack_from("<QQ", data, 32)
    size, n, section_size, n_sections = struct.unpack_from("<HHHH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, headers + i * size) for i in range(n)]
    dynamic = next((offset, filesz) for kind, _, offset, _, _, filesz in segments if kind == 2)
    tags = dict(struct.unpack_from("<QQ", data, dynamic[0] + i) for i in range(0, dynamic[1], 16))
    names = b""
    for i in range(n_sections):
        _, kind, _, address, offset, length = struct.unpack_from("<IIQQQQ", data, sections + i * section_size)
        if kind == 3 and address == tags[5]:  # the string table at DT_STRTAB
            names = data[offset : offset + length]
    return {kind: flags for kind, flags, *_ in segments}, tags, set(names.split(b"\0")), data


@on_linux
def test_hardened():
    """Each hardening flag of setup.py has left its trace in the extension."""
    segments, tags, names, data = read_elf(CPU.reason)
    sanitized = b"__asan_init" in names
    assert not segments[0x6474E551] & 1  # GNU_STACK is not executable: -z noexecstack
    assert 0x6474E552 in segments  # GNU_RELRO: -z relro
    assert tags[30] & 8  # BIND_NOW: -z now
    assert b"__stack_chk_fail" in names  # -fstack-protector-strong
    assert (b"__memcpy_chk" in names) != sanitized  # -D_FORTIFY_SOURCE=3, which AddressSanitizer disables
    assert b"__n < this->size()" in data  # -D_GLIBCXX_ASSERTIONS: operator[]'s assertion
    assert not any(name.startswith(b"_ZN3xla") for name in names)  # -fvisibility=hidden
    assert {b"jadam_step", b"jadam_source", b"jadam_instructions"} <= names
    if platform.machine() == "x86_64":
        entry = ctypes.cast(handler.library().jadam_step, ctypes.c_void_p).value
        assert ctypes.string_at(entry, 4) == b"\xf3\x0f\x1e\xfa"  # endbr64: -fcf-protection
