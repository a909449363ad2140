#include "cuda/launch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/pack.cuh"

namespace rnnkern::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is not sticky must not surface in somebody else's call
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

const KernelTable& table_of(Kind kind) {
  switch (kind) {
    case kBFloat16:
      return kBFloat16Kernels;
    case kFloat16:
      return kFloat16Kernels;
    case kTensorFloat32:
      return kTensorFloat32Kernels;
    case kFloat32:
      return kFloat32Kernels;
    default:
      return kFloat64Kernels;
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Kernel kernel_of(const Job& job, const Plan& plan) {
  const KernelTable& table = table_of(job.kind);
  const Kernel kernel = job.backward ? table.backward(plan) : table.forward(plan);
  if (kernel == nullptr) throw std::runtime_error("no kernel for this dtype in the regime " + name_of(plan.regime));
  return kernel;
}

// All that the device has, whatever this launch takes: another thread may be about to launch the same kernel with more.
void allow_shared_memory(Kernel kernel, const Device& facts) {
  check(
      cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, facts.shared_bytes),
      "shared memory for a block");
}

// A kernel's launch in clusters of plan.members blocks.
struct LaunchConfig {
  const void* function;
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  LaunchConfig(Kernel kernel, const Plan& plan, cudaStream_t stream) : function(reinterpret_cast<const void*>(kernel)) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.members;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(plan.blocks());
    config.blockDim = dim3(plan.threads());
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

Device facts_of(int device) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::once_flag asked[kDevices];
  if (device >= kDevices) throw std::runtime_error("more than 64 devices");
  std::call_once(asked[device], [&] {
    known[device] = {
        attribute(cudaDevAttrMultiProcessorCount, device),
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        attribute(cudaDevAttrCooperativeLaunch, device) != 0,
        {0, 0, 0},
    };
    if (attribute(cudaDevAttrClusterLaunch, device) == 0) return;
    // Any kernel that has a multiprocessor to itself; a part of a GPU may have too few side by side.
    Plan plan{};
    plan.regime = kCluster;
    plan.KC = 8;
    plan.NT = 1;
    plan.slabs_per_block = plan.groups = 1;
    plan.k_parts = 8;
    plan.shared_bytes = known[device].shared_bytes;
    const Kernel kernel = kBFloat16Kernels.forward(plan);
    // Where the driver has compiled it from PTX for older devices it is empty (RNNKERN_HAS_CLUSTERS), and would launch.
    cudaFuncAttributes compiled{};
    check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
    if (compiled.ptxVersion < 90) return;
    allow_shared_memory(kernel, known[device]);
    for (int i = 0; i < 3; ++i) {
      plan.members = 2 << i;
      LaunchConfig config(kernel, plan, nullptr);
      if (cudaOccupancyMaxActiveClusters(&known[device].clusters[i], config.function, &config.config) != cudaSuccess) {
        known[device].clusters[i] = 0;
        cudaGetLastError();
      }
    }
  });
  return known[device];
}

// A word of host memory that kernels write when a wait has run out: (regime + 1) << 56 | block << 32 | step.
std::atomic<unsigned long long*> failure_word{nullptr};

unsigned long long* failure_word_on_device() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (failure_word == nullptr) {
    // Allowed while a graph is captured: this memory lives as long as the process.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    void* word = nullptr;
    const cudaError_t error =
        cudaHostAlloc(&word, sizeof(unsigned long long), cudaHostAllocMapped | cudaHostAllocPortable);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(error, "a word of host memory");
    *static_cast<unsigned long long*>(word) = 0;
    failure_word = static_cast<unsigned long long*>(word);
  }
  return failure_word;  // the same address on every device: unified addressing
}

int64_t patience() {
  const char* const asked = std::getenv("RNNKERN_CUDA_PATIENCE");
  const double seconds = asked && *asked ? std::atof(asked) : 10.0;
  return static_cast<int64_t>(std::clamp(seconds, -1.0, 1e9) * 1e9);  // -1: none at all, for tests
}

}  // namespace

Versions versions() {
  Versions found{};
  check(cudaDriverGetVersion(&found.driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&found.runtime), "cudaRuntimeGetVersion");
  return found;
}

std::string earlier_failure() {
  unsigned long long* const word = failure_word;
  if (word == nullptr) return "";
  const unsigned long long failure = *static_cast<volatile unsigned long long*>(word);
  if (failure == 0) return "";
  *static_cast<volatile unsigned long long*>(word) = 0;
  return "an earlier rnnkern kernel gave up: in the regime '" + name_of(static_cast<Regime>((failure >> 56) - 1)) +
         "', block " + std::to_string(failure >> 32 & 0xffffff) + " waited in vain for the state of step " +
         std::to_string(failure & 0xffffffff) +
         "; its results are not valid (is the GPU shared with other work that keeps blocks from running?)";
}

Plan plan_for(const Job& job, int device, int asked) {
  const Device facts = facts_of(device);
  const auto plan_on = [&](const Device& some, int regime) {
    return make_plan(some, job.kind, job.chain.B, job.chain.H, job.backward, regime);
  };
  const Plan plan = plan_on(facts, asked);
  if (plan.regime == kGrid) {
    // Waiting for blocks that cannot run is a deadlock: ask how many can, under MPS or on a part of a GPU fewer.
    const Kernel kernel = kernel_of(job, plan);
    allow_shared_memory(kernel, facts);
    int per_multiprocessor = 0;
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &per_multiprocessor, reinterpret_cast<const void*>(kernel), plan.threads(), plan.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (per_multiprocessor * facts.multiprocessors < plan.blocks()) return plan_on(facts, kStep);
  }
  return plan;
}

void launch(const Job& job, const Plan& plan, int device, char* workspace, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Workspace space = workspace_of(job, plan);
  const Kernel kernel = kernel_of(job, plan);
  allow_shared_memory(kernel, facts_of(device));
  Chain chain = chain_for(job, plan, workspace);
  chain.error = failure_word_on_device();
  chain.patience = patience();
  if (job.offsets) {
    const auto count = static_cast<int64_t>(job.offsets->size());
    bring_offsets(reinterpret_cast<int64_t*>(workspace + space.offsets), job.offsets->data(), count, stream);
  }
  table_of(job.kind).pack(
      workspace + space.weights, job.w_hh, job.backward, job.chain.hidden_size, slabs_of(plan), plan.chunks, stream);

  const dim3 blocks(plan.blocks()), threads(plan.threads());
  void* arguments[] = {&chain};
  const auto function = reinterpret_cast<const void*>(kernel);
  if (plan.regime == kGrid) check(cudaMemsetAsync(chain.ring, 0xff, space.ring_bytes, stream), "cudaMemsetAsync");
  for_each_launch(job, plan, chain, [&] {
    if (plan.regime == kGrid) {
      check(
          cudaLaunchCooperativeKernel(function, blocks, threads, arguments, plan.shared_bytes, stream),
          "a cooperative kernel launch");
    } else if (plan.regime == kCluster) {
      LaunchConfig config(kernel, plan, stream);
      check(cudaLaunchKernelExC(&config.config, config.function, arguments), "a launch in clusters");
    } else {
      check(cudaLaunchKernel(function, blocks, threads, arguments, plan.shared_bytes, stream), "a kernel launch");
    }
  });
  if (job.stats) add_statistics(job.stats, chain.partials, chain.T, slabs_of(plan), chain.B, stream);
  check(cudaGetLastError(), "a kernel launch");
}

}  // namespace rnnkern::cuda
