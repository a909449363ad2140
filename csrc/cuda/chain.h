// What a kernel is given: plain numbers and pointers, filled in by the host.
#pragma once

#include <cstdint>

namespace rnnkern::cuda {

// How the state gets from the blocks that compute it to those that need it.
//   kLocal    one block holds all of W, and the state stays in its shared memory
//   kCluster  the blocks of a cluster hold W, and push the state into each other's shared memory
//   kGrid     blocks anywhere hold W, and the state goes through a ring in global memory
//   kStep     nobody holds W: a launch per step, each reads W anew, and the state goes through global memory
enum Regime : int { kLocal, kCluster, kGrid, kStep };

// Rows of H values: (T, B, H) or packed (N, H); strides in bytes, the values of a row side by side. Of a dense tensor
// `data` is row 0 of the first step in processing order, and time_stride leads to the next; of a packed one, row 0 of all.
struct Rows {
  char* data;
  int64_t time_stride, row_stride;
};

struct Chain {
  const char* weights;     // W (or its transpose), packed by pack.cu: slab by slab, chunk by chunk
  Rows input;              // forward: z;  backward: grad_h
  Rows states;             // backward: h
  Rows output;             // forward: h;  backward: delta
  Rows initial;            // (B, H): forward h0;  backward grad_hn, or null for zeros
  Rows final_;             // (B, H): backward grad_h0
  const int64_t* offsets;  // (T + 1): the first row of each step of a packed sequence; null where every step has B rows
  double* partials;        // (T, members x slabs_per_block, 3, B): what each slab adds to the statistics, or null
  char* ring;              // kGrid: groups x kRingSlots states;  kStep: 2 x tiles states
  unsigned long long* error;  // a word of the host's: what ran out of patience, or 0
  int64_t patience;           // of a wait, in nanoseconds
  int T, B, H;                // H is a multiple of 4 and every row begins at a multiple of 16 bytes, or of four units
  int hidden_size;            // units of those H that w_hh has
  int first_step, last_step;  // [first, last) of T (backward: of T + 1) in processing order; all but in kStep
  int last_input;             // the same for the inputs: at most T
  bool sends_initial;         // forward: begins with h0, and not with a state that an earlier launch has sent
  int sent;                   // kStep: states sent by earlier launches
  bool backward_in_time;      // the first step in processing order is the last in time
  bool relu;
  double clip;
  // How the work is divided. A group of `members` blocks walks the chain for its rows; a block of
  // slabs_per_block x k_parts warps holds slabs_per_block slabs of W, each divided among k_parts warps by chunks of k.
  int members, groups, tiles;  // tiles: of 8 NT rows, dealt out to the groups
  int slabs_per_block, k_parts;
  int chunks, chunks_per_warp;  // chunks of k in all, and of one warp
  int state_chunks;             // that a stored state has room for
};

constexpr int kRingSlots = 32;  // states in the ring of a group
constexpr int kStages = 4;      // steps whose inputs are on their way or in use

}  // namespace rnnkern::cuda
