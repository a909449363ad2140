// csrc/cpu/isa_amx.cpp over the twin of its instructions, as the only set of the driver, for tests/test_cpu_host.py; without
// HOST_TILES, isa_avx512_bf16.cpp.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "cpu/isa.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"
#include "cpu/weight_gradient.h"

#define RNNKERN_INTRINSICS 0
#define RNNKERN_BFLOAT16_PRODUCTS 1

namespace rnnkern::cpu {
namespace host {

constexpr int kVectorBytes = 16;  // every processor has such vectors
constexpr int kMaxSums = 24;

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#if HOST_TILES
#include "cpu/tiles.inc"
#endif
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"
#include "cpu/weight_gradient_tiles.inc"

}  // namespace host

// ThreadSanitizer does not know libgomp's barriers; the threads that a forked child makes (team.h) it does.
#if defined(__SANITIZE_THREAD__)
[[maybe_unused]] static const bool kMakesThreads = is_forked = true;
#endif

static bool yes() { return true; }
static bool no() { return false; }

extern const InstructionSet kAmx = {"amx", yes, {nullptr, nullptr, &host::kKernels<host::BFloat16>, nullptr}, {nullptr, nullptr, &host::kWeightGradient}};
extern const InstructionSet kAvx512Bf16 = {"", no, {}}, kAvx512 = kAvx512Bf16, kAvx2 = kAvx512Bf16, kGeneric = kAvx512Bf16;

}  // namespace rnnkern::cpu

// All tensors are bfloat16 and contiguous, stats float64. With a RowProductKind, x (T, B, I) and w_ih (H, I) the input is x w_ih', or
// backward, x becomes its gradient. Returns how many threads have kept tiles, or -1 where it failed.
extern "C" int host_run(
    int backward, int64_t T, int64_t B, int64_t H, const int64_t* batch_sizes, const int64_t* offsets, void* input,
    void* states, void* output, void* initial, void* final_, double* stats, void* w_hh, int reverse, int relu,
    double clip, int kind, int64_t I, void* x, void* w_ih, int threads) try {
  using namespace rnnkern::cpu;
  const auto rows = [&](void* data) { return AnyRows{data, B * H, H}; };
  const Steps steps{T, B, H, batch_sizes, offsets, reverse != 0};
  const Weights w{w_hh, H, 1};
  const Nonlinearity f = relu ? kRelu : kTanh;
  const RowProduct product{static_cast<RowProductKind>(kind), {x, B * I, I}, I};
  const Weights of_x{w_ih, I, 1};
  if (backward) {
    const Backward job{
        steps, rows(input), rows(initial), rows(states), rows(output), rows(final_), clip, stats, true, product};
    recurrence_backward({{job, w, of_x}}, kBFloat16, f, threads);
  } else {
    const Forward job{steps, rows(input), rows(initial), rows(output), nullptr, product};
    recurrence({{job, w, of_x}}, kBFloat16, f, threads);
  }
  return host::threads_with_tiles;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return -1;
}

// Of `count` runs, whose rows lie `delta_stride` and `x_stride[i]` apart; grad[i] (H, I[i]) and delta_sum (H) are contiguous. Returns
// as host_run does.
extern "C" int host_weight_gradient(
    int64_t count, const int64_t* rows, void* const* delta, void* const* x0, void* const* x1, int64_t delta_stride,
    const int64_t* x_stride, int64_t H, const int64_t* I, void* const* grad, void* delta_sum, int threads) try {
  using namespace rnnkern::cpu;
  std::vector<RowRun> runs;
  for (int64_t i = 0; i < count; ++i)
    runs.push_back({rows[i], {delta[i], delta_stride}, {{x0[i], x_stride[0]}, {x1[i], x_stride[1]}}});
  weight_gradient({runs.data(), count, H, {I[0], I[1]}, {grad[0], grad[1]}, delta_sum}, kBFloat16, threads);
  return host::threads_with_tiles;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return -1;
}

extern "C" int host_tile_products() { return rnnkern::cpu::host::tile_products; }
