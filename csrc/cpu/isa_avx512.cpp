// x86-64-v4: 32 registers of 64 bytes.
#if defined(__x86_64__)
#include "cpu/isa.h"

// After every other include: what follows is compiled for this instruction set, and lives in a namespace of its own.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

// Width of the vectors that have intrinsics. (GCC 12 defines no __AVX__ and the like after that pragma.)
#define RNNKERN_INTRINSICS 512
#define RNNKERN_BFLOAT16_PRODUCTS 0

namespace rnnkern::cpu {
namespace avx512 {

constexpr int kVectorBytes = 64;
constexpr int kMaxSums = 24;  // of the vector registers, how many hold sums

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"
#include "cpu/weight_gradient_vectors.inc"

static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace avx512

extern const InstructionSet kAvx512 = {
    "avx512",
    avx512::supported,
    {&avx512::kKernels<float>, &avx512::kKernels<double>, &avx512::kKernels<avx512::BFloat16>,
     &avx512::kKernels<avx512::Float16>},
    {&avx512::kGradientOnVectors<float>}};

}  // namespace rnnkern::cpu
#endif
