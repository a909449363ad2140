#include "cuda/plan.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "cuda/layout.h"

namespace rnnkern::cuda {
namespace {

constexpr int kWarps = 8;  // of a block: the registers of a multiprocessor, 255 for each thread

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The instances that are compiled (instances.cuh). Multiply-adds need registers for more than W.
int registers_for(Kind kind, int chunks_per_warp) {
  return chunks_per_warp <= 2 ? 2 : chunks_per_warp <= 4 ? 4 : tensor_cores(kind) ? 8 : 6;
}

// What follows from the rest of a plan; whether its blocks fit.
bool fits(Plan& plan, const Device& device, Kind kind, bool backward) {
  plan.state_chunks =
      plan.regime == kLocal || plan.regime == kCluster ? std::max(plan.chunks, plan.KC * plan.k_parts) : plan.chunks;
  plan.shared_bytes = layout_of(plan, kind, backward).total;
  return plan.shared_bytes <= device.shared_bytes;
}

// One block holds W; blocks share nothing, so there may be more of them than multiprocessors.
std::optional<Plan> local_plan(const Device& device, Kind kind, int B, int H, bool backward) {
  Plan plan{};
  plan.regime = kLocal;
  plan.slabs_per_block = ceil_div(H, kSlab);
  if (plan.slabs_per_block > kWarps) return {};
  plan.chunks = ceil_div(H * bytes_of(kind), kChunkBytes);
  plan.k_parts = 1;
  // Tensor cores are fast enough for all k of a slab; else all the warps that there may be.
  while (!tensor_cores(kind) && 2 * plan.k_parts * plan.slabs_per_block <= kWarps) plan.k_parts *= 2;
  plan.chunks_per_warp = ceil_div(plan.chunks, plan.k_parts);
  plan.KC = registers_for(kind, plan.chunks_per_warp);
  plan.members = 1;
  plan.NT = bytes_of(kind) == 2 && ceil_div(B, kRows) > device.multiprocessors ? 2 : 1;
  if (plan.NT == 2 && !fits(plan, device, kind, backward)) plan.NT = 1;
  plan.groups = plan.tiles = ceil_div(B, kRows * plan.NT);
  if (!fits(plan, device, kind, backward)) return {};
  return plan;
}

// The blocks of a cluster hold W in their registers; clusters share nothing, so there may be more than run at once.
// The largest cluster that leaves room for all tiles to run side by side has the shortest step; where none does, the
// smallest has the most room.
std::optional<Plan> cluster_plan(const Device& device, Kind kind, int B, int H, bool backward) {
  const int slabs = ceil_div(H, kSlab), tiles = ceil_div(B, kRows);
  std::optional<Plan> best;
  for (int i = 0; i < 3; ++i) {
    Plan plan{};
    plan.regime = kCluster;
    plan.members = 2 << i;
    plan.slabs_per_block = ceil_div(slabs, plan.members);
    if (plan.slabs_per_block > 4 || plan.members > slabs || device.clusters[i] == 0) continue;
    plan.k_parts = plan.slabs_per_block == 1 ? 8 : plan.slabs_per_block == 2 ? 4 : 2;
    plan.chunks = ceil_div(H * bytes_of(kind), kChunkBytes);
    plan.chunks_per_warp = ceil_div(plan.chunks, plan.k_parts);
    plan.KC = registers_for(kind, plan.chunks_per_warp);
    if (plan.chunks_per_warp > plan.KC) continue;
    const bool side_by_side = tiles <= device.clusters[i];
    if (best && !side_by_side) break;
    plan.NT = side_by_side ? 1 : 2;
    plan.groups = plan.tiles = ceil_div(B, kRows * plan.NT);
    if (fits(plan, device, kind, backward)) best = plan;
  }
  return best;
}

// Each block holds one slab, k divided among its warps; as many groups as can run at once.
std::optional<Plan> grid_plan(const Device& device, Kind kind, int B, int H, bool backward) {
  if (!device.cooperative) return {};
  Plan plan{};
  plan.regime = kGrid;
  plan.slabs_per_block = 1;
  plan.members = ceil_div(H, kSlab);
  if (plan.members > device.multiprocessors) return {};
  plan.chunks = ceil_div(H * bytes_of(kind), kChunkBytes);
  plan.k_parts = kWarps;
  plan.chunks_per_warp = ceil_div(plan.chunks, plan.k_parts);
  plan.KC = registers_for(kind, plan.chunks_per_warp);
  const int tiles = ceil_div(B, kRows);
  plan.groups = std::min(device.multiprocessors / plan.members, tiles);
  const int per_group = ceil_div(tiles, plan.groups);
  const int most = tensor_cores(kind) ? 4 : 2;
  for (plan.NT = std::min(most, per_group > 2 ? 4 : per_group); plan.NT > 0; plan.NT /= 2) {
    plan.tiles = ceil_div(B, kRows * plan.NT);
    plan.groups = std::min(plan.groups, plan.tiles);
    if (fits(plan, device, kind, backward)) return plan;
  }
  return {};
}

Plan step_plan(const Device& device, Kind kind, int B, int H, bool backward) {
  Plan plan{};
  plan.regime = kStep;
  plan.slabs_per_block = 1;
  plan.members = ceil_div(H, kSlab);
  plan.chunks = ceil_div(H * bytes_of(kind), kChunkBytes);
  plan.k_parts = kWarps;
  plan.chunks_per_warp = ceil_div(plan.chunks, plan.k_parts);
  plan.KC = 0;
  for (plan.NT = B > kRows ? 4 : 1; plan.NT > 0; plan.NT -= 3) {
    plan.groups = plan.tiles = ceil_div(B, kRows * plan.NT);
    if (fits(plan, device, kind, backward)) return plan;
  }
  throw std::runtime_error("a block of this device has too little shared memory");
}

}  // namespace

std::string name_of(Regime regime) {
  switch (regime) {
    case kLocal:
      return "cta";
    case kCluster:
      return "cluster";
    case kGrid:
      return "grid";
    default:
      return "step";
  }
}

Plan make_plan(const Device& device, Kind kind, int B, int H, bool backward, int asked) {
  const bool persistent = kind != kFloat64;
  const auto may = [&](Regime regime) { return (asked == -1 || asked == regime) && (persistent || regime == kStep); };
  const auto local = may(kLocal) ? local_plan(device, kind, B, H, backward) : std::nullopt;
  const auto cluster = may(kCluster) ? cluster_plan(device, kind, B, H, backward) : std::nullopt;
  // Measured on an H100 (benchmarks/results/h100): one block is best up to H = 128 and, without tensor cores, 64. Beyond,
  // it is best only where clusters would have to take turns and its registers hold W.
  if (local && (!cluster || H <= (tensor_cores(kind) ? 128 : 64))) {
    if (asked == kLocal || local->chunks_per_warp <= local->KC) return *local;
  }
  if (local && local->chunks_per_warp <= local->KC && cluster && cluster->NT > 1) return *local;
  // Multiply-adds want more multiprocessors for a row than a cluster has.
  if (cluster && (asked == kCluster || tensor_cores(kind) || H <= 256)) return *cluster;
  if (const auto plan = may(kGrid) ? grid_plan(device, kind, B, H, backward) : std::nullopt) return *plan;
  if (local) return *local;
  if (may(kStep)) return step_plan(device, kind, B, H, backward);
  throw std::runtime_error(
      "the regime '" + name_of(static_cast<Regime>(asked)) + "' cannot serve H = " + std::to_string(H) +
      " in this dtype on this device");
}

}  // namespace rnnkern::cuda
