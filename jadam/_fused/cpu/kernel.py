"""The CPU's kernel: finds the extension built from ``cpu.cc``, and calls it on groups of leaves.

Taken are leaves whose gradient is float32 or bfloat16, whose parameter is float32 or bfloat16 with a remainder, and
whose moments are in one of the three formats (``mu_dtype`` is none), under a rule with a native name. XLA does the
others.
"""

import ctypes
import functools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jadam._moments.formats import FORMATS
from jadam._moments.int8 import block_of
from jadam._transformation.transformation import Job

EXTENSION = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"
LEAVES = 24  # a call; XLA's compile time grows with the square of a call's aliases


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
    library, settings, firsts, inputs, outputs, aliases = load(), [], [], [], [], {}
    for job, g, p, row in zip(jobs, grads, params, rows, strict=True):
        run, stride = (p.size, p.size) if job.part is None else job.part.runs(p.shape)
        firsts += [] if job.part is None else [job.part.first]
        settings.append(
            {
                "rule": library.rules.index(job.rule.native),
                "format": library.formats.index(job.format.name),
                "clipping": (job.bound is not None) + 2 * (job.norm is not None),
                "scalars": row,
                "salt": job.salt,
                "block": block_of(job.stored) if job.format.name == "int8" else 0,
                "run": run,
                "stride": stride,
            }
        )
        own = [p, *([] if job.remainder is None else [job.remainder]), *job.stored]
        inputs.append(g)
        for x in own:
            aliases[len(inputs) + 2] = len(outputs)
            inputs.append(x)
            outputs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    count = jobs[0].count.astype(jnp.uint32)
    count = jnp.stack([count, *firsts]) if firsts else jnp.pad(count[None], (0, len(jobs)))
    call = jax.ffi.ffi_call("jadam_step", outputs, input_output_aliases=aliases)
    attributes = {name: np.array([leaf[name] for leaf in settings], np.int64) for name in settings[0]}
    results = iter(call(scalars, count, *inputs, **attributes))
    for job in jobs:
        p, *stored = (next(results) for _ in range(1 + (job.remainder is not None) + len(job.stored)))
        yield p, tuple(stored)


def _scalars_of(job: Job) -> tuple[int, ...]:
    """Equal for jobs with the same scalars."""
    return tuple(map(id, (job.step, job.minus_lr, job.weight_decay, job.bound, job.norm)))


def _row(job: Job) -> jax.Array:
    """The scalars of a job, in the library's order."""
    return jnp.stack([jnp.asarray(SCALARS[name](job)).astype(jnp.float32) for name in load().scalars])


# The scalars of a step by the names that rules.h has for them: what Python divides by, the kernel multiplies by.
SCALARS: dict[str, Callable[[Job], Any]] = {
    "b1": lambda job: job.step.b1.b,
    "one_minus_b1": lambda job: job.step.b1.one_minus_b,
    "correction1": lambda job: 1 / jnp.asarray(job.step.b1.correction),
    "b2": lambda job: job.step.b2.b,
    "one_minus_b2": lambda job: job.step.b2.one_minus_b,
    "correction2": lambda job: 1 / jnp.asarray(job.step.b2.correction),
    "root_correction2": lambda job: jnp.sqrt(1 / jnp.asarray(job.step.b2.correction)),
    "next": lambda job: job.step.momentum.next_b,
    "next_correction": lambda job: 1 / jnp.asarray(job.step.momentum.next_correction),
    "newest": lambda job: job.step.momentum.one_minus_b,
    "newest_correction": lambda job: 1 / jnp.asarray(job.step.momentum.correction),
    "eps": lambda job: job.step.eps,
    "eps_root": lambda job: job.step.eps_root,
    "trusted": lambda job: job.step.trusted,
    "rectification": lambda job: job.step.rectification,
    "minus_lr": lambda job: job.minus_lr,
    "weight_decay": lambda job: 0 if job.weight_decay is None else job.weight_decay,
    "bound": lambda job: 0 if job.bound is None else job.bound,
    "norm": lambda job: 1 if job.norm is None else job.norm,
    "max_norm": lambda job: 1 if job.max_norm is None else job.max_norm,
}

SOURCES = ("cpu/cpu.cc", "native/formats.h", "native/portable.h", "native/rules.h")  # below jadam/_fused


class Library(NamedTuple):
    """The extension: its instructions, or None; where it is or why there is none; and its names in their order."""

    instructions: str | None
    reason: str
    rules: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@functools.cache
def load() -> Library:
    """Register the extension.

    Looked for beside this file and in every ``jadam`` on the path: a clone's source folder hides the installed one.
    """
    here = Path(__file__).parent
    checksum = zlib.crc32(b"".join((here.parent / name).read_bytes() for name in SOURCES))
    stale = None
    for path in (folder / EXTENSION for folder in (here, *(Path(x) / "jadam" / "_fused" / "cpu" for x in sys.path))):
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return Library(None, f"{path} does not load: {error}")
        if library.jadam_source() % 2**32 != checksum:
            stale = path
            continue
        instructions, rules, scalars, formats = (
            _text(library, name) for name in ("instructions", "rules", "scalars", "formats")
        )
        if sorted(scalars) != sorted(SCALARS) or sorted(formats) != sorted(FORMATS):
            return Library(None, f"{path} has other scalars or formats than this version of jadam; reinstall jadam")
        jax.ffi.register_ffi_target("jadam_step", jax.ffi.pycapsule(library.jadam_step), platform="cpu")
        return Library(instructions[0], str(path), tuple(rules), tuple(scalars), tuple(formats))
    if stale is not None:
        return Library(None, f"{stale} was built from other sources; reinstall jadam")
    return Library(None, "no extension was built; install a C++17 compiler and reinstall jadam")


def _text(library, name: str) -> list[str]:
    """The words that a function of the library returns."""
    function = getattr(library, f"jadam_{name}")
    function.restype = ctypes.c_char_p
    return function().decode().split()
