// What every operator expects of its arguments, and the words in which it refuses the rest: rnnkern/contract.py's twin.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace rnnkern {

using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string words(const Shape& shape) {
  std::ostringstream out;
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "[") << shape[i];
  out << (shape.empty() ? "[]" : "]");
  return out.str();
}

inline void check_shape(const char* name, const Tensor& tensor, const Shape& expected) {
  STD_TORCH_CHECK(
      shape(tensor) == expected, name, " must have shape ", words(expected), ", got ", words(shape(tensor)));
}

inline void check_same(const char* name, const Tensor& tensor, const char* other, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", other, " (",
      torch::headeronly::toString(like.scalar_type()), "), got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of ", other);
}

inline void check_nonlinearity(const std::string& name) {
  STD_TORCH_CHECK(name == "tanh" || name == "relu", "nonlinearity must be 'tanh' or 'relu', got '", name, "'");
}

// Which rows belong to which step. Keeps a contiguous copy of batch_sizes and its running sum.
struct Sequence {
  int64_t T, B, H;
  std::vector<int64_t> batch_sizes, offsets;  // empty where every step has B rows
};

// rows: z or h, (T, B, H) or packed (N, H).
inline Sequence check_recurrence(
    const char* name, const Tensor& rows, const Tensor& h0, const Tensor& w_hh,
    const std::optional<Tensor>& batch_sizes, const std::string& nonlinearity) {
  const char* const expected = batch_sizes ? "(N, H), packed by batch_sizes" : "(T, B, H)";
  STD_TORCH_CHECK(
      rows.dim() == (batch_sizes ? 2 : 3), name, " must have shape ", expected, ", got ", words(shape(rows)));
  check_nonlinearity(nonlinearity);
  check_same("h0", h0, name, rows);
  check_same("w_hh", w_hh, name, rows);
  const int64_t H = rows.size(rows.dim() - 1);
  check_shape("w_hh", w_hh, {H, H});
  STD_TORCH_CHECK(h0.dim() == 2, "h0 must have shape (B, H), got ", words(shape(h0)));
  const int64_t B = h0.size(0);
  if (!batch_sizes) {
    STD_TORCH_CHECK(
        rows.size(1) == B, "h0 must have shape (B, H) = ", words({rows.size(1), H}), ", got ", words({B, H}));
    check_shape("h0", h0, {B, H});
    return {rows.size(0), B, H, {}, {}};
  }

  STD_TORCH_CHECK(
      batch_sizes->dim() == 1 && batch_sizes->scalar_type() == torch::headeronly::ScalarType::Long &&
          batch_sizes->is_cpu(),
      "batch_sizes must be a 1-D int64 tensor on the CPU, got ", batch_sizes->dim(), "-D ",
      torch::headeronly::toString(batch_sizes->scalar_type()), batch_sizes->is_cpu() ? " on the CPU" : " elsewhere");
  Sequence sequence{batch_sizes->size(0), B, H, {}, {}};
  const int64_t* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
  int64_t sum = 0;
  bool sorted = true;
  for (int64_t t = 0; t < sequence.T; ++t) {
    const int64_t size = sizes[t * batch_sizes->stride(0)];
    sorted = sorted && size > 0 && (t == 0 || size <= sequence.batch_sizes.back());
    sequence.batch_sizes.push_back(size);
    sequence.offsets.push_back(sum);
    // A sum of positive sizes that has passed the rows there are cannot overflow on its way to the message.
    STD_TORCH_CHECK(sorted, "batch_sizes must be positive and non-increasing, got ", size, " at step ", t);
    sum += size;
    STD_TORCH_CHECK(
        sum <= rows.size(0), "batch_sizes must add up to ", name, ".size(0) = ", rows.size(0), ", got a sum of ", sum,
        " after ", t + 1, " of ", sequence.T, " steps");
  }
  STD_TORCH_CHECK(
      sum == rows.size(0), "batch_sizes must add up to ", name, ".size(0) = ", rows.size(0), ", got a sum of ", sum);
  STD_TORCH_CHECK(
      sequence.T == 0 || sequence.batch_sizes[0] == B,
      "h0 must have batch_sizes[0] = ", sequence.T ? sequence.batch_sizes[0] : 0, " rows, got ", B);
  check_shape("h0", h0, {B, H});
  return sequence;
}

inline Sequence check_recurrence_backward(
    const Tensor& grad_h, const std::optional<Tensor>& grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    const std::optional<Tensor>& batch_sizes, const std::string& nonlinearity, double clip) {
  Sequence sequence = check_recurrence("h", h, h0, w_hh, batch_sizes, nonlinearity);
  check_shape("grad_h", grad_h, shape(h));
  check_same("grad_h", grad_h, "h", h);
  if (grad_hn) {
    check_shape("grad_hn", *grad_hn, shape(h0));
    check_same("grad_hn", *grad_hn, "h", h);
  }
  STD_TORCH_CHECK(clip > 0, "clip must be positive (inf for none), got ", clip);
  return sequence;
}

}  // namespace rnnkern
