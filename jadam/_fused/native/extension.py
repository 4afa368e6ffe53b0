"""Finds the extension built from ``cpu.cc`` and ``cuda.cc`` and registers its FFI handlers.

JAX calls `initialize` when it starts, because ``pyproject.toml`` names this module as an entry point ``jax_plugins``. A
process can then run a step that another one has compiled or exported. So this module imports little, opens no CUDA
library, and never raises.
"""

import ctypes
import functools
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import jax.ffi

EXTENSION = "_native.dll" if sys.platform == "win32" else "_native.so"
SOURCES = (  # below jadam/_fused
    *("cpu/cpu.cc", "cuda/cuda.cc", "cuda/table.h"),
    *("native/formats.h", "native/leaves.h", "native/portable.h", "native/rules.h"),
)


class Library(NamedTuple):
    """The extension, and the order of its rules, scalars and formats."""

    instructions: str | None  # of the CPU kernel: its instruction set. None if the extension is not available
    reason: str  # its path, or why it is not available
    rules: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


# The type ``Resolve`` of cuda.cc: stream, variant, kernel, error, size of error.
RESOLVE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)


@RESOLVE
def _resolve(*arguments):
    """Load a CUDA kernel; the handler calls this when XLA initializes a program."""
    from jadam._fused.cuda import driver

    return driver.resolve_for_handler(*arguments)


@functools.cache
def load() -> Library:
    """Load the extension and register its FFI handlers.

    It is searched beside this file, then in every ``jadam`` on `sys.path`, because a clone's source folder hides the
    installed package.
    """
    here = Path(__file__).parent
    checksum = zlib.crc32(b"".join((here.parent / name).read_bytes() for name in SOURCES))
    stale = None
    for path in (folder / EXTENSION for folder in (here, *(Path(x) / "jadam" / "_fused" / "native" for x in sys.path))):
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
            tuple(_text(library, name)) for name in ("instructions", "rules", "scalars", "formats")
        )
        jax.ffi.register_ffi_target("jadam_step", jax.ffi.pycapsule(library.jadam_step), platform="cpu")
        library.jadam_cuda_set_resolve(_resolve)
        stages = {"initialize": library.jadam_cuda_initialize, "execute": library.jadam_cuda_step}
        handlers = {stage: jax.ffi.pycapsule(handler) for stage, handler in stages.items()}
        jax.ffi.register_ffi_target("jadam_step", handlers, platform="CUDA")
        return Library(instructions[0], str(path), rules, scalars, formats)
    if stale is not None:
        return Library(None, f"{stale} was built from other sources; reinstall jadam")
    return Library(None, "no extension was built; install a C++17 compiler and reinstall jadam")


def _text(library, name: str) -> list[str]:
    """The words in the string that ``jadam_{name}`` of the extension returns."""
    function = getattr(library, f"jadam_{name}")
    function.restype = ctypes.c_char_p
    return function().decode().split()


def initialize() -> None:
    """Register the handlers. For JAX."""
    load()
