// The kernels of one dtype: an explicit ladder over few instances. Included by one source file per dtype.
#pragma once

#include "cuda/chain.cuh"
#include "cuda/kernels.h"
#include "cuda/pack.cuh"

namespace rnnkern::cuda {

template <class P, Regime R, bool kBackward, int KC, int NT>
__global__ void __launch_bounds__(256, 1) chain_kernel(const __grid_constant__ Chain chain) {
  if constexpr (R != kCluster || RNNKERN_HAS_CLUSTERS) {
    ChainKernel<P, R, kBackward, KC, NT>(chain, ptx::shared_memory()).run();
  }
}

template <class P, Regime R, bool kBackward, int NT>
Kernel by_registers(int KC) {
  if (KC == 2) return chain_kernel<P, R, kBackward, 2, NT>;
  if (KC == 4) return chain_kernel<P, R, kBackward, 4, NT>;
  return chain_kernel<P, R, kBackward, P::kMostChunks, NT>;
}

template <class P, bool kBackward>
Kernel by_plan(const Plan& plan) {
  if (plan.regime == kStep) {
    if (plan.NT == 1) return chain_kernel<P, kStep, kBackward, 0, 1>;
    return chain_kernel<P, kStep, kBackward, 0, 4>;
  }
  if constexpr (sizeof(typename P::Storage) < 8) {
    if (plan.regime == kLocal) {
      if constexpr (sizeof(typename P::Storage) == 2) {
        if (plan.NT == 2) return by_registers<P, kLocal, kBackward, 2>(plan.KC);
      }
      return by_registers<P, kLocal, kBackward, 1>(plan.KC);
    }
    if (plan.regime == kCluster) {
      if (plan.NT == 1) return by_registers<P, kCluster, kBackward, 1>(plan.KC);
      return by_registers<P, kCluster, kBackward, 2>(plan.KC);
    }
    if (plan.NT == 1) return by_registers<P, kGrid, kBackward, 1>(plan.KC);
    if constexpr (!P::kStateInShared) {
      if (plan.NT == 4) return by_registers<P, kGrid, kBackward, 4>(plan.KC);
    }
    return by_registers<P, kGrid, kBackward, 2>(plan.KC);
  }
  return nullptr;
}

template <class P>
void pack(char* packed, const Matrix& w, bool transposed, int H, int slabs, int chunks, cudaStream_t stream) {
  const int64_t vectors = static_cast<int64_t>(slabs) * chunks * (kPackedBytes / 16);
  ptx::launch(
      pack_kernel<P>, (vectors + 255) / 256, 256, stream, reinterpret_cast<uint4*>(packed),
      static_cast<const typename P::Storage*>(w.data), transposed ? w.column_stride : w.row_stride,
      transposed ? w.row_stride : w.column_stride, H, chunks, vectors);
}

template <class P>
constexpr KernelTable kernel_table() {
  return {by_plan<P, false>, by_plan<P, true>, pack<P>};
}

}  // namespace rnnkern::cuda
