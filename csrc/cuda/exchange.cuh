// How the state of a step gets from the warps that compute it to those that multiply it, one way per regime.
//
// A state (8 NT rows x the group's units) is stored chunk by chunk as product.cuh reads it: chunk c of the tile nt lies at
// (c NT + nt) x 512 bytes. States are counted from 0 over all tiles of a group; step after step, every block sends its
// units of state n, and receives what it needs of it before it sends any of state n + 1. So who has received all of
// state n knows that everybody has received all of state n - 1.
//
// Shared memory (kLocal): two buffers in turn, one barrier per state.
//
// Other blocks' shared memory (kCluster): two buffers in turn in every block. Whoever has computed four units of a row
// stores them into the buffers of all blocks of the cluster. Each store is counted, in bytes, by a barrier beside the buffer
// that it goes to, and a state is there when all its bytes are. A buffer is free when it is written again: who sends
// state n + 2 has received all of n + 1, and every block sent its part of that after all its warps had read state n.
//
// Global memory (kGrid): a ring of kRingSlots states that begins as all ones. The data is its own flag: a word that is
// still all ones has not been written, as no state holds that NaN. Accesses are relaxed at gpu scope, word by word; nothing
// else has to be ordered, but for one thing: a slot must be all ones again before it is used anew. The thread that wrote
// it resets it half a ring later, when every reader is long done, and the reset must be seen before the slot's next turn,
// again half a ring later. Every kFenceEvery states the writer fences after its resets and a reader before its reads:
// resets while receiving 8k .. 8k+7 -> writer's fence -> data of state 8k+9 -> reader's fence -> its look at 8k+16.
//
// Global memory, one launch per step (kStep): two buffers in turn.
//
// Every wait ends after a.patience nanoseconds: the block tells the host where it stood and leaves. The others then wait
// in vain for what it would have sent, and leave in the same way.
#pragma once

#include "cuda/chain.h"
#include "cuda/product.cuh"

namespace rnnkern::cuda {

constexpr int kFenceEvery = 8;
static_assert(kRingSlots == 4 * kFenceEvery && (kRingSlots & (kRingSlots - 1)) == 0);

template <class P, Regime R, int NT>
struct Exchange {
  const Chain& a;
  const int warp, lane, group;
  char* const
      shared;  // kLocal, kCluster: the two states;  else: two chunks per warp, where the product needs s in shared memory
  char* ring;  // kGrid, kStep: this group's, or this tile's
  const int state_bytes;
  const int own;               // where this lane's units of its first row lie in a state
  const uint32_t state_here;   // kLocal, kCluster: the address of `shared`
  const bool read_by_someone;  // units beyond the last chunk are padding
  int sent = 0;                // states
  uint64_t* const arrivals;    // kCluster: a barrier for each buffer
  int received = 0;            // the number of the latest state that the product has taken
  int turn = 0;                // of a warp's two chunks

  RNNKERN_INLINE Exchange(
      const Chain& chain, int group_, int warp_, int lane_, int unit, char* shared_memory, char* barriers)
      : a(chain),
        warp(warp_),
        lane(lane_),
        group(group_),
        shared(shared_memory),
        ring(chain.ring),
        state_bytes(chain.state_chunks * NT * kTileBytes),
        own(offset_of(unit, lane_ & 3)),
        state_here(ptx::kept(ptx::shared_address(shared_memory))),
        arrivals(reinterpret_cast<uint64_t*>(barriers)),
        read_by_someone(own < chain.chunks * NT * kTileBytes) {}

  // n: the state's number.
  RNNKERN_INLINE char* slot(int n) const {
    if constexpr (R == kLocal || R == kCluster) return shared + (n & 1) * state_bytes;
    if constexpr (R == kStep) return ring + (n & 1) * state_bytes;
    return ring + (n & (kRingSlots - 1)) * static_cast<int64_t>(state_bytes);
  }
  // Where four units lie in a state, for the row at the q-th place of its first tile.
  static RNNKERN_INLINE int offset_of(int unit, int q) {
    const int byte = unit * static_cast<int>(sizeof(typename P::Storage));
    return byte / kChunkBytes * NT * kTileBytes + q * kChunkBytes + byte % kChunkBytes;
  }
  static RNNKERN_INLINE int in_state(int j) { return (j >> 1) * kTileBytes + (j & 1) * 4 * kChunkBytes; }
  // The slab's item j of this lane: row 2q + j % 2 of tile j / 2.
  RNNKERN_INLINE char* item(int n, int j) const { return slot(n) + own + in_state(j); }

  RNNKERN_INLINE void begin() {
    if constexpr (R == kLocal || R == kCluster) {
      for (int i = ptx::thread(); i < 2 * state_bytes / 16; i += ptx::threads()) {
        reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
      }
      ptx::sync_block();
    }
#if RNNKERN_HAS_CLUSTERS
    if constexpr (R == kCluster) {
      if (ptx::thread() < 2) {
        flag(ptx::thread()) = 0;
        ptx::barrier_init(arrivals + ptx::thread(), 1);
        ptx::barrier_expect(arrivals + ptx::thread(), sent_bytes());
      }
      ptx::sync_cluster();
    }
#endif
    if constexpr (R == kGrid) ring += static_cast<int64_t>(group) * kRingSlots * state_bytes;
  }
  RNNKERN_INLINE void begin_tile(int tile) {
    if constexpr (R == kStep) {
      ring = a.ring + static_cast<int64_t>(tile) * 2 * state_bytes;
      sent = a.sent;
    }
  }

  // Nobody leaves while others may still write into its shared memory.
  RNNKERN_INLINE void end() {
#if RNNKERN_HAS_CLUSTERS
    if constexpr (R == kCluster) {
      ptx::sync_cluster();
    }
#endif
  }
  RNNKERN_INLINE int sent_bytes() const { return a.chunks * NT * kTileBytes; }  // of a state, by all blocks
  // Raised by a warp that has waited in vain; of two, as a fast warp may be one product ahead.
  RNNKERN_INLINE volatile int& flag(int which) const { return reinterpret_cast<int*>(arrivals + 2)[which & 1]; }

  // ---- Sending --------------------------------------------------------------------------------------------------------

  RNNKERN_INLINE void send(int j, const typename P::Quad& quad) {
    if (!read_by_someone) return;
    if constexpr (R == kGrid) {
      ptx::store_relaxed(item(sent, j), quad);
    } else if constexpr (R == kCluster) {
#if RNNKERN_HAS_CLUSTERS
      const uint32_t here = state_here + (sent & 1) * state_bytes + own + in_state(j);
      const uint32_t barrier = ptx::shared_address(arrivals + (sent & 1));
      for (int rank = 0; rank < a.members; ++rank) {
        ptx::store_remote(ptx::address_in(here, rank), quad, ptx::address_in(barrier, rank));
      }
#endif
    } else if constexpr (R == kLocal) {
      ptx::store_shared(state_here + (sent & 1) * state_bytes + own + in_state(j), quad);
    } else {
      *reinterpret_cast<typename P::Quad*>(item(sent, j)) = quad;
    }
  }
  // After all items of a state have been sent.
  RNNKERN_INLINE void published() {
    ++sent;
    if constexpr (R == kLocal) ptx::sync_block();
  }
  // Resets one item of the state half a ring before the one that this block has just received.
  RNNKERN_INLINE void reset(int j) {
    if constexpr (R == kGrid) {
      const int old = received - kRingSlots / 2;
      if (old < 0 || !read_by_someone) return;
      typename P::Quad ones;
      memset(&ones, 0xff, sizeof ones);
      ptx::store_relaxed(item(old, j), ones);
    }
  }
  // After all items have been reset.
  RNNKERN_INLINE void after_resets() {
    if constexpr (R == kGrid) {
      if (received % kFenceEvery == kFenceEvery - 1) ptx::fence_gpu();
    }
  }

  // ---- Receiving ------------------------------------------------------------------------------------------------------

  // A lane's part of N chunks.
  template <int N>
  struct Arrival {
    uint4 v[N];
  };

  static RNNKERN_INLINE bool missing(uint4 v) { return max(max(v.x, v.y), max(v.z, v.w)) == 0xffffffffu; }

  // Chunks first .. first + count (at most N, the others are zeros) of the latest state. False if they never came.
  template <int N>
  RNNKERN_INLINE bool receive(Arrival<N>& arrival, int nt, int first, int count) {
    const int place = (first * NT + nt) * kTileBytes + place_of_row(lane >> 2) * kChunkBytes + 16 * (lane & 3);
    const char* const from = slot(received) + place;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      const char* const chunk = from + c * NT * kTileBytes;
      // In shared memory there is room for all chunks of all registers, and what no block sends is zeros.
      if (!P::kStateInShared && (R == kLocal || R == kCluster)) {
        arrival.v[c] = ptx::load_shared16(state_here + (received & 1) * state_bytes + place + c * NT * kTileBytes);
        continue;
      }
      arrival.v[c] = uint4{0, 0, 0, 0};
      if (c < count) {
        if constexpr (R == kGrid) {
          arrival.v[c] = ptx::load_relaxed(chunk);
        } else if constexpr (R == kStep) {
          arrival.v[c] = *reinterpret_cast<const uint4*>(chunk);
        }
      }
    }
    if constexpr (R == kGrid) {
#pragma unroll
      for (int c = 0; c < N; ++c) {
        if (!ptx::any(missing(arrival.v[c]))) continue;
        if (!wait(arrival.v[c], from + c * NT * kTileBytes)) return false;
      }
    }
    return true;
  }

  // Until the chunk is there. After the deadline comes one more look: the clock goes on while a debugger or a sleeping
  // machine halts the GPU.
  RNNKERN_INLINE bool wait(uint4& v, const char* chunk) const {
    if (a.patience < 0) return false;
    const long long deadline = ptx::nanoseconds() + a.patience;
    for (bool late = false; !late;) {
      late = ptx::any(ptx::nanoseconds() > deadline);
      v = ptx::load_relaxed(chunk);
      if (!ptx::any(missing(v))) return true;
    }
    return false;
  }

  // Before the first receive of the latest state.
  RNNKERN_INLINE bool before_receive() {
    received = sent - 1;
    if constexpr (R == kGrid) {
      if (received % kFenceEvery == 0) ptx::fence_gpu();
    }
#if RNNKERN_HAS_CLUSTERS
    if constexpr (R == kCluster) {
      uint64_t* const barrier = arrivals + (received & 1);
      const int parity = received >> 1 & 1;
      if (!ptx::barrier_test(barrier, parity)) {
        if (a.patience < 0) return false;
        const long long deadline = ptx::nanoseconds() + a.patience;
        bool late = false;
        while (!ptx::barrier_done(barrier, parity)) {
          if (late) return false;
          late = ptx::nanoseconds() > deadline;
        }
      }
      // The next state of this buffer may begin to arrive before it is announced here: its phase waits for this arrival.
      if (ptx::thread() == 0) ptx::barrier_expect(barrier, sent_bytes());
    }
#endif
    return true;
  }

  // What the product needs of chunk c: the lane's vector, or the chunk's address in shared memory.
  template <int N>
  RNNKERN_INLINE auto operand(const Arrival<N>& arrival, int c, int nt, int first) {
    if constexpr (!P::kStateInShared) {
      return arrival.v[c];
    } else if constexpr (R == kLocal || R == kCluster) {
      return static_cast<const char*>(slot(received) + ((first + c) * NT + nt) * kTileBytes);
    } else {
      char* const chunk = shared + (2 * warp + turn) * kTileBytes;
      turn ^= 1;
      *reinterpret_cast<uint4*>(chunk + place_of_row(lane >> 2) * kChunkBytes + 16 * (lane & 3)) = arrival.v[c];
      ptx::sync_warp();
      return static_cast<const char*>(chunk);
    }
  }

  RNNKERN_INLINE void give_up(int step) const {
    if (lane == 0) {
      ptx::tell_host(
          a.error, static_cast<unsigned long long>(R + 1) << 56 |
                       static_cast<unsigned long long>(ptx::block() & 0xffffff) << 32 |
                       static_cast<unsigned long long>(step));
    }
  }
};

}  // namespace rnnkern::cuda
