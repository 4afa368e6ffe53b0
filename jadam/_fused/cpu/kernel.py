"""The CPU's kernel: finds the extension built from ``cpu.cc``, and calls it on groups of leaves.

Taken are leaves whose gradient is float32 or bfloat16, whose parameter is float32 or bfloat16 with a remainder, and
whose moments are in one of the three formats (``mu_dtype`` is none), under a rule with a native name. XLA does the
others.
"""

import ctypes
import functools
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jadam._moments.int8 import block_of
from jadam._transformation.transformation import Job

EXTENSION = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"
LEAVES = 24  # a call; XLA's compile time grows with the square of a call's aliases
SCALARS = 20  # in a row of `_row`
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}


def kernel(jobs: list[Job], grads, params) -> list[tuple | None]:
    """The new parameter and what is stored, for each leaf that `refuses` does not."""
    done: list = [None] * len(jobs)
    taken = [i for i, x in enumerate(zip(jobs, grads, params, strict=True)) if refuses(*x) is None]
    if not taken:
        return done
    distinct: dict = {}  # rows of scalars, which most leaves share
    rows = {i: distinct.setdefault(_scalars_of(jobs[i]), (len(distinct), jobs[i]))[0] for i in taken}
    scalars = jnp.stack([_row(job) for _, job in distinct.values()])
    for start in range(0, len(taken), LEAVES):
        group = taken[start : start + LEAVES]
        columns = ([column[i] for i in group] for column in (jobs, grads, params, rows))
        for i, result in zip(group, _call(scalars, *columns), strict=True):
            done[i] = result
    return done


def refuses(job: Job, g, p) -> str | None:
    """Why the kernel cannot take a leaf, or None."""
    if job.rule.native is None:
        return f"no kernel for {job.rule}"
    if job.dtype != np.float32:
        return f"{job.dtype} is XLA's"
    if g.dtype not in (jnp.float32, jnp.bfloat16):
        return f"gradients in {g.dtype} are XLA's"
    if p.dtype != jnp.float32 and job.remainder is None:
        return f"{p.dtype} without jadam.exact_bf16 is XLA's"
    if job.format.name == "float32" and any(x.dtype != jnp.float32 for x in job.stored):
        return "mu_dtype is XLA's"
    if not p.size:
        return "no elements"
    if job.part is not None and job.part.runs(p.shape) is None:
        return "divided along several inner axes"
    return None


def _call(scalars, jobs, grads, params, rows):
    """One call for a group of leaves, each with its row of ``scalars``."""
    rules, settings, firsts, inputs, outputs, aliases = load().rules, [], [], [], [], {}
    for job, g, p, row in zip(jobs, grads, params, rows, strict=True):
        limit = (job.bound is not None) + 2 * (job.norm is not None)
        block = block_of(job.stored) if job.format.name == "int8" else 0
        run, stride = (p.size, p.size) if job.part is None else job.part.runs(p.shape)
        firsts += [] if job.part is None else [job.part.first]
        settings += [rules.index(job.rule.native), FORMATS[job.format.name], limit, row, job.salt, block, run, stride]
        own = [p, *([] if job.remainder is None else [job.remainder]), *job.stored]
        inputs.append(g)
        for x in own:
            aliases[len(inputs) + 2] = len(outputs)
            inputs.append(x)
            outputs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    count = jobs[0].count.astype(jnp.uint32)
    count = jnp.stack([count, *firsts]) if firsts else jnp.pad(count[None], (0, len(jobs)))
    call = jax.ffi.ffi_call("jadam_step", outputs, input_output_aliases=aliases)
    results = iter(call(scalars, count, *inputs, leaves=np.array(settings, np.int64)))
    for job in jobs:
        p, *stored = (next(results) for _ in range(1 + (job.remainder is not None) + len(job.stored)))
        yield p, tuple(stored)


def _scalars_of(job: Job) -> tuple[int, ...]:
    """Equal for jobs with the same scalars."""
    return tuple(map(id, (job.step, job.minus_lr, job.weight_decay, job.bound, job.norm)))


def _row(job: Job) -> jax.Array:
    """``struct Scalars`` of ``cpu.cc``."""
    step = job.step
    look = step.momentum
    over = lambda x: 1 / jnp.asarray(x)
    values = [
        *(step.b1.b, step.b1.one_minus_b, over(step.b1.correction)),
        *(step.b2.b, step.b2.one_minus_b, over(step.b2.correction), jnp.sqrt(over(step.b2.correction))),
        *(look.next_b, over(look.next_correction), look.one_minus_b, over(look.correction)),
        *(step.eps, step.eps_root, step.trusted, step.rectification),
        *(job.minus_lr, 0 if job.weight_decay is None else job.weight_decay),
        *(0 if job.bound is None else job.bound, 1 if job.norm is None else job.norm),
        1 if job.max_norm is None else job.max_norm,
    ]
    return jnp.stack([jnp.asarray(x).astype(jnp.float32) for x in values])


class Library(NamedTuple):
    """The extension: the instructions it uses, or None, where it is or why there is none, and the rules it has."""

    instructions: str | None
    reason: str
    rules: tuple[str, ...] = ()


@functools.cache
def load() -> Library:
    """Register the extension.

    Looked for beside this file and in every ``jadam`` on the path: a clone's source folder hides the installed one.
    """
    here = Path(__file__).parent
    source = here / "cpu.cc"
    folders = [here, *(Path(entry) / "jadam" / "_fused" / "cpu" for entry in sys.path)]
    stale = None
    for path in (folder / EXTENSION for folder in folders):
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return Library(None, f"{path} does not load: {error}")
        if library.jadam_source() % 2**32 != zlib.crc32(source.read_bytes()):
            stale = path
            continue
        library.jadam_instructions.restype = library.jadam_rules.restype = ctypes.c_char_p
        jax.ffi.register_ffi_target("jadam_step", jax.ffi.pycapsule(library.jadam_step), platform="cpu")
        rules = library.jadam_rules().decode().split()
        return Library(library.jadam_instructions().decode(), str(path), tuple(rules))
    if stale is not None:
        return Library(None, f"{stale} was built from another version of cpu.cc; reinstall jadam")
    return Library(None, "no extension was built; install a C++17 compiler and reinstall jadam")
