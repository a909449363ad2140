// From the bindings to the kernels: what to compute, in memory that the caller owns.
#pragma once

#include <cstddef>
#include <string>
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
  int hidden_size;                      // of w_hh; chain.H is the next multiple of 4
  double* stats;                        // (3, T, B), or null
  const std::vector<int64_t>* offsets;  // (T + 1) on the host, or null
  Chain chain;                          // filled in but for what a plan and a workspace give
};

// The memory that a job needs beside its tensors, in bytes from the start of one allocation.
struct Workspace {
  size_t weights, ring, partials, offsets, total, ring_bytes;
};

Workspace workspace_of(const Job&, const Plan&);

// The device's plan for the job; asks the driver how many blocks can run at once.
Plan plan_for(const Job&, int device, int asked);

// Puts everything on the stream; throws std::runtime_error where CUDA refuses.
void launch(const Job&, const Plan&, char* workspace, int device, void* stream);

// Why an earlier launch on this process's devices gave up waiting, once; empty where none did.
std::string earlier_failure();

}  // namespace rnnkern::cuda
