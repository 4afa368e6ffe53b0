// Storage formats of moments and parameters, element by element: jadam/_moments and jadam/_core/bf16.py for kernels.

#ifndef JADAM_FORMATS_H_
#define JADAM_FORMATS_H_

#include "portable.h"

namespace jadam {

enum Format { kFloat32, kBFloat16, kInt8, kFormats };
constexpr char kFormatNames[] = "float32 bfloat16 int8";  // the Python names, in the order of Format

JADAM_INLINE float float_from_bfloat16(u16 x) { return float_from_bits(static_cast<u32>(x) << 16); }

JADAM_INLINE u32 lowbias32(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Random bits for stochastic rounding, as `dither` of jadam/_core/numerics.py: stream k of the leaf with this salt after
// count steps. An even stream and the next odd one share the hash of an element's index, because its halves are independent.
struct Dither {
  u32 salt, offset;
  JADAM_INLINE Dither(u32 salt, u32 k, u32 count)
      : salt(lowbias32(salt + k / 2 * 0x632BE5ABu)), offset(count * 0x9E3779B9u) {}
  JADAM_INLINE u32 hash(u32 index) const { return lowbias32(index ^ salt); }
  JADAM_INLINE u32 even_stream(u32 hash) const { return hash + offset; }
  JADAM_INLINE u32 odd_stream(u32 hash) const { return (hash << 16 | hash >> 16) + offset; }
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

// int8 moments: a block stores s = sqrt(v) and r = m / s, each as a scale and 8-bit codes, see jadam/_moments/int8.py.
constexpr float kRLevels = 127.0f * 127.0f, kSLevels = 255.0f * 255.0f * 255.0f * 255.0f;  // of the largest codes
constexpr float kSmallestRatio = 1e-30f;  // if all |r| of a block are below, they are stored as 0

JADAM_INLINE float uniform(u32 random) { return static_cast<float>(static_cast<i32>(random >> 8)) * 0x1p-24f; }
JADAM_INLINE float square(float x) { return x * x; }
JADAM_INLINE float eighth_power(float x) { return square(square(square(x))); }

// m and v from their codes. r_step is the block's scale of r divided by kRLevels, s_step that of s by kSLevels.
JADAM_INLINE void dequantize(i8 rq, u8 sq, float r_step, float s_step, float& m, float& v) {
  const float code = static_cast<float>(static_cast<i32>(rq));
  const float s = s_step * square(square(static_cast<float>(static_cast<i32>(sq))));
  m = r_step * (code * abs_of(code)) * s;
  v = s * s;
}

JADAM_INLINE float ratio(float m, float s) { return s > 0.0f ? m / s : m * 0.0f; }

// A block's scales from the bits of its largest |r| and s. Positive floats are ordered as their bits are, and NaN is
// the largest. Both scales are NaN if a value is not finite, because codes cannot hold it.
JADAM_INLINE void scales(i32 r_max, i32 s_max, float& r_scale, float& s_scale) {
  const bool finite = max_int(r_max, s_max) < static_cast<i32>(kInfinity);
  const float r = float_from_bits(static_cast<u32>(r_max));
  r_scale = !finite ? float_from_bits(kNaN) : r < kSmallestRatio ? 0.0f : r;
  s_scale = finite ? float_from_bits(static_cast<u32>(s_max)) : float_from_bits(kNaN);
}

JADAM_INLINE float inverse_step(float levels, float scale) { return scale > 0.0f ? levels / scale : 0.0f; }

// The code of r, rounded stochastically between neighbouring squares.
JADAM_INLINE i32 quantize_r(float r, float r_inverse_step, u32 random) {
  const float y = abs_of(r) * r_inverse_step, root = sqrt_of(y);
  const i32 a = static_cast<i32>(root < 126.0f ? root : 126.0f);
  const float low = static_cast<float>(a);
  const i32 code = a + (uniform(random) * (2.0f * low + 1.0f) < y - low * low);
  return r < 0.0f ? -code : code;
}

// The code of s, rounded stochastically so that v = s * s is the mean. Code 0 is v = 0 exactly.
JADAM_INLINE i32 quantize_s(float s, float s_inverse_step, u32 random) {
  const float w = s * s_inverse_step, fourth_root = sqrt_of(sqrt_of(w));
  const i32 c = static_cast<i32>(fourth_root < 254.0f ? fourth_root : 254.0f);
  const float low = eighth_power(static_cast<float>(c)), high = eighth_power(static_cast<float>(c) + 1.0f);
  const i32 code = c + (uniform(random) * (high - low) < w * w - low);
  return s > 0.0f ? max_int(code, 1) : 0;
}

}  // namespace jadam

#endif  // JADAM_FORMATS_H_
