// One call of an operator: what is to be computed, the memory that takes, and the launches it is made of. Plain C++.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "cuda/plan.h"

namespace rnnkern::cuda {

// w_hh (H, H) with any strides, in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
};

struct Job {
  Kind kind;
  bool backward;
  Matrix w_hh;
  double* stats;                        // (4, T, B), or null
  const std::vector<int64_t>* offsets;  // (T + 1) on the host, or null
  Chain chain;                          // filled in but for what a plan and a workspace give
};

// The memory that a job needs beside its tensors, in bytes from the start of one allocation.
struct Workspace {
  size_t weights, ring, partials, offsets, total, ring_bytes;
};

Workspace workspace_of(const Job&, const Plan&);

inline int slabs_of(const Plan& plan) { return plan.members * plan.slabs_per_block; }

// The job's chain with all that follows from the plan; offsets, ring and weights lie in `workspace` and are not yet there.
Chain chain_for(const Job&, const Plan&, char* workspace);

// Calls `launch` for each launch of the job, in order, with the steps of that launch in `chain`.
void for_each_launch(const Job&, const Plan&, Chain& chain, const std::function<void()>& launch);

}  // namespace rnnkern::cuda
