// What each dtype's source file offers.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch.h"

namespace rnnkern::cuda {

using Kernel = void (*)(Chain);

struct KernelTable {
  Kernel (*forward)(const Plan&);
  Kernel (*backward)(const Plan&);
  void (*pack)(char* packed, const Matrix& w, bool transposed, int H, int slabs, int chunks, cudaStream_t);
};

extern const KernelTable kBFloat16Kernels, kFloat16Kernels, kTensorFloat32Kernels, kFloat32Kernels, kFloat64Kernels;

}  // namespace rnnkern::cuda
