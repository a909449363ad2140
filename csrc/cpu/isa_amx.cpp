// x86-64-v4 with dot products and tiles of bfloat16 (Sapphire Rapids and later), for bfloat16 only.
#if defined(__x86_64__)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/isa.h"

// After every other include: what follows is compiled for this instruction set, and lives in a namespace of its own.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

// Width of the vectors that have intrinsics. (GCC 12 defines no __AVX__ and the like after that pragma.)
#define RNNKERN_INTRINSICS 512
#define RNNKERN_BFLOAT16_PRODUCTS 1

namespace rnnkern::cpu {
namespace amx {

constexpr int kVectorBytes = 64;
constexpr int kMaxSums = 24;  // of the vector registers, how many hold sums

#include "cpu/simd.inc"
#include "cpu/tanh.inc"
#include "cell.h"
#include "cpu/product.inc"
#include "cpu/tiles.inc"
#include "cpu/squares.inc"
#include "cpu/row_product.inc"
#include "cpu/chain.inc"
#include "cpu/weight_gradient_tiles.inc"

// A process has to ask the system for tiles, once: what it saves of a thread grows by 8 KB.
static bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static bool supported() {
  return kAvx512Bf16.supported() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}

}  // namespace amx

extern const InstructionSet kAmx = {
    "amx",
    amx::supported,
    {nullptr, nullptr, &amx::kKernels<amx::BFloat16>, nullptr},
    {nullptr, nullptr, &amx::kWeightGradient}};

}  // namespace rnnkern::cpu
#endif
