#include "cuda/instances.cuh"

namespace rnnkern::cuda {

const KernelTable kTensorFloat32Kernels = kernel_table<TensorFloat32>();

}  // namespace rnnkern::cuda
