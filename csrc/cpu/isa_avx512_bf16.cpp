// x86-64-v4 with dot products of bfloat16 (Zen 4, Cooper Lake and later), for bfloat16 only.
#if defined(__x86_64__)
#include "cpu/isa.h"

// After every other include: what follows is compiled for this instruction set, and lives in a namespace of its own.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

// Width of the vectors that have intrinsics. (GCC 12 defines no __AVX__ and the like after that pragma.)
#define RNNKERN_INTRINSICS 512
#define RNNKERN_BFLOAT16_PRODUCTS 1

namespace rnnkern::cpu {
namespace avx512_bf16 {

constexpr int kVectorBytes = 64;
constexpr int kMaxSums = 24;  // of the vector registers, how many hold sums

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"

static bool supported() { return kAvx512.supported() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace avx512_bf16

extern const InstructionSet kAvx512Bf16 = {
    "avx512_bf16", avx512_bf16::supported, {nullptr, nullptr, &avx512_bf16::kKernels<avx512_bf16::BFloat16>, nullptr}};

}  // namespace rnnkern::cpu
#endif
