"""The headers in ``native/`` compile without a standard library and for a GPU."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import RSQRT_ERROR, check_output

import jadam

HEADERS = Path(jadam.__file__).parent / "_fused" / "native"
PROGRAM = """
#include "formats.h"
#include "rules.h"

struct Take {
  const jadam::Scalars& s;
  float g;
  jadam::Moments& x;
  float& u;
  template <class Rule>
  JADAM_INLINE void operator()(Rule) {
    Rule::template update_moments<false>(s, g, x);
    u = Rule::template direction<false>(s, g, x, jadam::sqrt_of(x.v));
  }
};

JADAM_INLINE void every_function(int rule, const jadam::Scalars& s, float g, jadam::i8& rq, jadam::u8& vq,
                                 jadam::u16& p, jadam::i16& r) {
  jadam::Moments x{0.0f, 0.0f, 0.0f};
  jadam::dequantize(rq, vq, 1.0f, 1.0f, x.m, x.v);
  float u = 0.0f, r_scale, v_scale;
  jadam::Rules::visit(rule, Take{s, g, x, u});
  jadam::scales(1, 2, r_scale, v_scale);
  const jadam::Dither dither(1u, 0u, 2u);
  const float ratio = jadam::ratio(x.m, x.v, jadam::rsqrt_of(x.v));
  rq = static_cast<jadam::i8>(jadam::quantize_r(ratio, r_scale, dither.odd_stream(3u)));
  vq = static_cast<jadam::u8>(jadam::quantize_v(x.v, v_scale, jadam::Dither::lane(dither.block(3u), 4u)));
  jadam::split(jadam::join(p, r) - u, p, r);
  p = static_cast<jadam::u16>(p ^ jadam::round_to_bfloat16(u, dither.hash(4u)));
}
"""
KERNEL = """
extern "C" __global__ void kernel(int rule, jadam::Scalars s, const float* g, jadam::i8* rq, jadam::u8* vq,
                                  jadam::u16* p, jadam::i16* r) {
  const int i = threadIdx.x;
  every_function(rule, s, g[i], rq[i], vq[i], p[i], r[i]);
}
"""


def compile_source(command, source):
    """Fails with the compiler's message."""
    check_output([*command, "-std=c++17", f"-I{HEADERS}", str(source)])


def test_compiles_without_a_standard_library(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    (tmp_path / "program.cc").write_text(PROGRAM)
    compile_source(
        [compiler, "-nostdinc", "-nostdinc++", "-ffreestanding", "-fsyntax-only", "-Werror"], tmp_path / "program.cc"
    )


RSQRT_PROGRAM = """
#include <cmath>
#include <cstdio>
#include "portable.h"

int main() {
  double largest = 0;
  for (jadam::u32 bits = 0x3F800000; bits < 0x40800000; ++bits) {  // all floats in [1, 4); other exponents repeat them
    const float x = jadam::float_from_bits(bits);
    largest = std::fmax(largest, std::fabs(jadam::rsqrt_of(x) * std::sqrt(static_cast<double>(x)) - 1));
  }
  std::printf("%.3e %.3e %.3e", largest, jadam::rsqrt_of(0.0f), jadam::rsqrt_of(1e-40f));
}
"""


@pytest.mark.parametrize("flags", ["-O2", "-O2 -mfma"])
def test_error_of_rsqrt(flags, tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    if "fma" in flags and "fma" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        pytest.skip("no FMA instructions are known of here")
    (tmp_path / "program.cc").write_text(RSQRT_PROGRAM)
    compile_source([compiler, *flags.split(), "-o", str(tmp_path / "program")], tmp_path / "program.cc")
    largest, of_zero, of_denormal = map(float, check_output([str(tmp_path / "program")]).split())
    assert 5e-7 < largest < RSQRT_ERROR  # the bound in portable.h is tight
    assert np.isfinite(of_zero)
    assert np.isfinite(of_denormal)


@pytest.mark.slow
def test_compiles_for_a_gpu(tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc is here")
    (tmp_path / "program.cu").write_text(PROGRAM + KERNEL)
    compile_source([compiler, "-arch=sm_90", "-ptx", "-o", str(tmp_path / "program.ptx")], tmp_path / "program.cu")
    assert "sqrt.rn.f32" in (tmp_path / "program.ptx").read_text()
