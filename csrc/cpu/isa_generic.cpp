// What every processor of the architecture has: 16-byte vectors (SSE2 on x86-64, NEON on aarch64).
#include "cpu/isa.h"

#define RNNKERN_INTRINSICS 0  // of no vectors
#define RNNKERN_BFLOAT16_PRODUCTS 0

namespace rnnkern::cpu {
namespace generic {

constexpr int kVectorBytes = 16;
constexpr int kMaxSums = 12;  // of the vector registers, how many hold sums

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"

static bool supported() { return true; }

}  // namespace generic

extern const InstructionSet kGeneric = {
    "generic",
    generic::supported,
    {&generic::kKernels<float>, &generic::kKernels<double>, &generic::kKernels<generic::BFloat16>,
     &generic::kKernels<generic::Float16>}};

}  // namespace rnnkern::cpu
