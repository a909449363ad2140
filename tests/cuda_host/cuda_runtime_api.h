// The little of CUDA's own header that the kernels' files name.
#pragma once
using cudaStream_t = void*;
