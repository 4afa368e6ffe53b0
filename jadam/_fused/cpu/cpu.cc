// The CPU kernel: an XLA FFI handler that updates a group of leaves in one pass over memory.
//
// Rules are in rules.h and storage formats in formats.h. This file has tiles, threads and the checks of the arguments.
// A leaf is updated in tiles that fit the L1 cache: load, decode, apply the rule, update the parameter, encode, store.
// Each is a loop over the tile that the compiler vectorises, so rules, formats and dtypes need no combined loops.
//
// Limits: gradients float32 or bfloat16; parameters float32, or bfloat16 with a remainder; moments float32, bfloat16 or
// (for two moments) int8; int8 blocks of at most kTile elements. An output may be its whole input, but no part of one.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "formats.h"
#include "rules.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE JADAM_INLINE
#if defined(__GNUC__)
#define JADAM_LAMBDA __attribute__((always_inline))  // a lambda does not inherit its caller's target instructions
#else
#define JADAM_LAMBDA
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define JADAM_X86 1
#endif
// Before a loop whose iterations are independent, although the compiler cannot prove it.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

namespace jadam {
namespace {

constexpr int64_t kTile = 512;       // elements per tile: 12 KiB of float32 buffers
constexpr int64_t kChunk = 1 << 15;  // elements that a thread updates at a time
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

enum Clipping { kBound = 1, kNorm = 2, kClippings = 4 };  // bits: clipped by value, by norm

// One leaf's value of each attribute of the FFI call.
struct Settings {
  int64_t rule, format, clipping, scalar_row, salt, block, run, digits;
};

// A leaf: an array, or a shard of one. Its elements come in runs that are contiguous in the global array. The run's
// number has one digit for each further axis along which the shard was cut, the fastest first.
struct Leaf {
  Settings settings;
  const int64_t* digit_sizes = nullptr;
  const int64_t* digit_strides = nullptr;  // how far a digit moves the global index
  Scalars scalars;
  int64_t n = 0;                // number of elements
  int64_t row = 0, blocks = 0;  // int8 only: elements of the last axis, and blocks along it
  int64_t moments = 0;          // number of moments
  uint32_t offset = 0;          // global index of the first element
  bool g_is_bfloat16 = false, p_is_bfloat16 = false;
  const void* g = nullptr;
  const void* p = nullptr;
  void* p_out = nullptr;
  const int16_t* remainder = nullptr;
  int16_t* remainder_out = nullptr;
  const void* m[3] = {};
  void* m_out[3] = {};
  const float* scale[2] = {};
  float* scale_out[2] = {};
};

// float32 values of a tile. Each pointer points into the leaf where that is float32, else to the tile's buffer.
struct Tile {
  alignas(64) float g_buffer[kTile], p_buffer[kTile], m_buffer[3][kTile];
  const float *g, *p, *m[3];
  float *p_out, *m_out[3];
};

// The int8 blocks of a tile, which are contiguous.
struct Blocks {
  int64_t first, count;       // blocks [first, first + count) of the leaf
  int64_t start;              // the leaf's element at which the tile begins
  int64_t bounds[kTile + 1];  // the k-th block has the elements [bounds[k], bounds[k + 1]) of the tile
};

INLINE void load_bfloat16(float* to, const void* from, int64_t start, int64_t n) {
  const u16* x = static_cast<const u16*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) to[i] = float_from_bfloat16(x[i]);
}

INLINE const float* at(const void* from, int64_t start) { return static_cast<const float*>(from) + start; }
INLINE float* at(void* from, int64_t start) { return static_cast<float*>(from) + start; }

INLINE void clip(const Leaf& leaf, Tile& tile, int64_t n) {
  if (!leaf.settings.clipping) return;
  const float bound = leaf.scalars.bound, norm = leaf.scalars.norm, max_norm = leaf.scalars.max_norm;
  float* g = tile.g_buffer;
  if (tile.g != g) std::memcpy(g, tile.g, n * sizeof(float));
  tile.g = g;
  if (leaf.settings.clipping & kBound) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) {
      float x = g[i] > bound ? bound : g[i];
      g[i] = x < -bound ? -bound : x;
    }
  }
  if (leaf.settings.clipping & kNorm) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) g[i] = g[i] / norm * max_norm;
  }
}

INLINE float new_parameter(const Scalars& s, bool weight_decay, float p, float u) {
  if (weight_decay) u = u + s.weight_decay * p;
  return p + s.minus_lr * u;
}

// New parameters and moments of a tile. kCommonScalars: see rules.h.
template <class Rule, bool kCommonScalars, bool kWeightDecay>
INLINE void rule_loop(const Scalars s, Tile& tile, int64_t n) {
  constexpr bool kHasVMax = Rule::kMoments == 3;
  const float *g = tile.g, *p = tile.p, *m = tile.m[0], *v = tile.m[1], *v_max = tile.m[2];
  float *p_out = tile.p_out, *m_out = tile.m_out[0], *v_out = tile.m_out[1], *v_max_out = tile.m_out[2];
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    Moments x{m[i], v[i], kHasVMax ? v_max[i] : 0.0f};
    Rule::template update_moments<kCommonScalars>(s, g[i], x);
    const float u = Rule::template direction<kCommonScalars>(s, g[i], x, sqrt_of(x.v));
    p_out[i] = new_parameter(s, kWeightDecay, p[i], u);
    m_out[i] = x.m;
    v_out[i] = x.v;
    if (kHasVMax) v_max_out[i] = x.v_max;
  }
}

// `rule_loop` of int8 blocks: reads the codes, and leaves r and v in the tile's buffers, and their scales in the leaf.
template <class Rule, bool kCommonScalars, bool kWeightDecay>
INLINE void int8_rule_loop(const Scalars s, Tile& tile, const Leaf& leaf, const Blocks& blocks) {
  for (int64_t k = 0; k < blocks.count; ++k) {
    const int64_t at = blocks.bounds[k], n = blocks.bounds[k + 1] - at, block = blocks.first + k;
    const i8* rq = static_cast<const i8*>(leaf.m[0]) + blocks.start + at;
    const u8* vq = static_cast<const u8*>(leaf.m[1]) + blocks.start + at;
    const float r_step = leaf.scale[0][block] * (1.0f / kRTop), v_step = leaf.scale[1][block] * (1.0f / kVTop);
    const float *g = tile.g + at, *p = tile.p + at;
    float *p_out = tile.p_out + at, *r = tile.m_buffer[0] + at, *v = tile.m_buffer[1] + at;
    INDEPENDENT for (int64_t i = 0; i < n; ++i) {
      Moments x{};
      dequantize(rq[i], vq[i], r_step, v_step, x.m, x.v);
      Rule::template update_moments<kCommonScalars>(s, g[i], x);
      const float rsqrt_v = rsqrt_of(x.v);
      const float u = Rule::template direction<kCommonScalars>(s, g[i], x, x.v * rsqrt_v);
      p_out[i] = new_parameter(s, kWeightDecay, p[i], u);
      r[i] = ratio(x.m, x.v, rsqrt_v);
      v[i] = x.v;
    }
    i32 r_max = 0, v_max = 0;
    INDEPENDENT for (int64_t i = 0; i < n; ++i) {
      r_max = max_int(r_max, static_cast<i32>(float_bits(r[i]) & kAbsMask));
      v_max = max_int(v_max, static_cast<i32>(float_bits(v[i]) & kAbsMask));
    }
    scales(r_max, v_max, leaf.scale_out[0][block], leaf.scale_out[1][block]);
  }
}

// The loop of the leaf's format; `blocks` are its blocks in the tile if it is int8, else null.
template <class Rule, bool kCommonScalars, bool kWeightDecay>
INLINE void choose_rule_loop(const Leaf& leaf, Tile& tile, int64_t n, const Blocks* blocks) {
  if constexpr (Rule::kInt8) {
    if (blocks != nullptr) return int8_rule_loop<Rule, kCommonScalars, kWeightDecay>(leaf.scalars, tile, leaf, *blocks);
  }
  rule_loop<Rule, kCommonScalars, kWeightDecay>(leaf.scalars, tile, n);
}

template <class Rule>
INLINE void apply_rule(const Leaf& leaf, Tile& tile, int64_t n, const Blocks* blocks) {
  const Scalars& s = leaf.scalars;
  const bool common = s.b1 >= 0.5f && s.b2 >= 0.5f && s.eps_root == 0.0f && s.eps > 0.0f;
  if (s.weight_decay == 0.0f) {
    common ? choose_rule_loop<Rule, true, false>(leaf, tile, n, blocks)
           : choose_rule_loop<Rule, false, false>(leaf, tile, n, blocks);
  } else {
    common ? choose_rule_loop<Rule, true, true>(leaf, tile, n, blocks)
           : choose_rule_loop<Rule, false, true>(leaf, tile, n, blocks);
  }
}

INLINE void join_tile(float* to, const void* from, const int16_t* remainder, int64_t start, int64_t n) {
  const u16* p = static_cast<const u16*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) to[i] = join(p[i], remainder[start + i]);
}

INLINE void split_tile(void* to, int16_t* remainder, const float* from, int64_t start, int64_t n) {
  u16* p = static_cast<u16*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) split(from[i], p[i], remainder[start + i]);
}

// Elements [start, start + n) rounded to bfloat16; `index` is the global index of the first.
template <bool kOdd>
INLINE void round_tile(void* to, const float* from, const Dither& dither, int64_t start, u32 index, int64_t n) {
  u16* x = static_cast<u16*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const u32 hash = dither.hash(index + static_cast<u32>(i));
    x[i] = round_to_bfloat16(from[i], kOdd ? dither.odd_stream(hash) : dither.even_stream(hash));
  }
}

// What `Dither::lane` adds for each element of a block. Loading it is faster than multiplying.
struct Lanes {
  alignas(64) u32 of[kTile];
  constexpr Lanes() : of() {
    for (int64_t i = 0; i < kTile; ++i) of[i] = Dither::lane(0, static_cast<u32>(i));
  }
};
constexpr Lanes kLanes;

// Writes the codes of n elements from their r and v. `random` is `Dither::block` of their block.
INLINE void quantize_block(i8* rq, u8* vq, const float* r, const float* v, float r_scale, float v_scale, u32 random,
                           int64_t n) {
  const float r_inverse_step = inverse_step(kBelowRTop, r_scale), v_inverse_step = inverse_step(kEncodedVTop, v_scale);
  alignas(64) u32 new_r[kTile], new_v[kTile];  // converting to 8 bits in the same loop would slow it down
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const u32 bits = random + kLanes.of[i];
    new_r[i] = quantize_r(r[i], r_inverse_step, bits);
    new_v[i] = quantize_v(v[i], v_inverse_step, bits);
  }
  INDEPENDENT for (int64_t i = 0; i < n; ++i) rq[i] = static_cast<i8>(new_r[i]);
  INDEPENDENT for (int64_t i = 0; i < n; ++i) vq[i] = static_cast<u8>(new_v[i]);
}

// Updates elements [start, start + n). The caller sets the tile's pointers to the moments, or gives int8 blocks.
INLINE void update_elements(const Leaf& leaf, Tile& tile, int64_t start, int64_t n, const Blocks* blocks = nullptr) {
  tile.g = leaf.g_is_bfloat16 ? tile.g_buffer : at(leaf.g, start);
  tile.p = leaf.p_is_bfloat16 ? tile.p_buffer : at(leaf.p, start);
  tile.p_out = leaf.p_is_bfloat16 ? tile.p_buffer : at(leaf.p_out, start);
  if (leaf.g_is_bfloat16) load_bfloat16(tile.g_buffer, leaf.g, start, n);
  if (leaf.p_is_bfloat16) join_tile(tile.p_buffer, leaf.p, leaf.remainder, start, n);
  clip(leaf, tile, n);
  Rules::visit(leaf.settings.rule, [&](auto rule) JADAM_LAMBDA { apply_rule<decltype(rule)>(leaf, tile, n, blocks); });
  if (leaf.p_is_bfloat16) split_tile(leaf.p_out, leaf.remainder_out, tile.p_buffer, start, n);
}

// The global index of element i modulo 2**32, which the random bits depend on.
INLINE uint32_t global_index(const Leaf& leaf, int64_t i) {
  const Settings& x = leaf.settings;
  if (i < x.run) return leaf.offset + static_cast<uint32_t>(i);  // as below, without the divisions
  uint32_t index = leaf.offset + static_cast<uint32_t>(i % x.run);
  int64_t rest = i / x.run;
  for (int64_t k = 0; k < x.digits; ++k) {
    const bool last = k == x.digits - 1;
    const int64_t digit = last ? rest : rest % leaf.digit_sizes[k];
    index += static_cast<uint32_t>(digit) * static_cast<uint32_t>(leaf.digit_strides[k]);
    if (!last) rest /= leaf.digit_sizes[k];
  }
  return index;
}

struct Chunk {
  int64_t leaf, begin, end;  // in elements, or in blocks of an int8 leaf
};

// The first element of an int8 block.
INLINE int64_t block_start(const Leaf& leaf, int64_t block) {
  return block / leaf.blocks * leaf.row + block % leaf.blocks * leaf.settings.block;
}

// Sets `blocks` to as many as a tile holds, from block `first`, which starts at element `start`, to before block `end`.
INLINE void set_blocks(Blocks& blocks, const Leaf& leaf, int64_t start, int64_t first, int64_t end) {
  blocks.first = first;
  blocks.count = 0;
  blocks.start = start;
  blocks.bounds[0] = 0;
  int64_t at = 0, column = start % leaf.row;
  while (first + blocks.count < end) {
    const int64_t n = std::min(leaf.settings.block, leaf.row - column);
    if (at + n > kTile) break;
    column = column + n == leaf.row ? 0 : column + n;
    blocks.bounds[++blocks.count] = at += n;
  }
}

INLINE void update_int8_chunk(const Leaf& leaf, Tile& tile, uint32_t count, int64_t begin, int64_t end) {
  const Dither dither(static_cast<uint32_t>(leaf.settings.salt), 0, count);
  Blocks blocks;
  int64_t start = block_start(leaf, begin);
  for (int64_t first = begin; first < end; first += blocks.count) {
    set_blocks(blocks, leaf, start, first, end);
    const int64_t n = blocks.bounds[blocks.count];
    update_elements(leaf, tile, start, n, &blocks);
    for (int64_t k = 0; k < blocks.count; ++k) {
      const int64_t at = blocks.bounds[k], block = first + k;
      quantize_block(static_cast<i8*>(leaf.m_out[0]) + start + at, static_cast<u8*>(leaf.m_out[1]) + start + at,
                     tile.m_buffer[0] + at, tile.m_buffer[1] + at, leaf.scale_out[0][block], leaf.scale_out[1][block],
                     dither.block(global_index(leaf, start + at)), blocks.bounds[k + 1] - at);
    }
    start += n;
  }
}

// A chunk of a leaf with float32 or bfloat16 moments.
INLINE void update_float_chunk(const Leaf& leaf, Tile& tile, uint32_t count, int64_t begin, int64_t end) {
  const bool bfloat16 = leaf.settings.format == kBFloat16;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = std::min(kTile, end - start);
    for (int64_t k = 0; k < leaf.moments; ++k) {
      tile.m[k] = bfloat16 ? tile.m_buffer[k] : at(leaf.m[k], start);
      tile.m_out[k] = bfloat16 ? tile.m_buffer[k] : at(leaf.m_out[k], start);
      if (bfloat16) load_bfloat16(tile.m_buffer[k], leaf.m[k], start, n);
    }
    update_elements(leaf, tile, start, n);
    for (int64_t k = 0; bfloat16 && k < leaf.moments; ++k) {
      const Dither dither(static_cast<uint32_t>(leaf.settings.salt), static_cast<uint32_t>(k), count);
      for (int64_t at = 0, end = 0; at < n; at = end) {  // up to the end of the run
        end = std::min(n, at + leaf.settings.run - (start + at) % leaf.settings.run);
        const uint32_t index = global_index(leaf, start + at);
        if (k % 2) {
          round_tile<true>(leaf.m_out[k], tile.m_buffer[k] + at, dither, start + at, index, end - at);
        } else {
          round_tile<false>(leaf.m_out[k], tile.m_buffer[k] + at, dither, start + at, index, end - at);
        }
      }
    }
  }
}

INLINE void update_chunk(const Leaf& leaf, uint32_t count, const Chunk& chunk) {
  Tile tile;
  if (leaf.settings.format == kInt8) {
    update_int8_chunk(leaf, tile, count, chunk.begin, chunk.end);
  } else {
    update_float_chunk(leaf, tile, count, chunk.begin, chunk.end);
  }
}

// The same loops for three instruction sets. With 64-byte vectors each cache line is touched once. This matters where
// the arrays' addresses collide in the L1 cache. AMD's L1 identifies lines by a hash of the address, which is often the
// same for arrays that XLA allocated one after the other.
using UpdateChunk = void (*)(const Leaf&, uint32_t, const Chunk&);
struct InstructionSet {
  const char* name;
  UpdateChunk update;
};

void update_chunk_portable(const Leaf& leaf, uint32_t count, const Chunk& chunk) { update_chunk(leaf, count, chunk); }
#if defined(JADAM_X86)
#define AVX2 "avx2,fma"
#if defined(__clang__)
#define AVX512 AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
__attribute__((target(AVX2))) void update_chunk_avx2(const Leaf& leaf, uint32_t count, const Chunk& chunk) {
  update_chunk(leaf, count, chunk);
}
__attribute__((target(AVX512))) void update_chunk_avx512(const Leaf& leaf, uint32_t count, const Chunk& chunk) {
  update_chunk(leaf, count, chunk);
}
#endif

// The widest instruction set of this CPU, or the one named by JADAM_INSTRUCTIONS, for tests.
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
    std::vector<InstructionSet> supported = {{"portable", update_chunk_portable}};
#if defined(JADAM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      supported.push_back({"avx2", update_chunk_avx2});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        supported.push_back({"avx512", update_chunk_avx512});
      }
    }
#endif
    const char* wanted = std::getenv("JADAM_INSTRUCTIONS");
    for (const InstructionSet& x : supported) {
      if (wanted != nullptr && std::string(wanted) == x.name) return x;
    }
    return supported.back();
  }();
  return chosen;
}

// State shared by the threads. It may outlive the call: a thread that starts late finds no chunk left and touches no
// buffer.
struct Work {
  std::vector<Leaf> leaves;
  std::vector<Chunk> chunks;
  uint32_t count;  // steps taken before this one
  UpdateChunk update;
  std::atomic<size_t> next{0}, done{0};

  void update_chunks() {
    for (size_t i = next++; i < chunks.size(); i = next++) {
      update(leaves[chunks[i].leaf], count, chunks[i]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void update_all(const std::shared_ptr<Work>& work, ffi::ThreadPool& threads, int64_t elements) {
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), elements / kChunk) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    threads.Schedule([work] { work->update_chunks(); });
  }
  // The caller takes part and waits only for chunks in progress, so a full pool cannot deadlock it.
  work->update_chunks();
  while (work->done.load(std::memory_order_acquire) < work->chunks.size()) std::this_thread::yield();
}

// The addresses of a buffer.
struct Range {
  uintptr_t begin, end;
  int64_t pair;  // the same for an input and the output that may alias it; -1 for gradients
  bool output;
};

// Reads and checks the buffers of a call, one after the other.
struct Reader {
  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  size_t arg = 0, ret = 0;  // the next input and output
  int64_t leaf = 0;         // for error messages
  int64_t input_pair = 0;   // `Range::pair` of the input being read
  std::string error = {};   // the first error
  std::vector<Range> ranges = {};

  void fail(const char* what, const std::string& problem) {
    if (error.empty()) error = "jadam: leaf " + std::to_string(leaf) + ": " + what + " " + problem;
  }

  // The next input, of one of two dtypes and n elements (any number if n < 0). Null after an error.
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
    if (buffer.element_type() != dtype && buffer.element_type() != other) fail(what, "has the wrong dtype");
    if (n >= 0 && static_cast<int64_t>(buffer.element_count()) != n) fail(what, "has the wrong size");
    if (buffer.untyped_data() == nullptr && buffer.element_count() != 0) fail(what, "has no data");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.untyped_data());
    if (error.empty() && begin % ffi::ByteWidth(buffer.element_type())) fail(what, "is not aligned");
    if (found != nullptr) *found = buffer.element_type();
    if (shape != nullptr) shape->assign(buffer.dimensions().begin(), buffer.dimensions().end());
    if (buffer.element_count() != 0) {
      ranges.push_back({begin, begin + buffer.size_bytes(), static_cast<int64_t>(output ? ret : input_pair), output});
    }
    return buffer.untyped_data();
  }
};

ffi::Error invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

// The inputs of a leaf are g, p, the remainder if any, the moments, and int8 scales. The outputs are the same
// without g.
void read_leaf(Reader& reader, Leaf& leaf) {
  using D = ffi::DataType;
  D g = D::F32, p = D::F32;
  std::vector<int64_t> shape;
  const auto in = [&](const char* what, D dtype, int64_t n, std::vector<int64_t>* shape = nullptr) {
    reader.input_pair++;
    return reader.input(what, dtype, dtype, n, nullptr, shape);
  };
  reader.input_pair = -1;
  leaf.g = reader.input("gradient", D::F32, D::BF16, -1, &g, &shape);
  int64_t n = 1;
  for (int64_t x : shape) n *= x;
  leaf.n = n;
  reader.input_pair = static_cast<int64_t>(reader.ret) + 1;
  leaf.p = reader.input("parameter", D::F32, D::BF16, n, &p, nullptr);
  leaf.g_is_bfloat16 = g == D::BF16;
  leaf.p_is_bfloat16 = p == D::BF16;
  if (leaf.p_is_bfloat16) leaf.remainder = static_cast<const int16_t*>(in("remainder", D::S16, n));
  const D stored = leaf.settings.format == kBFloat16 ? D::BF16 : D::F32;
  const bool int8 = leaf.settings.format == kInt8;
  bool int8_allowed = false;
  Rules::visit(leaf.settings.rule, [&](auto rule) {
    leaf.moments = decltype(rule)::kMoments;
    int8_allowed = decltype(rule)::kInt8;
  });
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m[k] = in("moment", int8 ? (k ? D::U8 : D::S8) : stored, n);
  if (int8) {
    if (!int8_allowed) reader.fail("rule", "does not support int8 moments");
    if (shape.empty()) return reader.fail("gradient", "is a scalar, int8 needs an axis");
    leaf.row = shape.back();
    if (leaf.settings.block < 1 || leaf.settings.block > kTile) return reader.fail("block", "is out of range");
    leaf.blocks = leaf.row / leaf.settings.block + (leaf.row % leaf.settings.block != 0);
    const int64_t count = leaf.row ? n / leaf.row * leaf.blocks : 0;
    for (int k = 0; k < 2; ++k) leaf.scale[k] = static_cast<const float*>(in("scale", D::F32, count));
    leaf.p_out = reader.output("new parameter", p, n);
    if (leaf.p_is_bfloat16) leaf.remainder_out = static_cast<int16_t*>(reader.output("new remainder", D::S16, n));
    for (int k = 0; k < 2; ++k) leaf.m_out[k] = reader.output("new moment", k ? D::U8 : D::S8, n);
    for (int k = 0; k < 2; ++k) leaf.scale_out[k] = static_cast<float*>(reader.output("new scale", D::F32, count));
    return;
  }
  leaf.p_out = reader.output("new parameter", p, n);
  if (leaf.p_is_bfloat16) leaf.remainder_out = static_cast<int16_t*>(reader.output("new remainder", D::S16, n));
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m_out[k] = reader.output("new moment", stored, n);
}

// Whether an output overlaps another buffer, other than as an exact alias of its own input.
bool overlap(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t before = 0, end = 0, written_end = 0;  // end of all ranges but the last, of all, and of the outputs
  const Range* last = nullptr;
  for (const Range& x : ranges) {
    const bool alias = last != nullptr && last->begin == x.begin && last->end == x.end && last->output != x.output &&
                      last->pair == x.pair;
    if (x.begin < (alias ? before : x.output ? end : written_end)) return true;
    before = end;
    end = std::max(end, x.end);
    if (x.output) written_end = std::max(written_end, x.end);
    last = &x;
  }
  return false;
}

// Whether a buffer is readable and has whole rows of n elements of a dtype.
bool has_rows(const ffi::AnyBuffer& buffer, ffi::DataType dtype, int64_t n) {
  if (buffer.element_type() != dtype || buffer.element_count() % n) return false;
  if (buffer.untyped_data() == nullptr) return buffer.element_count() == 0;
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % ffi::ByteWidth(dtype) == 0;
}

// Whether a leaf's runs are whole rows, and its run and digits together count its elements.
bool counts_elements(const Leaf& leaf) {
  if (leaf.n == 0) return true;
  const int64_t run = leaf.settings.run;
  if (run < 1 || leaf.n % run || (leaf.row && run % leaf.row)) return false;
  int64_t runs = leaf.n / run;
  for (int64_t k = 0; k < leaf.settings.digits; ++k) {
    if (leaf.digit_sizes[k] < 1 || runs % leaf.digit_sizes[k]) return false;
    runs /= leaf.digit_sizes[k];
  }
  return runs == 1;
}

using Int64s = ffi::Span<const int64_t>;

ffi::Error step(ffi::ThreadPool threads, Int64s rule, Int64s format, Int64s clipping, Int64s scalar_rows,
                Int64s salt, Int64s block, Int64s run, Int64s digits, Int64s digit_sizes, Int64s digit_strides,
                ffi::AnyBuffer scalars, ffi::AnyBuffer count, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const size_t leaves = rule.size();
  for (const Int64s& x : {format, clipping, scalar_rows, salt, block, run, digits}) {
    if (x.size() != leaves) return invalid("jadam: each attribute must have one number per leaf");
  }
  const int64_t all_digits = digit_sizes.size();
  if (digit_strides.size() != digit_sizes.size()) return invalid("jadam: each digit must have a size and a stride");
  if (!has_rows(scalars, ffi::DataType::F32, kScalars)) {
    return invalid("jadam: scalars must be float32 in rows of " + std::to_string(kScalars));
  }
  if (!has_rows(count, ffi::DataType::U32, 1 + leaves) || static_cast<size_t>(count.element_count()) != 1 + leaves) {
    return invalid("jadam: count must be uint32, the step count and one offset per leaf");
  }
  auto work = std::make_shared<Work>();
  work->count = *count.typed_data<uint32_t>();
  work->update = instruction_set().update;
  work->leaves.resize(leaves);
  Reader reader{args, rets};
  reader.ranges.reserve(args.size() + rets.size());
  const int64_t rows = scalars.element_count() / kScalars;
  int64_t elements = 0, digit = 0;
  for (size_t i = 0; i < leaves; ++i) {
    Leaf& leaf = work->leaves[i];
    reader.leaf = i;
    leaf.settings = {rule[i], format[i], clipping[i], scalar_rows[i], salt[i], block[i], run[i], digits[i]};
    const Settings& settings = leaf.settings;
    if (settings.rule < 0 || settings.rule >= Rules::kCount) reader.fail("rule", "is out of range");
    if (settings.format < 0 || settings.format >= kFormats) reader.fail("format", "is out of range");
    if (settings.clipping < 0 || settings.clipping >= kClippings) reader.fail("clipping", "is out of range");
    if (settings.scalar_row < 0 || settings.scalar_row >= rows) reader.fail("scalars", "are out of range");
    if (settings.digits < 0 || settings.digits > all_digits - digit) reader.fail("digits", "are out of range");
    if (!reader.error.empty()) return invalid(reader.error);
    leaf.digit_sizes = digit_sizes.begin() + digit;
    leaf.digit_strides = digit_strides.begin() + digit;
    digit += settings.digits;
    leaf.offset = count.typed_data<uint32_t>()[1 + i];
    std::memcpy(&leaf.scalars, scalars.typed_data<float>() + settings.scalar_row * kScalars, sizeof(Scalars));
    read_leaf(reader, leaf);
    if (!reader.error.empty()) return invalid(reader.error);
    if (!counts_elements(leaf)) {
      return invalid("jadam: leaf " + std::to_string(i) + ": run must be whole rows, run and digits the whole leaf");
    }
    const bool int8 = settings.format == kInt8;
    const int64_t units = int8 ? (leaf.row ? leaf.n / leaf.row * leaf.blocks : 0) : leaf.n;
    const int64_t per_chunk = int8 ? std::max<int64_t>(1, kChunk / settings.block) : kChunk;
    for (int64_t begin = 0; begin < units; begin += per_chunk) {
      work->chunks.push_back({static_cast<int64_t>(i), begin, std::min(units, begin + per_chunk)});
    }
    elements += leaf.n;
  }
  if (digit != all_digits) return invalid("jadam: too many digits");
  if (reader.arg != args.size() || reader.ret != rets.size()) return invalid("jadam: too many buffers");
  if (overlap(reader.ranges)) return invalid("jadam: an output overlaps another buffer");
  update_all(work, threads, elements);
  return ffi::Error::Success();
}

// The names of all rules in order, separated by spaces.
const std::string& rule_names() {
  static const std::string names = [] {
    std::string joined;
    for (int i = 0; i < Rules::kCount; ++i) {
      Rules::visit(i, [&](auto rule) { joined += std::string(i ? " " : "") + decltype(rule)::name(); });
    }
    return joined;
  }();
  return names;
}

}  // namespace
}  // namespace jadam

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT XLA_FFI_Error* jadam_step(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_step, jadam::step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<jadam::Int64s>("rule")
                                  .Attr<jadam::Int64s>("format")
                                  .Attr<jadam::Int64s>("clipping")
                                  .Attr<jadam::Int64s>("scalars")
                                  .Attr<jadam::Int64s>("salt")
                                  .Attr<jadam::Int64s>("block")
                                  .Attr<jadam::Int64s>("run")
                                  .Attr<jadam::Int64s>("digits")
                                  .Attr<jadam::Int64s>("digit_sizes")
                                  .Attr<jadam::Int64s>("digit_strides")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

// For Python: the order of names, the instruction set in use, and the checksum of the sources of this build.
#define JADAM_NAME(name) #name " "
EXPORT const char* jadam_rules() { return jadam::rule_names().c_str(); }
EXPORT const char* jadam_scalars() { return JADAM_SCALARS(JADAM_NAME); }
EXPORT const char* jadam_formats() { return jadam::kFormatNames; }
EXPORT const char* jadam_instructions() { return jadam::instruction_set().name; }
EXPORT uint32_t jadam_source() { return JADAM_SOURCE; }
