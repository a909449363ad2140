// From the bindings to the kernels: what to compute, in memory that the caller owns.
#pragma once

#include <string>

#include "cuda/job.h"

namespace rnnkern::cuda {

// The device's plan for the job; asks the driver how many blocks can run at once.
Plan plan_for(const Job&, int device, int asked);

// Puts everything on the stream of the device; throws std::runtime_error where CUDA refuses.
void launch(const Job&, const Plan&, int device, char* workspace, void* stream);

// Of CUDA, 1000 major + 10 minor: the newest that the driver serves, and that of the runtime within this library. Touches no
// device.
struct Versions {
  int driver, runtime;
};
Versions versions();

// Why an earlier launch on this process's devices gave up waiting, once; empty where none did.
std::string earlier_failure();

}  // namespace rnnkern::cuda
