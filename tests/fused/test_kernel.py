"""The CPU's handler under rough use: wrong calls, threads, children, long runs, huge leaves; and how it is built."""

import ctypes
import json
import platform
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import handler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CPU, assert_equal, environment, needs_kernel, rows
from jax.sharding import PartitionSpec as P
from programs import kernel as program

import jadam
from jadam import sharding
from jadam._core.numerics import linear_index
from jadam._transformation.transformation import Shard

pytestmark = needs_kernel
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF, /proc or maps memory as Linux does")
nightly = pytest.mark.nightly


def run_program(*args, timeout, **env):
    """The last line that `programs/kernel.py` prints; a crash is reported with the call that caused it."""
    command = [sys.executable, "-W", "error", program.__file__, *map(str, args)]
    done = subprocess.run(
        command,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"exit {done.returncode} in {program.__file__} {lines[-1]}\n{done.stderr}"
    return lines[-1]


# -- right and wrong calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "calls_by_xla", "messages"),
    [
        (60, 8, 15),
        pytest.param(120, 15, 15, marks=pytest.mark.slow),
        pytest.param(2_000, 150, 35, marks=nightly),
        pytest.param(100_000, 5_000, 40, marks=nightly),
    ],
)
def test_every_call_gives_the_right_result_or_says_what_is_wrong(calls, calls_by_xla, messages):
    """And reads and writes nothing else, at any address that is a multiple of the element's size."""
    tallies = json.loads(run_program("fuzz", calls, calls_by_xla, timeout=60 + calls + calls_by_xla))
    for tally, n in zip(tallies, (calls, calls_by_xla), strict=True):
        codes, apart, right, other = (tally.pop(key, 0) for key in ("codes", "codes apart", "right", "other scalars"))
        assert right + other + sum(tally.values()) == n
        assert other <= 1 + 0.01 * n
        assert right > 0.2 * n  # a third has no mistake
        assert all(message.startswith("jadam: ") for message in tally)
        assert apart <= 1e-3 * codes  # as in test_step.py
    assert len(tallies[0]) >= messages


def test_a_gradient_that_is_the_weight():
    """Donated: XLA then hands the handler a copy, for a result must replace nothing that another argument is."""
    tx, p = jadam.adamw(1e-3), jax.device_put(np.linspace(-1, 1, 1001, dtype=np.float32))
    state = tx.init(p)
    step = lambda p, state: jadam.step(tx, p, state, p)
    expected = jax.device_get(jax.jit(step)(p, state))
    new = jax.jit(step, donate_argnums=(0, 1))(p, state)
    assert_equal(new, expected)


POOLS = [handler.Inline, handler.Full, handler.Late, handler.Threads]


def leaf(format, shape, seed=0):
    """Gradient, weight, remainder and moments: all in 16 bits but int8's."""
    rng = np.random.default_rng(seed)
    normal = lambda shape, dtype=program.BFLOAT16: rng.standard_normal(shape).astype(dtype)
    arrays = [normal(shape), normal(shape), rng.integers(-(2**15), 2**15, shape, np.int16)]
    if format == "bfloat16":
        return [*arrays, normal(shape), np.abs(normal(shape))]
    scales = (*shape[:-1], program.blocks_of(shape, 128))
    codes = [rng.integers(-127, 128, shape, np.int8), rng.integers(0, 256, shape, np.uint8)]
    return [*arrays, *codes, *(np.abs(normal(scales, np.float32)) for _ in range(2))]


def stepped_in_place(format, buffers, first=0, pool=None):
    """The handler on one leaf, its results in the place of what they replace."""
    scalars = program.row(program.any_step(np.random.default_rng(1)))[None]
    count, n = np.array([3, first % 2**32], np.uint32), int(np.prod(buffers[0].shape, dtype=object))
    leaves = [0, program.FORMATS.index(format), 0, 0, 12345, 128, n, n]
    own = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in (scalars, count)]
    assert handler.call([*own, *buffers], buffers[1:], leaves, pool) is None


def new_leaf(format, arrays, first=0, pool=None, behind=None):
    """The bytes of what a step makes of arrays."""
    rng = np.random.default_rng(7)
    blocks = [program.Block(rng, x, behind) for x in arrays]
    stepped_in_place(format, [x.buffer for x in blocks], first, pool)
    if pool is not None:
        pool.after()
    return [x.values.tobytes() for x in blocks[1:]]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("format", "shape"), [("bfloat16", (2**18 + 13,)), ("int8", (523, 1000))])
def test_any_pool_of_threads(pool, format, shape):
    """One that does tasks at once, refuses them, does them after the call, or each in a thread: the same bits."""
    arrays = leaf(format, shape)
    assert new_leaf(format, arrays, pool=pool()) == new_leaf(format, arrays, pool=handler.Full())


def test_late_tasks_touch_no_buffer():
    arrays, pool = leaf("int8", (523, 1000)), handler.Late()
    buffers = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in arrays]
    stepped_in_place("int8", buffers, pool=pool)
    assert len(pool.tasks) == 3  # four threads, of which the caller is one
    done = [x.copy() for x in arrays]
    pool.after()
    for a, b in zip(arrays, done, strict=True):
        np.testing.assert_array_equal(a, b)


# -- threads and children ----------------------------------------------------------------------------------------------


@rows("donate", [True, False], default=["True"])
def test_two_python_threads(donate):
    """Each steps models of its own, 200 steps, and ends on the bits of having been alone."""
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
    """A child that does not touch JAX ends cleanly and changes no bit of its parent's training.

    A forked child cannot compute with JAX, whose threads it lacks: a plain ``jax.jit`` function hangs there too. The
    handler itself does not: it waits for no thread that has not begun.
    """
    assert run_program("forked", "int8", "few", timeout=120) == "forked"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_other_start_methods(method):
    """Whose parent has trained before: they train, to the same bits."""
    assert run_program(method, *program.TRAINED, timeout=120) == method


# -- long runs ---------------------------------------------------------------------------------------------------------


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", program.TRAINED)
def test_memory_is_flat(name):
    """The process grows by less than 1 % in 20,000 steps: by less than some 120 bytes a step."""
    sooner, later = map(int, run_program("memory", name, 2_000, 22_000, timeout=300, MALLOC_ARENA_MAX="1").split())
    assert later < 1.01 * sooner, (sooner, later)


# -- huge leaves -------------------------------------------------------------------------------------------------------


def index(element, shape, whole):
    """Of an element of the first part of an array, in Python's integers."""
    place, stride = 0, 1
    for n, size in zip(reversed(shape), reversed(whole), strict=True):
        element, i = divmod(element, n)
        place, stride = place + i * stride, stride * size
    return place


@pytest.mark.parametrize("whole", [(2**40, 2**33 + 5), (3, 2**32), (3, 2**32 - 1), (2**20, 3, 2**31 + 1), (7, 5)])
def test_indices_of_huge_arrays(whole):
    """Modulo 2**32 the true ones, however large the array of which a leaf is a part."""
    shape = (*(1,) * (len(whole) - 2), 3, 5)
    size, first = int(np.prod(shape)), 2**32 - 7
    wanted = [index(i, shape, whole) for i in range(size)]
    np.testing.assert_array_equal(linear_index(shape, whole).ravel(), np.array([x % 2**32 for x in wanted], np.uint32))
    part = Shard(jnp.uint32(first), whole)
    indices = np.array([(first + x) % 2**32 for x in wanted], np.uint32)
    np.testing.assert_array_equal(part.global_indices(shape).ravel(), indices)
    run, stride = part.strided_runs(shape)
    assert [i // run * stride + i % run for i in range(size)] == wanted
    # The handler's, by its dither: the bits of leaves that lie where its elements do.
    arrays = [x.reshape(-1) for x in leaf("bfloat16", shape)]
    rng = np.random.default_rng(0)
    blocks = [program.Block(rng, x) for x in arrays]
    scalars = program.Block(rng, program.row(program.any_step(np.random.default_rng(1)))[None])
    count = program.Block(rng, np.array([3, first], np.uint32))
    buffers = [x.buffer for x in blocks]
    leaves = [0, 1, 0, 0, 12345, 128, run, stride % 2**63]
    assert handler.call([scalars.buffer, count.buffer, *buffers], buffers[1:], leaves) is None
    for i in range(size):
        one = new_leaf("bfloat16", [x[i : i + 1] for x in arrays], first=first + wanted[i])
        assert [x.values[i : i + 1].tobytes() for x in blocks[1:]] == one


@pytest.mark.parametrize("size", [2**31 + 8, 2**32 + 64, 2**35])
def test_where_parts_of_huge_arrays_begin(size):
    """`jadam.sharding.zero1` divides an array of which nothing needs to exist."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    first = jax.jit(
        jax.shard_map(
            lambda: sharding._shard_offset((size, 3), P("x", None), mesh)[None],
            mesh=mesh,
            in_specs=(),
            out_specs=P("x"),
            check_vma=False,
        )
    )
    np.testing.assert_array_equal(first(), np.array([i * (size // 8) * 3 % 2**32 for i in range(8)], np.uint32))


ROW = 1000  # of int8's leaf: blocks of 128, the last of 104


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(("format", "shape"), [("bfloat16", (2**32 + 54321,)), ("int8", (2**32 // ROW + 999, ROW))])
def test_more_than_2_to_the_32_elements(format, shape):
    """At the beginning, around 2**31 and 2**32 and at the end, to the bit the step of small leaves that lie there."""
    rows = 9 if format == "int8" else 9 * ROW
    per_row = ROW if format == "int8" else 1
    starts = [0, *(2**k // per_row - rows // 2 for k in (31, 32)), shape[0] - rows]
    windows = [leaf(format, (rows, *shape[1:]), seed) for seed in range(len(starts))]
    whole = []
    try:
        for k, example in enumerate(windows[0]):
            width = int(np.prod(example.shape[1:]))
            values = [(start * width, window[k]) for start, window in zip(starts, windows, strict=True)]
            whole.append(handler.Sparse((shape[0], *example.shape[1:]), example.dtype, values))
        stepped_in_place(format, [x.buffer for x in whole], first=5)
        for start, window in zip(starts, windows, strict=True):
            new = [x.window(start * int(np.prod(w.shape[1:])), w.size) for x, w in zip(whole, window, strict=True)]
            assert [x.tobytes() for x in new[1:]] == new_leaf(format, window, first=5 + start * per_row)
            assert [x.tobytes() for x in new[1:]] != new_leaf(format, window, first=6 + start * per_row)
    finally:
        for x in whole:
            x.close()


@on_linux
@pytest.mark.nightly
def test_a_real_step_of_more_than_2_to_the_31_elements():
    """Through `jadam.step` and XLA: 14 GB of new weights and codes, the old ones in little memory as above."""
    assert run_program("huge", timeout=1800) == "huge"


# -- how it is built ---------------------------------------------------------------------------------------------------


def elf(path):
    """Program headers ``{type: flags}``, the dynamic section ``{tag: value}`` and the names of the dynamic symbols."""
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
        if kind == 3 and address == tags[5]:  # the string table that DT_STRTAB means
            names = data[offset : offset + length]
    return {kind: flags for kind, flags, *_ in segments}, tags, set(names.split(b"\0")), data


@on_linux
def test_hardened():
    """What each flag of setup.py leaves in the extension."""
    segments, tags, names, data = elf(CPU.reason)
    sanitized = b"__asan_init" in names
    assert not segments[0x6474E551] & 1  # GNU_STACK is not executable: -z noexecstack
    assert 0x6474E552 in segments  # GNU_RELRO: -z relro
    assert tags[30] & 8  # BIND_NOW: -z now
    assert b"__stack_chk_fail" in names  # -fstack-protector-strong
    assert (b"__memcpy_chk" in names) != sanitized  # -D_FORTIFY_SOURCE=3, for which AddressSanitizer is no friend
    assert b"__n < this->size()" in data  # -D_GLIBCXX_ASSERTIONS: what operator[] asserts
    assert not any(name.startswith(b"_ZN3xla") for name in names)  # -fvisibility=hidden
    assert {b"jadam_step", b"jadam_source", b"jadam_instructions"} <= names
    if platform.machine() == "x86_64":
        entry = ctypes.cast(handler.library().jadam_step, ctypes.c_void_p).value
        assert ctypes.string_at(entry, 4) == b"\xf3\x0f\x1e\xfa"  # endbr64: -fcf-protection
