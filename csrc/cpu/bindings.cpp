// The operators' CPU implementations: they check, allocate and launch, and compute nothing.

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/recurrence.h"

namespace rnnkern::cpu {
namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return kFloat32;
    case torch::headeronly::ScalarType::Double:
      return kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(
          false, "the CPU kernels serve float32, float64, bfloat16 and float16, got ",
          torch::headeronly::toString(tensor.scalar_type()));
  }
}

Nonlinearity nonlinearity_of(const std::string& name) { return name == "tanh" ? kTanh : kRelu; }

Steps steps_of(const Sequence& sequence, bool reverse) {
  const bool packed = !sequence.batch_sizes.empty();
  return {
      sequence.T,
      sequence.B,
      sequence.H,
      packed ? sequence.batch_sizes.data() : nullptr,
      packed ? sequence.offsets.data() : nullptr,
      reverse};
}

// Of a (T, B, H), (N, H) or (B, H) tensor.
AnyRows rows_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(tensor.dim() - 2)};
}

// A tensor as the kernels can walk it, and what keeps its memory: any strides, but the elements of a row side by side.
struct Walkable {
  Tensor memory;
  AnyRows rows;
};

Walkable walkable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return {tensor, rows_of(tensor)};
  bool one_value = tensor.numel() > 0;
  for (int64_t i = 0; i <= last; ++i) one_value = one_value && tensor.stride(i) == 0;
  if (one_value) {  // the gradient of a sum: one row stands for all
    Tensor row = tensor;
    for (int64_t i = 0; i < last; ++i) row = torch::stable::narrow(row, i, 0, 1);
    row = torch::stable::contiguous(row);
    return {row, {row.data_ptr(), 0, 0}};
  }
  const Tensor copy = torch::stable::contiguous(tensor);
  return {copy, rows_of(copy)};
}

Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

void launch(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, const Sequence& sequence, bool reverse,
    const std::string& nonlinearity, const Tensor& h) {
  const Walkable z_rows = walkable(z), h0_rows = walkable(h0);
  const Forward job{steps_of(sequence, reverse), z_rows.rows, h0_rows.rows, rows_of(h)};
  recurrence(
      job, {w_hh.data_ptr(), w_hh.stride(0), w_hh.stride(1)}, dtype_of(z), nonlinearity_of(nonlinearity),
      static_cast<int>(torch::stable::get_num_threads()));
}

Tensor recurrence_op(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  const Sequence sequence = check_recurrence("z", z, h0, w_hh, batch_sizes, nonlinearity);
  const Tensor h = new_like(z);
  launch(z, h0, w_hh, sequence, reverse, nonlinearity, h);
  return h;
}

// Whether two different elements of the tensor could lie at the same address.
bool overlaps_itself(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) == 0) return true;
  }
  return false;
}

void recurrence_in_place_op(
    Tensor z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  const Sequence sequence = check_recurrence("z", z, h0, w_hh, batch_sizes, nonlinearity);
  STD_TORCH_CHECK(
      !overlaps_itself(z), "z must have an address of its own for every element to be written, got an expanded tensor");
  const Tensor h = walkable(z).memory;
  launch(h, h0, w_hh, sequence, reverse, nonlinearity, h);
  if (h.data_ptr() != z.data_ptr()) torch::stable::copy_(z, h);
}

std::tuple<Tensor, Tensor> launch_backward(
    const Tensor& grad_h, const std::optional<Tensor>& grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    const std::optional<Tensor>& batch_sizes, bool reverse, const std::string& nonlinearity, double clip,
    Tensor* stats) {
  const Sequence sequence = check_recurrence_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, nonlinearity, clip);
  const Tensor delta = new_like(h), grad_h0 = new_like(h0);
  if (stats) {
    const Shape shape{3, sequence.T, sequence.B};
    *stats = torch::stable::new_zeros(h, shape, torch::headeronly::ScalarType::Double);
  }
  const Walkable grad_h_rows = walkable(grad_h), h_rows = walkable(h);
  const Walkable grad_hn_rows = grad_hn ? walkable(*grad_hn) : Walkable{{}, {nullptr, 0, 0}};
  const Backward job{
      steps_of(sequence, reverse),
      grad_h_rows.rows,
      grad_hn_rows.rows,
      h_rows.rows,
      rows_of(delta),
      rows_of(grad_h0),
      clip,
      stats ? static_cast<double*>(stats->data_ptr()) : nullptr,
      true};
  recurrence_backward(
      job, {w_hh.data_ptr(), w_hh.stride(0), w_hh.stride(1)}, dtype_of(h), nonlinearity_of(nonlinearity),
      static_cast<int>(torch::stable::get_num_threads()));
  if (sequence.T == 0) {  // no step to carry the gradient through
    Tensor out = grad_h0;
    if (grad_hn) torch::stable::copy_(out, *grad_hn);
    else torch::stable::zero_(out);
  }
  return {delta, grad_h0};
}

std::tuple<Tensor, Tensor> recurrence_backward_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  return launch_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward_stats_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  Tensor stats;
  auto [delta, grad_h0] =
      launch_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, &stats);
  return {delta, grad_h0, stats};
}

std::string isa() { return instruction_set().name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto set = kInstructionSets; *set; ++set) {
    if ((*set)->supported()) names.push_back((*set)->name);
  }
  return names;
}

}  // namespace
}  // namespace rnnkern::cpu

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&rnnkern::cpu::recurrence_op));
  m.impl("recurrence_", TORCH_BOX(&rnnkern::cpu::recurrence_in_place_op));
  m.impl("recurrence_backward", TORCH_BOX(&rnnkern::cpu::recurrence_backward_op));
  m.impl("recurrence_backward_stats", TORCH_BOX(&rnnkern::cpu::recurrence_backward_stats_op));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rnnkern::cpu::isa));
  m.impl("cpu_isas", TORCH_BOX(&rnnkern::cpu::isas));
}
