// Between the operators' tensors and what the drivers take.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/recurrence.h"
#include "walkable.h"

namespace rnnkern::cpu {

Dtype dtype_of(const Tensor&);
inline Nonlinearity nonlinearity_of(const std::string& name) { return name == "tanh" ? kTanh : kRelu; }
inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }
inline Weights weights_of(const Tensor& w_hh) { return {w_hh.data_ptr(), w_hh.stride(0), w_hh.stride(1)}; }
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline Tensor narrowed(const Tensor& tensor, int64_t dim, int64_t begin, int64_t length) {
  Tensor whole = tensor;  // narrow() takes no const
  return begin == 0 && length == tensor.size(dim) ? whole : torch::stable::narrow(whole, dim, begin, length);
}

// (T, B, .) -> (T B, .)
inline Tensor as_rows(const Tensor& x) { return torch::stable::reshape(x, Shape{x.size(0) * x.size(1), x.size(2)}); }

inline AnyRows rows_of(const Walkable& walkable) {
  return {walkable.memory.data_ptr(), walkable.time_stride, walkable.row_stride};
}

// What the backward of one or two chains returns.
struct Gradients {
  Tensor delta;
  std::vector<Tensor> grad_h0;
  std::optional<Tensor> stats;  // (4, T, B), or (2, 4, T, B) of two
};

// grad (T, B, I) <- delta W_ih, which the chain computes on its way; where has_input_gradient().
struct InputGradient {
  Tensor grad, w_ih;
};

Gradients launch_backward(
    const Tensor& grad_h, const std::vector<std::optional<Tensor>>& grad_hn, const Tensor& h,
    const std::vector<Tensor>& h0, const std::vector<Tensor>& w_hh, const std::optional<Tensor>& batch_sizes,
    bool reverse, const std::string& nonlinearity, double clip, bool with_stats,
    const std::optional<InputGradient>& of_x = std::nullopt);

// An operator of PyTorch.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == 0, name, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace rnnkern::cpu
