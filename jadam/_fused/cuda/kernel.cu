// The CUDA kernel: updates all leaves of a table in one pass over memory.
//
// Rules are in rules.h and storage formats in formats.h. NVRTC compiles this file at run time, for one rule, format and
// dtypes of weights and gradients. A program is a thread block of 256 threads. It updates a part of one leaf in rounds
// of 2048 elements: each thread loads two quads of consecutive elements, updates them, and stores them. A warp updates
// one int8 block at a time, so its largest values are found without shared memory.

#include "table.h"

// JADAM_COUNT_USUAL leaves out the code for rare cases, so that `python -m benchmarks cuda` counts the instructions of
// the usual one.
#if defined(JADAM_COUNT_USUAL)
#define JADAM_USUALLY(value, condition) value
#else
#define JADAM_USUALLY(value, condition) (condition)
#endif

namespace jadam {

// Four values, loaded and stored at once.
template <int bytes>
struct Words;
template <>
struct Words<1> {
  using Type = u32;
};
template <>
struct Words<2> {
  using Type = uint2;
};
template <>
struct Words<4> {
  using Type = uint4;
};
template <class T>
union Packed {
  typename Words<sizeof(T)>::Type words;
  T x[kQuad];
};

// The quad of a thread: n <= 4 elements from base + offset on. `base` is the same in the whole program. If `whole`, n
// is 4 and the addresses are aligned.
struct Place {
  i64 base;
  u32 offset;
  int n;
  bool whole;
};

template <class T>
__device__ __forceinline__ void load(const void* from, const Place& at, T (&to)[kQuad]) {
  const T* source = static_cast<const T*>(from) + at.base + at.offset;
  if (at.whole) {
    Packed<T> packed;
    packed.words = *reinterpret_cast<const decltype(packed.words)*>(source);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = packed.x[j];
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = j < at.n ? source[j] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void store(void* to, const Place& at, const T (&from)[kQuad]) {
  T* target = static_cast<T*>(to) + at.base + at.offset;
  if (at.whole) {
    Packed<T> packed;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) packed.x[j] = from[j];
    *reinterpret_cast<decltype(packed.words)*>(target) = packed.words;
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < at.n) target[j] = from[j];
    }
  }
}

template <bool kBFloat16Values>
__device__ __forceinline__ void load_floats(const void* from, const Place& at, float (&to)[kQuad]) {
  if constexpr (kBFloat16Values) {
    u16 x[kQuad];
    load(from, at, x);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = float_from_bfloat16(x[j]);
  } else {
    load(from, at, to);
  }
}

// The global index of element i modulo 2**32, which the random bits depend on.
__device__ __forceinline__ u32 global_index(const Table& table, const Entry& leaf, u32 offset, i64 i) {
  u32 index = static_cast<u32>(i);
  if (JADAM_USUALLY(false, leaf.digits != 0)) {  // such a leaf has fewer than 2**32 elements
    u32 rest = index / leaf.run;
    index -= rest * leaf.run;
    for (int k = 0; k < leaf.digits; ++k) {
      const Digit digit = table.digits[leaf.first_digit + k];
      const bool last = k == leaf.digits - 1;
      index += (last ? rest : rest % digit.size) * digit.stride;
      rest /= digit.size;
    }
  }
  return offset + index;
}

// The maximum over a warp.
__device__ __forceinline__ i32 warp_max(i32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFFu, x);
#else
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) x = max_int(x, __shfl_xor_sync(0xFFFFFFFFu, x, other));
  return x;
#endif
}

// The leaf of a program, and the step's scalars.
struct Step {
  const Table& table;
  const Entry& leaf;
  const Scalars s;
  const u32 count, offset;
  const bool common, weight_decay;
};

// The gradients, parameters and remainders of a quad.
template <bool kBFloat16Weights, bool kBFloat16Gradients>
struct Weights {
  float g[kQuad], p[kQuad];

  __device__ __forceinline__ void load_all(const Entry& leaf, const Place& at) {
    load_floats<kBFloat16Gradients>(leaf.g, at, g);
    if constexpr (kBFloat16Weights) {
      u16 high[kQuad];
      i16 remainder[kQuad];
      load(leaf.p, at, high);
      load(leaf.remainder, at, remainder);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) p[j] = join(high[j], remainder[j]);
    } else {
      load(leaf.p, at, p);
    }
  }

  __device__ __forceinline__ void clip(const Step& step) {
    if (JADAM_USUALLY(false, step.leaf.clipping & kBound)) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) g[j] = clip_to_bound(step.s, g[j]);
    }
    if (JADAM_USUALLY(false, step.leaf.clipping & kNorm)) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) g[j] = clip_by_norm(step.s, g[j]);
    }
  }

  __device__ __forceinline__ void store_parameters(const Entry& leaf, const Place& at) const {
    if constexpr (kBFloat16Weights) {
      u16 high[kQuad];
      i16 remainder[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) split(p[j], high[j], remainder[j]);
      store(leaf.p, at, high);
      store(leaf.remainder, at, remainder);
    } else {
      store(leaf.p, at, p);
    }
  }
};

// A quad with float32 or bfloat16 moments.
template <class Rule, int kFormat, bool kBFloat16Weights, bool kBFloat16Gradients>
struct Quad {
  Weights<kBFloat16Weights, kBFloat16Gradients> weights;
  float m[Rule::kMoments][kQuad];
  Place at;

  static __device__ __forceinline__ bool exists_in(const Entry& leaf, u32 round) {
    return static_cast<i64>(round) * kRoundElements < leaf.n;
  }

  __device__ __forceinline__ void load_all(const Step& step, u32 round, int k) {
    const Entry& leaf = step.leaf;
    at.base = static_cast<i64>(round) * kRoundElements;
    at.offset = (k * kThreads + threadIdx.x) * kQuad;
    const i64 left = leaf.n - at.base - at.offset;
    at.n = left >= kQuad ? kQuad : left > 0 ? static_cast<int>(left) : 0;
    at.whole = JADAM_USUALLY(true, at.n == kQuad && leaf.aligned);
    weights.load_all(leaf, at);
#pragma unroll
    for (int i = 0; i < Rule::kMoments; ++i) load_floats<kFormat == kBFloat16>(leaf.m[i], at, m[i]);
  }

  template <bool kCommonScalars>
  __device__ __forceinline__ void update_elements(const Step& step) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      Moments x{m[0][j], m[1][j], Rule::kMoments == 3 ? m[Rule::kMoments - 1][j] : 0.0f};
      weights.p[j] = update<Rule, kCommonScalars>(step.s, step.weight_decay, weights.g[j], weights.p[j], x);
      m[0][j] = x.m;
      m[1][j] = x.v;
      if (Rule::kMoments == 3) m[Rule::kMoments - 1][j] = x.v_max;
    }
  }

  __device__ __forceinline__ void update_all(const Step& step) {
    weights.clip(step);
    step.common ? update_elements<true>(step) : update_elements<false>(step);
  }

  __device__ __forceinline__ void store_all(const Step& step) const {
    weights.store_parameters(step.leaf, at);
    if constexpr (kFormat == kFloat32) {
#pragma unroll
      for (int i = 0; i < Rule::kMoments; ++i) store(step.leaf.m[i], at, m[i]);
    } else {
      store_bfloat16(step);
    }
  }

  __device__ __forceinline__ void store_bfloat16(const Step& step) const {
    const bool in_one_run = JADAM_USUALLY(true, step.leaf.digits == 0 || step.leaf.run % kQuad == 0);
    u32 index[kQuad];
    index[0] = global_index(step.table, step.leaf, step.offset, at.base + at.offset);
#pragma unroll
    for (int j = 1; j < kQuad; ++j) {
      index[j] = in_one_run ? index[0] + j : global_index(step.table, step.leaf, step.offset, at.base + at.offset + j);
    }
    u16 x[Rule::kMoments][kQuad];
#pragma unroll
    for (int i = 0; i < Rule::kMoments; i += 2) {
      const int odd = i + 1 < Rule::kMoments ? i + 1 : i;  // stays in bounds where no moment is left
      const Dither dither(step.leaf.salt, i, step.count);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const u32 hash = dither.hash(index[j]);
        x[i][j] = round_to_bfloat16(m[i][j], dither.even_stream(hash));
        if (odd != i) x[odd][j] = round_to_bfloat16(m[odd][j], dither.odd_stream(hash));
      }
    }
#pragma unroll
    for (int i = 0; i < Rule::kMoments; ++i) store(step.leaf.m[i], at, x[i]);
  }
};

// A quad with int8 moments, of the warp's block.
template <class Rule, bool kBFloat16Weights, bool kBFloat16Gradients>
struct Quad<Rule, kInt8, kBFloat16Weights, kBFloat16Gradients> {
  Weights<kBFloat16Weights, kBFloat16Gradients> weights;
  i8 rq[kQuad];
  u8 vq[kQuad];
  float r_scale, v_scale;
  i64 first;  // element of the block
  u32 block;
  bool exists;
  Place at;

  static __device__ __forceinline__ bool exists_in(const Entry& leaf, u32 round) {
    return round * kRoundBlocks < leaf.blocks;
  }

  static __device__ __forceinline__ i64 first_of(const Entry& leaf, u32 block) {
    if (JADAM_USUALLY(true, leaf.contiguous)) return static_cast<i64>(block) * leaf.block;
    const u32 row = block / leaf.row_blocks;
    return row * leaf.row + static_cast<i64>(block - row * leaf.row_blocks) * leaf.block;
  }

  __device__ __forceinline__ void load_all(const Step& step, u32 round, int k) {
    const Entry& leaf = step.leaf;
    const u32 lane = threadIdx.x % kWarp;
    block = round * kRoundBlocks + k * (kThreads / kWarp) + threadIdx.x / kWarp;
    exists = block < leaf.blocks;  // the same for a warp
    if (!exists) block = leaf.blocks - 1;
    first = first_of(leaf, block);
    int length = leaf.block;
    if (!JADAM_USUALLY(true, leaf.contiguous)) {
      const i64 left = leaf.row - first % leaf.row;
      length = left < length ? static_cast<int>(left) : length;
    }
    if (!exists) length = 0;
    at.base = first_of(leaf, round * kRoundBlocks);
    at.offset = static_cast<u32>(first - at.base) + lane * kQuad;
    const int left = length - static_cast<int>(lane * kQuad);
    at.n = left >= kQuad ? kQuad : left > 0 ? left : 0;
    at.whole = JADAM_USUALLY(true, length == kMaxBlock && leaf.aligned);
    weights.load_all(leaf, at);
    load(leaf.m[0], at, rq);
    load(leaf.m[1], at, vq);
    r_scale = leaf.scale[0][block];
    v_scale = leaf.scale[1][block];
  }

  template <bool kCommonScalars>
  __device__ __forceinline__ void update_elements(const Step& step, float (&r)[kQuad], float (&v)[kQuad]) {
    const float r_step = r_scale * (1.0f / kRTop), v_step = v_scale * (1.0f / kVTop);
    const u32 v_codes = vq[0] | vq[1] << 8 | vq[2] << 16 | static_cast<u32>(vq[3]) << 24;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      weights.p[j] = update_int8<Rule, kCommonScalars>(step.s, step.weight_decay, weights.g[j], weights.p[j], rq[j],
                                                       float_from_byte(v_codes, j), r_step, v_step, r[j], v[j]);
    }
  }

  __device__ __forceinline__ void update_all(const Step& step) {
    float r[kQuad], v[kQuad];
    weights.clip(step);
    step.common ? update_elements<true>(step, r, v) : update_elements<false>(step, r, v);
    if (!at.whole) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (j >= at.n) r[j] = v[j] = 0.0f;
      }
    }
    i32 r_max = 0, v_max = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      r_max = max_int(r_max, static_cast<i32>(float_bits(r[j]) & kAbsMask));
      v_max = max_int(v_max, static_cast<i32>(float_bits(v[j]) & kAbsMask));
    }
    scales(warp_max(r_max), warp_max(v_max), r_scale, v_scale);
    const float r_inverse_step = r_inverse_step_of(r_scale), v_inverse_step = v_inverse_step_of(v_scale);
    const Dither dither(step.leaf.salt, 0, step.count);
    const u32 random = Dither::lane(dither.block(global_index(step.table, step.leaf, step.offset, first)),
                                    threadIdx.x % kWarp * kQuad);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const u32 bits = Dither::lane(random, j);
      rq[j] = static_cast<i8>(quantize_r(r[j], r_inverse_step, bits));
      vq[j] = static_cast<u8>(quantize_v(v[j], v_inverse_step, bits));
    }
  }

  __device__ __forceinline__ void store_all(const Step& step) const {
    const Entry& leaf = step.leaf;
    weights.store_parameters(leaf, at);
    store(leaf.m[0], at, rq);
    store(leaf.m[1], at, vq);
    if (exists && threadIdx.x % kWarp == 0) {
      leaf.scale[0][block] = r_scale;
      leaf.scale[1][block] = v_scale;
    }
  }
};

// The leaf that this program updates.
__device__ __forceinline__ const Entry& leaf_of_program(const Table& table) {
  int low = 0, high = table.leaves - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_program <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.entries[low];
}

template <class Rule, int kFormat, bool kBFloat16Weights, bool kBFloat16Gradients>
__device__ __forceinline__ void step_program(const Table& table, const float* scalars, const u32* count_and_offsets) {
  const Entry& leaf = leaf_of_program(table);
  const Scalars s = reinterpret_cast<const Scalars*>(scalars)[leaf.scalar_row];
  const Step step{table, leaf, s, count_and_offsets[0], count_and_offsets[1 + leaf.number],
                  JADAM_USUALLY(true, has_common_scalars(s)), JADAM_USUALLY(false, s.weight_decay != 0.0f)};
  constexpr u32 kRounds = kFormat == kInt8 ? kInt8Rounds : kFloatRounds;
  const u32 first_round = (blockIdx.x - leaf.first_program) * kRounds;
  using RuleQuad = Quad<Rule, kFormat, kBFloat16Weights, kBFloat16Gradients>;
#pragma unroll 1
  for (u32 round = first_round; round < first_round + kRounds && RuleQuad::exists_in(leaf, round); ++round) {
    RuleQuad quads[kQuads];
#pragma unroll
    for (int k = 0; k < kQuads; ++k) quads[k].load_all(step, round, k);
#pragma unroll
    for (int k = 0; k < kQuads; ++k) quads[k].update_all(step);
#pragma unroll
    for (int k = 0; k < kQuads; ++k) quads[k].store_all(step);
  }
}

}  // namespace jadam

#if defined(JADAM_RULE)
#define JADAM_JOIN(rule, format, weights, gradients) jadam_##rule##_##format##_##weights##_##gradients
#define JADAM_KERNEL(rule, format, weights, gradients) JADAM_JOIN(rule, format, weights, gradients)
// With 3 programs on a multiprocessor enough loads are under way to keep the memory busy, and on sm_80 and sm_90 no
// variant spills registers.
extern "C" __global__ void __launch_bounds__(jadam::kThreads, 3)
    JADAM_KERNEL(JADAM_RULE, JADAM_FORMAT, JADAM_BFLOAT16_WEIGHTS, JADAM_BFLOAT16_GRADIENTS)(
        const __grid_constant__ jadam::Table table, const float* scalars, const unsigned* count_and_offsets) {
  jadam::step_program<jadam::Rules::At<JADAM_RULE>, JADAM_FORMAT, JADAM_BFLOAT16_WEIGHTS, JADAM_BFLOAT16_GRADIENTS>(
      table, scalars, count_and_offsets);
}
#endif
