#include "cuda/instances.cuh"

namespace rnnkern::cuda {

const KernelTable kBFloat16Kernels = kernel_table<BFloat16>();

}  // namespace rnnkern::cuda
