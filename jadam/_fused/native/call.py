"""Calls the extension on groups of leaves. The CPU kernel and the CUDA kernel take the same arguments.

`unsupported_reason` lists what the kernels support. XLA does the other leaves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._fused.native import extension
from jadam._fused.native.extension import Library
from jadam._moments.formats import FORMATS
from jadam._transformation.transformation import LeafUpdate


def update_leaves(
    leaf_updates: list[LeafUpdate], grads, params, supported: list[int], leaves_per_call: int, unused_rows=None
) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf in ``supported``, and None for the others.

    ``unused_rows``, if given, are appended to the rows of scalars.
    """
    results: list = [None] * len(leaf_updates)
    if not supported:
        return results
    key = lambda leaf: tuple(id(getattr(leaf, x)) for x in ("hyperparams", "minus_lr", "weight_decay", "bound", "norm"))
    distinct: dict = {}  # most leaves share their scalars
    rows = {i: distinct.setdefault(key(leaf_updates[i]), (len(distinct), leaf_updates[i]))[0] for i in supported}
    scalars = jnp.stack([_scalar_row(leaf_update) for _, leaf_update in distinct.values()])
    scalars = scalars if unused_rows is None else jnp.concatenate([scalars, unused_rows])
    for start in range(0, len(supported), leaves_per_call):
        group = supported[start : start + leaves_per_call]
        columns = ([column[i] for i in group] for column in (leaf_updates, grads, params, rows))
        for i, result in zip(group, _call(scalars, *columns), strict=True):
            results[i] = result
    return results


def unsupported_reason(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the kernels do not support a leaf, or None."""
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
    return None


def _call(scalars, leaf_updates, grads, params, rows):
    """Call the extension on a group of leaves; ``rows`` are the leaves' rows of ``scalars``."""
    library, settings, digits, offsets, inputs, outputs, aliases = load(), [], [], [], [], [], {}
    for leaf_update, g, p, row in zip(leaf_updates, grads, params, rows, strict=True):
        (run, _), *outer = [(p.size, 1)] if leaf_update.shard is None else leaf_update.shard.strides(p.shape)
        digits += outer
        offsets += [] if leaf_update.shard is None else [leaf_update.shard.offset]
        settings.append(
            {
                "rule": library.rules.index(leaf_update.rule.native),
                "format": library.formats.index(leaf_update.format.name),
                "clipping": (leaf_update.bound is not None) + 2 * (leaf_update.norm is not None),
                "scalars": row,
                "salt": leaf_update.salt,
                "block": leaf_update.block or 0,
                "run": run,
                "digits": len(outer),
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
    attributes["digit_sizes"] = np.array([size for size, _ in digits], np.int64)
    attributes["digit_strides"] = np.array([stride for _, stride in digits], np.int64)
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


@functools.cache
def load() -> Library:
    """The extension, if its scalars and formats are those of this version."""
    library = extension.load()
    if library.instructions is None:
        return library
    if sorted(library.scalars) != sorted(SCALARS) or sorted(library.formats) != sorted(FORMATS):
        return Library(
            None, f"{library.reason} has other scalars or formats than this version of jadam; reinstall jadam"
        )
    return library
