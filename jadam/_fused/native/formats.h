// Storage formats of moments and parameters, element by element: jadam/_moments and jadam/_core/bf16.py for kernels.

#ifndef JADAM_FORMATS_H_
#define JADAM_FORMATS_H_

#include "portable.h"
#include "rules.h"

namespace jadam {

enum Format { kFloat32, kBFloat16, kInt8, kFormats };
constexpr char kFormatNames[] = "float32 bfloat16 int8";  // the Python names, in the order of Format

JADAM_INLINE float float_from_bfloat16(u16 x) { return float_from_bits(static_cast<u32>(x) << 16); }

JADAM_INLINE u32 lowbias32(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Random bits for stochastic rounding, as `dither` of jadam/_core/numerics.py: stream k of the leaf with this salt
// after count steps. An even stream and the next odd one share the hash of an element's index: its halves are
// independent.
struct Dither {
  u32 salt, offset;
  JADAM_INLINE Dither(u32 salt, u32 k, u32 count)
      : salt(lowbias32(salt + k / 2 * 0x632BE5ABu)), offset(count * 0x9E3779B9u) {}
  JADAM_INLINE u32 hash(u32 index) const { return lowbias32(index ^ salt); }
  JADAM_INLINE u32 even_stream(u32 hash) const { return hash + offset; }
  JADAM_INLINE u32 odd_stream(u32 hash) const { return (hash << 16 | hash >> 16) + offset; }
  // As `dither_of_block`: `block` from the index of its first element, and from it `lane`, the bits of element i.
  JADAM_INLINE u32 block(u32 first_index) const { return even_stream(hash(first_index)); }
  static JADAM_INLINE constexpr u32 lane(u32 block, u32 i) { return block + i * 0xC13FA9A9u; }
};

// float32 from its bfloat16 rounding and the remainder. If the weight was overwritten with 0 or infinity, a remainder
// that would make it NaN is dropped.
JADAM_INLINE float join(u16 p, i16 remainder) {
  const i32 p_abs = p & 0x7FFF, r = remainder;
  const bool invalid = (p_abs == 0 && r < 0) || (p_abs == 0x7F80 && r > 0);
  return float_from_bits((static_cast<u32>(p) << 16) + static_cast<u32>(invalid ? 0 : r));
}

// The inverse of `join`.
JADAM_INLINE void split(float x, u16& p, i16& remainder) {
  const u32 b = (float_bits(x) & kAbsMask) > kInfinity ? kNaN : float_bits(x);
  const u32 high = (b + 0x8000u) >> 16;
  p = static_cast<u16>(high);
  remainder = static_cast<i16>(static_cast<u16>(b - (high << 16)));
}

// Stochastic rounding: up or down, with x as the mean.
JADAM_INLINE u16 round_to_bfloat16(float x, u32 random) {
  const u32 b = float_bits(x);
  const u32 rounded = (b + (random >> 16)) >> 16;
  const u32 not_finite = (b >> 16) | ((b & kAbsMask) > kInfinity ? 0x40u : 0u);  // truncated; the quiet bit keeps NaN
  return static_cast<u16>((b & kAbsMask) >= kInfinity ? not_finite : rounded);
}

// int8 moments: a block stores r = m / sqrt(v) and v, each as a scale and 8-bit codes, see jadam/_moments/int8.py.
constexpr float kRTop = 5.9375f, kVTop = 31.0f / 32.0f;  // what the largest |r| and v of a block are scaled to
constexpr float kEncodedVTop = 4.0f * kVTop;  // in `quantize_v`, so that dividing it by a large scale does not underflow
constexpr float kBelowRTop = kRTop * (1.0f - 0x1p-22f);  // so that rounding errors do not take 2 + |r| to 8
constexpr float kMinRScale = 1e-30f, kMinVScale = 0x1p-126f;  // smaller scales become 0

// m and v from the code of r and, as a float, the code of v. r_step is the block's scale of r divided by kRTop, v_step
// that of v by kVTop.
JADAM_INLINE void dequantize(i8 rq, float vq, float r_step, float v_step, float& m, float& v) {
  v = v_step * float_from_bits((float_bits(vq) << 3) + 0x23800000u);
  const u32 code = static_cast<u32>(static_cast<i32>(rq));
  const float r = float_from_bits((code & 0x7Fu) << 17 | 0x40000000u) - 2.0f;
  m = float_from_bits(float_bits(r * (r_step * sqrt_of(v))) ^ (code & 0x80000000u));
}

// m / sqrt(v), 0 where v is 0, from rsqrt_of(v).
JADAM_INLINE float ratio(float m, float v, float rsqrt_v) { return m * (v > 0.0f ? rsqrt_v : 0.0f); }

// A block's scales from the bits of its largest |r| and v. Positive floats are ordered as their bits are, and NaN is
// the largest. Both scales are NaN if a value is not finite, because codes cannot hold it.
JADAM_INLINE void scales(i32 r_max, i32 v_max, float& r_scale, float& v_scale) {
  const bool finite = max_int(r_max, v_max) < static_cast<i32>(kInfinity);
  const float r = float_from_bits(static_cast<u32>(r_max)), v = float_from_bits(static_cast<u32>(v_max));
  r_scale = !finite ? float_from_bits(kNaN) : r < kMinRScale ? 0.0f : r;
  v_scale = !finite ? float_from_bits(kNaN) : v < kMinVScale ? 0.0f : v;
}

// For `quantize_r` and `quantize_v`. v may be as large as a square is.
JADAM_INLINE float r_inverse_step_of(float scale) { return scale > 0.0f ? kBelowRTop / scale : 0.0f; }
JADAM_INLINE float v_inverse_step_of(float scale) { return scale > 0.0f ? divide_by_large(kEncodedVTop, scale) : 0.0f; }

// The code of r, rounded stochastically: its sign, the last bit of the exponent of 2 + |r|, and 6 bits of the mantissa.
JADAM_INLINE u32 quantize_r(float r, float r_inverse_step, u32 random) {
  const float x = 2.0f + abs_of(r) * r_inverse_step;
  return ((float_bits(x) + (random & 0x1FFFFu)) >> 17 & 0x7Fu) | (r < 0.0f ? 0x80u : 0u);
}

// The code of v, rounded stochastically: the bits of v shifted right are those of nearly its eighth root.
JADAM_INLINE u32 quantize_v(float v, float v_inverse_step, u32 random) {
  const float y = v * v_inverse_step + 0x1p-62f;
  const float uniform = float_from_bits(random >> 9 | 0x3F800000u) - 1.0f;
  const float code = float_from_bits((float_bits(y) >> 3) + 0x3B700000u) + uniform;  // positive, even if y is NaN
  const i32 bits = min_int(static_cast<i32>(float_bits(code)), static_cast<i32>(float_bits(255.0f)));  // 255 for NaN
  return truncate(float_from_bits(static_cast<u32>(bits)));
}

// Returns the new parameter of an element with int8 moments, and sets the new r and v. r_step, v_step: see dequantize.
template <class Rule, bool kCommonScalars>
JADAM_INLINE float update_int8(const Scalars& s, bool weight_decay, float g, float p, i8 rq, float vq, float r_step,
                               float v_step, float& r, float& v) {
  Moments x{};
  dequantize(rq, vq, r_step, v_step, x.m, x.v);
  Rule::template update_moments<kCommonScalars>(s, g, x);
  const float rsqrt_v = rsqrt_of(x.v);
  const float u = Rule::template direction<kCommonScalars>(s, g, x, x.v * rsqrt_v);
  r = ratio(x.m, x.v, rsqrt_v);
  v = x.v;
  return new_parameter(s, weight_decay, p, u);
}

}  // namespace jadam

#endif  // JADAM_FORMATS_H_
