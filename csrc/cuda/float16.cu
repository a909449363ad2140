#include "cuda/instances.cuh"

namespace rnnkern::cuda {

const KernelTable kFloat16Kernels = kernel_table<Float16>();

}  // namespace rnnkern::cuda
