// x86-64-v3: 16 registers of 32 bytes.
#if defined(__x86_64__)
#include "cpu/isa.h"

// After every other include: what follows is compiled for this instruction set, and lives in a namespace of its own.
#pragma GCC target("avx2,fma,f16c")

// Width of the vectors that have intrinsics. (GCC 12 defines no __AVX__ and the like after that pragma.)
#define RNNKERN_INTRINSICS 256
#define RNNKERN_BFLOAT16_PRODUCTS 0

namespace rnnkern::cpu {
namespace avx2 {

constexpr int kVectorBytes = 32;
constexpr int kMaxSums = 12;  // of the vector registers, how many hold sums

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"

static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace avx2

extern const InstructionSet kAvx2 = {
    "avx2",
    avx2::supported,
    {&avx2::kKernels<float>, &avx2::kKernels<double>, &avx2::kKernels<avx2::BFloat16>, &avx2::kKernels<avx2::Float16>}};

}  // namespace rnnkern::cpu
#endif
