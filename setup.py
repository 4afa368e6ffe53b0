"""The one part of the build that pyproject.toml cannot say: where the headers of XLA's FFI are."""

import importlib.util
import os
import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "jadam/_kernels/cpu.cc"
# JADAM_SANITIZE=address,undefined builds the kernel with these sanitizers, for tests.
sanitize = os.environ.get("JADAM_SANITIZE")
if sys.platform == "win32":
    flags, link = ["/std:c++17", "/O2", "/GS", "/guard:cf"], ["/guard:cf"]
else:
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags += ["-fstack-protector-strong", "-D_GLIBCXX_ASSERTIONS", "-U_FORTIFY_SOURCE"]
    link = []
    if sys.platform == "linux":
        link += ["-Wl,-z,relro,-z,now,-z,noexecstack"]
        flags += ["-fcf-protection"] if platform.machine() in ("x86_64", "i686") else []
    if sanitize:  # Python's own flags hide overflows from UBSan (-fwrapv) and leave out assertions
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-O1", "-fno-wrapv", "-UNDEBUG"]
        link += [f"-fsanitize={sanitize}"]
    else:
        flags += ["-D_FORTIFY_SOURCE=3"]

jaxlib = importlib.util.find_spec("jaxlib")
setup(
    ext_modules=[
        Extension(
            "jadam._kernels._cpu",
            [SOURCE],
            include_dirs=[str(Path(next(iter(jaxlib.submodule_search_locations)), "include"))] if jaxlib else [],
            define_macros=[("JADAM_SOURCE", f"{zlib.crc32(Path(SOURCE).read_bytes())}u")],
            extra_compile_args=flags,
            extra_link_args=link,
            language="c++",
            optional=True,  # without a compiler XLA serves
        )
    ],
)
