"""What pyproject.toml cannot say: a C++ extension without Python symbols, and so one wheel for all Pythons."""

import os
import platform
import re
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FUSED = Path("jadam", "_fused")
SOURCES = [FUSED / name for name in ("cpu/cpu.cc", "cuda/cuda.cc")]
HEADERS = [FUSED / "cuda/table.h", *(FUSED / f"native/{x}.h" for x in ("formats", "leaves", "portable", "rules"))]
WITHOUT = """jadam: the kernels for CPUs and NVIDIA GPUs were not built: {error}
jadam works without them. On a CPU XLA takes two passes over memory instead of one: about 1.7 times as long.
With a C++17 compiler (g++, clang++ or MSVC): pip install --force-reinstall --no-deps --no-cache-dir jadam"""


def description() -> str:
    """README.md for places where the files it links to are not: without pictures, links as names."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]*)\)", r"\1 (`\2`)", text)


class Build(build_ext):
    """Builds a shared library that `ctypes` loads, named alike for every Python."""

    def get_ext_filename(self, fullname):
        """``_native.so``, without the tag of an interpreter."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext):
        """No ``PyInit``."""
        return ext.export_symbols

    def build_extension(self, ext):
        """Says what it means where there is no compiler; pip shows it with -v."""
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever the absence of a compiler looks like
            print(WITHOUT.format(error=error), file=sys.stderr)


class Wheel(bdist_wheel):
    """One wheel for a platform's Pythons."""

    def get_tag(self):
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


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
        flags += ["-D_FORTIFY_SOURCE=3", "-g0"]
        link += ["-Wl,-s"] if sys.platform == "linux" else []  # stripped: 0.5 MB for 3.3

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "jadam._fused.native._native",
            list(map(str, SOURCES)),
            depends=list(map(str, HEADERS)),
            include_dirs=[str(FUSED / "native"), str(FUSED / "native" / "third_party")],
            define_macros=[("JADAM_SOURCE", f"{zlib.crc32(b''.join(x.read_bytes() for x in SOURCES + HEADERS))}u")],
            extra_compile_args=flags,
            extra_link_args=link,
            language="c++",
        )
    ],
)
