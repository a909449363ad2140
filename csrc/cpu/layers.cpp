// The operators for whole layers: projection, recurrence and, backward, the products after it.

#include <cstring>
#include <tuple>

#include "cpu/bindings.h"
#include "cpu/products.h"
#include "cpu/weight_gradient.h"

namespace rnnkern::cpu {
namespace {

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
    const auto weight = [&](int64_t i, int64_t of) -> const Tensor& { return weights[(first + i) * of_chain + of]; };
    std::vector<Tensor> w_ih, biases;
    for (int64_t i = 0; i < D; ++i) {
      w_ih.push_back(weight(i, 0));
      // b_ih - (-1) b_hh: there is no add
      if (has_biases) biases.push_back(as_contiguous(torch::stable::subtract(weight(i, 2), weight(i, 3), -1)));
    }
    // By the chains themselves where they can, as they go.
    const Tensor x = rows;
    RowProductKind kind = projection_kind(dtype, B, x.size(2), H);
    // With gradients PyTorch projects for two directions; what is computed without them has the same bits, but for those of bfloat16.
    if (kind == kInSteps && bidirectional && dtype != kBFloat16) kind = kNoRowProduct;
    rows = kind == kNoRowProduct ? project(x, w_ih) : torch::stable::new_empty(input, Shape{T, B, D * H});
    const Walkable x_rows = walkable(x);
    std::vector<Chain<Forward>> of_layer;
    for (int64_t i = 0; i < D; ++i) {
      const AnyRows z{at(rows, i * H), B * D * H, D * H}, initial{at(*h0, (first + i) * B * H), 0, H};
      const void* const bias = has_biases ? biases[i].data_ptr() : nullptr;
      Chain<Forward> chain{
          {{T, B, H, nullptr, nullptr, i == 1}, z, initial, z, bias},
          weights_of(weight(i, 1)),
          weights_of(weight(i, 0))};
      if (kind != kNoRowProduct) chain.job.projection = {kind, rows_of(x_rows), x.size(2)};
      of_layer.push_back(chain);
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

// (1, B, H) -> (B, H)
Tensor of_layer(const Tensor& state) {
  Tensor all = state;
  return torch::stable::select(all, 0, 0);
}

using Maybe = std::optional<Tensor>;

std::tuple<Maybe, Maybe, Maybe, Maybe, Tensor, Maybe> layer_backward_op(
    const Tensor& grad_h, Maybe grad_hn, const Tensor& x, const Tensor& w_ih, const Tensor& h, const Tensor& h0,
    const Tensor& w_hh, std::string nonlinearity, double clip, bool for_x, bool for_w_ih, bool for_b, bool for_w_hh,
    bool with_stats) {
  STD_TORCH_CHECK(h.dim() == 3 && h.size(0) > 0, "h must have shape (T, B, H) with T > 0, got ", words(shape(h)));
  STD_TORCH_CHECK(w_ih.dim() == 2, "w_ih must have shape (H, I), got ", words(shape(w_ih)));
  const int64_t T = h.size(0), B = h.size(1), H = h.size(2), I = w_ih.size(1), N = T * B;
  check_shape("x", x, {T, B, I});
  check_shape("w_ih", w_ih, {H, I});
  check_shape("h0", h0, {1, B, H});
  if (grad_hn) check_shape("grad_hn", *grad_hn, {1, B, H});
  check_same("x", x, "h", h);
  check_same("w_ih", w_ih, "h", h);
  const Tensor initial = of_layer(h0);
  // Nothing that is returned is a view of something.
  Maybe grad_x, grad_w_ih, grad_b, grad_w_hh;
  if (for_x) grad_x = torch::stable::new_empty(x, Shape{T, B, I});
  std::optional<InputGradient> of_x;  // by the chain itself where it can, as it goes
  if (for_x && has_input_gradient(dtype_of(h), B, H, I)) of_x = {*grad_x, w_ih};
  const Gradients chain = launch_backward(
      grad_h, {grad_hn ? Maybe(of_layer(*grad_hn)) : grad_hn}, h, {initial}, {w_hh}, std::nullopt, false, nonlinearity,
      clip, with_stats, of_x);

  const Tensor delta = as_rows(chain.delta);
  const FlushInAllThreads flush;
  const Pair rows = for_w_ih ? Pair(delta, as_rows(x)) : Pair(delta);
  if (for_w_hh) {
    const Pair later(narrowed(delta, 0, B, N - B), narrowed(as_rows(h), 0, 0, N - B));
    const Tensor delta_0 = narrowed(delta, 0, 0, B);
    if (for_w_ih && has_layer_gradients(dtype_of(h), N, H, I)) {
      const LayerGradients grads = layer_gradients(rows, Pair(delta_0, initial), later);
      grad_w_ih = grads.w_ih;
      grad_w_hh = grads.w_hh;
      if (for_b) grad_b = grads.b;
    } else {
      std::vector<Pair> pairs{later};
      const bool begins_with_zeros = Pair(initial, delta_0).needed.empty();
      if (!begins_with_zeros) pairs.emplace_back(delta_0, initial);
      grad_w_hh = weight_gradient(pairs);
    }
  }
  if (for_w_ih && !grad_w_ih) {
    if (for_b) std::tie(grad_w_ih, grad_b) = weight_and_bias_gradient(rows);
    else grad_w_ih = weight_gradient({rows});
  }
  if (for_x && !of_x) input_gradient(rows, w_ih, as_rows(*grad_x));
  if (for_b && !grad_b) grad_b = bias_gradient(delta);
  const Tensor grad_h0 = torch::stable::clone(torch::stable::reshape(chain.grad_h0[0], Shape{1, B, H}));
  return {grad_x, grad_w_ih, grad_b, grad_w_hh, grad_h0, chain.stats};
}

void check_rows(const Tensor& delta, const Tensor& x) {
  dtype_of(delta);  // or an error
  STD_TORCH_CHECK(delta.dim() == 2, "delta must have shape (N, H), got ", words(shape(delta)));
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape (N, I), got ", words(shape(x)));
  check_shape("x", x, {delta.size(0), x.size(1)});
  check_same("x", x, "delta", delta);
}

Tensor weight_gradient_op(std::vector<Tensor> delta, std::vector<Tensor> x) {
  STD_TORCH_CHECK(
      !delta.empty() && delta.size() == x.size(), "delta and x must be as many tensors each, got ", delta.size(),
      " and ", x.size());
  std::vector<Pair> pairs;
  for (size_t i = 0; i < delta.size(); ++i) {
    check_rows(delta[i], x[i]);
    check_same("delta", delta[i], "delta[0]", delta[0]);
    check_shape("delta", delta[i], {delta[i].size(0), delta[0].size(1)});
    check_shape("x", x[i], {delta[i].size(0), x[0].size(1)});
    pairs.emplace_back(delta[i], x[i]);
  }
  const FlushInAllThreads flush;
  return weight_gradient(pairs);
}

Tensor input_gradient_op(const Tensor& delta, const Tensor& w) {
  STD_TORCH_CHECK(delta.dim() == 2, "delta must have shape (N, H), got ", words(shape(delta)));
  STD_TORCH_CHECK(w.dim() == 2, "w must have shape (H, I), got ", words(shape(w)));
  check_shape("w", w, {delta.size(1), w.size(1)});
  check_same("w", w, "delta", delta);
  const Tensor grad = torch::stable::new_empty(delta, Shape{delta.size(0), w.size(1)});
  const FlushInAllThreads flush;
  input_gradient(Pair(delta), w, grad);
  return grad;
}

std::vector<int64_t> needed_rows_op(const Tensor& delta, const Tensor& x) {
  check_rows(delta, x);
  std::vector<int64_t> bounds;
  for (const Run run : Pair(delta, x).needed) bounds.insert(bounds.end(), {run.begin, run.end});
  return bounds;
}

}  // namespace
}  // namespace rnnkern::cpu

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("layers", TORCH_BOX(&rnnkern::cpu::layers_op));
  m.impl("layer_backward", TORCH_BOX(&rnnkern::cpu::layer_backward_op));
  m.impl("weight_gradient", TORCH_BOX(&rnnkern::cpu::weight_gradient_op));
  m.impl("needed_rows", TORCH_BOX(&rnnkern::cpu::needed_rows_op));
  m.impl("input_gradient", TORCH_BOX(&rnnkern::cpu::input_gradient_op));
}
