"""The CPU kernel: loads the extension built from ``cpu.cc`` and calls it on groups of leaves.

`unsupported_reason` lists what the kernel supports. XLA does the other leaves.
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
from jadam._moments.int8 import block_length
from jadam._transformation.transformation import LeafUpdate

EXTENSION = "_cpu.dll" if sys.platform == "win32" else "_cpu.so"
LEAVES_PER_CALL = 24  # XLA's compile time grows with the square of a call's aliases


def run_kernel(leaf_updates: list[LeafUpdate], grads, params) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where the kernel does not support it."""
    results: list = [None] * len(leaf_updates)
    supported = [i for i, x in enumerate(zip(leaf_updates, grads, params, strict=True)) if not unsupported_reason(*x)]
    if not supported:
        return results
    key = lambda leaf: tuple(id(getattr(leaf, x)) for x in ("hyperparams", "minus_lr", "weight_decay", "bound", "norm"))
    distinct: dict = {}  # most leaves share their scalars
    rows = {i: distinct.setdefault(key(leaf_updates[i]), (len(distinct), leaf_updates[i]))[0] for i in supported}
    scalars = jnp.stack([_scalar_row(leaf_update) for _, leaf_update in distinct.values()])
    for start in range(0, len(supported), LEAVES_PER_CALL):
        group = supported[start : start + LEAVES_PER_CALL]
        columns = ([column[i] for i in group] for column in (leaf_updates, grads, params, rows))
        for i, result in zip(group, _call(scalars, *columns), strict=True):
            results[i] = result
    return results


def unsupported_reason(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the kernel does not support a leaf, or None."""
    if leaf_update.rule.native is None:
        return f"no kernel for {leaf_update.rule}"
    if leaf_update.dtype != np.float32:
        return f"no kernel for {leaf_update.dtype}"
    if g.dtype not in (jnp.float32, jnp.bfloat16):
        return f"no kernel for {g.dtype} gradients"
    if p.dtype != jnp.float32 and leaf_update.remainder is None:
        return f"no kernel for {p.dtype} parameters{' without jadam.exact_bf16' * (p.dtype == jnp.bfloat16)}"
    if leaf_update.format.name == "float32" and any(x.dtype != jnp.float32 for x in leaf_update.stored):
        return "no kernel for mu_dtype"
    if not p.size:
        return "no elements"
    if leaf_update.shard is not None and leaf_update.shard.strided_runs(p.shape) is None:
        return "sharded along several inner axes"
    return None


def _call(scalars, leaf_updates, grads, params, rows):
    """Call the extension on a group of leaves; ``rows`` are the leaves' rows of ``scalars``."""
    library, settings, offsets, inputs, outputs, aliases = load(), [], [], [], [], {}
    for leaf_update, g, p, row in zip(leaf_updates, grads, params, rows, strict=True):
        run, stride = (p.size, p.size) if leaf_update.shard is None else leaf_update.shard.strided_runs(p.shape)
        offsets += [] if leaf_update.shard is None else [leaf_update.shard.offset]
        settings.append(
            {
                "rule": library.rules.index(leaf_update.rule.native),
                "format": library.formats.index(leaf_update.format.name),
                "clipping": (leaf_update.bound is not None) + 2 * (leaf_update.norm is not None),
                "scalars": row,
                "salt": leaf_update.salt,
                "block": block_length(leaf_update.stored) if leaf_update.format.name == "int8" else 0,
                "run": run,
                "stride": stride,
            }
        )
        replaced = [p, *([] if leaf_update.remainder is None else [leaf_update.remainder]), *leaf_update.stored]
        inputs.append(g)
        for x in replaced:
            aliases[len(inputs) + 2] = len(outputs)  # after scalars and count_and_offsets
            inputs.append(x)
            outputs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    count = leaf_updates[0].count.astype(jnp.uint32)
    count_and_offsets = jnp.stack([count, *offsets]) if offsets else jnp.pad(count[None], (0, len(leaf_updates)))
    call = jax.ffi.ffi_call("jadam_step", outputs, input_output_aliases=aliases)
    attributes = {name: np.array([leaf[name] for leaf in settings], np.int64) for name in settings[0]}
    results = iter(call(scalars, count_and_offsets, *inputs, **attributes))
    for leaf_update in leaf_updates:
        p, *stored = (next(results) for _ in range(1 + (leaf_update.remainder is not None) + len(leaf_update.stored)))
        yield p, tuple(stored)


def _scalar_row(leaf_update: LeafUpdate) -> jax.Array:
    """A leaf's scalars, in the extension's order."""
    return jnp.stack([jnp.asarray(SCALARS[name](leaf_update)).astype(jnp.float32) for name in load().scalars])


# A leaf's scalars by their names in rules.h. The kernel multiplies by reciprocals where Python divides.
SCALARS: dict[str, Callable[[LeafUpdate], Any]] = {
    "b1": lambda leaf_update: leaf_update.hyperparams.b1.b,
    "one_minus_b1": lambda leaf_update: leaf_update.hyperparams.b1.one_minus_b,
    "inverse_correction1": lambda leaf_update: 1 / jnp.asarray(leaf_update.hyperparams.b1.correction),
    "b2": lambda leaf_update: leaf_update.hyperparams.b2.b,
    "one_minus_b2": lambda leaf_update: leaf_update.hyperparams.b2.one_minus_b,
    "inverse_correction2": lambda leaf_update: 1 / jnp.asarray(leaf_update.hyperparams.b2.correction),
    "inverse_sqrt_correction2": lambda leaf_update: jnp.sqrt(1 / jnp.asarray(leaf_update.hyperparams.b2.correction)),
    "next_momentum": lambda leaf_update: leaf_update.hyperparams.momentum.next_b,
    "inverse_next_momentum_correction": lambda leaf_update: (
        1 / jnp.asarray(leaf_update.hyperparams.momentum.next_correction)
    ),
    "one_minus_momentum": lambda leaf_update: leaf_update.hyperparams.momentum.one_minus_b,
    "inverse_momentum_correction": lambda leaf_update: 1 / jnp.asarray(leaf_update.hyperparams.momentum.correction),
    "eps": lambda leaf_update: leaf_update.hyperparams.eps,
    "eps_root": lambda leaf_update: leaf_update.hyperparams.eps_root,
    "trusted": lambda leaf_update: leaf_update.hyperparams.trusted,
    "rectification": lambda leaf_update: leaf_update.hyperparams.rectification,
    "minus_lr": lambda leaf_update: leaf_update.minus_lr,
    "weight_decay": lambda leaf_update: 0 if leaf_update.weight_decay is None else leaf_update.weight_decay,
    "bound": lambda leaf_update: 0 if leaf_update.bound is None else leaf_update.bound,
    "norm": lambda leaf_update: 1 if leaf_update.norm is None else leaf_update.norm,
    "max_norm": lambda leaf_update: 1 if leaf_update.max_norm is None else leaf_update.max_norm,
}

SOURCES = ("cpu/cpu.cc", "native/formats.h", "native/portable.h", "native/rules.h")  # below jadam/_fused


class Library(NamedTuple):
    """The extension, and the order of its rules, scalars and formats."""

    instructions: str | None  # the instruction set it uses, None if it is not available
    reason: str  # its path, or why it is not available
    rules: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@functools.cache
def load() -> Library:
    """Load the extension and register its FFI handler.

    It is searched beside this file, then in every ``jadam`` on `sys.path`, because a clone's source folder hides the
    installed package.
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
    """The words in the string that ``jadam_{name}`` of the extension returns."""
    function = getattr(library, f"jadam_{name}")
    function.restype = ctypes.c_char_p
    return function().decode().split()
