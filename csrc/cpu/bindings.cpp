// The operators' CPU implementations: they check, allocate and launch, and compute nothing.

#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>

#include "checks.h"
#include "cpu/recurrence.h"
#include "cpu/weight_gradient.h"
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

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

Weights weights_of(const Tensor& w_hh) { return {w_hh.data_ptr(), w_hh.stride(0), w_hh.stride(1)}; }

Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// One direction of a layer's rows (.., 2H), which lie side by side.
Tensor half(const Tensor& both, int direction) {
  const int64_t last = both.dim() - 1, H = both.size(last) / 2;
  Tensor rows = both;
  return torch::stable::narrow(rows, last, direction * H, H);
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

// An operator of PyTorch.
template <class... Arguments>
Tensor call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == 0, name, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x W_ih' + b_ih + b_hh of one direction, or of both side by side by one product; `weights` are those of the layer.
Tensor project(const Tensor& x, const Tensor* weights, int64_t directions, int64_t of_chain) {
  std::vector<Tensor> w_ih, biases;
  for (const Tensor* w = weights; w != weights + directions * of_chain; w += of_chain) {
    w_ih.push_back(w[0]);
    if (of_chain == 4) biases.push_back(torch::stable::subtract(w[2], w[3], -1));  // b_ih - (-1) b_hh: there is no add
  }
  const auto joined = [](const std::vector<Tensor>& parts) {
    return parts.size() == 1 ? parts[0] : call("aten::cat", parts, int64_t{0});
  };
  std::optional<Tensor> b;
  if (!biases.empty()) b = joined(biases);
  // F.linear takes other products for rows with gaps.
  return as_contiguous(call("aten::linear", directions == 1 ? x : as_contiguous(x), joined(w_ih), b));
}

// All layers in one call: where a sequence is short, the way through Python takes longer than what is computed. Pointers
// into z and the states take the place of views, each of which would cost as much as a step.
std::tuple<Tensor, Tensor> layers_op(
    const Tensor& input, std::optional<Tensor> h0, std::vector<Tensor> weights, bool has_biases, bool bidirectional,
    std::string nonlinearity) {
  const int64_t D = bidirectional ? 2 : 1, of_chain = has_biases ? 4 : 2, count = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(
      count > 0 && count % (D * of_chain) == 0, "weights must be ", D * of_chain, " for each layer, got ", count);
  STD_TORCH_CHECK(
      input.dim() == 3 && input.size(0) > 0, "input must have shape (T, B, I) with T > 0, got ", words(shape(input)));
  STD_TORCH_CHECK(weights[1].dim() == 2, "w_hh must have shape (H, H), got ", words(shape(weights[1])));
  check_nonlinearity(nonlinearity);
  const Dtype dtype = dtype_of(input);
  const int64_t T = input.size(0), B = input.size(1), H = weights[1].size(0), chains = count / of_chain;
  // All of them here: of what fails within an operator of PyTorch the stable ABI loses the words.
  const auto check = [&input](const char* name, const Tensor& tensor, const Shape& expected) {
    check_shape(name, tensor, expected);
    check_same(name, tensor, "input", input);
  };
  for (int64_t chain = 0; chain < chains; ++chain) {
    const Tensor* const w = &weights[chain * of_chain];
    check("w_ih", w[0], {H, chain < D ? input.size(2) : D * H});
    check("w_hh", w[1], {H, H});
    if (has_biases) check("b_ih", w[2], {H}), check("b_hh", w[3], {H});
  }
  if (h0) check("h0", *h0, {chains, B, H});
  h0 = h0 ? as_contiguous(*h0) : torch::stable::new_zeros(input, Shape{chains, B, H});

  const Tensor h_n = new_like(*h0);
  const int64_t size = input.element_size();
  const auto at = [size](const Tensor& tensor, int64_t i) { return static_cast<char*>(tensor.data_ptr()) + i * size; };
  Tensor rows = input;
  for (int64_t first = 0; first < chains; first += D) {
    rows = project(rows, &weights[first * of_chain], D, of_chain);  // (T, B, D H)
    std::vector<Chain<Forward>> of_layer;
    for (int64_t i = 0; i < D; ++i) {
      const AnyRows z{at(rows, i * H), B * D * H, D * H}, initial{at(*h0, (first + i) * B * H), 0, H};
      const Weights w_hh = weights_of(weights[(first + i) * of_chain + 1]);
      of_layer.push_back({{{T, B, H, nullptr, nullptr, i == 1}, z, initial, z}, w_hh});
    }
    recurrence(of_layer, dtype, nonlinearity_of(nonlinearity), threads());
    for (int64_t i = 0; i < D; ++i) {
      const int64_t last = i == 1 ? 0 : T - 1;
      for (int64_t b = 0; b < B; ++b) {
        std::memcpy(at(h_n, ((first + i) * B + b) * H), at(rows, (last * B + b) * D * H + i * H), H * size);
      }
    }
  }
  return {rows, h_n};
}

// What the backward of one or two chains returns.
struct Gradients {
  Tensor delta;
  std::vector<Tensor> grad_h0;
  std::optional<Tensor> stats;  // (4, T, B), or (2, 4, T, B) of two
};

Gradients launch_backward(
    const Tensor& grad_h, const std::vector<std::optional<Tensor>>& grad_hn, const Tensor& h,
    const std::vector<Tensor>& h0, const std::vector<Tensor>& w_hh, const std::optional<Tensor>& batch_sizes,
    bool reverse, const std::string& nonlinearity, double clip, bool with_stats) {
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
    const Backward job{
        steps_of(sequences[i], reverse || i == 1),
        keep(walkable(both ? half(grad_h, i) : grad_h)),
        grad_hn[i] ? keep(walkable(*grad_hn[i])) : AnyRows{nullptr, 0, 0},
        keep(walkable(both ? half(h, i) : h)),
        rows_of(as_it_lies(both ? half(out.delta, i) : out.delta)),
        rows_of(as_it_lies(out.grad_h0[i])),
        clip,
        stats ? stats + i * 4 * T * B : nullptr,
        true};
    chains.push_back({job, weights_of(w_hh[i])});
  }
  recurrence_backward(chains, dtype_of(h), nonlinearity_of(nonlinearity), threads());
  for (size_t i = 0; T == 0 && i < h0.size(); ++i) {  // no step to carry the gradient through
    if (grad_hn[i]) torch::stable::copy_(out.grad_h0[i], *grad_hn[i]);
    else torch::stable::zero_(out.grad_h0[i]);
  }
  return out;
}

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

Tensor weight_gradient_op(std::vector<Tensor> delta, std::vector<Tensor> x) {
  STD_TORCH_CHECK(
      !delta.empty() && delta.size() == x.size(), "delta and x must be as many tensors each, got ", delta.size(),
      " and ", x.size());
  STD_TORCH_CHECK(
      has_weight_gradient(dtype_of(delta[0])), "weight_gradient is for bfloat16 on processors with AMX, got ",
      torch::headeronly::toString(delta[0].scalar_type()), " with the instruction set ", instruction_set().name);
  std::vector<RowPair> pairs;
  for (size_t i = 0; i < delta.size(); ++i) {
    check_same("delta", delta[i], "delta[0]", delta[0]);
    check_same("x", x[i], "delta[0]", delta[0]);
    STD_TORCH_CHECK(delta[i].dim() == 2, "delta must have shape (N, H), got ", words(shape(delta[i])));
    STD_TORCH_CHECK(x[i].dim() == 2, "x must have shape (N, I), got ", words(shape(x[i])));
    check_shape("delta", delta[i], {delta[i].size(0), delta[0].size(1)});
    check_shape("x", x[i], {delta[i].size(0), x[0].size(1)});
    const auto dense = [](Tensor& rows) { rows = rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows); };
    dense(delta[i]), dense(x[i]);
    pairs.push_back({delta[i].data_ptr(), x[i].data_ptr(), x[i].size(0), delta[i].stride(0), x[i].stride(0)});
  }
  const int64_t H = delta[0].size(1), I = x[0].size(1);
  const Tensor grad = torch::stable::new_empty(delta[0], Shape{H, I});
  weight_gradient({pairs.data(), static_cast<int64_t>(pairs.size()), H, I, grad.data_ptr()}, threads());
  return grad;
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
  m.impl("weight_gradient", TORCH_BOX(&rnnkern::cpu::weight_gradient_op));
  m.impl("layers", TORCH_BOX(&rnnkern::cpu::layers_op));
  m.impl("bidirectional_backward", TORCH_BOX(&rnnkern::cpu::bidirectional_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rnnkern::cpu::isa));
  m.impl("cpu_isas", TORCH_BOX(&rnnkern::cpu::isas));
}
