// Tensors as the kernels walk them: any strides, but the elements of a row side by side.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace rnnkern {

using torch::stable::Tensor;

// What keeps the memory, and where row b of step t begins: t time_stride + b row_stride elements behind data_ptr().
struct Walkable {
  Tensor memory;
  int64_t time_stride, row_stride;
};

// Of a (T, B, H), (N, H) or (B, H) tensor whose rows already are side by side.
inline Walkable as_it_lies(const Tensor& tensor) {
  return {tensor, tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(tensor.dim() - 2)};
}

inline Walkable walkable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return as_it_lies(tensor);
  bool one_value = tensor.numel() > 0;
  for (int64_t i = 0; i <= last; ++i) one_value = one_value && tensor.stride(i) == 0;
  if (one_value) {  // the gradient of a sum: one row stands for all
    Tensor row = tensor;
    for (int64_t i = 0; i < last; ++i) row = torch::stable::narrow(row, i, 0, 1);
    return {torch::stable::contiguous(row), 0, 0};
  }
  return as_it_lies(torch::stable::contiguous(tensor));
}

// Whether two different elements of the tensor could lie at the same address.
inline bool overlaps_itself(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) == 0) return true;
  }
  return false;
}

inline Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

}  // namespace rnnkern
