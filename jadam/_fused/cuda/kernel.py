"""The CUDA kernel of ``kernel.cu``: which leaves it updates, and on which machines."""

import functools

import jax

from jadam._fused.backends import Backend, backends, platform_of
from jadam._fused.native import call
from jadam._transformation.transformation import LeafUpdate

LEAVES_PER_CALL = 32  # the most that one launch updates
# XLA updates leaves of at least this many elements, except int8 ones. On an H200 a float32 leaf of 2**27 elements took
# XLA 0.913 ms and a prototype of the kernel 0.958 ms. GPT-2 small, with leaves up to 2**25.2, took 1.25 and 1.04 ms.
XLA_SIZE = 2**26


def run_kernel(leaf_updates: list[LeafUpdate], grads, params) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where XLA does it."""
    columns = leaf_updates, grads, params
    rows = enumerate(zip(*columns, strict=True))
    supported = [i for i, x in rows if not _is_faster_by_xla(*x) and not _beyond_limits(*x)]
    return call.update_leaves(*columns, supported, LEAVES_PER_CALL)


def unsupported_reason(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the kernel does not support a leaf, or None."""
    if (backend := backends()["cuda"]).kernel is None:
        return backend.reason
    return _beyond_limits(leaf_update, g, p)


def _beyond_limits(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the kernel does not support a leaf, or None, where the kernel is available."""
    if leaf_update.shard is not None and p.size >= 2**32:
        return "shards of 2**32 elements or more"
    return call.unsupported_reason(leaf_update, g, p)


def why_several_passes(leaf_update: LeafUpdate, g, p) -> str | None:
    """Return why the step takes more than one pass over a leaf, or None: XLA or the kernel does it in one."""
    return None if leaf_update.format.name != "int8" else unsupported_reason(leaf_update, g, p)


def _is_faster_by_xla(leaf_update: LeafUpdate, g, p) -> bool:
    """Whether XLA is faster than the kernel, see `XLA_SIZE`."""
    return leaf_update.format.name != "int8" and p.size >= XLA_SIZE


def backend() -> Backend:
    """The kernel, or the reason why XLA does the step."""
    library = call.load()
    if library.instructions is None:
        return Backend(None, library.reason)
    capabilities = _compute_capabilities()
    if not capabilities:
        return Backend("FFI, NVRTC", "this process has no NVIDIA GPU; compiled where the program runs")
    return _backend_of(capabilities)


@functools.cache
def _backend_of(capabilities) -> Backend:
    """The kernel for GPUs of these compute capabilities, or the reason why XLA does the step."""
    from jadam._fused.cuda import driver, nvrtc

    reason = driver.why_not(capabilities)
    return Backend(None, reason) if reason else Backend("FFI, NVRTC", str(nvrtc.find(driver.version())))


def _compute_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capabilities of this process's NVIDIA GPUs; empty without one."""
    try:
        devices = [x for x in jax.local_devices(backend="gpu") if platform_of(x) == "cuda"]
    except RuntimeError:  # JAX has no such backend here
        return ()
    found = (map(int, x.compute_capability.split(".")) for x in devices)
    return tuple(sorted({(major, minor) for major, minor in found}))
