// Types and float functions for host compilers, nvcc and NVRTC. Uses no standard library.

#ifndef JADAM_PORTABLE_H_
#define JADAM_PORTABLE_H_

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define JADAM_INLINE __device__ __forceinline__
#elif defined(__GNUC__)
#define JADAM_INLINE inline __attribute__((always_inline))
#else
#define JADAM_INLINE inline
#include <math.h>
#include <string.h>
#endif

namespace jadam {

using i8 = signed char;
using i16 = short;
using i32 = int;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

constexpr float kLowestFinite = -3.402823466e+38f;
constexpr u32 kInfinity = 0x7F800000u, kNaN = 0x7FC00000u, kAbsMask = 0x7FFFFFFFu;  // bit patterns of float32

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
JADAM_INLINE u32 float_bits(float x) { return __float_as_uint(x); }
JADAM_INLINE float float_from_bits(u32 x) { return __uint_as_float(x); }
JADAM_INLINE float sqrt_of(float x) { return sqrtf(x); }
JADAM_INLINE float abs_of(float x) { return fabsf(x); }
// Finite for 0 and positive for infinity, so that x * rsqrt_of(x) is sqrt(x) for both.
JADAM_INLINE float rsqrt_of(float x) { return rsqrtf(fminf(fmaxf(x, 0x1p-126f), -kLowestFinite)); }
// x / y for y >= 2**-126. A GPU's fast division gives 0 for y > 2**126.
JADAM_INLINE float divide_by_large(float x, float y) {
  const float rsqrt_y = rsqrtf(y);
  return x * rsqrt_y * rsqrt_y;
}
// A GPU's conversions between integers and floats are as slow as its roots. The last bit of floats from 2**23 on is
// worth 1, so adding 2**23 does the same.
JADAM_INLINE float float_from_byte(u32 x, int k) {
  return __uint_as_float(__byte_perm(x, 0x4B000000u, 0x7440u + k)) - 8388608.0f;
}
JADAM_INLINE u32 truncate(float x) { return __float_as_uint(__fadd_rd(x, 8388608.0f)) & 0x7FFFFFu; }
#else
#if !defined(__GNUC__)
#define __builtin_memcpy memcpy
#define __builtin_sqrtf sqrtf
#define __builtin_fabsf fabsf
#endif
template <class To, class From>
JADAM_INLINE To bit_cast(From x) {
  To to;
  __builtin_memcpy(&to, &x, sizeof(to));
  return to;
}
JADAM_INLINE u32 float_bits(float x) { return bit_cast<u32>(x); }
JADAM_INLINE float float_from_bits(u32 x) { return bit_cast<float>(x); }
JADAM_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
JADAM_INLINE float abs_of(float x) { return __builtin_fabsf(x); }
JADAM_INLINE float divide_by_large(float x, float y) { return x / y; }
// Byte k of x.
JADAM_INLINE float float_from_byte(u32 x, int k) { return static_cast<float>(static_cast<i32>(x >> 8 * k & 0xFFu)); }
JADAM_INLINE u32 truncate(float x) { return static_cast<u32>(static_cast<i32>(x)); }  // 0 <= x < 2**23

// 1 / sqrt(x) for x > 0 with a relative error below 8e-7, faster than a root and a division: an estimate from the bits,
// and two Newton steps whose constants centre the error (Walczyk, Moroz & Cieslinski 2021). Finite for 0 and denormals.
// x / 2 is not computed: it may be denormal, which XLA's threads flush to 0.
JADAM_INLINE float rsqrt_of(float x) {
  float y = float_from_bits(0x5F376908u - (float_bits(x) >> 1));
  y = y * (1.5008789f - x * y * (0.5f * y));
  return y * (1.5000006f - x * y * (0.5f * y));
}
#endif

JADAM_INLINE i32 max_int(i32 x, i32 y) { return x < y ? y : x; }
JADAM_INLINE i32 min_int(i32 x, i32 y) { return x < y ? x : y; }

}  // namespace jadam

#endif  // JADAM_PORTABLE_H_
