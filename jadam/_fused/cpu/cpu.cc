// One pass over memory for Adam and its relatives on a CPU: an XLA FFI handler over a group of leaves.
//
// What a rule is stands in rules.h, how moments are stored in formats.h; here are tiles, threads and the checking of
// arguments. A leaf is taken in tiles that fit the first cache: load, decode, rule, descend, encode, store, each a loop
// over the tile that the compiler vectorises, so that formats, rules and dtypes add up instead of multiplying.
//
// Limits: gradients float32 or bfloat16; parameters float32, or bfloat16 with a remainder; moments float32, bfloat16 or
// (two of them) int8; blocks of at most kTile elements. Outputs may be the inputs' own buffers, not parts of them.

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
#define JADAM_LAMBDA __attribute__((always_inline))  // else it would not have the instructions of its caller
#else
#define JADAM_LAMBDA
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

namespace jadam {
namespace {

constexpr int64_t kTile = 512;       // elements a tile: 10 KiB of float32
constexpr int64_t kPiece = 1 << 15;  // elements a thread takes at a time
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

enum Clipping { kBound = 1, kNorm = 2, kClippings = 4 };

// A leaf's number in each attribute.
struct Settings {
  int64_t rule, format, clipping, scalars, salt, block, run, stride;
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
  const u16* x = static_cast<const u16*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) to[i] = widen(x[i]);
}

INLINE const float* at(const void* from, int64_t start) { return static_cast<const float*>(from) + start; }
INLINE float* at(void* from, int64_t start) { return static_cast<float*>(from) + start; }

INLINE void clip(const Leaf& leaf, Tile& tile, int64_t n) {
  if (!leaf.set.clipping) return;
  const float bound = leaf.s.bound, norm = leaf.s.norm, max_norm = leaf.s.max_norm;
  float* g = tile.own_g;
  if (tile.g != g) std::memcpy(g, tile.g, n * sizeof(float));
  tile.g = g;
  if (leaf.set.clipping & kBound) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) {
      float x = g[i] > bound ? bound : g[i];
      g[i] = x < -bound ? -bound : x;
    }
  }
  if (leaf.set.clipping & kNorm) {
    INDEPENDENT for (int64_t i = 0; i < n; ++i) g[i] = g[i] / norm * max_norm;
  }
}

// From gradient and moments to the parameter. kUsual: see rules.h. kRoots: sqrt(v) is kept in the tile, and v is not.
template <class Rule, bool kUsual, bool kDecay, bool kRoots>
INLINE void loop(const Scalars s, Tile& tile, int64_t n) {
  constexpr bool kThird = Rule::kMoments == 3;
  const float *g = tile.g, *p = tile.p, *m = tile.m[0], *v = tile.m[1], *largest = tile.m[2];
  float *p_out = tile.p_out, *m_out = tile.m_out[0], *v_out = tile.m_out[1], *largest_out = tile.m_out[2];
  float* roots = tile.roots;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    Moments x{m[i], v[i], kThird ? largest[i] : 0.0f, 0.0f};
    float u = Rule::template direction<kUsual>(s, g[i], x);
    if (kDecay) u = u + s.weight_decay * p[i];
    p_out[i] = p[i] + s.minus_lr * u;
    m_out[i] = x.m;
    if (!kRoots) v_out[i] = x.v;
    if (kThird) largest_out[i] = x.largest;
    if (kRoots) roots[i] = x.root;
  }
}

template <class Rule, bool kRoots>
INLINE void loop(const Scalars& s, Tile& tile, int64_t n) {
  const bool usual = s.b1 >= 0.5f && s.b2 >= 0.5f && s.eps_root == 0.0f;
  if (s.weight_decay == 0.0f) {
    usual ? loop<Rule, true, false, kRoots>(s, tile, n) : loop<Rule, false, false, kRoots>(s, tile, n);
  } else {
    usual ? loop<Rule, true, true, kRoots>(s, tile, n) : loop<Rule, false, true, kRoots>(s, tile, n);
  }
}

template <class Rule>
INLINE void step_tile(const Leaf& leaf, Tile& tile, int64_t n) {
  if constexpr (Rule::kInt8) {
    if (leaf.set.format == kInt8) return loop<Rule, true>(leaf.s, tile, n);
  }
  loop<Rule, false>(leaf.s, tile, n);
}

INLINE void join_tile(float* to, const void* from, const int16_t* rest, int64_t start, int64_t n) {
  const u16* p = static_cast<const u16*>(from) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) to[i] = join(p[i], rest[start + i]);
}

INLINE void split_tile(void* to, int16_t* rest, const float* from, int64_t start, int64_t n) {
  u16* p = static_cast<u16*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) split(from[i], p[i], rest[start + i]);
}

template <bool kOdd>
INLINE void round_tile(void* to, const float* from, const Dither& dither, int64_t start, u32 first, int64_t n) {
  u16* x = static_cast<u16*>(to) + start;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const u32 place = dither.start(first + static_cast<u32>(i));
    x[i] = round_to_bfloat16(from[i], kOdd ? dither.odd(place) : dither.even(place));
  }
}

INLINE void dequantize_block(Tile& tile, int64_t at, const i8* rq, const u8* sq, float r_scale, float s_scale, int64_t n) {
  float *m = tile.own_m[0] + at, *v = tile.own_m[1] + at;
  const float by_r = r_scale * (1.0f / kRLevels), by_s = s_scale * (1.0f / kSLevels);
  INDEPENDENT for (int64_t i = 0; i < n; ++i) dequantize(rq[i], sq[i], by_r, by_s, m[i], v[i]);
}

INLINE void quantize_block(Tile& tile, int64_t at, i8* rq, u8* sq, float* r_scale, float* s_scale, const Dither& dither,
                     u32 first, int64_t n) {
  float *r = tile.own_m[0] + at, *s = tile.roots + at;
  i32 r_max = 0, s_max = 0;
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    r[i] = ratio(r[i], s[i]);
    r_max = larger(r_max, static_cast<i32>(bits(r[i]) & kNoSign));
    s_max = larger(s_max, static_cast<i32>(bits(s[i]) & kNoSign));
  }
  float rs, ss;
  scales(r_max, s_max, rs, ss);
  *r_scale = rs;
  *s_scale = ss;
  const float by_r = levels_over(kRLevels, rs), by_s = levels_over(kSLevels, ss);
  alignas(64) i32 new_r[kTile], new_s[kTile];  // codes; narrowed in the same loop they would slow it down
  INDEPENDENT for (int64_t i = 0; i < n; ++i) {
    const u32 start = dither.start(first + static_cast<u32>(i));
    new_r[i] = ratio_code(r[i], by_r, dither.even(start));
    new_s[i] = root_code(s[i], by_s, dither.odd(start));
  }
  INDEPENDENT for (int64_t i = 0; i < n; ++i) rq[i] = static_cast<i8>(new_r[i]);
  INDEPENDENT for (int64_t i = 0; i < n; ++i) sq[i] = static_cast<u8>(new_s[i]);
}

// Elements [start, start + n) from gradient to parameter, with the moments where the tile says.
INLINE void update(const Leaf& leaf, Tile& tile, int64_t start, int64_t n) {
  tile.g = leaf.narrow_g ? tile.own_g : at(leaf.g, start);
  tile.p = leaf.narrow_p ? tile.own_p : at(leaf.p, start);
  tile.p_out = leaf.narrow_p ? tile.own_p : at(leaf.p_out, start);
  if (leaf.narrow_g) load(tile.own_g, leaf.g, start, n);
  if (leaf.narrow_p) join_tile(tile.own_p, leaf.p, leaf.rest, start, n);
  clip(leaf, tile, n);
  Rules::visit(leaf.set.rule, [&](auto rule) JADAM_LAMBDA { step_tile<decltype(rule)>(leaf, tile, n); });
  if (leaf.narrow_p) split_tile(leaf.p_out, leaf.rest_out, tile.own_p, start, n);
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
      dequantize_block(tile, at, rq + start + at, sq + start + at, leaf.scale[0][block], leaf.scale[1][block], n);
    }
    update(leaf, tile, start, block_start(leaf, block) - start);
    for (int64_t k = from; k < block; ++k) {
      const int64_t at = block_start(leaf, k) - start, n = block_start(leaf, k + 1) - start - at;
      quantize_block(tile, at, rq_out + start + at, sq_out + start + at, leaf.scale_out[0] + k, leaf.scale_out[1] + k, dither,
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
          round_tile<true>(leaf.m_out[k], tile.own_m[k] + at, dither, start + at, first, end - at);
        } else {
          round_tile<false>(leaf.m_out[k], tile.own_m[k] + at, dither, start + at, first, end - at);
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
  bool int8_allowed = false;
  Rules::visit(leaf.set.rule, [&](auto rule) {
    leaf.moments = decltype(rule)::kMoments;
    int8_allowed = decltype(rule)::kInt8;
  });
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m[k] = in("moment", int8 ? (k ? D::U8 : D::S8) : stored, n);
  if (int8) {
    if (!int8_allowed) reader.fail("rule", "has no int8 moments");
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

using Numbers = ffi::Span<const int64_t>;

ffi::Error step(ffi::ThreadPool threads, Numbers rule, Numbers format, Numbers clipping, Numbers scalar_rows,
                Numbers salt, Numbers block, Numbers run, Numbers stride, ffi::AnyBuffer scalars, ffi::AnyBuffer count,
                ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const size_t leaves = rule.size();
  for (const Numbers& x : {format, clipping, scalar_rows, salt, block, run, stride}) {
    if (x.size() != leaves) return invalid("jadam: each attribute must have a number for every leaf");
  }
  if (!rows_of(scalars, ffi::DataType::F32, kScalars)) {
    return invalid("jadam: scalars must be float32 in rows of " + std::to_string(kScalars));
  }
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
    leaf.set = {rule[i], format[i], clipping[i], scalar_rows[i], salt[i], block[i], run[i], stride[i]};
    const Settings& set = leaf.set;
    if (set.rule < 0 || set.rule >= Rules::kCount) reader.fail("rule", "is out of range");
    if (set.format < 0 || set.format >= kFormats) reader.fail("format", "is out of range");
    if (set.clipping < 0 || set.clipping >= kClippings) reader.fail("clipping", "is out of range");
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

// The names of all rules, separated by spaces, in their order.
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
                                  .Attr<jadam::Numbers>("rule")
                                  .Attr<jadam::Numbers>("format")
                                  .Attr<jadam::Numbers>("clipping")
                                  .Attr<jadam::Numbers>("scalars")
                                  .Attr<jadam::Numbers>("salt")
                                  .Attr<jadam::Numbers>("block")
                                  .Attr<jadam::Numbers>("run")
                                  .Attr<jadam::Numbers>("stride")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

// What Python compares with its own: names in their order, and the checksum of the sources this was built from. And
// which instructions run here.
#define JADAM_NAME(name) #name " "
EXPORT const char* jadam_rules() { return jadam::rule_names().c_str(); }
EXPORT const char* jadam_scalars() { return JADAM_SCALARS(JADAM_NAME); }
EXPORT const char* jadam_formats() { return jadam::kFormatNames; }
EXPORT const char* jadam_instructions() { return jadam::instructions().name; }
EXPORT uint32_t jadam_source() { return JADAM_SOURCE; }
