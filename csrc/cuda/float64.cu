#include "cuda/instances.cuh"

namespace rnnkern::cuda {

const KernelTable kFloat64Kernels = kernel_table<Float64>();

}  // namespace rnnkern::cuda
