#include "cuda/instances.cuh"

namespace rnnkern::cuda {

const KernelTable kFloat32Kernels = kernel_table<Float32>();

}  // namespace rnnkern::cuda
