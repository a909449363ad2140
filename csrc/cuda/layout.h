// Sizes that host and device share: tiles, and where a block's shared memory goes.
#pragma once

#include "cuda/plan.h"

#ifdef __CUDACC__
#define RNNKERN_BOTH __host__ __device__
#else
#define RNNKERN_BOTH
#endif

namespace rnnkern::cuda {

constexpr int kSlab = 32;                        // units of a slab
constexpr int kRows = 8;                         // batch rows of a tile
constexpr int kChunkBytes = 64;                  // of one row of the state
constexpr int kTileBytes = kRows * kChunkBytes;  // a chunk of 8 rows of the state: one 16-byte load of a warp
constexpr int kPackedBytes = 4 * kTileBytes;     // a chunk of a slab of W: four loads of a warp

// Byte offsets into a block's shared memory.
struct Layout {
  int staged;    // inputs: warps x kStages x inputs x items x lanes, of four units
  int reduced;   // unless one warp sums over all k: buffers x warps x items x lanes, of four sums
  int state;     // kLocal, kCluster: two states;  else two chunks per warp, where the product needs them there
  int weights;   // warps x chunks beyond the registers
  int arrivals;  // kCluster: two barriers, two flags
  int total;
};

// Items (four units of a row) that a lane may have at most in a step: plan.cpp chooses k_parts so that these suffice.
RNNKERN_BOTH constexpr int items_per_lane(Regime regime, int NT) {
  return regime == kLocal ? 2 * NT : regime == kCluster ? NT : (2 * NT + 7) / 8;
}

RNNKERN_BOTH constexpr Layout make_layout(
    Regime regime, int slabs_per_block, int k_parts, int state_chunks, int chunks_per_warp, int KC, int NT,
    int value_bytes, bool double_sums, bool state_in_shared, bool backward) {
  const int warps = slabs_per_block * k_parts;
  const int items = items_per_lane(regime, NT);
  const bool through_memory = regime == kGrid || regime == kStep;
  const int beyond = chunks_per_warp > KC && regime != kStep ? chunks_per_warp - KC : 0;
  Layout layout{};
  layout.staged = 0;
  layout.reduced = layout.staged + kStages * (backward ? 2 : 1) * items * warps * 32 * 4 * value_bytes;
  const int buffers = regime == kStep ? 1 : k_parts > 1 || regime != kLocal ? 2 : 0;
  layout.state = layout.reduced + buffers * warps * 2 * NT * 32 * 4 * (double_sums ? 8 : 4);
  layout.weights = layout.state + (!through_memory   ? 2 * state_chunks * NT * kTileBytes
                                   : state_in_shared ? warps * 2 * kTileBytes
                                                     : 0);
  layout.arrivals = layout.weights + warps * beyond * kPackedBytes;
  layout.total = layout.arrivals + (regime == kCluster ? 32 : 0);
  return layout;
}

inline Layout layout_of(const Plan& p, Kind kind, bool backward) {
  return make_layout(
      p.regime, p.slabs_per_block, p.k_parts, p.state_chunks, p.chunks_per_warp, p.KC, p.NT, bytes_of(kind),
      kind == kFloat64, !tensor_cores(kind), backward);
}

}  // namespace rnnkern::cuda
