// The CPU kernel: an XLA FFI handler that updates a group of leaves in one pass over memory.
//
// Rules are in rules.h and storage formats in formats.h. leaves.h reads and checks the arguments. This file has tiles
// and threads. A leaf is updated in tiles that fit the L1 cache: load, decode, apply the rule, update the parameter,
// encode, store. Each is a loop over the tile that the compiler vectorises, so rules, formats and dtypes need no
// combined loops.

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

#include "leaves.h"

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

// A leaf with what the CPU can read from its arguments.
struct Leaf : LeafArguments {
  Scalars scalars;
  uint32_t offset = 0;  // global index of the first element
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

INLINE void clip_tile(const Leaf& leaf, Tile& tile, int64_t n) {
  if (!leaf.clipping) return;
  const Scalars s = leaf.scalars;
  float* g = tile.g_buffer;
  if (tile.g != g) std::memcpy(g, tile.g, n * sizeof(float));
  tile.g = g;
  if (leaf.clipping & kBound) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) g[i] = clip_to_bound(s, g[i]);
  }
  if (leaf.clipping & kNorm) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) g[i] = clip_by_norm(s, g[i]);
  }
}

// New parameters and moments of a tile. kCommonScalars: see rules.h.
template <class Rule, bool kCommonScalars, bool kWeightDecay>
INLINE void rule_loop(const Scalars s, Tile& tile, int64_t n) {
  constexpr bool kHasVMax = Rule::kMoments == 3;
  const float *g = tile.g, *p = tile.p, *m = tile.m[0], *v = tile.m[1], *v_max = tile.m[2];
  float *p_out = tile.p_out, *m_out = tile.m_out[0], *v_out = tile.m_out[1], *v_max_out = tile.m_out[2];
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    Moments x{m[i], v[i], kHasVMax ? v_max[i] : 0.0f};
    p_out[i] = update<Rule, kCommonScalars>(s, kWeightDecay, g[i], p[i], x);
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
      const float v_code = static_cast<float>(static_cast<i32>(vq[i]));
      p_out[i] =
          update_int8<Rule, kCommonScalars>(s, kWeightDecay, g[i], p[i], rq[i], v_code, r_step, v_step, r[i], v[i]);
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
  const bool common = has_common_scalars(s);
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
  const float r_inverse_step = r_inverse_step_of(r_scale), v_inverse_step = v_inverse_step_of(v_scale);
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
  clip_tile(leaf, tile, n);
  Rules::visit(leaf.rule, [&](auto rule) JADAM_LAMBDA { apply_rule<decltype(rule)>(leaf, tile, n, blocks); });
  if (leaf.p_is_bfloat16) split_tile(leaf.p_out, leaf.remainder_out, tile.p_buffer, start, n);
}

// The global index of element i modulo 2**32, which the random bits depend on.
INLINE uint32_t global_index(const Leaf& leaf, int64_t i) {
  if (i < leaf.run) return leaf.offset + static_cast<uint32_t>(i);  // as below, without the divisions
  uint32_t index = leaf.offset + static_cast<uint32_t>(i % leaf.run);
  int64_t rest = i / leaf.run;
  for (int64_t k = 0; k < leaf.digits; ++k) {
    const bool last = k == leaf.digits - 1;
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
  return block / leaf.blocks * leaf.row + block % leaf.blocks * leaf.block;
}

// Sets `blocks` to as many as a tile holds, from block `first`, which starts at element `start`, to before block `end`.
INLINE void set_blocks(Blocks& blocks, const Leaf& leaf, int64_t start, int64_t first, int64_t end) {
  blocks.first = first;
  blocks.count = 0;
  blocks.start = start;
  blocks.bounds[0] = 0;
  int64_t at = 0, column = start % leaf.row;
  while (first + blocks.count < end) {
    const int64_t n = std::min(leaf.block, leaf.row - column);
    if (at + n > kTile) break;
    column = column + n == leaf.row ? 0 : column + n;
    blocks.bounds[++blocks.count] = at += n;
  }
}

INLINE void update_int8_chunk(const Leaf& leaf, Tile& tile, uint32_t count, int64_t begin, int64_t end) {
  const Dither dither(static_cast<uint32_t>(leaf.salt), 0, count);
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
  const bool bfloat16 = leaf.format == kBFloat16;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = std::min(kTile, end - start);
    for (int64_t k = 0; k < leaf.moments; ++k) {
      tile.m[k] = bfloat16 ? tile.m_buffer[k] : at(leaf.m[k], start);
      tile.m_out[k] = bfloat16 ? tile.m_buffer[k] : at(leaf.m_out[k], start);
      if (bfloat16) load_bfloat16(tile.m_buffer[k], leaf.m[k], start, n);
    }
    update_elements(leaf, tile, start, n);
    for (int64_t k = 0; bfloat16 && k < leaf.moments; ++k) {
      const Dither dither(static_cast<uint32_t>(leaf.salt), static_cast<uint32_t>(k), count);
      for (int64_t at = 0, end = 0; at < n; at = end) {  // up to the end of the run
        end = std::min(n, at + leaf.run - (start + at) % leaf.run);
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
  if (leaf.format == kInt8) {
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

ffi::Error step(ffi::ThreadPool threads, const Call& call) {
  auto work = std::make_shared<Work>();
  std::string error = read_leaves(call, kTile, work->leaves);
  if (!error.empty()) return ffi::Error::InvalidArgument(std::move(error));
  const uint32_t* count_and_offsets = call.count_and_offsets.typed_data<uint32_t>();
  work->count = count_and_offsets[0];
  work->update = instruction_set().update;
  int64_t elements = 0;
  for (size_t i = 0; i < work->leaves.size(); ++i) {
    Leaf& leaf = work->leaves[i];
    leaf.offset = count_and_offsets[1 + i];
    std::memcpy(&leaf.scalars, call.scalar_rows.typed_data<float>() + leaf.scalar_row * kScalars, sizeof(Scalars));
    const bool int8 = leaf.format == kInt8;
    const int64_t units = int8 ? leaf.num_blocks() : leaf.n;
    const int64_t per_chunk = int8 ? std::max<int64_t>(1, kChunk / leaf.block) : kChunk;
    for (int64_t begin = 0; begin < units; begin += per_chunk) {
      work->chunks.push_back({static_cast<int64_t>(i), begin, std::min(units, begin + per_chunk)});
    }
    elements += leaf.n;
  }
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

EXPORT XLA_FFI_Error* jadam_step(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_step,
                              ([](ffi::ThreadPool threads, auto... arguments) {
                                return jadam::step(threads, jadam::Call{arguments...});
                              }),
                              jadam::bind_call(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

// For Python: the order of names, the instruction set in use, and the checksum of the sources of this build.
#define JADAM_NAME(name) #name " "
EXPORT const char* jadam_rules() { return jadam::rule_names().c_str(); }
EXPORT const char* jadam_scalars() { return JADAM_SCALARS(JADAM_NAME); }
EXPORT const char* jadam_formats() { return jadam::kFormatNames; }
EXPORT const char* jadam_instructions() { return jadam::instruction_set().name; }
EXPORT uint32_t jadam_source() { return JADAM_SOURCE; }
