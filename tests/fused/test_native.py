"""The headers in ``native/`` compile without a standard library and for a GPU."""

import shutil
from pathlib import Path

import pytest
from helpers import check_output

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


@pytest.mark.slow
def test_compiles_for_a_gpu(tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc is here")
    (tmp_path / "program.cu").write_text(PROGRAM + KERNEL)
    compile_source([compiler, "-arch=sm_90", "-ptx", "-o", str(tmp_path / "program.ptx")], tmp_path / "program.cu")
    assert "sqrt.rn.f32" in (tmp_path / "program.ptx").read_text()
