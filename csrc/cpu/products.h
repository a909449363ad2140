// The products over all rows of a sequence: PyTorch's, or a kernel of our own where there is one.
#pragma once

#include <vector>

#include "cpu/bindings.h"
#include "cpu/flush.h"
#include "cpu/needed_rows.h"

namespace rnnkern::cpu {

// x W_ih' + b_ih + b_hh (T, B, H) of one direction, or (T, B, 2H) of both side by side by one product. `weights` are those of
// the layer: of each direction w_ih, w_hh, and if of_chain is 4 b_ih, b_hh.
Tensor project(const Tensor& x, const Tensor* weights, int64_t directions, int64_t of_chain);

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
