// The gradient of a weight, Σ δᵀ x over all rows of a sequence, where the processor has instructions that PyTorch's product
// does not make the most of.
#pragma once

#include "cpu/kernel.h"

namespace rnnkern::cpu {

bool has_weight_gradient(Dtype);
// Only where there is one. `threads` is the most that may run; the bits do not depend on it.
void weight_gradient(const WeightGradient&, int threads);

}  // namespace rnnkern::cpu
