// Runs kernel.cu on the CPU: a program's warps one after the other, a warp's 32 lanes in step.
//
// A lane is a coroutine. `exchange` suspends it until every lane of its warp has given a value.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "shim.h"

#include "kernel.cu"

Index threadIdx, blockIdx;
int lane;

namespace {

constexpr int kStack = 1 << 18;
constexpr int kLanes = 32;

ucontext_t scheduler, lanes[kLanes];
std::vector<char> stacks[kLanes];
bool finished[kLanes];
int given[2][kLanes], round_of_lane[kLanes];  // two rounds: a lane may give again before the others have read
const std::function<void()>* body;

void run_lane() {
  (*body)();
  finished[lane] = true;
  swapcontext(&lanes[lane], &scheduler);
}

// Runs all lanes of the warp whose first thread this is.
void run_warp(unsigned first_thread) {
  for (lane = 0; lane < kLanes; ++lane) {
    stacks[lane].resize(kStack);
    getcontext(&lanes[lane]);
    lanes[lane].uc_stack.ss_sp = stacks[lane].data();
    lanes[lane].uc_stack.ss_size = kStack;
    lanes[lane].uc_link = nullptr;
    makecontext(&lanes[lane], run_lane, 0);
    finished[lane] = false;
    round_of_lane[lane] = 0;
  }
  for (;;) {
    int running = 0;
    for (lane = 0; lane < kLanes; ++lane) {
      if (finished[lane]) continue;
      threadIdx.x = first_thread + lane;
      swapcontext(&scheduler, &lanes[lane]);
      running += !finished[lane];
    }
    if (running == 0) return;
    if (running != kLanes) {
      std::fprintf(stderr, "emulator: %d lanes of a warp wait for the others, which have returned\n", running);
      std::abort();
    }
  }
}

}  // namespace

const int* exchange(int x) {
  const int self = lane;
  int* all = given[round_of_lane[self]++ % 2];
  all[self] = x;
  swapcontext(&lanes[self], &scheduler);
  return all;
}

namespace {

template <class Rule, int kFormat>
void run(int weights, int gradients, const jadam::Table& table, const float* scalars, const unsigned* count) {
  using jadam::step_program;
  if constexpr (kFormat == jadam::kInt8 && !Rule::kInt8) {
    std::abort();
  } else if (weights) {
    gradients ? step_program<Rule, kFormat, true, true>(table, scalars, count)
              : step_program<Rule, kFormat, true, false>(table, scalars, count);
  } else {
    gradients ? step_program<Rule, kFormat, false, true>(table, scalars, count)
              : step_program<Rule, kFormat, false, false>(table, scalars, count);
  }
}

int64_t launches, copied_bytes;

}  // namespace

extern "C" {

// As `Variant` of cuda.cc. A pointer to one stands for a kernel.
struct Variant {
  int32_t rule, format, bfloat16_weights, bfloat16_gradients;
};

int emulator_launch(const Variant* kernel, unsigned programs, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                    unsigned, void*, void** parameters, void**) {
  if (threads != jadam::kThreads) return 1;
  // copies of the parameters' own size, so that a sanitizer sees what is read beyond
  const auto table = std::make_unique<jadam::Table>(*static_cast<jadam::Table*>(parameters[0]));
  const auto* scalars = *static_cast<const float**>(parameters[1]);
  const auto* count = *static_cast<const unsigned**>(parameters[2]);
  const std::function<void()> program = [&] {
    jadam::Rules::visit(kernel->rule, [&](auto rule) {
      using Rule = decltype(rule);
      const int w = kernel->bfloat16_weights, g = kernel->bfloat16_gradients;
      switch (kernel->format) {
        case jadam::kFloat32: return run<Rule, jadam::kFloat32>(w, g, *table, scalars, count);
        case jadam::kBFloat16: return run<Rule, jadam::kBFloat16>(w, g, *table, scalars, count);
        case jadam::kInt8: return run<Rule, jadam::kInt8>(w, g, *table, scalars, count);
      }
    });
  };
  body = &program;
  for (blockIdx.x = 0; blockIdx.x < programs; ++blockIdx.x) {
    for (unsigned thread = 0; thread < threads; thread += kLanes) run_warp(thread);
  }
  ++launches;
  return 0;
}

int emulator_copy(void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
  copied_bytes += bytes;
  return 0;
}

int64_t emulator_launches() { return launches; }
int64_t emulator_copied_bytes() { return copied_bytes; }
}
