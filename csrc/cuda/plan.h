// Which regime serves a call, and how the work is divided: plain arithmetic, the same on every machine.
#pragma once

#include <string>

#include "cuda/chain.h"

namespace rnnkern::cuda {

enum Kind : int { kBFloat16, kFloat16, kTensorFloat32, kFloat32, kFloat64 };

inline int bytes_of(Kind kind) { return kind == kFloat64 ? 8 : kind <= kFloat16 ? 2 : 4; }
inline bool tensor_cores(Kind kind) { return kind <= kTensorFloat32; }

// What the ladder asks of a device.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  bool cooperative;  // can launch a grid whose blocks all run at once
  int clusters[3];   // of 2, 4, 8 blocks with a multiprocessor each: how many run at once
};

struct Plan {
  Regime regime;
  int KC, NT;  // the kernel's instance: chunks of W in a warp's registers, tiles of 8 rows at a time
  int slabs_per_block, k_parts, chunks, chunks_per_warp, state_chunks;
  int members, groups, tiles;
  int shared_bytes;
  int blocks() const { return members * groups; }
  int threads() const { return 32 * slabs_per_block * k_parts; }
};

// `asked`: -1 for the best regime, else that one; where that cannot serve, std::runtime_error says why.
Plan make_plan(const Device&, Kind, int B, int H, bool backward, int asked);

std::string name_of(Regime);

}  // namespace rnnkern::cuda
