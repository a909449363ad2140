// The drivers: pack the factor, divide the rows among a thread team, walk the chains.
#pragma once

#include "cpu/kernel.h"

namespace rnnkern::cpu {

// w_hh (H, H) with any strides, in elements.
struct Weights {
  const void* data;
  int64_t row_stride, column_stride;
};

// `threads` is the most that may run; they never wait for each other but once, after packing.
void recurrence(const Forward&, const Weights& w_hh, Dtype, Nonlinearity, int threads);
// `finite_weights` of the job is set here.
void recurrence_backward(Backward, const Weights& w_hh, Dtype, Nonlinearity, int threads);

// The instruction set in use: the best that the machine has, or the one that RNNKERN_CPU_ISA names.
// Throws std::runtime_error where that is unknown or not supported.
const InstructionSet& instruction_set();
// All of this build, the best first, ended by null.
extern const InstructionSet* const kInstructionSets[];

}  // namespace rnnkern::cpu
