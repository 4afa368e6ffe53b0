"""Loads kernels through the CUDA driver, for the handler in ``cuda.cc``.

Importing this module opens no library.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterable, Iterator

from jadam._fused.cuda import nvrtc
from jadam._fused.cuda.nvrtc import Unavailable, Variant

LIBRARY = "libcuda.so.1"  # JAX has no CUDA on Windows and macOS
OLDEST = 12000  # CUDA 12.0, the first with cuLibraryLoadData
COMPUTE_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NUM_REGS = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS


def why_not(capabilities: Iterable[tuple[int, int]]) -> str | None:
    """Return why the CUDA kernel cannot run on GPUs of these compute capabilities, or None if it can."""
    try:
        nvrtc.find(version())
        for capability in capabilities:
            nvrtc.choose(capability, version())
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def version() -> int:
    """Return the newest CUDA that the driver supports, 12080 for 12.8.

    Raises:
        Unavailable: there is no driver, or it is older than the kernel needs.
    """
    number = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(number))
    if number.value < OLDEST:
        major, minor = number.value // 1000, number.value % 1000 // 10
        raise Unavailable(f"the NVIDIA driver supports CUDA {major}.{minor}, and the CUDA kernel needs 12.0: update it")
    return number.value


def resolve(stream: int | None, variant: Variant) -> tuple[int, int, int]:
    """Load a kernel into the context of a stream, completely: a launch may be captured, and a capture cannot load.

    Args:
        stream: a CUstream; the null stream's context is the current one.
        variant: the kernel.

    Returns:
        The CUkernel, and the addresses of cuLaunchKernel and cuMemcpyDtoDAsync_v2.

    Raises:
        Unavailable: the driver or NVRTC is missing or fails.
    """
    with _context_of(stream):
        kernel = _kernel(variant, _capability())
        function = ctypes.c_void_p()
        _call("cuKernelGetFunction", ctypes.byref(function), kernel)
        if hasattr(_library(), "cuFuncLoad"):  # from CUDA 12.4 on
            _call("cuFuncLoad", function)
        else:
            _call("cuFuncGetAttribute", ctypes.byref(ctypes.c_int()), NUM_REGS, function)
    return kernel.value or 0, _address("cuLaunchKernel"), _address("cuMemcpyDtoDAsync_v2")


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise Unavailable(f"the NVIDIA driver does not load ({error}): install it") from None


def _function(name: str):
    try:
        return getattr(_library(), name)
    except AttributeError:
        raise Unavailable(f"the NVIDIA driver has no {name}: update it") from None


def _address(name: str) -> int:
    return ctypes.cast(_function(name), ctypes.c_void_p).value or 0


def _call(name: str, *arguments) -> None:
    """Call a function of the driver. Raises `Unavailable` with the driver's text for an error."""
    error = _function(name)(*arguments)
    if error:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(text))
        raise Unavailable(f"{name} failed: {(text.value or b'unknown error').decode()} (CUresult {error})")


@contextlib.contextmanager
def _context_of(stream: int | None) -> Iterator[None]:
    """Make the context of a stream current."""
    context = ctypes.c_void_p()
    _call("cuStreamGetCtx", ctypes.c_void_p(stream), ctypes.byref(context))
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(context))


def _capability() -> tuple[int, int]:
    """The compute capability of the current context's device."""
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    _call("cuCtxGetDevice", ctypes.byref(device))
    for number, attribute in zip(numbers, COMPUTE_CAPABILITY, strict=True):
        _call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
    return numbers[0].value, numbers[1].value


_kernels: dict[tuple[Variant, str], tuple[ctypes.c_void_p, bytes]] = {}
_lock = threading.Lock()


def _kernel(variant: Variant, capability: tuple[int, int]) -> ctypes.c_void_p:
    """The CUkernel of a variant. It is valid in the contexts of all devices with this architecture."""
    key = variant, nvrtc.choose(capability, version())[1]
    code = nvrtc.cubin(variant, capability, version())
    with _lock:
        if key not in _kernels:
            library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
            _call("cuLibraryLoadData", ctypes.byref(library), code, None, None, 0, None, None, 0)
            _call("cuLibraryGetKernel", ctypes.byref(kernel), library, variant.name.encode())
            _kernels[key] = kernel, code  # the driver may read the code later
        return _kernels[key][0]


# -- for cuda.cc -------------------------------------------------------------------------------------------------------


class Resolved(ctypes.Structure):
    """``Kernel`` of cuda.cc: what `resolve` returns."""

    _fields_ = (("values", ctypes.c_void_p * 3),)


def resolve_for_handler(stream, variant, resolved, error, error_size) -> int:
    """Call `resolve` for C++, which exceptions cannot cross. Return 0, or 1 and write the reason to ``error``.

    Args:
        stream: as for `resolve`.
        variant: a ctypes pointer to the numbers of a `Variant`.
        resolved: the address of a `Resolved`.
        error, error_size: the address and size of a buffer.
    """
    try:
        Resolved.from_address(resolved).values = resolve(stream, Variant(*variant[: len(Variant._fields)]))
        return 0
    except BaseException as reason:
        text = f"the CUDA kernel cannot run: {str(reason) or type(reason).__name__}. "
        text += "Or compile the step with JADAM_KERNELS=xla in the environment."
        if error_size:
            encoded = text.encode()[: error_size - 1].decode(errors="ignore").encode() + b"\0"  # whole characters
            ctypes.memmove(error, encoded, len(encoded))
        return 1
