"""The CUDA kernel is found, compiled, cached and loaded: with stand-ins for NVRTC and the driver, and with NVRTC."""

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import check_output, subprocess_env

import jadam
from jadam._fused.cuda import driver, nvrtc
from jadam._fused.cuda.nvrtc import Unavailable, Variant
from jadam._fused.native import extension

FAKE = Path(__file__).parent / "fake_cuda.cc"
ARCHITECTURES = {12: "70,75,80,86,87,90,100,101,120", 13: "75,80,86,90,100,110,120"}
WHEELS = {12: "cuda_nvrtc", 13: "cu13"}
FLOAT32, BFLOAT16_INT8 = Variant(0, 0, 0, 0), Variant(1, 2, 1, 1)
KERNEL = """
#include "rules.h"
#include "table.h"
#define JOIN_(a, b, c, d) jadam_##a##_##b##_##c##_##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)
extern "C" __global__ void JOIN(JADAM_RULE, JADAM_FORMAT, JADAM_BFLOAT16_WEIGHTS, JADAM_BFLOAT16_GRADIENTS)(
    const __grid_constant__ jadam::Table table, const float* scalars, const unsigned* count) {
  table.leaf[blockIdx.x][threadIdx.x] += twice(*scalars) / static_cast<float>(*count);
}
"""
HEADERS = {
    "cuda/table.h": "namespace jadam { struct Table { float* leaf[8]; }; }\n",
    "native/portable.h": "#define JADAM_INLINE __device__ __forceinline__\n",
    "native/formats.h": "",
    "native/rules.h": '#include "portable.h"\nJADAM_INLINE float twice(float x) { return 2 * x; }\n',
}


# -- stand-ins ---------------------------------------------------------------------------------------------------------


@functools.cache
def compiler():
    return shutil.which("g++") or shutil.which("clang++")


needs_compiler = pytest.mark.skipif(
    compiler() is None or sys.platform == "win32", reason="no C++ compiler is here for the stand-ins"
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the stand-in with some macros, once, and returns a copy of it: a copy has its own counters."""
    folder = tmp_path_factory.mktemp("fakes")

    @functools.cache
    def compiled(*macros):
        out = folder / f"{len(list(folder.iterdir()))}.so"
        check_output([compiler(), "-std=c++17", "-shared", "-fPIC", "-pthread", *macros, str(FAKE), "-o", str(out)])
        return out

    def copy(target, *macros):
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(compiled(*macros), target)

    return copy


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Neither the machine's NVRTC nor its cache, and sources of a few lines."""
    _forget()
    monkeypatch.setattr(nvrtc, "_cubins", {})
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setattr(nvrtc, "FUSED", tmp_path / "sources")
    for name, text in {"cuda/kernel.cu": KERNEL, **HEADERS}.items():
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    _forget()


def _forget():
    for function in (nvrtc.installed, driver.version, driver._library):
        function.cache_clear()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder on the path, the only one where there may be an NVRTC."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(nvrtc, "_candidates", functools.partial(_candidates, nvrtc._candidates, tmp_path))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _candidates(real, folder):
    return [x for x in real() if x.startswith(str(folder))]


@pytest.fixture
def install(build, site):
    """Installs a stand-in for a version of NVRTC, and returns it."""

    def install(major=12, minor=9, architectures=None, folder=None):
        path = (folder or site / "nvidia" / WHEELS[major] / "lib") / f"libnvrtc.so.{major}"
        macros = f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DARCHITECTURES={architectures or ARCHITECTURES[major]}"
        return ctypes.CDLL(str(build(path, *macros)))

    return install


@pytest.fixture
def cuda(build, monkeypatch, tmp_path):
    """A stand-in for the driver."""
    return _driver(build, monkeypatch, tmp_path / "libcuda.so.1", "-DLOAD")


def _driver(build, monkeypatch, path, *macros):
    library = ctypes.CDLL(str(build(path, *macros)))
    library.fake_calls.restype = ctypes.c_char_p
    monkeypatch.setattr(driver, "LIBRARY", str(path))
    return library


def calls(cuda):
    return cuda.fake_calls().decode().split("\n")


# -- finding NVRTC -----------------------------------------------------------------------------------------------------


def test_variant():
    assert FLOAT32.name == "jadam_0_0_0_0"
    assert Variant(0, 2, 1, 0).name == "jadam_0_2_1_0"
    assert Variant(6, 1, 0, 1).defines == (
        "-DJADAM_RULE=6",
        "-DJADAM_FORMAT=1",
        "-DJADAM_BFLOAT16_WEIGHTS=0",
        "-DJADAM_BFLOAT16_GRADIENTS=1",
    )


def test_options_of_int8():
    assert "-use_fast_math" in nvrtc.options(Variant(0, 2, 0, 0), "sm_90")
    for format in (0, 1):
        assert "-use_fast_math" not in nvrtc.options(Variant(0, format, 0, 0), "sm_90")


def test_importing_opens_nothing():
    program = """if True:
        import sys
        opened = []
        sys.addaudithook(lambda event, args: event == "ctypes.dlopen" and opened.append(args[0]))
        import jadam._fused.cuda.driver
        print([x for x in opened if x], "jax" in sys.modules)
    """
    assert check_output([sys.executable, "-c", program], env=subprocess_env()) == "[] False\n"


@needs_compiler
@pytest.mark.parametrize(
    ("driver_version", "expected"), [(12000, (12, 9)), (12080, (12, 9)), (13000, (13, 1)), (None, (13, 1))]
)
def test_newest_that_the_driver_supports(install, driver_version, expected):
    install(12), install(13, 1)
    assert nvrtc.find(driver_version).version == expected


@needs_compiler
def test_newest_of_one_major_version(install, monkeypatch, tmp_path):
    """Whether it is a wheel or a toolkit."""
    install(12, 4), install(12, 6, folder=tmp_path / "toolkit" / "lib64")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    found = nvrtc.find(12080)
    assert found.version == (12, 6)
    assert str(found) == f"NVRTC 12.6 ({tmp_path}/toolkit/lib64/libnvrtc.so.12)"


@needs_compiler
def test_builtins_are_loaded_from_beside(install, monkeypatch):
    """NVRTC of the wheel of 13.0 looks for its second library only where the system does."""
    install(13, 0)
    opened, real = [], ctypes.CDLL
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: opened.append(Path(path)) or real(path))
    path = Path(nvrtc.find().path)
    assert opened == [path, path.with_name("libnvrtc-builtins.so.13.0")]


def test_without_nvrtc(site):
    with pytest.raises(Unavailable, match=r"not installed: pip install nvidia-cuda-nvrtc-cu12, or .* jax\[cuda12\]"):
        nvrtc.find(12080)
    with pytest.raises(Unavailable, match=r"not installed: pip install nvidia-cuda-nvrtc, or .* jax\[cuda13\]"):
        nvrtc.find(13000)
    with pytest.raises(Unavailable, match=r"-cu12 \(for CUDA 12\) or nvidia-cuda-nvrtc \(for CUDA 13\)"):
        nvrtc.find()


@needs_compiler
def test_only_a_newer_nvrtc_than_the_driver(install):
    install(13)
    with pytest.raises(
        Unavailable, match=r"libnvrtc.so.13 needs a driver of CUDA 13, .* pip install nvidia-cuda-nvrtc-cu12"
    ):
        nvrtc.find(12080)


def test_damaged_nvrtc(site):
    path = site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    with pytest.raises(Unavailable, match=rf"{path} does not load \(.*\): pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.find(12080)


@needs_compiler
def test_architecture(install, monkeypatch, tmp_path):
    install(12), install(13), install(12, 4, "70,75,80,90", tmp_path / "toolkit" / "lib64")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    new, old, older = nvrtc.installed(None)[0]
    assert nvrtc.architecture(new, (9, 0)) == "sm_90"
    assert nvrtc.architecture(new, (8, 9)) == "sm_86"  # the newest of the same major version
    assert nvrtc.architecture(new, (12, 1)) == "sm_120"
    assert nvrtc.architecture(old, (10, 3)) == "sm_100"  # not that of a Tegra, 101
    assert nvrtc.architecture(old, (10, 1)) == "sm_101"
    assert nvrtc.architecture(old, (8, 7)) == "sm_87"
    with pytest.raises(Unavailable, match=r"to 12\.0, but not for a GPU's 8\.7"):  # a Tegra runs only its own
        nvrtc.architecture(new, (8, 7))
    with pytest.raises(Unavailable, match=r"7\.5 to 12\.0, but not for a GPU's 7\.0: pip install .*-nvrtc-cu12"):
        nvrtc.architecture(new, (7, 0))
    with pytest.raises(Unavailable, match=r"but not for a GPU's 13\.0: pip install --upgrade nvidia-cuda-nvrtc"):
        nvrtc.architecture(old, (13, 0))
    with pytest.raises(Unavailable, match=r"but not for a GPU's 12\.0: pip install --upgrade nvidia-cuda-nvrtc-cu12"):
        nvrtc.architecture(older, (12, 0))
    with pytest.raises(Unavailable, match=r"compute capability is 6\.1, and the CUDA kernel needs 7\.0 or newer"):
        nvrtc.architecture(old, (6, 1))


@needs_compiler
def test_older_nvrtc_serves_an_older_gpu(install):
    install(12), install(13)
    chosen, architecture = nvrtc.choose((7, 0), 13000)
    assert (chosen.version, architecture) == ((12, 9), "sm_70")
    assert nvrtc.choose((9, 0), 13000)[0].version == (13, 9)
    with pytest.raises(Unavailable, match=r"NVRTC 13\.9 .* but not for a GPU's 14\.0"):
        nvrtc.choose((14, 0), 13000)


# -- compilation and cache ---------------------------------------------------------------------------------------------


@needs_compiler
def test_compilation_has_the_headers_by_name(install):
    fake = install()
    code = nvrtc.compile_kernel(nvrtc.find(), BFLOAT16_INT8, "sm_90").decode()
    assert code.startswith(f"cubin {' '.join(nvrtc.options(BFLOAT16_INT8, 'sm_90'))} | kernel.cu ")
    for name, text in HEADERS.items():
        assert f" {name.partition('/')[2]}:{text}" in code
    assert fake.fake_programs() == 0


@needs_compiler
def test_error_has_the_log(install, tmp_path):
    (tmp_path / "sources" / "cuda" / "kernel.cu").write_text("#error\n")
    fake = install()
    for _ in range(2):
        with pytest.raises(
            Unavailable,
            match=r"^NVRTC 12\.9 \(.*\) does not compile kernel\.cu with .*-arch=sm_90.*: "
            r"kernel\.cu\(1\): error: #error directive \| #error \| \^$",
        ):
            nvrtc.cubin(FLOAT32, (9, 0))
    assert fake.fake_compilations() == 2  # an error is not remembered
    assert fake.fake_programs() == 0
    assert list(nvrtc.cache_folder().iterdir()) == []


def compile_again(fake, *arguments):
    """The code as a new process gets it, and how many compilations that took."""
    nvrtc._cubins.clear()
    before = fake.fake_compilations()
    return nvrtc.cubin(*arguments), fake.fake_compilations() - before


@needs_compiler
def test_cache(install, monkeypatch, tmp_path):
    fake = install()
    code = nvrtc.cubin(FLOAT32, (9, 0))
    assert nvrtc.cubin(FLOAT32, (9, 0)) is code  # remembered by the process
    assert fake.fake_compilations() == 1
    assert compile_again(fake, FLOAT32, (9, 0)) == (code, 0)
    (file,) = nvrtc.cache_folder().iterdir()
    assert file.read_bytes() == hashlib.sha256(code).digest() + code
    for arguments in ((Variant(0, 0, 0, 1), (9, 0)), (FLOAT32, (8, 0))):
        assert compile_again(fake, *arguments)[1] == 1
    for name in nvrtc.SOURCES:
        path = tmp_path / "sources" / name
        path.write_text(path.read_text() + "// changed\n")
        assert compile_again(fake, FLOAT32, (9, 0))[1] == 1, name
    monkeypatch.setattr(jadam, "__version__", "0.0")
    assert compile_again(fake, FLOAT32, (9, 0))[1] == 1
    newer = install(13)
    nvrtc.installed.cache_clear()
    assert compile_again(newer, FLOAT32, (9, 0))[1] == 1


@needs_compiler
@pytest.mark.parametrize("keep", [0, 10, 32, 40, -1])
def test_truncated_file_is_rebuilt(install, keep):
    fake = install()
    code = nvrtc.cubin(FLOAT32, (9, 0))
    (file,) = nvrtc.cache_folder().iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    assert compile_again(fake, FLOAT32, (9, 0)) == (code, 1)
    assert file.read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize("position", [0, 31, 32, -1])
def test_damaged_file_is_rebuilt(install, position):
    fake = install()
    code = nvrtc.cubin(FLOAT32, (9, 0))
    (file,) = nvrtc.cache_folder().iterdir()
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[position] ^= 1
    file.write_bytes(damaged)
    assert compile_again(fake, FLOAT32, (9, 0)) == (code, 1)
    assert file.read_bytes() == whole


def test_folder_is_private(tmp_path):
    old = os.umask(0)
    try:
        folder = nvrtc.cache_folder()
    finally:
        os.umask(old)
    assert folder == tmp_path / "cache" / "jadam" / "cubin"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", ["", "relative"])
def test_folder_without_an_absolute_xdg_cache_home(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert nvrtc.cache_folder() == tmp_path / "home" / ".cache" / "jadam" / "cubin"


def _writable_by_all(folder, monkeypatch):
    nvrtc.cache_folder().chmod(0o707)


def _writable_by_a_group(folder, monkeypatch):
    nvrtc.cache_folder().chmod(0o770)


def _of_another_user(folder, monkeypatch):
    monkeypatch.setattr(nvrtc.os, "geteuid", lambda: os.getuid() + 1)


def _is_a_file(folder, monkeypatch):
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def _no_home(folder, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(nvrtc.Path, "home", no_home)


def _full_disk(folder, monkeypatch):
    def write_bytes(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.Path, "write_bytes", write_bytes)


def _no_permission(folder, monkeypatch):
    def atomic_replace(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nvrtc, "atomic_replace", atomic_replace)


@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [_writable_by_all, _writable_by_a_group, _of_another_user, _is_a_file, _no_home, _full_disk, _no_permission],
)
def test_works_without_a_cache(install, monkeypatch, tmp_path, caplog, spoil):
    """And reads nothing that others may have written, and says nothing."""
    fake = install()
    code = nvrtc.cubin(FLOAT32, (9, 0))
    folder = nvrtc.cache_folder()
    (file,) = folder.iterdir()
    planted = b"planted by another"
    file.write_bytes(hashlib.sha256(planted).digest() + planted)
    if spoil in (_is_a_file, _no_home, _full_disk, _no_permission):
        shutil.rmtree(tmp_path / "cache")
    spoil(folder, monkeypatch)
    with caplog.at_level(logging.INFO, "jadam"):
        for _ in range(2):
            assert compile_again(fake, FLOAT32, (9, 0)) == (code, 1)
    assert caplog.records == []
    assert not list(tmp_path.rglob("*.tmp"))


@needs_compiler
def test_threads_compile_once(install):
    fake, results = install(), []
    started = threading.Barrier(4)

    def get(variant):
        started.wait()
        results.append((variant, nvrtc.cubin(variant, (9, 0))))

    threads = [threading.Thread(target=get, args=[x]) for x in (FLOAT32, FLOAT32, FLOAT32, BFLOAT16_INT8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 2
    assert fake.fake_compilations() == 2


@needs_compiler
def test_processes_at_once(install, site, tmp_path):
    install()
    program = f"""if True:
        import pathlib, sys
        from jadam._fused.cuda import nvrtc
        nvrtc.FUSED = pathlib.Path({str(tmp_path / "sources")!r})
        nvrtc._candidates = lambda: [{str(site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12")!r}]
        print("ready", flush=True)
        sys.stdin.read(1)
        print(nvrtc.cubin(nvrtc.Variant(0, 0, 0, 0), (9, 0)).hex())
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=subprocess_env(),
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("x")
        process.stdin.flush()
    results = [(process.communicate(), process.returncode) for process in processes]
    assert {(error, code) for (_, error), code in results} == {("", 0)}
    assert len({out for (out, _), _ in results}) == 1
    (file,) = nvrtc.cache_folder().iterdir()  # no temporary file is left
    contents = file.read_bytes()
    assert hashlib.sha256(contents[32:]).digest() == contents[:32]


# -- the driver --------------------------------------------------------------------------------------------------------

STEPS = (
    "cuStreamGetCtx",
    "cuCtxPushCurrent_v2",
    "cuCtxGetDevice",
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
    "cuLibraryLoadData",
    "cuLibraryGetKernel",
    "cuKernelGetFunction",
    "cuFuncLoad",
    "cuCtxPopCurrent_v2",
)


@needs_compiler
def test_resolve(install, cuda):
    install()
    kernel, launch, copy = driver.resolve(1001, FLOAT32)
    assert kernel == 0x700000000002
    assert launch == ctypes.cast(cuda.cuLaunchKernel, ctypes.c_void_p).value
    assert copy == ctypes.cast(cuda.cuMemcpyDtoDAsync_v2, ctypes.c_void_p).value
    assert calls(cuda) == [
        "cuStreamGetCtx",
        "cuCtxPushCurrent_v2",
        "cuCtxGetDevice",
        "cuDeviceGetAttribute",
        "cuDeviceGetAttribute",
        "cuDriverGetVersion",
        "cuLibraryLoadData -arch=sm_90",
        "cuLibraryGetKernel jadam_0_0_0_0",
        "cuKernelGetFunction on 1",
        "cuFuncLoad",
        "cuCtxPopCurrent_v2",
    ]
    assert cuda.fake_depth() == 1


@needs_compiler
def test_driver_without_func_load(install, build, monkeypatch, tmp_path):
    install()
    cuda = _driver(build, monkeypatch, tmp_path / "old" / "libcuda.so.1")
    driver.resolve(1000, FLOAT32)
    assert calls(cuda)[-3:] == ["cuKernelGetFunction on 0", "cuFuncGetAttribute", "cuCtxPopCurrent_v2"]


@needs_compiler
def test_one_library_for_two_devices_of_one_architecture(install, cuda):
    fake = install()
    for stream in (1000, 1001, 1002, 1001, None):  # the devices 0 and 1 are alike; the null stream's is 0
        driver.resolve(stream, FLOAT32)
    loaded = [x for x in calls(cuda) if x.startswith("cuLibraryLoadData")]
    assert loaded == ["cuLibraryLoadData -arch=sm_90", "cuLibraryLoadData -arch=sm_80"]
    assert [x[-1] for x in calls(cuda) if x.startswith("cuKernelGetFunction")] == ["0", "1", "2", "1", "0"]
    assert fake.fake_compilations() == 2
    driver.resolve(1000, BFLOAT16_INT8)
    assert calls(cuda).count("cuLibraryGetKernel jadam_1_2_1_1") == 1


def resolve(stream, variant, size=1000):
    """``RESOLVE`` as C++ calls it: its result, the structure and the error's text."""
    resolved, error = driver.Resolved(), ctypes.create_string_buffer(b"\xff" * 1000, 1001)
    call = extension.RESOLVE(driver.resolve_for_handler)
    code = call(stream, (ctypes.c_int32 * 4)(*variant), ctypes.addressof(resolved), error, size)
    assert error.raw[size:1000] == b"\xff" * (1000 - size)  # nothing is written behind it
    return code, resolved, error.raw


@needs_compiler
def test_callback(install, cuda):
    install()
    code, resolved, error = resolve(1000, FLOAT32)
    assert (code, resolved.values[0]) == (0, 0x700000000002)
    assert resolved.values[1] == ctypes.cast(cuda.cuLaunchKernel, ctypes.c_void_p).value
    assert resolved.values[2] == ctypes.cast(cuda.cuMemcpyDtoDAsync_v2, ctypes.c_void_p).value
    assert error[0] == 0xFF


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_each_error_comes_back_as_text(install, cuda, name):
    install()
    for number, text in ((209, "no kernel image is available (CUresult 209)"), (4242, "unknown error (CUresult 4242)")):
        _forget()
        cuda.fake_reset(name.encode(), number, 12080)
        code, _, error = resolve(1001, FLOAT32)
        message = error[: error.index(b"\0")].decode()
        assert code == 1
        assert f"{name} failed: {text}" in message
        assert "JADAM_KERNELS=xla" in message
        assert cuda.fake_depth() == 1  # the context is popped
    _forget()
    cuda.fake_reset(b"", 0, 12080)
    assert resolve(1001, FLOAT32)[0] == 0  # and nothing is remembered of it


@needs_compiler
def test_callback_truncates_whole_characters(monkeypatch):
    def fail(*_):
        raise Unavailable("ä" * 600)

    monkeypatch.setattr(driver, "resolve", fail)
    for size in (1000, 100, 99, 2, 1):
        text = resolve(1000, FLOAT32, size)[2][:size]
        assert text.count(b"\0") == 1
        assert len(text[: text.index(b"\0")].decode()) >= size // 2 - 1
    assert resolve(1000, FLOAT32, 0)[0] == 1


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), SystemExit(), MemoryError(), ValueError("x")])
def test_callback_never_raises(monkeypatch, exception):
    def fail(*_):
        raise exception

    monkeypatch.setattr(driver, "resolve", fail)
    code, _, error = resolve(1000, FLOAT32)
    assert code == 1
    assert (str(exception) or type(exception).__name__).encode() in error


@needs_compiler
def test_callback_without_nvrtc(site, cuda):
    code, _, error = resolve(1000, FLOAT32)
    assert code == 1
    assert b"pip install nvidia-cuda-nvrtc-cu12, or reinstall jax[cuda12]" in error
    assert b"JADAM_KERNELS=xla" in error
    assert cuda.fake_depth() == 1


@needs_compiler
def test_why_not(install, cuda, site):
    assert "NVRTC, which compiles the kernel, is not installed: pip install" in driver.why_not([(9, 0)])
    _forget()
    install()
    assert driver.why_not([]) is None
    assert driver.why_not([(9, 0), (8, 0), (7, 0)]) is None
    assert "but not for a GPU's 13.0" in driver.why_not([(9, 0), (13, 0)])
    _forget()
    cuda.fake_reset(b"", 0, 11080)
    assert driver.why_not([(9, 0)]) == (
        "the NVIDIA driver supports CUDA 11.8, and the CUDA kernel needs 12.0: update it"
    )
    _forget()
    cuda.fake_reset(b"cuDriverGetVersion", 34, 12080)  # that of a stub library
    assert driver.why_not([(9, 0)]) == "cuDriverGetVersion failed: unknown error (CUresult 34)"


@needs_compiler
def test_driver_without_a_function(cuda):
    with pytest.raises(Unavailable, match="the NVIDIA driver has no cuMissing: update it"):
        driver._call("cuMissing")


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-not-here.so.1")
    reason = driver.why_not([(9, 0)])
    assert re.fullmatch(r"the NVIDIA driver does not load \(libcuda-that-is-not-here\.so\.1: .*\): install it", reason)
    assert reason.encode() in resolve(1000, FLOAT32)[2]


# -- NVRTC itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[12, 13])
def real(request):
    for found in nvrtc.installed(None)[0]:
        if found.version[0] == request.param:
            return found
    package = "nvidia-cuda-nvrtc-cu12" if request.param == 12 else "nvidia-cuda-nvrtc"
    pytest.skip(f"NVRTC {request.param} is not installed: pip install {package}")


def test_nvrtc_compiles(real):
    oldest = (7, 0) if real.version[0] == 12 else (7, 5)
    for capability in oldest, (8, 0), (9, 0), (10, 0), (12, 0):
        for variant in FLOAT32, BFLOAT16_INT8:
            code = nvrtc.compile_kernel(real, variant, nvrtc.architecture(real, capability))
            assert code[:4] == b"\x7fELF"
            assert variant.name.encode() in code


def test_nvrtc_reports_registers_and_spills(real):
    log = nvrtc.compile_source(real, (*nvrtc.options(FLOAT32, "sm_90"), "--ptxas-options=-v"))[1]
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads\n.*Used \d+ registers", log)


def test_nvrtc_error(real, tmp_path):
    (tmp_path / "sources" / "cuda" / "kernel.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(Unavailable, match=r"kernel\.cu\(1\): error: identifier \"undeclared\" is undefined \|"):
        nvrtc.compile_kernel(real, FLOAT32, "sm_90")
    with pytest.raises(Unavailable, match="sm_1"):
        nvrtc.compile_kernel(real, FLOAT32, "sm_1")


def test_nvrtc_and_cache(real, monkeypatch):
    driver_version = 1000 * real.version[0]
    code = nvrtc.cubin(FLOAT32, (9, 0), driver_version)
    assert code == nvrtc.compile_kernel(real, FLOAT32, "sm_90")  # it is deterministic
    nvrtc._cubins.clear()
    monkeypatch.setattr(nvrtc, "compile_kernel", None)
    assert nvrtc.cubin(FLOAT32, (9, 0), driver_version) == code
