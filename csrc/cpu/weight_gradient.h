// The gradients of weights, Σ δᵀ x over all rows of a sequence, where that is faster than PyTorch's product: in bfloat16 on tiles, and
// in float32 on AVX-512 where one pass over δ serves both weights of a layer.
#pragma once

#include "cpu/kernel.h"

namespace rnnkern::cpu {

// Whether there is a kernel for it, and one that is faster than PyTorch's product of this size.
bool has_weight_gradient(Dtype, int64_t rows, int64_t H, int64_t I);
// The same for the gradients of both weights of a layer, and of its bias, in one pass over δ.
bool has_layer_gradients(Dtype, int64_t rows, int64_t H, int64_t I);
// Only where there is a kernel. `threads` is the most that may run; the bits do not depend on it.
void weight_gradient(const WeightGradient&, Dtype, int threads);

}  // namespace rnnkern::cpu
