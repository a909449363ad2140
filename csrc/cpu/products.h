// The products over all rows of a sequence: PyTorch's, or a kernel of our own where there is one.
#pragma once

#include <utility>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/flush.h"
#include "cpu/needed_rows.h"

namespace rnnkern::cpu {

// x W' (T, B, H) for x (T, B, I) and W (H, I); or (T, B, 2H), by one product, for the W of both directions.
Tensor project(const Tensor& x, const std::vector<Tensor>& w_ih);

// delta (N, H) of a backward pass and x (N, I) of as many rows, and which of them count.
struct Pair {
  Tensor delta, x;
  std::vector<Run> needed;

  Pair(const Tensor& delta, const Tensor& x);
  explicit Pair(const Tensor& delta);  // with no x
};

// grad (N, I) = delta W for W (H, I); and the sum of delta' x (H, I) over all pairs. A chain that vanishes leaves them with zeros,
// which are left out, and with subnormal numbers: so they want a FlushInAllThreads around them.
void input_gradient(const Pair&, const Tensor& w, const Tensor& grad);
Tensor weight_gradient(const std::vector<Pair>&);
Tensor bias_gradient(const Tensor& delta);  // the sum of all rows (H)
// Both, by one pass over delta where there is a kernel.
std::pair<Tensor, Tensor> weight_and_bias_gradient(const Pair&);

// Of both weights of a layer, and of its bias, by one pass over delta; where has_layer_gradients().
struct LayerGradients {
  Tensor w_ih, w_hh, b;
};
// delta's rows of all steps with x; those of the first step with h0, and those of the later ones with h of the step before.
LayerGradients layer_gradients(const Pair& all, const Pair& first, const Pair& later);

// FlushSubnormals in all threads of PyTorch that take part in the operators which this thread calls.
class FlushInAllThreads {
 public:
  FlushInAllThreads();
  // A thread that is new since then has the mode of the one that made it, this one's.
  ~FlushInAllThreads();

  FlushInAllThreads(const FlushInAllThreads&) = delete;
  FlushInAllThreads& operator=(const FlushInAllThreads&) = delete;

 private:
  std::vector<FloatMode> before_;
};

}  // namespace rnnkern::cpu
