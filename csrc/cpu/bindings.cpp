// The operators' CPU implementations: they check, allocate and launch, and compute nothing.

#include "cpu/bindings.h"

namespace rnnkern::cpu {

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

namespace {

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

// One direction of a layer's rows (.., 2H), which lie side by side.
Tensor half(const Tensor& both, int direction) {
  const int64_t last = both.dim() - 1, H = both.size(last) / 2;
  return narrowed(both, last, direction * H, H);
}

void check_halves(const char* name, const Tensor& both) {
  const int64_t last = both.dim() - 1;
  STD_TORCH_CHECK(
      last >= 1 && both.size(last) % 2 == 0, name, " must have the two directions side by side, (.., 2H), got ",
      words(shape(both)));
}

Tensor recurrence_op(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  const Sequence sequence = check_recurrence("z", z, h0, w_hh, batch_sizes, nonlinearity);
  const Tensor h = new_like(z);
  const Walkable z_rows = walkable(z), h0_rows = walkable(h0);
  const Forward job{steps_of(sequence, reverse), rows_of(z_rows), rows_of(h0_rows), rows_of(as_it_lies(h))};
  recurrence({{job, weights_of(w_hh)}}, dtype_of(z), nonlinearity_of(nonlinearity), threads());
  return h;
}

// z, as a whole or one half of it for each direction, becomes h.
void launch_in_place(
    const Tensor& z, const std::vector<Tensor>& h0, const std::vector<Tensor>& w_hh,
    const std::optional<Tensor>& batch_sizes, bool reverse, const std::string& nonlinearity) {
  const bool both = h0.size() == 2;
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < h0.size(); ++i) {
    sequences.push_back(check_recurrence("z", both ? half(z, i) : z, h0[i], w_hh[i], batch_sizes, nonlinearity));
  }
  STD_TORCH_CHECK(
      !overlaps_itself(z), "z must have an address of its own for every element to be written, got an expanded tensor");
  const Tensor h = walkable(z).memory;
  std::vector<Walkable> h0_rows;
  std::vector<Chain<Forward>> chains;
  for (size_t i = 0; i < h0.size(); ++i) {
    h0_rows.push_back(walkable(h0[i]));
    const AnyRows rows = rows_of(as_it_lies(both ? half(h, i) : h));
    chains.push_back(
        {{steps_of(sequences[i], reverse || i == 1), rows, rows_of(h0_rows[i]), rows}, weights_of(w_hh[i])});
  }
  recurrence(chains, dtype_of(z), nonlinearity_of(nonlinearity), threads());
  Tensor out = z;
  if (h.data_ptr() != z.data_ptr()) torch::stable::copy_(out, h);
}

void recurrence_in_place_op(
    Tensor z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  launch_in_place(z, {h0}, {w_hh}, batch_sizes, reverse, nonlinearity);
}

void bidirectional_in_place_op(
    Tensor z, const Tensor& h0, const Tensor& h0_reverse, const Tensor& w_hh, const Tensor& w_hh_reverse,
    std::optional<Tensor> batch_sizes, std::string nonlinearity) {
  check_halves("z", z);
  launch_in_place(z, {h0, h0_reverse}, {w_hh, w_hh_reverse}, batch_sizes, false, nonlinearity);
}

}  // namespace

Gradients launch_backward(
    const Tensor& grad_h, const std::vector<std::optional<Tensor>>& grad_hn, const Tensor& h,
    const std::vector<Tensor>& h0, const std::vector<Tensor>& w_hh, const std::optional<Tensor>& batch_sizes,
    bool reverse, const std::string& nonlinearity, double clip, bool with_stats,
    const std::optional<InputGradient>& of_x) {
  const bool both = h0.size() == 2;
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < h0.size(); ++i) {
    sequences.push_back(check_recurrence_backward(
        both ? half(grad_h, i) : grad_h, grad_hn[i], both ? half(h, i) : h, h0[i], w_hh[i], batch_sizes, nonlinearity,
        clip));
  }
  const int64_t T = sequences[0].T, B = sequences[0].B;
  Gradients out{new_like(h), {}, std::nullopt};
  double* stats = nullptr;
  if (with_stats) {
    const Shape shape = both ? Shape{2, 4, T, B} : Shape{4, T, B};
    constexpr auto kDouble = torch::headeronly::ScalarType::Double;
    // A packed sequence leaves out the steps that a sample does not have.
    out.stats = batch_sizes ? torch::stable::new_zeros(h, shape, kDouble) : torch::stable::new_empty(h, shape, kDouble);
    stats = static_cast<double*>(out.stats->data_ptr());
  }
  std::vector<Walkable> kept;  // what the chains point into
  const auto keep = [&](Walkable rows) { return rows_of(kept.emplace_back(std::move(rows))); };
  std::vector<Chain<Backward>> chains;
  for (size_t i = 0; i < h0.size(); ++i) {
    out.grad_h0.push_back(new_like(h0[i]));
    Backward job{
        steps_of(sequences[i], reverse || i == 1),
        keep(walkable(both ? half(grad_h, i) : grad_h)),
        grad_hn[i] ? keep(walkable(*grad_hn[i])) : AnyRows{nullptr, 0, 0},
        keep(walkable(both ? half(h, i) : h)),
        rows_of(as_it_lies(both ? half(out.delta, i) : out.delta)),
        rows_of(as_it_lies(out.grad_h0[i])),
        clip,
        stats ? stats + i * 4 * T * B : nullptr,
        true};
    if (of_x) job.grad_x = {kBetweenSteps, rows_of(as_it_lies(of_x->grad)), of_x->grad.size(2)};
    chains.push_back({job, weights_of(w_hh[i]), of_x ? weights_of(of_x->w_ih) : Weights{}});
  }
  recurrence_backward(chains, dtype_of(h), nonlinearity_of(nonlinearity), threads());
  for (size_t i = 0; T == 0 && i < h0.size(); ++i) {  // no step to carry the gradient through
    if (grad_hn[i]) torch::stable::copy_(out.grad_h0[i], *grad_hn[i]);
    else torch::stable::zero_(out.grad_h0[i]);
  }
  return out;
}

namespace {

std::tuple<Tensor, Tensor> recurrence_backward_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  const Gradients out =
      launch_backward(grad_h, {grad_hn}, h, {h0}, {w_hh}, batch_sizes, reverse, nonlinearity, clip, false);
  return {out.delta, out.grad_h0[0]};
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward_stats_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  const Gradients out =
      launch_backward(grad_h, {grad_hn}, h, {h0}, {w_hh}, batch_sizes, reverse, nonlinearity, clip, true);
  return {out.delta, out.grad_h0[0], *out.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_backward_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, std::optional<Tensor> grad_hn_reverse, const Tensor& h,
    const Tensor& h0, const Tensor& h0_reverse, const Tensor& w_hh, const Tensor& w_hh_reverse,
    std::optional<Tensor> batch_sizes, std::string nonlinearity, double clip, bool with_stats) {
  check_halves("h", h);
  check_shape("grad_h", grad_h, shape(h));
  const Gradients out = launch_backward(
      grad_h, {grad_hn, grad_hn_reverse}, h, {h0, h0_reverse}, {w_hh, w_hh_reverse}, batch_sizes, false, nonlinearity,
      clip, with_stats);
  const Tensor stats =
      with_stats ? *out.stats : torch::stable::new_empty(h, Shape{0}, torch::headeronly::ScalarType::Double);
  return {out.delta, out.grad_h0[0], out.grad_h0[1], stats};
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
  m.impl("bidirectional_", TORCH_BOX(&rnnkern::cpu::bidirectional_in_place_op));
  m.impl("bidirectional_backward", TORCH_BOX(&rnnkern::cpu::bidirectional_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rnnkern::cpu::isa));
  m.impl("cpu_isas", TORCH_BOX(&rnnkern::cpu::isas));
}
