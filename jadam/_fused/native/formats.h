// How moments and parameters are stored, element by element: jadam/_moments and jadam/_core/bf16.py for kernels.

#ifndef JADAM_FORMATS_H_
#define JADAM_FORMATS_H_

#include "portable.h"

namespace jadam {

enum Format { kFloat32, kBFloat16, kInt8, kFormats };
constexpr char kFormatNames[] = "float32 bfloat16 int8";  // as Python calls them, in this order

JADAM_INLINE float widen(u16 x) { return float_of(static_cast<u32>(x) << 16); }

JADAM_INLINE u32 lowbias32(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// A hash of the place, from which a walk starts in each of two streams; further streams have another salt.
struct Dither {
  u32 salt, walk;
  JADAM_INLINE Dither(u32 leaf, u32 k, u32 t) : salt(lowbias32(leaf + k / 2 * 0x632BE5ABu)), walk(t * 0x9E3779B9u) {}
  JADAM_INLINE u32 start(u32 index) const { return lowbias32(index ^ salt); }
  JADAM_INLINE u32 even(u32 start) const { return start + walk; }
  JADAM_INLINE u32 odd(u32 start) const { return (start << 16 | start >> 16) + walk; }
};

// float32 from its bfloat16 rounding and the remainder; a weight that was set from outside to 0 or infinity loses one
// that would make it NaN.
JADAM_INLINE float join(u16 p, i16 remainder) {
  const i32 size = p & 0x7FFF, r = remainder;
  const bool stray = (size == 0 && r < 0) || (size == 0x7F80 && r > 0);
  return float_of((static_cast<u32>(p) << 16) + static_cast<u32>(stray ? 0 : r));
}

JADAM_INLINE void split(float from, u16& p, i16& remainder) {
  const u32 x = (bits(from) & kNoSign) > kInfinity ? kNaN : bits(from);
  const u32 high = (x + 0x8000u) >> 16;
  p = static_cast<u16>(high);
  remainder = static_cast<i16>(static_cast<u16>(x - (high << 16)));
}

// Up or down with the probabilities that make the mean `x`.
JADAM_INLINE u16 round_to_bfloat16(float x, u32 random) {
  const u32 b = bits(x);
  const u32 rounded = (b + (random >> 16)) >> 16;
  const u32 kept = (b >> 16) | ((b & kNoSign) > kInfinity ? 0x40u : 0u);
  return static_cast<u16>((b & kNoSign) >= kInfinity ? kept : rounded);
}

constexpr float kRLevels = 127.0f * 127.0f, kSLevels = 255.0f * 255.0f * 255.0f * 255.0f;  // of the largest codes
constexpr float kSmallestRatio = 1e-30f;  // of m and sqrt(v) that a block has; below it they are 0

JADAM_INLINE float uniform(u32 random) { return static_cast<float>(static_cast<i32>(random >> 8)) * 0x1p-24f; }
JADAM_INLINE float square(float x) { return x * x; }
JADAM_INLINE float eighth_power(float x) { return square(square(square(x))); }

// m and v of codes; the factors are a block's scales over the levels.
JADAM_INLINE void dequantize(i8 rq, u8 sq, float by_r, float by_s, float& m, float& v) {
  const float code = static_cast<float>(static_cast<i32>(rq));
  const float s = by_s * square(square(static_cast<float>(static_cast<i32>(sq))));
  m = by_r * (code * magnitude(code)) * s;
  v = s * s;
}

JADAM_INLINE float ratio(float m, float root) { return root > 0.0f ? m / root : m * 0.0f; }

// The scales of a block, from the bits of its largest |ratio| and root: the order of positive floats is that of their
// bits, and NaN is largest. NaN if one is not finite.
JADAM_INLINE void scales(i32 r_max, i32 s_max, float& r_scale, float& s_scale) {
  const bool finite = larger(r_max, s_max) < static_cast<i32>(kInfinity);
  const float largest = float_of(static_cast<u32>(r_max));
  r_scale = !finite ? float_of(kNaN) : largest < kSmallestRatio ? 0.0f : largest;
  s_scale = finite ? float_of(static_cast<u32>(s_max)) : float_of(kNaN);
}

JADAM_INLINE float levels_over(float levels, float scale) { return scale > 0.0f ? levels / scale : 0.0f; }

// The code of a ratio, from random bits.
JADAM_INLINE i32 ratio_code(float r, float by_r, u32 random) {
  const float y = magnitude(r) * by_r, root = root_of(y);
  const i32 a = static_cast<i32>(root < 126.0f ? root : 126.0f);
  const float below = static_cast<float>(a);
  const i32 up = a + (uniform(random) * (2.0f * below + 1.0f) < y - below * below);
  return r < 0.0f ? -up : up;
}

// The code of sqrt(v).
JADAM_INLINE i32 root_code(float s, float by_s, u32 random) {
  const float w = s * by_s, fourth = root_of(root_of(w));
  const i32 c = static_cast<i32>(fourth < 254.0f ? fourth : 254.0f);
  const float low = eighth_power(static_cast<float>(c)), high = eighth_power(static_cast<float>(c) + 1.0f);
  const i32 code = c + (uniform(random) * (high - low) < w * w - low);
  return s > 0.0f ? larger(code, 1) : 0;
}

}  // namespace jadam

#endif  // JADAM_FORMATS_H_
