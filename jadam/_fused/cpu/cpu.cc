// One pass over memory for Adam and its relatives on a CPU: an XLA FFI handler over a group of leaves.
//
// This is `Job.update` of jadam/_transformation/transformation.py, its rules and its formats, written a second time; the
// tests hold the two together. A leaf is taken in tiles that fit the first cache: load, decode, rule, descend, encode, store, each a
// loop over the tile that the compiler vectorises, so that formats, rules and dtypes add up instead of multiplying.
//
// Limits: gradients float32 or bfloat16; parameters float32, or bfloat16 with a remainder; moments float32, bfloat16 or
// (two of them) int8; blocks of at most kTile elements. Outputs may be the inputs' own buffers, not parts of them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define JADAM_X86 1
#endif
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

namespace {

constexpr int64_t kTile = 512;       // elements a tile: 10 KiB of float32
constexpr int64_t kPiece = 1 << 15;  // elements a thread takes at a time

enum Rule : int64_t { kAdam, kNAdam, kAdaMax, kAMSGrad, kAMSGradOfV, kRAdam, kRAdamOfNAdam, kRules };
constexpr char kRuleNames[] = "adam nadam adamax amsgrad amsgrad_of_v radam radam_of_nadam";  // as Python calls them
enum Format : int64_t { kFloat32, kBFloat16, kInt8, kFormats };
enum Limit : int64_t { kBound = 1, kNorm = 2, kLimits = 4 };

// One row of the scalars' buffer, in this order; jadam/_fused/cpu/kernel.py fills it.
struct Scalars {
  float b1, one_minus_b1, correction1;  // the corrections come as 1 / (1 - b**t)
  float b2, one_minus_b2, correction2, root_correction2;
  float next, next_correction, newest, newest_correction;  // NAdam's look ahead
  float eps, eps_root;
  float trusted, rectification;  // RAdam's
  float minus_lr, weight_decay;
  float bound, norm, max_norm;
};
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

// One row of the attribute "leaves".
struct Settings {
  int64_t rule, format, limit, scalars, salt, block, run, stride;
};
constexpr int64_t kSettings = sizeof(Settings) / sizeof(int64_t);

template <class To, class From>
INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

INLINE uint32_t bits(float x) { return bitcast<uint32_t>(x); }
INLINE float widen(uint16_t x) { return bitcast<float>(static_cast<uint32_t>(x) << 16); }

constexpr uint32_t kInfinity = 0x7F800000, kNoSign = 0x7FFFFFFF;

INLINE uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// A hash of the place, from which a walk starts in each of two streams; further streams have another salt.
struct Dither {
  uint32_t salt, walk;
  Dither(uint32_t leaf, uint32_t k, uint32_t t)
      : salt(lowbias32(leaf + k / 2 * 0x632BE5ABu)), walk(t * 0x9E3779B9u) {}
  INLINE uint32_t start(uint32_t index) const { return lowbias32(index ^ salt); }
  INLINE uint32_t even(uint32_t start) const { return start + walk; }
  INLINE uint32_t odd(uint32_t start) const { return (start << 16 | start >> 16) + walk; }
};

struct Leaf {
  Settings set;
  Scalars s;
  int64_t n = 0, row = 0, blocks = 0, moments = 0;  // elements, of the last axis, blocks along it
  uint32_t first = 0;                               // index of the first element in the array of which this is a part
  bool narrow_g = false, narrow_p = false;
  const void* g = nullptr;
  const void* p = nullptr;
  void* p_out = nullptr;
  const int16_t* rest = nullptr;
  int16_t* rest_out = nullptr;
  const void* m[3] = {};
  void* m_out[3] = {};
  const float* scale[2] = {};
  float* scale_out[2] = {};
};

// Where the loops find their float32: in the leaf itself where it is stored so, else in the tile's own memory.
struct Tile {
  alignas(64) float own_g[kTile], own_p[kTile], own_m[3][kTile], roots[kTile];
  const float *g, *p, *m[3];
  float *p_out, *m_out[3];
};

INLINE void load(float* to, const void* from, int64_t start, int64_t n) {
  const uint16_t* x = static_cast<const uint16_t*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) to[i] = widen(x[i]);
}

INLINE const float* at(const void* from, int64_t start) { return static_cast<const float*>(from) + start; }
INLINE float* at(void* from, int64_t start) { return static_cast<float*>(from) + start; }

INLINE void limit(const Leaf& leaf, Tile& tile, int64_t n) {
  if (!leaf.set.limit) return;
  const float bound = leaf.s.bound, norm = leaf.s.norm, max_norm = leaf.s.max_norm;
  float* g = tile.own_g;
  if (tile.g != g) std::memcpy(g, tile.g, n * sizeof(float));
  tile.g = g;
  if (leaf.set.limit & kBound) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) {
      float x = g[i] > bound ? bound : g[i];
      g[i] = x < -bound ? -bound : x;
    }
  }
  if (leaf.set.limit & kNorm) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) g[i] = g[i] / norm * max_norm;
  }
}

INLINE float divide(float x, float y) { return x / (y == 0.0f ? 1.0f : y); }

// b * average + (1-b) * x, the correction on the term with the larger weight.
template <bool kSlow>
INLINE float ema(float b, float one_minus_b, float average, float x) {
  if (kSlow || b >= 0.5f) return average + one_minus_b * (x - average);
  return x + b * (average - x);
}

// NaN if either is, -infinity if x is: where g * g overflows, v is NaN as written but -infinity contracted.
INLINE float maximum(float x, float y) { return !(x >= std::numeric_limits<float>::lowest()) || x > y ? x : y; }

// The rule on one element: from gradient and moments, which it updates, to the direction. kUsual: b1 and b2 are at least
// 1/2 and eps_root is 0. Multiplies by the reciprocals of what Python divides by, where that is a scalar.
template <int64_t kRule, bool kUsual>
INLINE float direction(const Scalars& s, float g, float& m, float& v, float& largest, float& root) {
  m = ema<kUsual>(s.b1, s.one_minus_b1, m, g);
  if (kRule == kAdaMax) {
    v = maximum(s.b2 * v, std::fabs(g) + s.eps);
    return divide(m * s.correction1, v);
  }
  v = ema<kUsual>(s.b2, s.one_minus_b2, v, g * g);
  float m_hat = m * s.correction1;
  if (kRule == kNAdam || kRule == kRAdamOfNAdam) m_hat = s.next * m * s.next_correction + s.newest * g * s.newest_correction;
  float second = v, correction2 = s.correction2;
  if (kRule == kAMSGrad) {
    second = largest = maximum(v * s.correction2, largest);
    correction2 = 1.0f;
  }
  if (kRule == kAMSGradOfV) second = largest = maximum(v, largest);
  root = std::sqrt(second);
  const float root_hat = kRule == kAMSGrad ? root : root * s.root_correction2;
  const float denominator = (kUsual ? root_hat : std::sqrt(second * correction2 + s.eps_root)) + s.eps;
  const float u = divide(m_hat, denominator);
  if (kRule == kRAdam || kRule == kRAdamOfNAdam) return s.trusted != 0.0f ? s.rectification * u : m_hat;
  return u;
}

// From gradient and moments to the parameter. kRoots: sqrt(v) is kept in the tile, and v is not.
template <int64_t kRule, bool kUsual, bool kDecay, bool kRoots>
INLINE void loop(const Scalars s, Tile& tile, int64_t n) {
  constexpr bool kThird = kRule == kAMSGrad || kRule == kAMSGradOfV;
  const float *g = tile.g, *p = tile.p, *m = tile.m[0], *v = tile.m[1], *largest = tile.m[2];
  float *p_out = tile.p_out, *m_out = tile.m_out[0], *v_out = tile.m_out[1], *largest_out = tile.m_out[2];
  float* roots = tile.roots;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    float m_i = m[i], v_i = v[i], largest_i = kThird ? largest[i] : 0.0f, root = 0.0f;
    float u = direction<kRule, kUsual>(s, g[i], m_i, v_i, largest_i, root);
    if (kDecay) u = u + s.weight_decay * p[i];
    p_out[i] = p[i] + s.minus_lr * u;
    m_out[i] = m_i;
    if (!kRoots) v_out[i] = v_i;
    if (kThird) largest_out[i] = largest_i;
    if (kRoots) roots[i] = root;
  }
}

template <int64_t kRule, bool kRoots>
INLINE void loop(const Scalars& s, Tile& tile, int64_t n) {
  const bool usual = s.b1 >= 0.5f && s.b2 >= 0.5f && s.eps_root == 0.0f;
  if (s.weight_decay == 0.0f) {
    usual ? loop<kRule, true, false, kRoots>(s, tile, n) : loop<kRule, false, false, kRoots>(s, tile, n);
  } else {
    usual ? loop<kRule, true, true, kRoots>(s, tile, n) : loop<kRule, false, true, kRoots>(s, tile, n);
  }
}

INLINE void step_tile(const Leaf& leaf, Tile& tile, int64_t n) {
  const bool roots = leaf.set.format == kInt8;
  switch (leaf.set.rule) {
    case kAdam: return roots ? loop<kAdam, true>(leaf.s, tile, n) : loop<kAdam, false>(leaf.s, tile, n);
    case kNAdam: return roots ? loop<kNAdam, true>(leaf.s, tile, n) : loop<kNAdam, false>(leaf.s, tile, n);
    case kAdaMax: return loop<kAdaMax, false>(leaf.s, tile, n);
    case kAMSGrad: return loop<kAMSGrad, false>(leaf.s, tile, n);
    case kAMSGradOfV: return loop<kAMSGradOfV, false>(leaf.s, tile, n);
    case kRAdam: return loop<kRAdam, false>(leaf.s, tile, n);
    default: return loop<kRAdamOfNAdam, false>(leaf.s, tile, n);
  }
}

// float32 from its bfloat16 rounding and the remainder; a weight that was set from outside to 0 or infinity loses one
// that would make it NaN.
INLINE void join(float* to, const void* from, const int16_t* rest, int64_t start, int64_t n) {
  const uint16_t* p = static_cast<const uint16_t*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = p[i] & 0x7FFF, r = rest[start + i];
    const bool stray = (magnitude == 0 && r < 0) || (magnitude == 0x7F80 && r > 0);
    to[i] = bitcast<float>((static_cast<uint32_t>(p[i]) << 16) + static_cast<uint32_t>(stray ? 0 : r));
  }
}

INLINE void split(void* to, int16_t* rest, const float* from, int64_t start, int64_t n) {
  uint16_t* p = static_cast<uint16_t*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = (bits(from[i]) & kNoSign) > kInfinity ? 0x7FC00000u : bits(from[i]);
    const uint32_t high = (x + 0x8000u) >> 16;
    p[i] = static_cast<uint16_t>(high);
    rest[start + i] = static_cast<int16_t>(static_cast<uint16_t>(x - (high << 16)));
  }
}

template <bool kOdd>
INLINE void round_to_bfloat16(void* to, const float* from, const Dither& dither, int64_t start, uint32_t first,
                              int64_t n) {
  uint16_t* x = static_cast<uint16_t*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits(from[i]);
    const uint32_t place = dither.start(first + static_cast<uint32_t>(i));
    const uint32_t rounded = (b + ((kOdd ? dither.odd(place) : dither.even(place)) >> 16)) >> 16;
    const uint32_t kept = (b >> 16) | ((b & kNoSign) > kInfinity ? 0x40u : 0u);
    x[i] = static_cast<uint16_t>((b & kNoSign) >= kInfinity ? kept : rounded);
  }
}

constexpr float kRLevels = 127.0f * 127.0f, kSLevels = 255.0f * 255.0f * 255.0f * 255.0f;  // of the largest codes
constexpr float kSmallestRatio = 1e-30f;  // of m and sqrt(v) that a block has; below it they are 0

INLINE float uniform(uint32_t bits) { return static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f; }
INLINE float square(float x) { return x * x; }
INLINE float eighth_power(float x) { return square(square(square(x))); }

INLINE void dequantize(Tile& tile, int64_t at, const int8_t* rq, const uint8_t* sq, float rs, float ss, int64_t n) {
  float *m = tile.own_m[0] + at, *v = tile.own_m[1] + at;
  const float by_r = rs * (1.0f / kRLevels), by_s = ss * (1.0f / kSLevels);
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const float code = static_cast<float>(static_cast<int32_t>(rq[i]));
    const float s = by_s * square(square(static_cast<float>(static_cast<int32_t>(sq[i]))));
    m[i] = by_r * (code * std::fabs(code)) * s;
    v[i] = s * s;
  }
}

INLINE void quantize(Tile& tile, int64_t at, int8_t* rq, uint8_t* sq, float* r_scale, float* s_scale,
                     const Dither& dither, uint32_t first, int64_t n) {
  float *r = tile.own_m[0] + at, *s = tile.roots + at;
  int32_t r_max = 0, s_max = 0;  // the order of positive floats is that of their bits, and NaN is largest
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const float m = r[i], root = s[i], ratio = root > 0.0f ? m / root : m * 0.0f;
    r[i] = ratio;
    r_max = std::max(r_max, static_cast<int32_t>(bits(ratio) & kNoSign));
    s_max = std::max(s_max, static_cast<int32_t>(bits(root) & kNoSign));
  }
  const bool finite = std::max(r_max, s_max) < static_cast<int32_t>(kInfinity);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float rs = !finite ? nan : bitcast<float>(r_max) < kSmallestRatio ? 0.0f : bitcast<float>(r_max);
  const float ss = finite ? bitcast<float>(s_max) : nan;
  *r_scale = rs;
  *s_scale = ss;
  const float by_r = rs > 0.0f ? kRLevels / rs : 0.0f, by_s = ss > 0.0f ? kSLevels / ss : 0.0f;
  alignas(64) int32_t new_r[kTile], new_s[kTile];  // codes; narrowed in the same loop they would slow it down
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const uint32_t start = dither.start(first + static_cast<uint32_t>(i));
    const float y = std::fabs(r[i]) * by_r, root = std::sqrt(y);
    const int32_t a = static_cast<int32_t>(root < 126.0f ? root : 126.0f);
    const float below = static_cast<float>(a);
    const int32_t up = a + (uniform(dither.even(start)) * (2.0f * below + 1.0f) < y - below * below);
    new_r[i] = r[i] < 0.0f ? -up : up;
    const float w = s[i] * by_s, fourth = std::sqrt(std::sqrt(w));
    const int32_t c = static_cast<int32_t>(fourth < 254.0f ? fourth : 254.0f);
    const float low = eighth_power(static_cast<float>(c)), high = eighth_power(static_cast<float>(c) + 1.0f);
    const int32_t code = c + (uniform(dither.odd(start)) * (high - low) < w * w - low);
    new_s[i] = s[i] > 0.0f ? std::max(code, 1) : 0;
  }
  INDEPENDENT for (int64_t i = 0; i < n; ++i) rq[i] = static_cast<int8_t>(new_r[i]);
  INDEPENDENT for (int64_t i = 0; i < n; ++i) sq[i] = static_cast<uint8_t>(new_s[i]);
}

// Elements [start, start + n) from gradient to parameter, with the moments where the tile says.
INLINE void update(const Leaf& leaf, Tile& tile, int64_t start, int64_t n) {
  tile.g = leaf.narrow_g ? tile.own_g : at(leaf.g, start);
  tile.p = leaf.narrow_p ? tile.own_p : at(leaf.p, start);
  tile.p_out = leaf.narrow_p ? tile.own_p : at(leaf.p_out, start);
  if (leaf.narrow_g) load(tile.own_g, leaf.g, start, n);
  if (leaf.narrow_p) join(tile.own_p, leaf.p, leaf.rest, start, n);
  limit(leaf, tile, n);
  step_tile(leaf, tile, n);
  if (leaf.narrow_p) split(leaf.p_out, leaf.rest_out, tile.own_p, start, n);
}

// The index of an element in the whole array modulo 2**32, which the dither is a function of.
INLINE uint32_t index(const Leaf& leaf, int64_t i) {
  const uint32_t run = static_cast<uint32_t>(i / leaf.set.run), stride = static_cast<uint32_t>(leaf.set.stride);
  return leaf.first + run * stride + static_cast<uint32_t>(i % leaf.set.run);
}

struct Piece {
  int64_t leaf, begin, end;  // units: elements, or blocks of an int8 leaf
};

// Elements of a run of blocks: [start of block, start of the next).
INLINE int64_t block_start(const Leaf& leaf, int64_t block) {
  return block / leaf.blocks * leaf.row + block % leaf.blocks * leaf.set.block;
}

INLINE void run_int8(const Leaf& leaf, Tile& tile, uint32_t t, int64_t begin, int64_t end) {
  const uint32_t salt = static_cast<uint32_t>(leaf.set.salt);
  const Dither dither(salt, 0, t);
  for (int k = 0; k < 2; ++k) tile.m[k] = tile.m_out[k] = tile.own_m[k];
  const int8_t* rq = static_cast<const int8_t*>(leaf.m[0]);
  const uint8_t* sq = static_cast<const uint8_t*>(leaf.m[1]);
  int8_t* rq_out = static_cast<int8_t*>(leaf.m_out[0]);
  uint8_t* sq_out = static_cast<uint8_t*>(leaf.m_out[1]);
  for (int64_t block = begin; block < end;) {
    const int64_t start = block_start(leaf, block), from = block;
    for (; block < end; ++block) {  // as many whole blocks as a tile holds; they follow one another in memory
      const int64_t at = block_start(leaf, block) - start, n = block_start(leaf, block + 1) - start - at;
      if (at + n > kTile) break;
      dequantize(tile, at, rq + start + at, sq + start + at, leaf.scale[0][block], leaf.scale[1][block], n);
    }
    update(leaf, tile, start, block_start(leaf, block) - start);
    for (int64_t k = from; k < block; ++k) {
      const int64_t at = block_start(leaf, k) - start, n = block_start(leaf, k + 1) - start - at;
      quantize(tile, at, rq_out + start + at, sq_out + start + at, leaf.scale_out[0] + k, leaf.scale_out[1] + k, dither,
               index(leaf, start + at), n);
    }
  }
}

INLINE void run_plain(const Leaf& leaf, Tile& tile, uint32_t t, int64_t begin, int64_t end) {
  const bool narrow = leaf.set.format == kBFloat16;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = std::min(kTile, end - start);
    for (int64_t k = 0; k < leaf.moments; ++k) {
      tile.m[k] = narrow ? tile.own_m[k] : at(leaf.m[k], start);
      tile.m_out[k] = narrow ? tile.own_m[k] : at(leaf.m_out[k], start);
      if (narrow) load(tile.own_m[k], leaf.m[k], start, n);
    }
    update(leaf, tile, start, n);
    for (int64_t k = 0; narrow && k < leaf.moments; ++k) {
      const Dither dither(static_cast<uint32_t>(leaf.set.salt), static_cast<uint32_t>(k), t);
      for (int64_t at = 0, end = 0; at < n; at = end) {  // up to where the run ends
        end = std::min(n, at + leaf.set.run - (start + at) % leaf.set.run);
        const uint32_t first = index(leaf, start + at);
        if (k % 2) {
          round_to_bfloat16<true>(leaf.m_out[k], tile.own_m[k] + at, dither, start + at, first, end - at);
        } else {
          round_to_bfloat16<false>(leaf.m_out[k], tile.own_m[k] + at, dither, start + at, first, end - at);
        }
      }
    }
  }
}

INLINE void run_piece(const Leaf& leaf, uint32_t t, const Piece& piece) {
  Tile tile;
  if (leaf.set.format == kInt8) {
    run_int8(leaf, tile, t, piece.begin, piece.end);
  } else {
    run_plain(leaf, tile, t, piece.begin, piece.end);
  }
}

// The same loops for three instruction sets. With 64-byte vectors a cache line is touched once, which tells where the
// arrays' addresses collide in the first cache: AMD's tells lines apart by a hash of the address, and that of arrays which
// XLA allocated in a row is often the same.
using Run = void (*)(const Leaf&, uint32_t, const Piece&);
struct Instructions {
  const char* name;
  Run run;
};

void run_portable(const Leaf& leaf, uint32_t t, const Piece& piece) { run_piece(leaf, t, piece); }
#if defined(JADAM_X86)
#define AVX2 "avx2,fma"
#if defined(__clang__)
#define AVX512 AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
__attribute__((target(AVX2))) void run_avx2(const Leaf& leaf, uint32_t t, const Piece& piece) {
  run_piece(leaf, t, piece);
}
__attribute__((target(AVX512))) void run_avx512(const Leaf& leaf, uint32_t t, const Piece& piece) {
  run_piece(leaf, t, piece);
}
#endif

// The best that this machine has, or the one that JADAM_INSTRUCTIONS names, which the tests use.
const Instructions& instructions() {
  static const Instructions chosen = [] {
    std::vector<Instructions> there = {{"portable", run_portable}};
#if defined(JADAM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      there.push_back({"avx2", run_avx2});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        there.push_back({"avx512", run_avx512});
      }
    }
#endif
    const char* wanted = std::getenv("JADAM_INSTRUCTIONS");
    for (const Instructions& x : there) {
      if (wanted != nullptr && std::string(wanted) == x.name) return x;
    }
    return there.back();
  }();
  return chosen;
}

// What the threads share. One that comes late finds nothing left to take and touches no buffer.
struct Work {
  std::vector<Leaf> leaves;
  std::vector<Piece> pieces;
  uint32_t t;
  Run run;
  std::atomic<size_t> next{0}, done{0};

  void help() {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      run(leaves[pieces[i].leaf], t, pieces[i]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void run_all(const std::shared_ptr<Work>& work, ffi::ThreadPool& threads, int64_t elements) {
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), elements / kPiece) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    threads.Schedule([work] { work->help(); });
  }
  work->help();  // the caller works too and waits only for pieces in progress: a full pool cannot lock it up
  while (work->done.load(std::memory_order_acquire) < work->pieces.size()) std::this_thread::yield();
}

struct Range {
  uintptr_t begin, end;
  int64_t own;  // an input and the output that may replace it have the same number
  bool output;
};

struct Reader {
  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  size_t arg = 0, ret = 0;
  int64_t leaf = 0;
  std::string error = {};
  std::vector<Range> ranges = {};

  void fail(const char* what, const std::string& problem) {
    if (error.empty()) error = "jadam: leaf " + std::to_string(leaf) + ": " + what + " " + problem;
  }

  // The next input, of one of two dtypes and so many elements; a null pointer after an error.
  const void* input(const char* what, ffi::DataType dtype, ffi::DataType other, int64_t n, ffi::DataType* found,
                    std::vector<int64_t>* shape) {
    auto buffer = args.get<ffi::AnyBuffer>(arg++);
    if (!buffer.has_value()) return fail(what, "is missing"), nullptr;
    return check(what, *buffer, dtype, other, n, found, shape, false);
  }

  void* output(const char* what, ffi::DataType dtype, int64_t n) {
    auto buffer = rets.get<ffi::AnyBuffer>(ret++);
    if (!buffer.has_value()) return fail(what, "is missing"), nullptr;
    return check(what, **buffer, dtype, dtype, n, nullptr, nullptr, true);
  }

  void* check(const char* what, const ffi::AnyBuffer& buffer, ffi::DataType dtype, ffi::DataType other, int64_t n,
              ffi::DataType* found, std::vector<int64_t>* shape, bool output) {
    if (buffer.element_type() != dtype && buffer.element_type() != other) fail(what, "has another dtype");
    if (n >= 0 && static_cast<int64_t>(buffer.element_count()) != n) fail(what, "has another size");
    if (buffer.untyped_data() == nullptr && buffer.element_count() != 0) fail(what, "has no data");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.untyped_data());
    if (error.empty() && begin % ffi::ByteWidth(buffer.element_type())) fail(what, "is not aligned");
    if (found != nullptr) *found = buffer.element_type();
    if (shape != nullptr) shape->assign(buffer.dimensions().begin(), buffer.dimensions().end());
    if (buffer.element_count() != 0) {
      ranges.push_back({begin, begin + buffer.size_bytes(), static_cast<int64_t>(output ? ret : own), output});
    }
    return buffer.untyped_data();
  }

  int64_t own = 0;
};

ffi::Error invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

// Every leaf's arguments are g, p, its remainder if it has one, its moments, their scales; its results are all of these
// but g. The number of a result is therefore that of the argument it may replace.
void read_leaf(Reader& reader, Leaf& leaf) {
  using D = ffi::DataType;
  D g = D::F32, p = D::F32;
  std::vector<int64_t> shape, scales;
  const auto in = [&](const char* what, D dtype, int64_t n, std::vector<int64_t>* shape = nullptr) {
    reader.own++;
    return reader.input(what, dtype, dtype, n, nullptr, shape);
  };
  reader.own = -1;
  leaf.g = reader.input("gradient", D::F32, D::BF16, -1, &g, &shape);
  int64_t n = 1;
  for (int64_t x : shape) n *= x;
  leaf.n = n;
  reader.own = static_cast<int64_t>(reader.ret) + 1;
  leaf.p = reader.input("parameter", D::F32, D::BF16, n, &p, nullptr);
  leaf.narrow_g = g == D::BF16;
  leaf.narrow_p = p == D::BF16;
  if (leaf.narrow_p) leaf.rest = static_cast<const int16_t*>(in("remainder", D::S16, n));
  const D stored = leaf.set.format == kBFloat16 ? D::BF16 : D::F32;
  const bool int8 = leaf.set.format == kInt8;
  leaf.moments = leaf.set.rule == kAMSGrad || leaf.set.rule == kAMSGradOfV ? 3 : 2;
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m[k] = in("moment", int8 ? (k ? D::U8 : D::S8) : stored, n);
  if (int8) {
    if (leaf.set.rule != kAdam && leaf.set.rule != kNAdam) reader.fail("rule", "has no int8 moments");
    if (shape.empty()) return reader.fail("gradient", "has no axis, which int8 needs");
    leaf.row = shape.back();
    if (leaf.set.block < 1 || leaf.set.block > kTile) return reader.fail("block", "is out of range");
    leaf.blocks = leaf.row / leaf.set.block + (leaf.row % leaf.set.block != 0);
    const int64_t count = leaf.row ? n / leaf.row * leaf.blocks : 0;
    for (int k = 0; k < 2; ++k) leaf.scale[k] = static_cast<const float*>(in("scale", D::F32, count));
    leaf.p_out = reader.output("new parameter", p, n);
    if (leaf.narrow_p) leaf.rest_out = static_cast<int16_t*>(reader.output("new remainder", D::S16, n));
    for (int k = 0; k < 2; ++k) leaf.m_out[k] = reader.output("new moment", k ? D::U8 : D::S8, n);
    for (int k = 0; k < 2; ++k) leaf.scale_out[k] = static_cast<float*>(reader.output("new scale", D::F32, count));
    return;
  }
  leaf.p_out = reader.output("new parameter", p, n);
  if (leaf.narrow_p) leaf.rest_out = static_cast<int16_t*>(reader.output("new remainder", D::S16, n));
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m_out[k] = reader.output("new moment", stored, n);
}

// An output may be its own input, whole, and no other buffer may overlap one that is written.
bool overlap(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t before = 0, end = 0, written_end = 0;  // end of all ranges but the last, of all, and of the written ones
  const Range* last = nullptr;
  for (const Range& x : ranges) {
    const bool pair = last != nullptr && last->begin == x.begin && last->end == x.end && last->output != x.output &&
                      last->own == x.own;
    if (x.begin < (pair ? before : x.output ? end : written_end)) return true;
    before = end;
    end = std::max(end, x.end);
    if (x.output) written_end = std::max(written_end, x.end);
    last = &x;
  }
  return false;
}

// Whether there are rows of so many elements of a dtype, which can be read.
bool rows_of(const ffi::AnyBuffer& buffer, ffi::DataType dtype, int64_t n) {
  if (buffer.element_type() != dtype || buffer.element_count() % n) return false;
  if (buffer.untyped_data() == nullptr) return buffer.element_count() == 0;
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % ffi::ByteWidth(dtype) == 0;
}

ffi::Error step(ffi::ThreadPool threads, ffi::Span<const int64_t> settings, ffi::AnyBuffer scalars,
                ffi::AnyBuffer count, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (settings.size() % kSettings) return invalid("jadam: leaves must come in rows of " + std::to_string(kSettings));
  if (!rows_of(scalars, ffi::DataType::F32, kScalars)) {
    return invalid("jadam: scalars must be float32 in rows of " + std::to_string(kScalars));
  }
  const size_t leaves = settings.size() / kSettings;
  if (!rows_of(count, ffi::DataType::U32, 1 + leaves) || static_cast<size_t>(count.element_count()) != 1 + leaves) {
    return invalid("jadam: count must be uint32, one and another for each leaf");
  }
  auto work = std::make_shared<Work>();
  work->t = *count.typed_data<uint32_t>();
  work->run = instructions().run;
  work->leaves.resize(leaves);
  Reader reader{args, rets};
  const int64_t rows = scalars.element_count() / kScalars;
  int64_t elements = 0;
  for (size_t i = 0; i < leaves; ++i) {
    Leaf& leaf = work->leaves[i];
    reader.leaf = i;
    std::memcpy(&leaf.set, settings.begin() + i * kSettings, sizeof(Settings));
    const Settings& set = leaf.set;
    if (set.rule < 0 || set.rule >= kRules) reader.fail("rule", "is out of range");
    if (set.format < 0 || set.format >= kFormats) reader.fail("format", "is out of range");
    if (set.limit < 0 || set.limit >= kLimits) reader.fail("limit", "is out of range");
    if (set.scalars < 0 || set.scalars >= rows) reader.fail("scalars", "are out of range");
    if (!reader.error.empty()) return invalid(reader.error);
    leaf.first = count.typed_data<uint32_t>()[1 + i];
    std::memcpy(&leaf.s, scalars.typed_data<float>() + set.scalars * kScalars, sizeof(Scalars));
    read_leaf(reader, leaf);
    if (!reader.error.empty()) return invalid(reader.error);
    if (leaf.n && (set.run < 1 || leaf.n % set.run || (leaf.row && set.run % leaf.row))) {
      return invalid("jadam: leaf " + std::to_string(i) + ": run is no whole number of rows");
    }
    const bool int8 = set.format == kInt8;
    const int64_t units = int8 ? (leaf.row ? leaf.n / leaf.row * leaf.blocks : 0) : leaf.n;
    const int64_t most = int8 ? std::max<int64_t>(1, kPiece / set.block) : kPiece;
    for (int64_t begin = 0; begin < units; begin += most) {
      work->pieces.push_back({static_cast<int64_t>(i), begin, std::min(units, begin + most)});
    }
    elements += leaf.n;
  }
  if (reader.arg != args.size() || reader.ret != rets.size()) return invalid("jadam: more buffers than leaves use");
  if (overlap(reader.ranges)) return invalid("jadam: an output overlaps another buffer");
  run_all(work, threads, elements);
  return ffi::Error::Success();
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT XLA_FFI_Error* jadam_step(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_step, step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("leaves")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

// Which instructions run here, the rules in the order of `Rule`, and the checksum of the source this was built from.
EXPORT const char* jadam_rules() { return kRuleNames; }
EXPORT const char* jadam_instructions() { return instructions().name; }
EXPORT uint32_t jadam_source() { return JADAM_SOURCE; }
