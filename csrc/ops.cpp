// The operators' schemas, all of them, once. Devices register their implementations beside their kernels.
//
// T steps, B samples, H hidden units; packed sequences have N = sum(batch_sizes) rows instead of T x B.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rnnkern, m) {
  // z (T, B, H) or (N, H); h0 (B, H); w_hh (H, H); batch_sizes (T) int64 on the CPU, non-increasing; nonlinearity
  // 'tanh' or 'relu'. Returns h like z:  h_t = f(z_t + h_{t-1} w_hh'), walked from the last step if reverse.
  m.def("recurrence(Tensor z, Tensor h0, Tensor w_hh, Tensor? batch_sizes, bool reverse, str nonlinearity) -> Tensor");

  // The same, with h in z's place.
  m.def("recurrence_(Tensor(a!) z, Tensor h0, Tensor w_hh, Tensor? batch_sizes, bool reverse, str nonlinearity) -> ()");

  // grad_h like h, grad_hn (B, H): the gradients that arrive at every state and at the last ones.
  // Returns delta like h = dL/dz, and grad_h0 (B, H). clip clamps each element of dL/dh_t to +-clip (inf: never).
  m.def(
      "recurrence_backward(Tensor grad_h, Tensor? grad_hn, Tensor h, Tensor h0, Tensor w_hh, Tensor? batch_sizes, "
      "bool reverse, str nonlinearity, float clip) -> (Tensor, Tensor)");

  // The same, and stats (4, T, B) float64: the squared norms of dL/dh_t, of the part of it that came through h_{t+1}, of
  // delta_t, and of grad_h_t, per step and sample, before clipping; 0 in the steps that a sample does not have.
  m.def(
      "recurrence_backward_stats(Tensor grad_h, Tensor? grad_hn, Tensor h, Tensor h0, Tensor w_hh, "
      "Tensor? batch_sizes, bool reverse, str nonlinearity, float clip) -> (Tensor, Tensor, Tensor)");

  // Both directions of a layer at once, side by side in z and h, (T, B, 2H) or (N, 2H); those named _reverse walk from the
  // last step. stats (2, 4, T, B), or (0) without. On the CPU alone.
  m.def(
      "bidirectional_(Tensor(a!) z, Tensor h0, Tensor h0_reverse, Tensor w_hh, Tensor w_hh_reverse, "
      "Tensor? batch_sizes, str nonlinearity) -> ()");
  m.def(
      "bidirectional_backward(Tensor grad_h, Tensor? grad_hn, Tensor? grad_hn_reverse, Tensor h, Tensor h0, "
      "Tensor h0_reverse, Tensor w_hh, Tensor w_hh_reverse, Tensor? batch_sizes, str nonlinearity, float clip, "
      "bool with_stats) -> (Tensor, Tensor, Tensor, Tensor)");

  // All layers of a net at once, without gradients: input (T, B, I), h0 (chains, B, H) or none for zeros, where each layer has
  // one chain or, if bidirectional, two; weights w_ih, w_hh and, if has_biases, b_ih, b_hh of each chain. Returns the output
  // (T, B, H or 2H) and h_n like h0. On the CPU alone.
  m.def(
      "layers(Tensor input, Tensor? h0, Tensor[] weights, bool has_biases, bool bidirectional, str nonlinearity) "
      "-> (Tensor, Tensor)");

  // The backward of such a net of one layer and direction: grad_h like h (T, B, H), grad_hn and h0 (1, B, H), x (T, B, I).
  // Returns the gradients that are wanted of x, w_ih, either bias and w_hh; that of h0; and stats as above.
  m.def(
      "layer_backward(Tensor grad_h, Tensor? grad_hn, Tensor x, Tensor w_ih, Tensor h, Tensor h0, Tensor w_hh, "
      "str nonlinearity, float clip, bool for_x, bool for_w_ih, bool for_b, bool for_w_hh, bool with_stats) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor, Tensor?)");

  // The sum over pairs of delta' x (H, I), for delta (N, H) and x (N, I) of as many rows; and delta w (N, I), for w (H, I).
  // Subnormals are flushed to zero, and rows of zeros left out. On the CPU alone.
  m.def("weight_gradient(Tensor[] delta, Tensor[] x) -> Tensor");
  m.def("input_gradient(Tensor delta, Tensor w) -> Tensor");

  // begin, end, begin, end, ... of the rows that those do not leave out: outside of them delta is 0 and x finite.
  m.def("needed_rows(Tensor delta, Tensor x) -> int[]");

  // The instruction set that the CPU kernels use here, and all that this build and this machine could use.
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");

  // Whether the CUDA kernels may multiply float32 as TF32, from now on and in the whole process.
  m.def("cuda_allow_tf32(bool allowed) -> ()");

  // Of CUDA, 1000 major + 10 minor: the newest that the driver serves, and that of the kernels' own runtime.
  m.def("cuda_versions() -> int[]");
}
