"""Compiles ``kernel.cu`` with NVRTC, NVIDIA's compiler as a library, and keeps the machine code in the user's cache.

``jax[cuda12]`` and ``jax[cuda13]`` install NVRTC. It needs no GPU. Importing this module opens no library.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jadam
from jadam._core.files import atomic_replace

FUSED = Path(__file__).parent.parent
SOURCES = ("cuda/kernel.cu", "cuda/table.h", "native/portable.h", "native/formats.h", "native/rules.h")  # below FUSED
SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12")  # as the system's loader finds them
TOOLKITS = (sys.prefix, "/usr/local/cuda")  # besides $CUDA_HOME and $CUDA_PATH; a conda environment is one
OLDEST = 70  # sm_70, Volta
TEGRA = (72, 87, 101, 110)  # GPUs on one chip with a CPU. They share no machine code with other architectures.
INT8 = 2
# Instructions bound the int8 kernel, not memory, and its 8-bit codes are coarser than the fast functions' errors.
INT8_OPTIONS = ("-use_fast_math",)
LAST_OF_12 = 12, 9
LOG_LINES = 3

log = logging.getLogger("jadam")


class Unavailable(Exception):
    """The reason why the CUDA kernel cannot be used, and what to install."""


class Variant(NamedTuple):
    """One compiled kernel: the numbers of its rule and format, and whether weights and gradients are bfloat16."""

    rule: int
    format: int
    bfloat16_weights: int
    bfloat16_gradients: int

    @property
    def name(self) -> str:
        """The kernel's name in the machine code."""
        return "_".join(("jadam", *map(str, self)))

    @property
    def defines(self) -> tuple[str, ...]:
        """The macros that select this variant in ``kernel.cu``."""
        return tuple(f"-DJADAM_{name.upper()}={value}" for name, value in self._asdict().items())


class Nvrtc(NamedTuple):
    """A loaded NVRTC."""

    library: ctypes.CDLL
    version: tuple[int, int]
    path: str

    def __str__(self):
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"


# -- the library -------------------------------------------------------------------------------------------------------


def find(driver_version: int | None = None) -> Nvrtc:
    """Return the newest NVRTC whose major version the driver supports.

    Args:
        driver_version: 12080 for a driver that supports CUDA 12.8. None: any version will do.

    Raises:
        Unavailable: there is none.
    """
    found, failed = installed(_major(driver_version))
    if found:
        return found[0]
    raise Unavailable(f"{failed or 'NVRTC, which compiles the kernel, is not installed'}: {_remedy(driver_version)}")


def choose(capability: tuple[int, int], driver_version: int | None = None) -> tuple[Nvrtc, str]:
    """Return the newest NVRTC that `find` may return and that compiles for the GPU, and the architecture.

    Raises:
        Unavailable: there is none. The reason is that of the newest.
    """
    newest = find(driver_version)
    for nvrtc in installed(_major(driver_version))[0]:
        with contextlib.suppress(Unavailable):
            return nvrtc, architecture(nvrtc, capability)
    return newest, architecture(newest, capability)


def architecture(nvrtc: Nvrtc, capability: tuple[int, int]) -> str:
    """Return the architecture to compile for: ``sm_90`` for a GPU of compute capability ``(9, 0)``.

    Machine code runs on GPUs of the same major and the same or a higher minor compute capability.

    Raises:
        Unavailable: the GPU is too old for the kernel, or NVRTC knows no architecture of the same major version.
    """
    major, minor = capability
    wanted = 10 * major + minor
    if wanted < OLDEST:
        raise Unavailable(f"the GPU's compute capability is {major}.{minor}, and the CUDA kernel needs 7.0 or newer")
    known = _architectures(nvrtc)
    fitting = [x for x in known if x == wanted or (x // 10 == major and x < wanted and not {x, wanted} & {*TEGRA})]
    if fitting:
        return f"sm_{max(fitting)}"
    package = "nvidia-cuda-nvrtc-cu12" if wanted < min(known) else "--upgrade nvidia-cuda-nvrtc"
    if nvrtc.version < LAST_OF_12:  # that of CUDA 13 may need a newer driver
        package = "--upgrade nvidia-cuda-nvrtc-cu12"
    raise Unavailable(
        f"{nvrtc} compiles for compute capabilities from {min(known) / 10} to {max(known) / 10}, but not for a GPU's "
        f"{major}.{minor}: pip install {package}"
    )


@functools.cache
def installed(newest_major: int | None) -> tuple[tuple[Nvrtc, ...], str]:
    """Every NVRTC up to a major version, newest first, and why another cannot be used, or ""."""
    found, failed = [], ""
    for path in dict.fromkeys(_candidates()):
        major = int(path.rpartition(".")[2])
        if newest_major is not None and major > newest_major:
            if Path(path).is_file():
                failed = failed or f"{path} needs a driver of CUDA {major}, and this one is of CUDA {newest_major}"
            continue
        try:
            found.append(_open(path))
        except (OSError, AttributeError, Unavailable) as error:
            if Path(path).is_file():
                failed = failed or f"{path} does not load ({error})"
    unique = {x.version: x for x in reversed(found)}  # the loader may find one that was found in a wheel
    return tuple(sorted(unique.values(), key=lambda x: x.version, reverse=True)), failed


def _candidates() -> Iterator[str]:
    """Paths where NVRTC may be: in the wheels, where the system's loader looks, in a toolkit."""
    for folder in sys.path:
        yield from map(str, sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.[0-9][0-9]")))
    yield from SONAMES
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *TOOLKITS):
        for library in ("lib64", "lib") if folder else ():
            yield from map(str, sorted(Path(str(folder), library).glob("libnvrtc.so.[0-9][0-9]")))


def _open(path: str) -> Nvrtc:
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc = Nvrtc(library, (int(path.rpartition(".")[2]), 0), path)
    _call(nvrtc, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    with contextlib.suppress(OSError):  # NVRTC 13.0 from a wheel does not find it
        ctypes.CDLL(str(Path(path).with_name(f"libnvrtc-builtins.so.{major.value}.{minor.value}")))
    return Nvrtc(library, (major.value, minor.value), path)


def _call(nvrtc: Nvrtc, name: str, *arguments) -> None:
    """Call a function of NVRTC. Raises `Unavailable` with NVRTC's text for an error."""
    error = getattr(nvrtc.library, name)(*arguments)
    if error:
        raise Unavailable(f"{name} of {nvrtc} failed: {nvrtc.library.nvrtcGetErrorString(error).decode()}")


def _architectures(nvrtc: Nvrtc) -> list[int]:
    count = ctypes.c_int()
    _call(nvrtc, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call(nvrtc, "nvrtcGetSupportedArchs", numbers)
    return list(numbers)


def _major(driver_version: int | None) -> int | None:
    return None if driver_version is None else driver_version // 1000


def _remedy(driver_version: int | None) -> str:
    """What to install for the driver."""
    if driver_version is None:
        return (
            "pip install nvidia-cuda-nvrtc-cu12 (for CUDA 12) or nvidia-cuda-nvrtc (for CUDA 13), "
            "or reinstall jax[cuda12] or jax[cuda13]"
        )
    if driver_version < 13000:
        return "pip install nvidia-cuda-nvrtc-cu12, or reinstall jax[cuda12]"
    return "pip install nvidia-cuda-nvrtc, or reinstall jax[cuda13]"


# -- compilation -------------------------------------------------------------------------------------------------------


def options(variant: Variant, architecture: str) -> tuple[str, ...]:
    """Return NVRTC's options for a variant on an architecture such as ``sm_90``."""
    return (
        "-std=c++17",
        f"-arch={architecture}",
        "-modify-stack-limit=false",  # NVRTC would change the limit of the whole process
        *variant.defines,
        *(INT8_OPTIONS if variant.format == INT8 else ()),
    )


def compile_kernel(nvrtc: Nvrtc, variant: Variant, architecture: str) -> bytes:
    """Return the machine code of a variant, a cubin.

    Raises:
        Unavailable: it does not compile. The text has the first lines of NVRTC's log.
    """
    return compile_source(nvrtc, options(variant, architecture))[0]


def compile_source(nvrtc: Nvrtc, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compile ``kernel.cu``. Return the cubin and the log; with ``--ptxas-options=-v`` it has registers and spills.

    Raises:
        Unavailable: it does not compile. The text has the first lines of NVRTC's log.
    """
    names = [os.path.basename(name).encode() for name in SOURCES]  # `#include "rules.h"` has no folder
    source, *headers = _sources()
    program = ctypes.c_void_p()
    arguments = len(headers), _strings(headers), _strings(names[1:])
    _call(nvrtc, "nvrtcCreateProgram", ctypes.byref(program), source, names[0], *arguments)
    try:
        encoded = _strings([x.encode() for x in options])
        error = nvrtc.library.nvrtcCompileProgram(program, len(options), encoded)
        text = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if error:
            lines = [x.strip() for x in text.splitlines() if x.strip()][:LOG_LINES]
            lines = lines or [nvrtc.library.nvrtcGetErrorString(error).decode()]
            raise Unavailable(f"{nvrtc} does not compile kernel.cu with {' '.join(options)}: {' | '.join(lines)}")
        return _read(nvrtc, program, "CUBIN"), text
    finally:
        nvrtc.library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: Nvrtc, program: ctypes.c_void_p, what: str) -> bytes:
    """The log or the machine code of a program."""
    size = ctypes.c_size_t()
    _call(nvrtc, f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(nvrtc, f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _strings(values: list[bytes]) -> ctypes.Array:
    return (ctypes.c_char_p * len(values))(*values)


def _sources() -> list[bytes]:
    return [(FUSED / name).read_bytes() for name in SOURCES]


# -- cache -------------------------------------------------------------------------------------------------------------

_cubins: dict[tuple, bytes] = {}
_locks: dict[tuple, threading.Lock] = {}


def cubin(variant: Variant, capability: tuple[int, int], driver_version: int | None = None) -> bytes:
    """Return the machine code of a variant for a GPU: from this process, else from the user's cache, else compiled.

    Args:
        variant: the kernel.
        capability: the GPU's compute capability, such as ``(9, 0)``.
        driver_version: see `find`.

    Raises:
        Unavailable: NVRTC is missing, does not know the GPU, or fails.
    """
    nvrtc, architecture = choose(capability, driver_version)
    key = nvrtc.path, variant, architecture
    with _locks.setdefault(key, threading.Lock()):  # one thread compiles, others wait
        if key not in _cubins:
            _cubins[key] = _from_disk_or_compiled(nvrtc, variant, architecture)
        return _cubins[key]


def _from_disk_or_compiled(nvrtc: Nvrtc, variant: Variant, architecture: str) -> bytes:
    folder = cache_folder()
    if folder is None:
        return compile_kernel(nvrtc, variant, architecture)
    key = (_sources(), options(variant, architecture), nvrtc.version, jadam.__version__)
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.cubin"
    code = _load(path)
    if code is None:
        code = compile_kernel(nvrtc, variant, architecture)
        _save(path, code)
    return code


def cache_folder() -> Path | None:
    """Return the folder of the compiled kernels, made if needed, or None if there can be none.

    It is ``$XDG_CACHE_HOME/jadam/cubin``, by default ``~/.cache/jadam/cubin``. A folder that others may write to is not
    used: the GPU executes what it contains.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "jadam" / "cubin"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.debug("no cache of compiled kernels: %s", error)
        return None
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.debug("no cache of compiled kernels: others may write to %s", folder)
        return None
    return folder


def _load(path: Path) -> bytes | None:
    """The contents of a cache file, or None if it is missing or damaged."""
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    checksum, code = contents[:32], contents[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _save(path: Path, code: bytes) -> None:
    """Write a cache file, if that is possible."""
    try:
        with atomic_replace(path) as scratch:
            scratch.write_bytes(hashlib.sha256(code).digest() + code)
    except OSError as error:
        log.debug("no cache of compiled kernels: %s", error)
