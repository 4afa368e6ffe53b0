// The FFI handlers for CUDA: they launch the kernel of kernel.cu with a table of leaves.
//
// They are plain C++ and open no library. When XLA initializes a program, they get its kernels and the driver's
// functions from Python; see driver.py.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "leaves.h"
#include "table.h"

namespace ffi = xla::ffi;

namespace jadam {
namespace {

using Launch = int (*)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                       void** extra);  // cuLaunchKernel
using Copy = int (*)(uintptr_t to, uintptr_t from, size_t bytes, void* stream);  // cuMemcpyDtoDAsync

struct Kernel {
  void* kernel = nullptr;
  Launch launch = nullptr;
  Copy copy = nullptr;
};

// A kernel is compiled for a rule, a format, and whether weights and gradients are bfloat16.
struct Variant {
  int32_t rule, format, bfloat16_weights, bfloat16_gradients;

  explicit Variant(const LeafArguments& leaf)
      : rule(static_cast<int32_t>(leaf.rule)),
        format(static_cast<int32_t>(leaf.format)),
        bfloat16_weights(leaf.p_is_bfloat16),
        bfloat16_gradients(leaf.g_is_bfloat16) {}
  int32_t number() const { return ((rule * kFormats + format) * 2 + bfloat16_weights) * 2 + bfloat16_gradients; }
};

// `resolve_for_handler` of driver.py. Returns 0, or writes the text of an error.
using Resolve = int (*)(void* stream, const Variant* variant, Kernel* kernel, char* error, size_t error_size);

// The kernels of this process, by device and variant.
class Kernels {
 public:
  static Kernels& of_process() {
    static Kernels* kernels = new Kernels;  // never destroyed: threads of XLA may outlive static objects
    return *kernels;
  }

  void set_resolve(Resolve resolve) { resolve_ = resolve; }

  // Null if `load` has not been called.
  const Kernel* find(int32_t device, const Variant& variant) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kernels_.find({device, variant.number()});
    return found == kernels_.end() ? nullptr : &found->second;
  }

  // Returns an error, or "".
  std::string load(int32_t device, const Variant& variant, void* stream) {
    if (find(device, variant) != nullptr) return "";
    const Resolve resolve = resolve_;
    if (resolve == nullptr) return "jadam: the CUDA kernels need the Python package jadam in this process";
    Kernel kernel;
    char error[1024] = "";
    const int failed = resolve(stream, &variant, &kernel, error, sizeof(error));
    if (failed && error[0] != 0) return std::string("jadam: ") + error;
    if (failed || kernel.kernel == nullptr || kernel.launch == nullptr || kernel.copy == nullptr) {
      return "jadam: Python did not give the CUDA kernel";  // a callback that raises prints the error, returns anything
    }
    std::lock_guard<std::mutex> lock(mutex_);  // taken after Python has run
    kernels_.emplace(std::make_pair(device, variant.number()), kernel);  // keeps one that another thread may be using
    return "";
  }

 private:
  std::atomic<Resolve> resolve_{nullptr};
  std::mutex mutex_;
  std::map<std::pair<int32_t, int32_t>, Kernel> kernels_;
};

// Loads the kernels that a program needs. XLA calls this before every execution, as `step` may run within the capture
// of a CUDA graph, where nothing can be loaded. Most arguments are checked only by `step`.
ffi::Error initialize(void* stream, int32_t device, const Call& call) {
  const auto invalid = [] { return ffi::Error::InvalidArgument("jadam: wrong rules, formats or number of buffers"); };
  int32_t last = -1;
  size_t arg = 0;
  for (size_t i = 0; i < call.rule.size(); ++i) {
    LeafArguments leaf{};
    leaf.rule = call.rule[i];
    leaf.format = i < call.format.size() ? call.format[i] : -1;
    const auto g = call.args.get<ffi::AnyBuffer>(arg), p = call.args.get<ffi::AnyBuffer>(arg + 1);
    bool exists = false;
    Rules::visit(leaf.rule, [&](auto rule) {
      leaf.moments = decltype(rule)::kMoments;
      exists = leaf.format >= 0 && leaf.format < kFormats && (leaf.format != kInt8 || decltype(rule)::kInt8);
    });
    exists = exists && leaf.rule >= 0 && leaf.rule < Rules::kCount;  // `visit` truncates it to an int
    if (!exists || !g.has_value() || !p.has_value()) return invalid();
    leaf.g_is_bfloat16 = g->element_type() == ffi::DataType::BF16;
    leaf.p_is_bfloat16 = p->element_type() == ffi::DataType::BF16;
    arg += 2 + leaf.p_is_bfloat16 + leaf.moments + (leaf.format == kInt8 ? 2 : 0);
    const Variant variant(leaf);
    if (variant.number() == last) continue;
    last = variant.number();
    std::string error = Kernels::of_process().load(device, variant, stream);
    if (!error.empty()) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, std::move(error));
  }
  return ffi::Error::Success();
}

bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// A leaf's entry of a table. `first_digit` is the number of digits that the table has so far.
Entry entry_of(const LeafArguments& leaf, size_t number, uint32_t first_program, uint8_t first_digit) {
  Entry entry{};
  entry.g = leaf.g;
  entry.p = leaf.p_out;
  entry.remainder = leaf.remainder_out;
  const bool int8 = leaf.format == kInt8;
  const int64_t stored = int8 ? 1 : leaf.format == kBFloat16 ? 2 : 4, weights = leaf.p_is_bfloat16 ? 2 : 4;
  entry.aligned = is_aligned(leaf.g, kQuad * (leaf.g_is_bfloat16 ? 2 : 4)) &&
                  is_aligned(leaf.p_out, kQuad * weights) && is_aligned(leaf.remainder_out, kQuad * 2);
  for (int64_t k = 0; k < leaf.moments; ++k) {
    entry.m[k] = leaf.m_out[k];
    entry.aligned = entry.aligned && is_aligned(leaf.m_out[k], kQuad * stored);
  }
  entry.n = leaf.n;
  entry.run = static_cast<uint32_t>(leaf.run);
  entry.salt = static_cast<uint32_t>(leaf.salt);
  entry.scalar_row = static_cast<uint32_t>(leaf.scalar_row);
  entry.number = static_cast<uint16_t>(number);
  entry.first_program = first_program;
  entry.first_digit = first_digit;
  entry.digits = static_cast<uint8_t>(leaf.digits);
  entry.clipping = static_cast<uint8_t>(leaf.clipping);
  if (int8) {
    for (int k = 0; k < 2; ++k) entry.scale[k] = leaf.scale_out[k];
    entry.row = leaf.row;
    entry.block = static_cast<uint8_t>(leaf.block);
    entry.row_blocks = static_cast<uint32_t>(leaf.blocks);
    entry.blocks = static_cast<uint32_t>(leaf.num_blocks());
    entry.contiguous = leaf.row % leaf.block == 0;
    entry.aligned = entry.aligned && leaf.row % kQuad == 0 && leaf.block % kQuad == 0;
  }
  return entry;
}

// Programs of the grid that a leaf needs.
int64_t programs_of(const LeafArguments& leaf) {
  const bool int8 = leaf.format == kInt8;
  const int64_t units = int8 ? leaf.num_blocks() : leaf.n;
  const int64_t per_program = int8 ? kInt8Rounds * kRoundBlocks : kFloatRounds * kRoundElements;
  return units / per_program + (units % per_program != 0);
}

// Returns which limit of `Entry` a leaf exceeds, or "".
std::string beyond_limits(const LeafArguments& leaf) {
  if (leaf.digits > kMaxDigits) return "has too many digits";
  if (leaf.digits > 0 && leaf.n >> 32) return "has 2**32 elements or more, and digits";
  if (leaf.format == kInt8 && leaf.num_blocks() >> 31) return "has 2**31 int8 blocks or more";
  if (programs_of(leaf) >> 31) return "is too large";
  return "";
}

// The kernel updates in place: copies the inputs whose outputs are other buffers. Returns 0, or a CUDA error.
int copy_inputs(const LeafArguments& leaf, Copy copy, void* stream) {
  int result = 0;
  const auto copy_one = [&](const void* from, void* to, int64_t bytes) {
    if (from == to || result != 0) return;
    result = copy(reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), bytes, stream);
  };
  copy_one(leaf.p, leaf.p_out, leaf.n * (leaf.p_is_bfloat16 ? 2 : 4));
  copy_one(leaf.remainder, leaf.remainder_out, leaf.n * 2);
  const int64_t stored = leaf.format == kInt8 ? 1 : leaf.format == kBFloat16 ? 2 : 4;
  for (int64_t k = 0; k < leaf.moments; ++k) copy_one(leaf.m[k], leaf.m_out[k], leaf.n * stored);
  for (int k = 0; k < 2; ++k) copy_one(leaf.scale[k], leaf.scale_out[k], leaf.num_blocks() * 4);  // null without int8
  return result;
}

ffi::Error failed(const char* function, int result) {
  return ffi::Error::Internal(std::string("jadam: ") + function + " returned CUDA error " + std::to_string(result));
}

ffi::Error step(void* stream, int32_t device, const Call& call) {
  std::vector<LeafArguments> leaves;
  std::string error = read_leaves(call, kMaxBlock, leaves);
  for (size_t i = 0; error.empty() && i < leaves.size(); ++i) {
    error = beyond_limits(leaves[i]);
    if (!error.empty()) error = "jadam: leaf " + std::to_string(i) + " " + error;
  }
  if (error.empty() && leaves.size() >> 16) error = "jadam: more than 65535 leaves";
  if (!error.empty()) return ffi::Error::InvalidArgument(std::move(error));
  const void* scalars = call.scalar_rows.untyped_data();
  const void* count_and_offsets = call.count_and_offsets.untyped_data();
  std::vector<bool> done(leaves.size());
  for (size_t first = 0; first < leaves.size(); ++first) {
    if (done[first]) continue;
    const Variant variant(leaves[first]);
    const Kernel* kernel = Kernels::of_process().find(device, variant);
    if (kernel == nullptr) return ffi::Error::Internal("jadam: a program was executed before it was initialized");
    Table table;
    int digits = 0;
    int64_t programs = 0;
    table.leaves = 0;
    const auto launch = [&]() -> int {
      if (programs == 0) return 0;
      void* parameters[] = {&table, &scalars, &count_and_offsets};
      const int result = kernel->launch(kernel->kernel, static_cast<unsigned>(programs), 1, 1, kThreads, 1, 1, 0,
                                        stream, parameters, nullptr);
      table.leaves = digits = 0;
      programs = 0;
      return result;
    };
    for (size_t i = first; i < leaves.size(); ++i) {
      const LeafArguments& leaf = leaves[i];
      if (done[i] || Variant(leaf).number() != variant.number()) continue;
      done[i] = true;
      if (leaf.n == 0) continue;
      if (const int result = copy_inputs(leaf, kernel->copy, stream)) return failed("cuMemcpyDtoDAsync", result);
      const int64_t more = programs_of(leaf);
      if (table.leaves == kMaxLeaves || digits + leaf.digits > kMaxDigits || (programs + more) >> 31) {
        if (const int result = launch()) return failed("cuLaunchKernel", result);
      }
      table.entries[table.leaves++] = entry_of(leaf, i, static_cast<uint32_t>(programs), static_cast<uint8_t>(digits));
      for (int64_t k = 0; k < leaf.digits; ++k) {
        table.digits[digits++] = {static_cast<uint32_t>(leaf.digit_sizes[k]),
                                  static_cast<uint32_t>(leaf.digit_strides[k])};
      }
      programs += more;
    }
    if (const int result = launch()) return failed("cuLaunchKernel", result);
  }
  return ffi::Error::Success();
}

template <ffi::ExecutionStage stage>
auto bind() {
  return bind_call(
      ffi::Ffi::Bind<stage>().template Ctx<ffi::PlatformStream<void*>>().template Ctx<ffi::DeviceOrdinal>());
}

}  // namespace
}  // namespace jadam

EXPORT void jadam_cuda_set_resolve(jadam::Resolve resolve) { jadam::Kernels::of_process().set_resolve(resolve); }

EXPORT XLA_FFI_Error* jadam_cuda_initialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_cuda_initialize,
                              ([](void* stream, int32_t device, auto... arguments) {
                                return jadam::initialize(stream, device, jadam::Call{arguments...});
                              }),
                              jadam::bind<ffi::ExecutionStage::kInitialize>(), {ffi::Traits::kCmdBufferCompatible});

EXPORT XLA_FFI_Error* jadam_cuda_step(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jadam_cuda_step,
                              ([](void* stream, int32_t device, auto... arguments) {
                                return jadam::step(stream, device, jadam::Call{arguments...});
                              }),
                              jadam::bind<ffi::ExecutionStage::kExecute>(), {ffi::Traits::kCmdBufferCompatible});
