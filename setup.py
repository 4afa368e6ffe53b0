"""The one part of the build that pyproject.toml cannot say: where the headers of XLA's FFI are."""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "jadam/_kernels/cpu.cc"
# JADAM_SANITIZE=address,undefined builds the kernel with these sanitizers, for tests.
sanitize = os.environ.get("JADAM_SANITIZE")
flags = (
    ["/std:c++17", "/O2"] if sys.platform == "win32" else ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
)
flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitize else []

jaxlib = importlib.util.find_spec("jaxlib")
setup(
    ext_modules=[
        Extension(
            "jadam._kernels._cpu",
            [SOURCE],
            include_dirs=[str(Path(next(iter(jaxlib.submodule_search_locations)), "include"))] if jaxlib else [],
            define_macros=[("JADAM_SOURCE", f"{zlib.crc32(Path(SOURCE).read_bytes())}u")],
            extra_compile_args=flags,
            extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
            language="c++",
            optional=True,  # without a compiler XLA serves
        )
    ],
)
