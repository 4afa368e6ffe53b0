"""The machine that makes the golden files, saved states, and public names."""

import inspect
import platform
from pathlib import Path

import jax
import jaxlib
import ml_dtypes
import numpy as np

import jadam

SUBMODULES = ("sharding", "flax", "torch_state")


def here() -> dict[str, str]:
    """What a step's bits depend on: processor, the kernel's instruction set, and jaxlib, which computes the scalars."""
    kernel = jadam.backends()["cpu"].kernel
    return {"processor": _processor(), "instructions": kernel or "XLA", "jaxlib": jaxlib.__version__}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    rows = dict(x.split(":", 1) for x in info.read_text().splitlines() if ":" in x) if info.is_file() else {}
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    fields = ("vendor_id", "cpu family", "model", "stepping", "model name")
    return " ".join(rows[x] for x in fields if x in rows) or platform.processor() or platform.machine()


def named(state) -> dict[str, np.ndarray]:
    """``{path: array}`` for `numpy.savez`; bfloat16 as uint16 bits."""
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {path: x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x for path, x in arrays.items()}


def unnamed(arrays, like):
    """Inverse of `named`, for a state like ``like``."""

    def one(path, x):
        found = arrays[jax.tree_util.keystr(path)]
        return found.view(x.dtype) if x.dtype == ml_dtypes.bfloat16 else found

    return jax.tree_util.tree_map_with_path(one, like)


def public_names() -> dict[str, list[str] | None]:
    """``{public name: argument names}``, with None for what is not callable."""
    import jadam.flax
    import jadam.torch_state

    found = {}
    for module in (jadam, *(getattr(jadam, name) for name in SUBMODULES)):
        own = lambda x, module=module: module is jadam or getattr(x, "__module__", "") == module.__name__
        for name in sorted(dir(module)):
            value = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(value) or not own(value):
                continue
            found[f"{module.__name__}.{name}"] = list(inspect.signature(value).parameters) if callable(value) else None
    return found
