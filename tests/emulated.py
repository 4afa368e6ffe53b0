"""The CUDA kernel on the CPU: ``emulator/`` compiles the text of ``kernel.cu`` and stands in for the driver.

The handlers of ``cuda.cc`` are the extension's. Only the functions of CUDA are others, see ``emulator/shim.h``.
"""

import ctypes
import functools
import os
import shutil
import tempfile
from pathlib import Path

import handler
import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CPU, check_output

import jadam
from jadam._fused.cuda import kernel as cuda
from jadam._fused.native import call, extension

HERE = Path(__file__).parent / "emulator"
FUSED = Path(jadam.__file__).parent / "_fused"
ARCHITECTURES = (900, 700)  # __CUDA_ARCH__, with and without the warp's maximum as an instruction


@functools.cache
def library(architecture) -> ctypes.CDLL:
    """The emulator of an architecture, compiled with the sanitizers in ``JADAM_SANITIZE``, as in setup.py."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    sanitize = os.environ.get("JADAM_SANITIZE")
    flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-O0"] if sanitize else ["-O1"]
    folder = tempfile.mkdtemp()
    out = os.path.join(folder, "emulator.so")
    flags += [f"-D__CUDA_ARCH__={architecture}", f"-I{FUSED / 'native'}", f"-I{FUSED / 'cuda'}"]
    flags += ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    if "portable" not in str(CPU.kernel):  # contracts products and sums as a GPU's compiler does
        flags += ["-mfma", "-ffp-contract=fast", "-fexpensive-optimizations"]
    check_output([compiler, *flags, "-o", out, str(HERE / "emulator.cc")])
    loaded = ctypes.CDLL(out)
    shutil.rmtree(folder)
    return loaded


_variants: list = []  # what the handler keeps addresses of


def _resolve_with(architecture):
    """``resolve_for_handler`` of ``driver.py`` with an emulated kernel: its `Variant`, see ``emulator.cc``."""

    @extension.RESOLVE
    def resolve(stream, variant, resolved, error, error_size):
        emulator = library(architecture)
        _variants.append((ctypes.c_int32 * 4)(*variant[:4]))
        functions = (ctypes.cast(x, ctypes.c_void_p).value for x in (emulator.emulator_launch, emulator.emulator_copy))
        (ctypes.c_void_p * 3).from_address(resolved)[:] = [ctypes.addressof(_variants[-1]), *functions]
        return 0

    return resolve


_resolvers = {architecture: _resolve_with(architecture) for architecture in ARCHITECTURES}


def run_call(*arguments) -> str | None:
    """`handler.call` of CUDA's handlers, with emulated kernels."""
    return _call(handler.call, arguments, ARCHITECTURES[0])


def _call(function, arguments, architecture):
    """Call a function of `handler` for CUDA. Each architecture is a device, as the handler keeps kernels by device."""
    extension_library = handler.library()
    library(architecture)
    extension_library.jadam_cuda_set_resolve(_resolvers[architecture])
    try:
        return function(*arguments, platform="cuda", device=handler.NO_DEVICE + architecture)
    finally:
        extension_library.jadam_cuda_set_resolve(extension._resolve)


def run_kernel(
    leaf_updates, grads, params, architecture=ARCHITECTURES[0], donate=True, leaves_per_call=cuda.LEAVES_PER_CALL
):
    """`cuda.kernel.run_kernel` with concrete arrays. ``donate``: inputs and outputs are the same buffers."""

    def ffi_call(target, outputs, input_output_aliases):
        """Stands in for `jax.ffi.ffi_call`."""
        assert target == "jadam_step"

        def run(*inputs, **attributes):
            inputs = [np.array(x) for x in inputs]
            results = [np.full(x.shape, 77, x.dtype) for x in outputs]
            for i, k in input_output_aliases.items() if donate else ():
                results[k] = inputs[i]
            buffers = (list(map(buffer, arrays)) for arrays in (inputs, results))
            error = _call(handler.call_with_attributes, (*buffers, attributes), architecture)
            if error is not None:
                raise ValueError(error)
            return list(map(jnp.asarray, results))

        return run

    columns = leaf_updates, grads, params
    supported = [i for i, x in enumerate(zip(*columns, strict=True)) if not call.unsupported_reason(*x)]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(jax.ffi, "ffi_call", ffi_call)
        return call.update_leaves(*columns, supported, leaves_per_call)


def buffer(x) -> handler.Buffer:
    """The memory of a NumPy array, which must be kept alive."""
    return handler.Buffer(x.ctypes.data, x.shape, str(x.dtype))
