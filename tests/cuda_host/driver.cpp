// The operators on the twin: what bindings.cpp and launch.cu do on a GPU, with plain pointers, for tests/test_cuda_host.py.

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/job.h"
#include "cuda/kernels.h"
#include "twin.h"

using namespace rnnkern::cuda;

namespace {

const KernelTable& table_of(int kind) {
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

// A Hopper GPU in small: few multiprocessors, so that small cases have several groups and tiles in turn.
constexpr Device kDevice{8, 227 * 1024, true, {4, 2, 1}};

}  // namespace

// All rows contiguous. offsets (T + 1) or null. H a multiple of 4. Returns what a kernel has told the host, -1 with a
// message where something else went wrong.
extern "C" long long twin_run(
    int kind, int regime, int backward, int T, int B, int H, void* input, void* states, void* output, void* initial,
    void* final_, double* stats, const long long* offsets, const void* w_hh, int reverse, int relu, double clip,
    long long patience, unsigned long long seed, int mutation, char* message) {
  try {
    const int bytes = bytes_of(static_cast<Kind>(kind));
    const int64_t row = static_cast<int64_t>(H) * bytes;
    const std::vector<int64_t> host_offsets(offsets, offsets ? offsets + T + 1 : nullptr);
    Job job{};
    job.kind = static_cast<Kind>(kind);
    job.backward = backward;
    job.w_hh = {w_hh, H, 1};
    job.chain.hidden_size = H;
    job.stats = stats;
    job.offsets = offsets ? &host_offsets : nullptr;
    Chain& call = job.chain;
    const auto rows = [&](void* data) { return Rows{static_cast<char*>(data), B * row, row}; };
    call.input = rows(input);
    call.states = rows(states);
    call.output = rows(output);
    call.initial = rows(initial);
    call.final_ = rows(final_);
    call.T = T;
    call.B = B;
    call.H = H;
    call.relu = relu;
    call.clip = clip;
    call.backward_in_time = (backward != 0) != (reverse != 0);

    const Plan plan = make_plan(kDevice, job.kind, B, H, backward, regime);
    const Workspace space = workspace_of(job, plan);
    std::vector<std::max_align_t> memory(space.total / sizeof(std::max_align_t) + 1);
    char* const workspace = reinterpret_cast<char*>(memory.data());
    std::memset(workspace, 0x7f, space.total);
    Chain chain = chain_for(job, plan, workspace);
    unsigned long long failure = 0;
    chain.error = &failure;
    chain.patience = patience;
    std::memset(chain.ring, 0xff, plan.regime == kGrid ? space.ring_bytes : 0);
    if (offsets) std::memcpy(workspace + space.offsets, offsets, (T + 1) * sizeof(int64_t));
    twin::seed(seed, twin::kNone);
    const KernelTable& table = table_of(kind);
    table.pack(workspace, job.w_hh, backward, H, slabs_of(plan), plan.chunks, nullptr);

    twin::seed(seed, static_cast<twin::Mutation>(mutation));
    const Kernel kernel = backward ? table.backward(plan) : table.forward(plan);
    for_each_launch(job, plan, chain, [&] {
      const int cluster = plan.regime == kCluster ? plan.members : 1;
      twin::run(plan.blocks(), plan.threads(), cluster, plan.shared_bytes, [&] { kernel(chain); });
    });
    for (int64_t t = 0; stats && t < T; ++t) {
      for (int slab = 0; slab < slabs_of(plan); ++slab) {
        for (int k = 0; k < 4; ++k) {
          for (int b = 0; b < B; ++b) {
            stats[(k * static_cast<int64_t>(T) + t) * B + b] +=
                chain.partials[((t * slabs_of(plan) + slab) * 4 + k) * B + b];
          }
        }
      }
    }
    std::snprintf(
        message, 200, "%s, %d x %d blocks of %d threads, KC %d, NT %d, %d tiles", name_of(plan.regime).c_str(),
        plan.members, plan.groups, plan.threads(), plan.KC, plan.NT, plan.tiles);
    return static_cast<long long>(failure);
  } catch (const std::exception& error) {
    std::snprintf(message, 200, "%s", error.what());
    return -1;
  }
}

// The plan for a device: regime, KC, NT, slabs_per_block, k_parts, chunks_per_warp, members, groups, tiles, shared bytes.
// 0, or -1 where there is none.
extern "C" int twin_plan(
    int multiprocessors, int shared_bytes, int cooperative, int clusters, int kind, int B, int H, int backward,
    int* out) try {
  Device device{multiprocessors, shared_bytes, cooperative != 0, {}};
  for (int i = 0; i < 3; ++i) device.clusters[i] = clusters ? (multiprocessors - 4) / (2 << i) : 0;
  const Plan plan = make_plan(device, static_cast<Kind>(kind), B, H, backward, -1);
  const int values[] = {plan.regime,          plan.KC,      plan.NT,     plan.slabs_per_block, plan.k_parts,
                        plan.chunks_per_warp, plan.members, plan.groups, plan.tiles,           plan.shared_bytes};
  std::memcpy(out, values, sizeof values);
  return 0;
} catch (const std::exception&) {
  return -1;
}
