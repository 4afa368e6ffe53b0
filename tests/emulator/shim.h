// What kernel.cu needs of CUDA, for the host's compiler. A warp's lanes run one after the other, up to the next
// function in which they exchange values; see emulator.cc.

#ifndef JADAM_SHIM_H_
#define JADAM_SHIM_H_

#include <cmath>
#include <cstring>

#define __CUDACC_RTC__ 1
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx;
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Every lane gives a value; each gets those of all.
const int* exchange(int x);
extern int lane;

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fadd_rd(float x, float y) {  // exact in double for the sums of a byte's size with 2**23
  const double sum = static_cast<double>(x) + y;
  const float rounded = static_cast<float>(sum);
  return rounded > sum ? std::nextafter(rounded, -INFINITY) : rounded;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline int __reduce_max_sync(unsigned, int x) {
  const int* all = exchange(x);
  for (int i = 0; i < 32; ++i) x = all[i] > x ? all[i] : x;
  return x;
}
inline int __shfl_xor_sync(unsigned, int x, int mask) { return exchange(x)[lane ^ mask]; }

#endif  // JADAM_SHIM_H_
