#include "cuda/job.h"

#include <algorithm>

#include "cuda/layout.h"

namespace rnnkern::cuda {
namespace {

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Workspace workspace_of(const Job& job, const Plan& plan) {
  const Chain& chain = job.chain;
  const size_t state_bytes = static_cast<size_t>(plan.state_chunks) * plan.NT * kTileBytes;
  size_t ring_states = 0;
  if (plan.regime == kGrid) {
    const int64_t states = static_cast<int64_t>((plan.tiles + plan.groups - 1) / plan.groups) * chain.T;
    // Short chains never come round.
    ring_states = static_cast<size_t>(plan.groups - 1) * kRingSlots + std::min<int64_t>(states, kRingSlots);
  } else if (plan.regime == kStep) {
    ring_states = static_cast<size_t>(plan.tiles) * 2;
  }
  const size_t partials = static_cast<size_t>(chain.T) * slabs_of(plan) * 4 * chain.B * sizeof(double);
  Workspace space{};
  space.ring_bytes = ring_states * state_bytes;
  space.weights = 0;
  space.ring = aligned(static_cast<size_t>(slabs_of(plan)) * plan.chunks * kPackedBytes);
  space.partials = space.ring + aligned(space.ring_bytes);
  space.offsets = space.partials + (job.stats ? aligned(partials) : 0);
  space.total = space.offsets + (job.offsets ? aligned(job.offsets->size() * sizeof(int64_t)) : 0);
  return space;
}

Chain chain_for(const Job& job, const Plan& plan, char* workspace) {
  const Workspace space = workspace_of(job, plan);
  Chain chain = job.chain;
  chain.weights = workspace + space.weights;
  chain.ring = workspace + space.ring;
  chain.partials = job.stats ? reinterpret_cast<double*>(workspace + space.partials) : nullptr;
  chain.offsets = job.offsets ? reinterpret_cast<int64_t*>(workspace + space.offsets) : nullptr;
  if (!job.offsets && chain.backward_in_time) {
    for (Rows* rows : {&chain.input, &chain.states, &chain.output}) {
      rows->data += (chain.T - 1) * rows->time_stride;
      rows->time_stride = -rows->time_stride;
    }
  }
  chain.members = plan.members;
  chain.groups = plan.groups;
  chain.tiles = plan.tiles;
  chain.slabs_per_block = plan.slabs_per_block;
  chain.k_parts = plan.k_parts;
  chain.chunks = plan.chunks;
  chain.chunks_per_warp = plan.chunks_per_warp;
  chain.state_chunks = plan.state_chunks;
  return chain;
}

void for_each_launch(const Job& job, const Plan& plan, Chain& chain, const std::function<void()>& launch) {
  const int steps = job.backward ? chain.T + 1 : chain.T;  // the backward chain ends with grad_h0
  chain.first_step = 0;
  chain.last_step = steps;
  chain.last_input = chain.T;
  chain.sends_initial = !job.backward;
  if (plan.regime != kStep) {
    launch();
    return;
  }
  if (!job.backward) {  // h0 alone
    chain.last_step = chain.last_input = 0;
    launch();
    chain.sends_initial = false;
    chain.sent = 1;
  }
  for (int step = 0; step < steps; ++step) {
    chain.first_step = step;
    chain.last_step = step + 1;
    chain.last_input = std::min(step + 1, chain.T);
    launch();
    ++chain.sent;
  }
}

}  // namespace rnnkern::cuda
