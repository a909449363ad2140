// The drivers: pack the factor, divide the rows among a thread team, walk the chains.
#pragma once

#include <vector>

#include "cpu/kernel.h"

namespace rnnkern::cpu {

// w_hh (H, H) with any strides, in elements.
struct Weights {
  const void* data;
  int64_t row_stride, column_stride;
};

template <class Job>
struct Chain {
  Job job;
  Weights w_hh, w_ih{};  // w_ih where the job has a RowProduct
};

// Chains of the same steps, which may be walked either way, side by side: the directions of a layer. `threads` is the most
// that may run.
void recurrence(const std::vector<Chain<Forward>>&, Dtype, Nonlinearity, int threads);
// `finite_weights` of the jobs, and `packed`, are set here.
void recurrence_backward(const std::vector<Chain<Backward>>&, Dtype, Nonlinearity, int threads);

// Which RowProduct jobs of this dtype should have, from so many rows of `in` elements a step to rows of `out`.
RowProductKind projection_kind(Dtype, int64_t rows, int64_t in, int64_t out);
bool has_input_gradient(Dtype, int64_t rows, int64_t in, int64_t out);

// The instruction set in use: the best that the machine has, or the one that RNNKERN_CPU_ISA names.
// Throws std::runtime_error where that is unknown or not supported.
const InstructionSet& instruction_set();
// All of this build, the best first, ended by null.
extern const InstructionSet* const kInstructionSets[];

}  // namespace rnnkern::cpu
