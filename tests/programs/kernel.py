"""Programs that `test_kernel.py` runs in processes of their own: a fuzzer of the CPU's handler, forks, memory use.

``PYTHONPATH=tests python tests/programs/kernel.py call_directly 7 1`` repeats the fuzzer's call with seed 7, and
``call_by_xla 7 1`` repeats it through XLA.
"""

import copy
import ctypes
import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import time
import warnings
from collections import Counter
from typing import NamedTuple

import emulated
import handler
import jax
import jax.numpy as jnp
import numpy as np

import jadam
from jadam import _optimizers
from jadam._core.numerics import constant_beta
from jadam._fused.cpu import kernel as cpu
from jadam._fused.native import call as native_call
from jadam._fused.pallas import Int8Tile
from jadam._moments import formats
from jadam._transformation.transformation import Hyperparams, LeafUpdate, Rule, Shard, update_leaf

ROWS, COLUMNS = 64, 512  # the reference step runs on arrays of this one shape, so that it is compiled once
NATIVE = {
    rule.native: rule
    for module in pkgutil.iter_modules(_optimizers.__path__, "jadam._optimizers.")
    for rule in vars(importlib.import_module(module.name)).values()
    if isinstance(rule, Rule)
}
RULES, FORMATS = [NATIVE[name] for name in native_call.load().rules], list(native_call.load().formats)
SIZES = [0, 1, 2, 3, 5, 7, 97, 251, 509, 1021, *(n + i for n in (32, 128, 256, 512, 1024) for i in (-1, 0, 1))]
BLOCKS = [1, 2, 3, 31, 32, 64, 97, 127, 128, 129, 255, 256, 511, 512]
EDGES = [
    *range(9),
    511,
    512,
    513,
    -1,
    *(2**k + i for k in (31, 32) for i in (-1, 0)),
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30]
LARGEST_RATIO = 32.0  # |g|/sqrt(v) is at most 1/sqrt(1 - b2), 31.6 at b2 = 0.999
BFLOAT16 = jnp.dtype(jnp.bfloat16)


class GuardedArray:
    """An array aligned only to its element size, with guard bytes before and perhaps behind it."""

    def __init__(self, rng, values, behind=None):
        values = np.asarray(values)
        size = max(1, values.dtype.itemsize)
        self.offset = 64 + size * int(rng.integers(0, 64 // size))
        end = self.offset + values.nbytes
        # Without guard bytes behind it AddressSanitizer catches overruns; with them `call_directly` catches writes.
        self.memory = rng.integers(0, 256, end + int(rng.choice([0, 64]) if behind is None else behind), np.uint8)
        self.shape, self.dtype, self.null = values.shape, values.dtype, False
        self.values[...] = values

    def changed(self, **fields):
        """Another array in the same memory."""
        new = copy.copy(self)
        vars(new).update(fields)
        return new

    @property
    def values(self):
        return np.ndarray(self.shape, self.dtype, self.memory, self.offset)

    @property
    def buffer(self):
        return handler.Buffer(0 if self.null else self.address, self.shape, str(self.dtype))

    @property
    def address(self):
        return self.memory.ctypes.data + self.offset


class Call(NamedTuple):
    """Arguments of the handler; ``inputs`` begin with scalars and count. ``hyperparams`` are those in the scalars."""

    inputs: list[GuardedArray]
    outputs: list[GuardedArray]
    leaves: list[int]
    digits: list[int]
    hyperparams: list[dict]


# -- random valid calls ------------------------------------------------------------------------------------------------


def random_hyperparams(rng):
    """Random values for the fields of a LeafUpdate that become a row of scalars."""
    t = jnp.float32(rng.choice([1, 2, 10, 1000]))
    b1, b2, momentum = (float(rng.choice(x)) for x in ([0.0, 0.3, 0.9], [0.3, 0.99, 0.999], [0.5, 0.95]))
    betas = {name: constant_beta(b, t, np.float32) for name, b in (("b1", b1), ("b2", b2), ("momentum", momentum))}
    others = {
        "trusted": bool(rng.integers(2)),
        "rectification": 0.5,
        "eps": 1e-8,
        "eps_root": float(rng.choice([0, 1e-3])),
    }
    return {
        "hyperparams": Hyperparams(
            t=t, **betas, **{k: v if k == "trusted" else np.float32(v) for k, v in others.items()}
        ),
        "minus_lr": -float(rng.choice([1.0, 0.125])),
        "weight_decay": float(rng.choice([0.0, 0.1])),
        "bound": 0.5,
        "norm": jnp.float32(2),
        "max_norm": jnp.float32(0.5),  # a power of two, which leaves bfloat16 gradients exact
    }


def scalars_row(step):
    unused = {"rule": None, "dtype": None, "format": None, "stored": (), "salt": 0, "count": None}
    return np.asarray(native_call._scalar_row(LeafUpdate(**unused, **step)))


def random_shape(rng, min_rank, max_size):
    """Random shape of ``min_rank`` to 3 axes and at most ``max_size`` elements."""
    shape = []
    for _ in range(rng.integers(min_rank, 4)):
        shape.insert(0, int(rng.choice(SIZES if not shape else [0, 1, 2, 3, 5, 7, 13])))
        if np.prod(shape) > max_size:
            return tuple(shape[1:] or [1])
    return tuple(shape)


def random_floats(rng, shape, special):
    """Normal numbers over four decades, 2 % of them special. None is subnormal: XLA's threads flush those to 0."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)
    return np.where(rng.random(shape) < 0.02 * special, rng.choice(SPECIAL, shape), x).astype(np.float32)


def random_leaf(rng, rows, blocks):
    """Settings, inputs and outputs of a random leaf; ``rows`` is the number of rows of scalars."""
    format = FORMATS[rng.integers(3)]
    rule = int(rng.choice([i for i, rule in enumerate(RULES) if rule.int8 or format != "int8"]))
    block = int(rng.choice(blocks)) if format == "int8" else int(rng.choice(EDGES))  # ignored
    shape = random_shape(rng, format == "int8", ROWS if format == "int8" and block < 100 else ROWS * 100)
    if format == "int8" and np.prod(shape[:-1]) * num_blocks(shape, block) > ROWS:
        shape = shape[-1:] if num_blocks(shape[-1:], block) <= ROWS else (1,)
    special = rng.random() < 0.2
    narrow_g, narrow_p = rng.random(2) < 0.3
    g = random_floats(rng, shape, special).astype(BFLOAT16 if narrow_g else np.float32)
    p = random_floats(rng, shape, False)
    own = [p.astype(BFLOAT16), rng.integers(-(2**15), 2**15, shape, np.int16)] if narrow_p else [p]
    m = random_floats(rng, shape, False)
    v = m**2 * np.exp(rng.exponential(1.0, shape)).astype(np.float32)
    moments = [m, v, v * 2][: len(RULES[rule].moment_names)]
    if format == "bfloat16":
        moments = [x.astype(BFLOAT16) for x in moments]
    if format == "int8":
        scales = (*shape[:-1], num_blocks(shape, block))
        moments = [rng.integers(-127, 128, shape, np.int8), rng.integers(0, 256, shape, np.uint8)]
        moments += [rng.uniform(0.1, 7, scales).astype(np.float32), 10 ** rng.uniform(-2, 2, scales).astype(np.float32)]
    n = int(np.prod(shape))
    row = shape[-1] if format == "int8" else 1
    run = row * random_divisor(rng, n // row) if n else int(rng.choice(EDGES))
    digits = random_digits(rng, n // run) if n else []
    settings = [
        rule,
        FORMATS.index(format),
        rng.integers(4),
        rng.integers(rows),
        rng.integers(2**32),
        block,
        run,
        len(digits) // 2,
    ]
    outputs = [np.zeros_like(x) for x in (*own, *moments)]
    return [int(x) for x in settings], digits, [g, *own, *moments], outputs


def random_divisor(rng, n) -> int:
    return int(rng.choice([x for x in range(1, n + 1) if n % x == 0]))


def random_digits(rng, n) -> list[int]:
    """Sizes and strides of digits that count to ``n``, at most three more than needed."""
    digits = []
    while n > 1 or (len(digits) < 6 and rng.random() < 0.1):
        size = random_divisor(rng, n)
        digits += [size, int(rng.choice([*EDGES, 12345]))]
        n //= size
    return digits


def num_blocks(shape, block):
    return -(-shape[-1] // block)


def random_call(rng, blocks=BLOCKS):
    steps = [random_hyperparams(rng) for _ in range(rng.integers(1, 3))]
    several = [random_leaf(rng, len(steps), blocks) for _ in range(rng.integers(1, 4))]
    leaves, digits = ([x for leaf in several for x in leaf[i]] for i in range(2))
    scalars = np.stack([scalars_row(x) for x in steps])
    count = rng.integers(0, 2**32, 1 + len(several), np.uint32)
    inputs = [GuardedArray(rng, x) for x in (scalars, count, *(x for *_, inputs, _ in several for x in inputs))]
    outputs, place = [], 2
    for *_, given, new in several:
        for own, x in zip(inputs[place + 1 : place + len(given)], new, strict=True):
            outputs.append(own if rng.random() < 0.5 else GuardedArray(rng, x))
        place += len(given)
    return Call(inputs, outputs, leaves, digits, steps)


# -- random mistakes ---------------------------------------------------------------------------------------------------


def change_setting(rng, call):
    leaves = list(call.leaves)
    if leaves:
        leaves[rng.integers(len(leaves))] = int(rng.choice(EDGES))
    return call._replace(leaves=leaves)


def change_digit(rng, call):
    digits = list(call.digits)
    if digits:
        digits[rng.integers(len(digits))] = int(rng.choice(EDGES))
    return call._replace(digits=digits)


def change_number_of_settings(rng, call):
    leaves, digits = list(call.leaves), list(call.digits)
    if rng.random() < 0.3:
        return call._replace(digits=[digits[:-1], digits[:-2], [*digits, 1], [*digits, 1, 1]][rng.integers(4)])
    return call._replace(leaves=[leaves[:-1], leaves[:-8], [*leaves, 0], leaves + leaves[:8]][rng.integers(4)])


def change_dtype_or_shape(rng, call):
    """Changes dtype or shape of a buffer; its memory is large enough."""
    kind = rng.integers(2)
    columns = [list(call.inputs), list(call.outputs)]
    column = columns[kind]
    if not column:
        return call
    place = int(rng.integers(len(column)))
    shape, dtype = column[place].shape, column[place].dtype
    if rng.random() < 0.5:
        dtype = np.dtype(str(rng.choice(list(handler.DTYPE_CODES))))
    else:
        turned = [
            (),
            (0,),
            (*shape, 1),
            (*shape, 0),
            (*shape, 2),
            shape[:-1],
            (*shape[:-1], sum(shape[-1:]) + 1),
            shape[::-1],
        ]
        turned += [(*shape[:-1], max(0, sum(shape[-1:]) - 1)), (int(np.prod(shape)),)]
        shape = turned[rng.integers(len(turned))]
    values = np.zeros(shape, dtype)
    if dtype == column[place].dtype and column[place].values.size:
        values = np.resize(column[place].values, shape)  # rows of scalars stay valid
    column[place] = GuardedArray(rng, values)
    return call._replace(inputs=columns[0], outputs=columns[1])


def move_buffers(rng, call):
    """Drops, duplicates or swaps buffers."""
    columns = [list(call.inputs), list(call.outputs)]
    column = columns[rng.integers(2)]
    if not column:
        return call
    a, b = rng.integers(len(column), size=2)
    if min(a, b) == 0 and column is columns[0]:  # another buffer in the place of the scalars may pass for valid scalars
        return call
    match rng.integers(3):
        case 0:
            del column[a]
        case 1:
            column.insert(a, column[b])
        case 2:
            column[a], column[b] = column[b], column[a]
    return call._replace(inputs=columns[0], outputs=columns[1])


def overlap_buffers(rng, call):
    """Places an output on another buffer, or some bytes into it."""
    outputs = list(call.outputs)
    if not outputs:
        return call
    place, others = int(rng.integers(len(outputs))), [*call.inputs, *call.outputs]
    other, shift = others[rng.integers(len(others))], int(rng.choice([0, 0, 1, 2, 4, 64]))
    if other.offset + shift + outputs[place].values.nbytes <= len(other.memory):
        outputs[place] = outputs[place].changed(memory=other.memory, offset=other.offset + shift)
    return call._replace(outputs=outputs)


def misalign_input(rng, call):
    inputs = list(call.inputs)
    place = int(rng.integers(len(inputs)))
    new = GuardedArray(rng, inputs[place].values, behind=64)
    inputs[place] = new.changed(offset=new.offset + 1)
    return call._replace(inputs=inputs)


def drop_data(rng, call):
    columns = [list(call.inputs), list(call.outputs)]
    column = columns[rng.integers(2)]
    if column:
        place = int(rng.integers(len(column)))
        column[place] = column[place].changed(null=True)
    return call._replace(inputs=columns[0], outputs=columns[1])


MISTAKES = [
    change_setting,
    change_setting,
    change_digit,
    change_number_of_settings,
    change_dtype_or_shape,
    change_dtype_or_shape,
    move_buffers,
]
MISTAKES_IN_MEMORY = [*MISTAKES, overlap_buffers, misalign_input, drop_data]


# -- checks of the outputs ---------------------------------------------------------------------------------------------


def layout(shape, block):
    """Row and column of each element in the reference arrays. With ``block``, each int8 block has a row of its own."""
    n = int(np.prod(shape))
    if block is None:
        return np.divmod(np.arange(n), COLUMNS)
    element = np.arange(n)
    column = element % max(1, shape[-1])
    return element // max(1, shape[-1]) * num_blocks(shape, block) + column // block, column % block


def expected_outputs(call, inputs):
    """Yields ``(size of the largest term, expected value)`` for each leaf's parameter, as float32, and stored arrays.

    For int8 codes the first is a mask instead: codes with a NaN scale are not compared.
    """
    _, count, *arrays = inputs
    count, arrays, digits = count.ravel(), iter(arrays), call.digits
    for first, settings in zip(count[1:], split_settings(call.leaves), strict=True):
        rule, format, limit, scalars, salt, block, run, n = settings
        strides, digits = [(run, 1), *zip(digits[: 2 * n : 2], digits[1 : 2 * n : 2], strict=True)], digits[2 * n :]
        g, p = next(arrays), next(arrays)
        rest = next(arrays).ravel() if p.dtype == BFLOAT16 else None
        stored = [next(arrays).ravel() for _ in range(num_stored(rule, format))]
        scaled = FORMATS[format] == "int8"
        i, j = layout(g.shape, block if scaled else None)

        def lay(x, i=i, j=j):
            laid = np.zeros((ROWS, COLUMNS), x.dtype)
            laid[i, j] = x.ravel()
            return jnp.asarray(laid)

        def lay_scale(x):
            return jnp.asarray(np.concatenate([x, np.zeros(ROWS - x.size, np.float32)])[:, None])

        index = np.array([(int(first) + handler.mixed_radix(e, strides)) % 2**32 for e in range(g.size)], np.uint32)
        unused = {name for name, bit in (("bound", 1), ("norm", 2)) if not limit & bit}
        step = call.hyperparams[scalars % len(call.hyperparams)]
        leaf_update = LeafUpdate(
            rule=RULES[rule],
            dtype=np.dtype(np.float32),
            format=Int8Tile(1) if scaled else formats.FORMATS[FORMATS[format]],
            stored=(*map(lay, stored[:2]), *map(lay_scale, stored[2:])) if scaled else tuple(map(lay, stored)),
            salt=salt % 2**32,
            count=jnp.asarray(count[0]),
            remainder=None if rest is None else lay(rest),
            index=lay(index)[:, :1] if scaled else lay(index),
            **{k: v for k, v in step.items() if k not in unused},
        )
        new, others = update_leaf(leaf_update, lay(g), lay(p))
        new, *others = [np.asarray(x) for x in (new, *others)]
        old, g = join_master(p.ravel(), rest), np.abs(g.ravel().astype(np.float32))
        yield np.abs(old) + LARGEST_RATIO, join_master(new[i, j], None if rest is None else others.pop(0)[i, j])
        with np.errstate(over="ignore"):
            sizes = [g, g * g + g, g * g + g]
        for size, x, was in zip(sizes, others, stored[: 2 if scaled else 3], strict=False):
            yield ~np.isnan(others[2][i, 0]) if scaled else np.abs(was.astype(np.float32)) + size, x[i, j]
        for size, x, was in zip((LARGEST_RATIO, 0), others[2:], stored[2:], strict=True) if scaled else ():
            yield np.maximum(was, x[: was.size, 0]) + size, x[: was.size, 0]


def actual_outputs(call):
    """Yields the parameters, as float32, and stored arrays that the handler wrote."""
    outputs = iter(x.values.ravel() for x in call.outputs)
    for rule, format, *_ in split_settings(call.leaves):
        p = next(outputs)
        yield join_master(p, next(outputs) if p.dtype == BFLOAT16 else None)
        for _ in range(num_stored(rule, format)):
            yield next(outputs)


def split_settings(leaves):
    return [leaves[start : start + 8] for start in range(0, len(leaves), 8)]


def num_stored(rule, format):
    return 4 if FORMATS[format] == "int8" else len(RULES[rule].moment_names)


def join_master(p, rest):
    """Float32 weight from bfloat16 and remainder. Drops a remainder that would turn 0 or infinity into NaN."""
    if rest is None:
        return p
    pattern = p.view(np.uint16).astype(np.int64)
    magnitude = pattern & 0x7FFF
    stray = ((magnitude == 0) & (rest < 0)) | ((magnitude == 0x7F80) & (rest > 0))
    return ((pattern << 16) + np.where(stray, 0, rest)).astype(np.uint32).view(np.float32)


def both_non_finite(a, b):
    """Neither is finite. Where g * g overflows, a contracted x + b * (average - x) is inf, otherwise NaN."""
    return ~np.isfinite(a) & ~np.isfinite(b)


def check_outputs(call, wanted, counts):
    """Compares the handler's outputs with the reference.

    Tolerance: 1e-5 of the largest term. The reference rounds products that the kernel contracts, and the kernel
    multiplies by reciprocals of the corrections. A wrong element, row or rule is an error of order 1; `test_step.py`
    has the sharp bounds. Codes and bfloat16 may differ by one level at a rounding threshold.
    """
    for (size, new), got in zip(wanted, actual_outputs(call), strict=True):
        assert (got.dtype, got.shape) == (new.dtype, new.shape)
        if new.dtype in (np.float32, BFLOAT16):
            a, b = got.astype(np.float32), new.astype(np.float32)
            with np.errstate(invalid="ignore"):
                same = (np.abs(a - b) <= 1e-5 * np.maximum(size, np.abs(b))) | both_non_finite(a, b)
        if new.dtype == np.float32:
            assert same.all(), (got[~same][:4], new[~same][:4])
            continue
        if new.dtype == BFLOAT16:
            got, new, size = got.view(np.int16), new.view(np.int16), ~same
        apart = np.abs(got.astype(int) - new.astype(int))[size]
        counts["codes"] += got.size
        counts["codes apart"] += np.count_nonzero(apart)
        assert apart.max(initial=0) <= 1, apart.max()
        assert np.count_nonzero(apart) <= 3 + 0.005 * got.size, (np.count_nonzero(apart), got.size)


# -- the two ways to call ----------------------------------------------------------------------------------------------


def call_directly(call, rng, call_handler=handler.call):
    """Calls through ctypes and returns the error, if any. Bytes outside of the outputs must not change."""
    blocks = [*call.inputs, *call.outputs]
    memory = {x.memory.ctypes.data: x.memory for x in blocks}
    before = {address: x.copy() for address, x in memory.items()}
    pool = [handler.Inline, handler.Full, handler.Late, handler.Threads][rng.integers(4)]()
    error = call_handler(
        [x.buffer for x in call.inputs], [x.buffer for x in call.outputs], call.leaves, call.digits, pool
    )
    pool.after()
    written = {address: np.zeros(x.size, bool) for address, x in memory.items()}
    for x in call.outputs if error is None else ():
        written[x.memory.ctypes.data][x.offset : x.offset + x.values.nbytes] = True
    for address, x in memory.items():
        np.testing.assert_array_equal(x[~written[address]], before[address][~written[address]])
    return error


def call_by_xla(call, rng):
    """Calls through XLA, with its buffers and aliases."""
    places = {id(x): i for i, x in enumerate(call.inputs)}
    aliases = {places[id(x)]: i for i, x in enumerate(call.outputs) if id(x) in places}
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.outputs]
    if not any(x.values.size for x in call.outputs):  # XLA removes a call without results
        return call_directly(call, rng)
    of = jax.ffi.ffi_call("jadam_step", results, input_output_aliases=aliases)
    try:
        new = of(*(jnp.asarray(x.values) for x in call.inputs), **handler.attributes(call.leaves, call.digits))
        new = [np.asarray(x) for x in new]
    except Exception as error:
        text = str(error)
        return text[text.index("jadam: ") :] if "jadam: " in text else text
    for x, values in zip(call.outputs, new, strict=True):
        x.values[...] = values
    return None


def call_emulated(call, rng):
    """Calls CUDA's handlers, with the emulated kernel."""
    return call_directly(call, rng, emulated.run_call)


def fuzz_once(seed, way, mistakes, counts, blocks):
    rng = np.random.default_rng(seed)
    call = random_call(rng, blocks)
    scalars = call.inputs[0].values.copy()
    wrong = rng.integers(0, 3)
    for _ in range(wrong):
        call = mistakes[rng.integers(len(mistakes))](rng, call)
    inputs = [x.values.copy() for x in call.inputs]
    error = way(call, rng)
    if error is None and not np.array_equal(np.resize(inputs[0], scalars.shape), scalars):
        assert wrong
        counts["other scalars"] += 1  # changed but valid: no reference for them
    elif error is None:
        check_outputs(call, expected_outputs(call, inputs), counts)
        counts["right"] += 1
    else:
        assert wrong, error
        assert error.startswith("jadam: "), error
        counts[re.sub(r"leaf \d: ", "", error.splitlines()[0])] += 1


def fuzz(way, mistakes, first, n, blocks=BLOCKS):
    counts = Counter()
    for seed in range(first, first + n):
        print(f"{way.__name__} {seed} 1", flush=True)  # the last line names the call that crashed
        fuzz_once(seed, way, mistakes, counts, blocks)
    return {k: int(v) for k, v in counts.items()}


def fuzz_directly(first, n):
    return fuzz(call_directly, MISTAKES_IN_MEMORY, first, n)


def fuzz_by_xla(first, n):
    return fuzz(call_by_xla, MISTAKES, first, n)


def fuzz_emulated(first, n):
    return fuzz(call_emulated, MISTAKES_IN_MEMORY, first, n, [x for x in BLOCKS if x <= 128])


# -- training in this process, and in children -------------------------------------------------------------------------


def matrix(rows, columns, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, columns)), jnp.float32)


TRAINED = {
    "float32": lambda: (jadam.adamw(1e-3), {"small": matrix(3, 5), "large": matrix(301, 307)}),
    "int8": lambda: (jadam.adamw(1e-3, moments="int8"), {"large": matrix(257, 400)}),
    "exact_bf16": lambda: (
        jadam.exact_bf16(jadam.nadamw(1e-3, moments="bfloat16")),
        {"large": matrix(200, 500).astype(jnp.bfloat16)},
    ),
    "few": lambda: (jadam.adam(1e-3), {"few": matrix(4, 8)}),
}


def trained(name, steps, donate=True, at=lambda step, params: None):
    """Bytes of parameters and state after ``steps`` steps; calls ``at(step, params)`` before each."""
    tx, params = TRAINED[name]()
    state = tx.init(params)

    def train(params, state):
        grads = jax.tree.map(lambda p: p - p[:, :1], params)
        return jadam.step(tx, grads, state, params)

    train = jax.jit(train, donate_argnums=(0, 1) if donate else ())
    for step in range(steps):
        at(step, params)
        params, state = train(params, state)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((params, state))]


def resident_bytes():
    """Resident bytes of this process, after the allocator has returned its free memory.

    Free memory varies by some MB: it depends on how XLA's threads are scheduled.
    """
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_memory(name, *ends):
    """Prints, for each of ``ends``, the minimum of resident bytes over the 1,000 steps before it."""
    least = dict.fromkeys(ends, 2**63)

    def at(step, params):
        jax.block_until_ready(params)  # a varying number of queued steps would hold memory
        for end in ends:
            if end - 1000 <= step <= end and step % 20 == 0:
                least[end] = min(least[end], resident_bytes())

    trained(name, ends[-1] + 1, at=at)
    print(*least.values())


def data_loader(queue):
    """Work of a data loader, without JAX."""
    rng = np.random.default_rng(0)
    queue.put((rng.standard_normal((300, 300)) @ np.ones((300, 300))).sum())


def step_without_jax(scalars):
    """Calls the handler without JAX, on a leaf for several threads, in a pool that never starts one."""
    rng, n = np.random.default_rng(0), 2**18
    count = np.zeros(2, np.uint32)
    arrays = [rng.random(n, np.float32) for _ in range(4)]
    buffers = [handler.Buffer(x.ctypes.data, x.shape, str(x.dtype)) for x in (scalars, count, *arrays)]
    assert handler.call(buffers, buffers[3:], [0, 0, 0, 0, 0, 0, n, 0], pool=handler.Late()) is None
    return [x.tobytes() for x in arrays]


def train_with_forks(names):
    """Trains with forks between the steps; the bits must be those without forks."""
    warnings.filterwarnings("ignore", message=".*fork")  # both JAX and Python warn of forks
    scalars = scalars_row(random_hyperparams(np.random.default_rng(1)))[None]  # in the parent, as JAX computes it
    never = step_without_jax(scalars)
    codes, sums = [], []
    context = multiprocessing.get_context("fork")
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")

    def at(step, params):
        if step % 5 == 0:
            if sanitized:  # a thread in the sanitizer's allocator would leave its lock held in the child
                jax.block_until_ready(params)
                time.sleep(0.1)
            queue = context.SimpleQueue()
            child = context.Process(target=data_loader, args=(queue,))
            child.start()
            sums.append(queue.get())
            child.join()
            codes.append(child.exitcode)
            if (child := os.fork()) == 0:
                os._exit(0 if step_without_jax(scalars) == never else 1)
            codes.append(os.waitpid(child, 0)[1])

    for name in names:
        assert trained(name, 20, at=at) == trained(name, 20)
    assert len(set(sums)) == 1
    assert codes == [0] * 2 * 4 * len(names), codes
    print("forked")


def send_trained(queue, names):
    queue.put([trained(name, 20) for name in names])


def train_in_child(method, names):
    """Trains here, then in a child process; both must have the same bits."""
    here = [trained(name, 20) for name in names]
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=send_trained, args=(queue, names))
    child.start()
    assert queue.get() == here
    child.join()
    assert child.exitcode == 0
    print(method)


# -- a huge leaf -------------------------------------------------------------------------------------------------------


def step_huge_leaf():
    """Steps 2**31 + 4096 elements; compares three windows with small leaves at the same offsets, bit for bit."""
    tx, columns, rows = jadam.adam(1e-3, moments="int8"), 4096, 3
    whole = (2**31 // columns + 1, columns)
    tiny, empty = tx.init(jnp.zeros((rows, columns)))
    rng = np.random.default_rng(0)

    def random_state():
        codes = rng.integers(-127, 128, (rows, columns), np.int8), rng.integers(0, 256, (rows, columns), np.uint8)
        return codes + tuple(np.abs(rng.standard_normal((rows, columns // 128), np.float32)) for _ in range(2))

    starts = [0, whole[0] // 2, whole[0] - rows]  # the last one from 2**31 - 8192 on
    windows = [[*(random_floats(rng, (rows, columns), False) for _ in range(2)), *random_state()] for _ in starts]
    arrays = []
    for k, example in enumerate(windows[0]):
        width = example.shape[1]
        places = [(start * width, window[k]) for start, window in zip(starts, windows, strict=True)]
        arrays.append(handler.Sparse((whole[0], width), example.dtype, places))
    views = [x.window(0, x.shape[0] * x.shape[1]).reshape(x.shape) for x in arrays]
    g, p, *stored = map(jnp.from_dlpack, views)  # no copies
    names = ("mu", "nu", "mu_scale", "nu_scale")
    of = lambda stored: (tiny._replace(**dict(zip(names, stored, strict=True))), empty)
    p, (new, _) = jax.jit(functools.partial(jadam.step, tx))(g, of(stored), p)
    found = [np.asarray(x) for x in (p, *(getattr(new, name) for name in names))]
    for start, (g, p, *stored) in zip(starts, windows, strict=True):
        leaf_update = tx.update.leafwise(jnp.asarray(g), of(map(jnp.asarray, stored)), jnp.asarray(p)).leaf_updates[0]
        leaf_update = leaf_update._replace(shard=Shard(jnp.uint32(start * columns), whole))
        ((p, stored),) = cpu.run_kernel([leaf_update], [jnp.asarray(g)], [jnp.asarray(p)])
        for a, b in zip((p, *stored), found, strict=True):
            np.testing.assert_array_equal(a, b[start : start + rows])
    print("huge")


if __name__ == "__main__":
    faulthandler.enable()
    assert native_call.load()[0] is not None, native_call.load()[1]
    match sys.argv[1:]:
        case "fuzz", n, n_by_xla:
            print(json.dumps([fuzz_directly(0, int(n)), fuzz_by_xla(0, int(n_by_xla))]))
        case "call_directly", first, n:
            print(fuzz_directly(int(first), int(n)))
        case "fuzz_cuda", n:
            print(json.dumps(fuzz_emulated(0, int(n))))
        case "call_emulated", first, n:
            print(fuzz_emulated(int(first), int(n)))
        case "call_by_xla", first, n:
            print(fuzz_by_xla(int(first), int(n)))
        case "memory", name, *ends:
            print_memory(name, *map(int, ends))
        case "forked", *names:
            train_with_forks(names)
        case ("huge",):
            step_huge_leaf()
        case method, *names:
            train_in_child(method, names)
