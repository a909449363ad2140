// The operators' CPU implementations: they check, allocate and launch, and compute nothing.

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/recurrence.h"
#include "walkable.h"

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

AnyRows rows_of(const Walkable& walkable) {
  return {walkable.memory.data_ptr(), walkable.time_stride, walkable.row_stride};
}

void launch(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, const Sequence& sequence, bool reverse,
    const std::string& nonlinearity, const Tensor& h) {
  const Walkable z_rows = walkable(z), h0_rows = walkable(h0);
  const Forward job{steps_of(sequence, reverse), rows_of(z_rows), rows_of(h0_rows), rows_of(as_it_lies(h))};
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
    const Shape shape{4, sequence.T, sequence.B};
    *stats = torch::stable::new_zeros(h, shape, torch::headeronly::ScalarType::Double);
  }
  const Walkable grad_h_rows = walkable(grad_h), h_rows = walkable(h);
  const Walkable grad_hn_rows = grad_hn ? walkable(*grad_hn) : as_it_lies(grad_h0);
  const Backward job{
      steps_of(sequence, reverse),
      rows_of(grad_h_rows),
      grad_hn ? rows_of(grad_hn_rows) : AnyRows{nullptr, 0, 0},
      rows_of(h_rows),
      rows_of(as_it_lies(delta)),
      rows_of(as_it_lies(grad_h0)),
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
