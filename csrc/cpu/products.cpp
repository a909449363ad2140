#include "cpu/products.h"

#include <algorithm>

#include "cpu/team.h"
#include "cpu/weight_gradient.h"

namespace rnnkern::cpu {
namespace {

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor no_columns(const Tensor& rows) { return narrowed(rows, 1, 0, 0); }

StridedRows strided(const Tensor& rows) { return {rows.data_ptr(), rows.stride(0)}; }

bool is_finite(const Tensor& w) { return Pair(no_columns(w), w).needed.empty(); }

Tensor transposed(const Tensor& tensor) {
  Tensor matrix = tensor;  // transpose() takes no const
  return torch::stable::transpose(matrix, 0, 1);
}

Tensor rows_in(const Tensor& tensor, Run run) { return narrowed(tensor, 0, run.begin, run.end - run.begin); }

}  // namespace

Tensor project(const Tensor& x, const std::vector<Tensor>& w_ih) {
  const Tensor w = w_ih.size() == 1 ? w_ih[0] : call("aten::cat", "", w_ih, int64_t{0});
  // A tensor of its own, where linear() would return a view, into which nobody may write whom autograd looks after.
  const Tensor z = torch::stable::new_empty(x, Shape{x.size(0), x.size(1), w.size(0)});
  call("aten::mm", "out", as_rows(x), transposed(w), as_rows(z));
  return z;
}

Pair::Pair(const Tensor& delta_, const Tensor& x_)
    : delta(with_dense_rows(delta_)),
      x(with_dense_rows(x_)),
      needed(needed_rows(strided(delta), strided(x), x.size(0), delta.size(1), x.size(1), dtype_of(delta), threads())) {
}

Pair::Pair(const Tensor& delta) : Pair(delta, no_columns(delta)) {}

void input_gradient(const Pair& pair, const Tensor& w, const Tensor& grad) {
  const int64_t N = grad.size(0);
  std::vector<Run> runs = pair.needed;
  const bool all = runs.size() == 1 && runs[0].end - runs[0].begin == N;
  if (!all && !is_finite(w)) runs = {{0, N}};
  int64_t end = 0;
  runs.push_back({N, N});
  for (const Run run : runs) {
    if (end < run.begin) {
      Tensor zeros = rows_in(grad, {end, run.begin});
      torch::stable::zero_(zeros);
    }
    if (run.begin < run.end) call("aten::mm", "out", rows_in(pair.delta, run), w, rows_in(grad, run));
    end = run.end;
  }
}

namespace {

int64_t count_rows(const std::vector<Run>& runs) {
  int64_t rows = 0;
  for (const Run run : runs) rows += run.end - run.begin;
  return rows;
}

// By the kernel, where there is one that is faster. `delta_sum` (H) is filled too, if given.
std::optional<Tensor> weight_gradient_on_tiles(const std::vector<Pair>& pairs, Tensor* delta_sum) {
  const Tensor& delta = pairs.front().delta;
  const int64_t H = delta.size(1), I = pairs.front().x.size(1);
  int64_t rows = 0;
  for (const Pair& pair : pairs) rows += count_rows(pair.needed);
  if (!has_weight_gradient(dtype_of(delta), rows, H, I)) return std::nullopt;
  std::vector<RowRun> runs;
  for (const Pair& pair : pairs) {
    for (const Run run : pair.needed) {
      const StridedRows x = strided(rows_in(pair.x, run));
      runs.push_back({run.end - run.begin, strided(rows_in(pair.delta, run)), {x, x}});
    }
  }
  const Tensor grad = torch::stable::new_empty(delta, Shape{H, I});
  weight_gradient(
      {runs.data(),
       static_cast<int64_t>(runs.size()),
       H,
       {I, 0},
       {grad.data_ptr(), nullptr},
       delta_sum ? delta_sum->data_ptr() : nullptr},
      dtype_of(delta), threads());
  return grad;
}

}  // namespace

Tensor weight_gradient(const std::vector<Pair>& pairs) {
  if (const std::optional<Tensor> grad = weight_gradient_on_tiles(pairs, nullptr)) return *grad;
  std::optional<Tensor> total;
  for (const Pair& pair : pairs) {
    for (const Run run : pair.needed) {
      const Tensor part = call("aten::mm", "", transposed(rows_in(pair.delta, run)), rows_in(pair.x, run));
      total = total ? torch::stable::subtract(*total, part, -1) : part;  // total - (-1) part: there is no add
    }
  }
  if (total) return *total;
  return torch::stable::new_zeros(pairs.front().delta, Shape{pairs.front().delta.size(1), pairs.front().x.size(1)});
}

Tensor bias_gradient(const Tensor& delta) { return torch::stable::sum(delta, Shape{0}); }

std::pair<Tensor, Tensor> weight_and_bias_gradient(const Pair& pair) {
  Tensor grad_b = torch::stable::new_empty(pair.delta, Shape{pair.delta.size(1)});
  // The kernel does nothing where W has no elements.
  const std::optional<Tensor> grad_w = pair.x.size(1) > 0 ? weight_gradient_on_tiles({pair}, &grad_b) : std::nullopt;
  if (grad_w) return {*grad_w, grad_b};
  return {weight_gradient({pair}), bias_gradient(pair.delta)};
}

LayerGradients layer_gradients(const Pair& all, const Pair& first, const Pair& later) {
  const int64_t H = all.delta.size(1), I = all.x.size(1);
  std::vector<RowRun> runs;
  int64_t begin = 0;
  for (const Pair* const part : {&first, &later}) {
    const int64_t end = begin + part->delta.size(0);
    std::vector<Run> of_x;
    for (const Run run : all.needed) {
      const Run within{std::max(run.begin, begin) - begin, std::min(run.end, end) - begin};
      if (within.begin < within.end) of_x.push_back(within);
    }
    for (const Run run : united(of_x, part->needed)) {
      const Tensor x = rows_in(all.x, {begin + run.begin, begin + run.end});
      runs.push_back(
          {run.end - run.begin, strided(rows_in(part->delta, run)), {strided(x), strided(rows_in(part->x, run))}});
    }
    begin = end;
  }
  const auto empty = [&](const Shape& shape) { return torch::stable::new_empty(all.delta, shape); };
  const LayerGradients grads{empty({H, I}), empty({H, H}), empty({H})};
  weight_gradient(
      {runs.data(),
       static_cast<int64_t>(runs.size()),
       H,
       {I, H},
       {grads.w_ih.data_ptr(), grads.w_hh.data_ptr()},
       grads.b.data_ptr()},
      dtype_of(all.delta), threads());
  return grads;
}

namespace {

template <class F>
void in_each(int64_t threads, const F& f) {
  if (is_forked) return f(0);  // PyTorch's threads stayed with the parent
  torch::stable::parallel_for(0, threads, 1, [&f](int64_t i, int64_t) { f(i); });
}

}  // namespace

FlushInAllThreads::FlushInAllThreads() : before_(threads(), float_mode()) {
  in_each(before_.size(), [this](int64_t i) { set_float_mode((before_[i] = float_mode()) | kFlush); });
}

FlushInAllThreads::~FlushInAllThreads() {
  in_each(before_.size(), [this](int64_t i) { set_float_mode(before_[i]); });
}

}  // namespace rnnkern::cpu
