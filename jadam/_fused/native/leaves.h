// Reads and checks the arguments of an FFI call, a group of leaves, for the CPU's handler and CUDA's.
//
// Limits: gradients float32 or bfloat16; parameters float32, or bfloat16 with a remainder; moments float32, bfloat16 or
// (for two moments) int8. An output may be its whole input, but no part of one.

#ifndef JADAM_LEAVES_H_
#define JADAM_LEAVES_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "formats.h"
#include "rules.h"
#include "xla/ffi/api/ffi.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace jadam {

namespace ffi = xla::ffi;
using Int64s = ffi::Span<const int64_t>;

constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

// The arguments of the call: for each leaf a value of each of the first attributes, then the digits of all leaves; rows
// of scalars; the step count and each leaf's offset; the buffers.
struct Call {
  Int64s rule, format, clipping, scalars, salt, block, run, digits, digit_sizes, digit_strides;
  ffi::AnyBuffer scalar_rows, count_and_offsets;
  ffi::RemainingArgs args;
  ffi::RemainingRets rets;
};

// Appends the members of `Call` to a binding.
template <class Binding>
auto bind_call(Binding binding) {
  return std::move(binding)
      .template Attr<Int64s>("rule")
      .template Attr<Int64s>("format")
      .template Attr<Int64s>("clipping")
      .template Attr<Int64s>("scalars")
      .template Attr<Int64s>("salt")
      .template Attr<Int64s>("block")
      .template Attr<Int64s>("run")
      .template Attr<Int64s>("digits")
      .template Attr<Int64s>("digit_sizes")
      .template Attr<Int64s>("digit_strides")
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets();
}

// A leaf: an array, or a shard of one. Its elements come in runs that are contiguous in the global array. The run's
// number has one digit for each further axis along which the shard was cut, the fastest first.
struct LeafArguments {
  int64_t rule, format, clipping, scalar_row, salt, block, run, digits;
  const int64_t* digit_sizes = nullptr;
  const int64_t* digit_strides = nullptr;  // how far a digit moves the global index
  int64_t n = 0;                           // number of elements
  int64_t row = 0, blocks = 0;             // int8 only: elements of the last axis, and blocks along it
  int64_t moments = 0;                     // number of moments
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

  int64_t num_blocks() const { return row ? n / row * blocks : 0; }
};

// The addresses of a buffer, or of an input and the output that is the same buffer.
struct Range {
  uintptr_t begin, end;
  bool output;
};

// Reads and checks the buffers of a call, one after the other.
struct Reader {
  using Shape = ffi::AnyBuffer::Dimensions;

  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  int64_t max_block;        // elements of an int8 block
  size_t arg = 0, ret = 0;  // the next input and output
  int64_t leaf = 0;         // for error messages
  size_t alias = 0;         // the range of the input that the next output may alias
  std::string error = {};   // the first error
  std::vector<Range> ranges = {};

  void fail(const char* what, const std::string& problem) {
    if (error.empty()) error = "jadam: leaf " + std::to_string(leaf) + ": " + what + " " + problem;
  }

  // The next input, of one of two dtypes and n elements (any number if n < 0). Null after an error.
  const void* input(const char* what, ffi::DataType dtype, ffi::DataType other, int64_t n, ffi::DataType* found,
                    Shape* shape) {
    auto buffer = args.get<ffi::AnyBuffer>(arg++);
    if (!buffer.has_value()) return fail(what, "is missing"), nullptr;
    if (found != nullptr) *found = buffer->element_type();
    if (shape != nullptr) *shape = buffer->dimensions();
    return check(what, *buffer, dtype, other, n, false);
  }

  void* output(const char* what, ffi::DataType dtype, int64_t n) {
    auto buffer = rets.get<ffi::AnyBuffer>(ret++);
    if (!buffer.has_value()) return fail(what, "is missing"), nullptr;
    return check(what, **buffer, dtype, dtype, n, true);
  }

  void* check(const char* what, const ffi::AnyBuffer& buffer, ffi::DataType dtype, ffi::DataType other, int64_t n,
              bool output) {
    const ffi::DataType type = buffer.element_type();
    const int64_t count = static_cast<int64_t>(buffer.element_count());
    if (type != dtype && type != other) fail(what, "has the wrong dtype");
    if (n >= 0 && count != n) fail(what, "has the wrong size");
    if (buffer.untyped_data() == nullptr && count != 0) fail(what, "has no data");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.untyped_data());
    if (error.empty() && begin % ffi::ByteWidth(type)) fail(what, "is not aligned");
    if (count != 0) add_range(begin, begin + buffer.size_bytes(), output);
    return buffer.untyped_data();
  }

  void add_range(uintptr_t begin, uintptr_t end, bool output) {
    if (output && alias < ranges.size()) {
      Range& input = ranges[alias++];
      if (!input.output && input.begin == begin && input.end == end) {
        input.output = true;
        return;
      }
    }
    ranges.push_back({begin, end, output});
  }
};

// The inputs of a leaf are g, p, the remainder if any, the moments, and int8 scales. The outputs are the same without
// g.
inline void read_leaf(Reader& reader, LeafArguments& leaf) {
  using D = ffi::DataType;
  D g = D::F32, p = D::F32;
  Reader::Shape shape;
  const auto in = [&](const char* what, D dtype, int64_t n) {
    return reader.input(what, dtype, dtype, n, nullptr, nullptr);
  };
  reader.alias = reader.ranges.size() + 1;  // that of p
  leaf.g = reader.input("gradient", D::F32, D::BF16, -1, &g, &shape);
  int64_t n = 1;
  for (int64_t x : shape) n *= x;
  leaf.n = n;
  leaf.p = reader.input("parameter", D::F32, D::BF16, n, &p, nullptr);
  leaf.g_is_bfloat16 = g == D::BF16;
  leaf.p_is_bfloat16 = p == D::BF16;
  if (leaf.p_is_bfloat16) leaf.remainder = static_cast<const int16_t*>(in("remainder", D::S16, n));
  const bool int8 = leaf.format == kInt8;
  const auto stored = [&](int64_t k) {  // the dtype of a moment
    return int8 ? (k ? D::U8 : D::S8) : leaf.format == kBFloat16 ? D::BF16 : D::F32;
  };
  bool int8_allowed = false;
  Rules::visit(leaf.rule, [&](auto rule) {
    leaf.moments = decltype(rule)::kMoments;
    int8_allowed = decltype(rule)::kInt8;
  });
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m[k] = in("moment", stored(k), n);
  if (int8) {
    if (!int8_allowed) reader.fail("rule", "does not support int8 moments");
    if (shape.size() == 0) return reader.fail("gradient", "is a scalar, int8 needs an axis");
    leaf.row = shape.back();
    if (leaf.block < 1 || leaf.block > reader.max_block) return reader.fail("block", "is out of range");
    leaf.blocks = leaf.row / leaf.block + (leaf.row % leaf.block != 0);
    for (auto& scale : leaf.scale) scale = static_cast<const float*>(in("scale", D::F32, leaf.num_blocks()));
  }
  leaf.p_out = reader.output("new parameter", p, n);
  if (leaf.p_is_bfloat16) leaf.remainder_out = static_cast<int16_t*>(reader.output("new remainder", D::S16, n));
  for (int64_t k = 0; k < leaf.moments; ++k) leaf.m_out[k] = reader.output("new moment", stored(k), n);
  if (int8) {
    const int64_t count = leaf.num_blocks();
    for (auto& scale : leaf.scale_out) scale = static_cast<float*>(reader.output("new scale", D::F32, count));
  }
}

// Whether an output overlaps another buffer, other than as its own input.
inline bool overlap(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t end = 0, written_end = 0;  // of all ranges so far, and of the outputs
  for (const Range& x : ranges) {
    if (x.begin < (x.output ? end : written_end)) return true;
    end = std::max(end, x.end);
    if (x.output) written_end = std::max(written_end, x.end);
  }
  return false;
}

// Whether a buffer is readable and has whole rows of n elements of a dtype.
inline bool has_rows(const ffi::AnyBuffer& buffer, ffi::DataType dtype, int64_t n) {
  if (buffer.element_type() != dtype || buffer.element_count() % n) return false;
  if (buffer.untyped_data() == nullptr) return buffer.element_count() == 0;
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % ffi::ByteWidth(dtype) == 0;
}

// Whether a leaf's runs are whole rows, and its run and digits together count its elements.
inline bool counts_elements(const LeafArguments& leaf) {
  if (leaf.n == 0) return true;
  if (leaf.run < 1 || leaf.n % leaf.run || (leaf.row && leaf.run % leaf.row)) return false;
  int64_t runs = leaf.n / leaf.run;
  for (int64_t k = 0; k < leaf.digits; ++k) {
    if (leaf.digit_sizes[k] < 1 || runs % leaf.digit_sizes[k]) return false;
    runs /= leaf.digit_sizes[k];
  }
  return runs == 1;
}

// Reads the leaves, which derive from `LeafArguments`. Returns what is wrong with the call, or "".
template <class Leaf>
std::string read_leaves(const Call& call, int64_t max_block, std::vector<Leaf>& leaves) {
  leaves.resize(call.rule.size());
  for (const Int64s& x : {call.format, call.clipping, call.scalars, call.salt, call.block, call.run, call.digits}) {
    if (x.size() != leaves.size()) return "jadam: each attribute must have one number per leaf";
  }
  const int64_t all_digits = call.digit_sizes.size();
  if (call.digit_strides.size() != call.digit_sizes.size()) return "jadam: each digit must have a size and a stride";
  if (!has_rows(call.scalar_rows, ffi::DataType::F32, kScalars)) {
    return "jadam: scalars must be float32 in rows of " + std::to_string(kScalars);
  }
  const ffi::AnyBuffer& count = call.count_and_offsets;
  if (!has_rows(count, ffi::DataType::U32, 1 + leaves.size()) ||
      static_cast<size_t>(count.element_count()) != 1 + leaves.size()) {
    return "jadam: count must be uint32, the step count and one offset per leaf";
  }
  Reader reader{call.args, call.rets, max_block};
  reader.ranges.reserve(2 + call.args.size() + call.rets.size());
  for (const ffi::AnyBuffer* x : {&call.scalar_rows, &call.count_and_offsets}) {  // read while outputs are written
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x->untyped_data());
    if (x->element_count() != 0) reader.add_range(begin, begin + x->size_bytes(), false);
  }
  const int64_t rows = call.scalar_rows.element_count() / kScalars;
  int64_t digit = 0;
  for (size_t i = 0; i < leaves.size(); ++i) {
    LeafArguments& leaf = leaves[i];
    reader.leaf = i;
    leaf.rule = call.rule[i], leaf.format = call.format[i], leaf.clipping = call.clipping[i];
    leaf.scalar_row = call.scalars[i], leaf.salt = call.salt[i], leaf.block = call.block[i];
    leaf.run = call.run[i], leaf.digits = call.digits[i];
    if (leaf.rule < 0 || leaf.rule >= Rules::kCount) reader.fail("rule", "is out of range");
    if (leaf.format < 0 || leaf.format >= kFormats) reader.fail("format", "is out of range");
    if (leaf.clipping < 0 || leaf.clipping >= kClippings) reader.fail("clipping", "is out of range");
    if (leaf.scalar_row < 0 || leaf.scalar_row >= rows) reader.fail("scalars", "are out of range");
    if (leaf.digits < 0 || leaf.digits > all_digits - digit) reader.fail("digits", "are out of range");
    if (!reader.error.empty()) return reader.error;
    leaf.digit_sizes = call.digit_sizes.begin() + digit;
    leaf.digit_strides = call.digit_strides.begin() + digit;
    digit += leaf.digits;
    read_leaf(reader, leaf);
    if (!reader.error.empty()) return reader.error;
    if (!counts_elements(leaf)) {
      return "jadam: leaf " + std::to_string(i) + ": run must be whole rows, run and digits the whole leaf";
    }
  }
  if (digit != all_digits) return "jadam: too many digits";
  if (reader.arg != call.args.size() || reader.ret != call.rets.size()) return "jadam: too many buffers";
  if (overlap(reader.ranges)) return "jadam: an output overlaps another buffer";
  return "";
}

}  // namespace jadam

#endif  // JADAM_LEAVES_H_
