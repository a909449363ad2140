// The recurrence and its backward chain: one body for every dtype and regime.
//
//   forward    a_t = z_t + h_{t-1} W',  h_t = f(a_t)                               state s: h
//   backward   r_t = delta_{t+1} W,  g_t = e_t + r_t,  delta_t = clamp(g_t) f'(h_t)  state s: delta
//
// Both are: product of the state with a matrix held by the group, a few operations on each sum, the next state. What a
// block owns, and what the lanes hold, stands in chain.h and product.cuh. A step of a warp:
//
//   1. its chunks of the state arrive (exchange.cuh) and are multiplied with its part of W, which never moves;
//   2. where k is divided, the warps of a slab add their sums through shared memory, in a fixed order;
//   3. each warp takes some of the slab's items. An item is four adjacent units of one row: it adds the input, applies
//      the cell, sends the state to all who need it, and only then stores the output and sums the statistics.
//
// Inputs are copied to shared memory kStages - 1 steps ahead, by the thread that will use them.
//
// A row that step t does not have (packed sequences) keeps what it holds: forward h0 until its sequence begins; backward
// grad_hn until then, and grad_h0 is written when its sequence ends.
#pragma once

#include "cuda/chain.h"
#include "cuda/exchange.cuh"
#include "cuda/product.cuh"
#include "cuda/squares.cuh"

namespace rnnkern::cuda {

// The kernels are instances of this. KC: chunks of W that a warp keeps in registers, the others lie in shared memory.
template <class P, Regime R, bool kBackward, int KC, int NT>
struct ChainKernel {
  using Sum = typename P::Sum;
  using Storage = typename P::Storage;
  using Quad = typename P::Quad;
  static constexpr int kInputs = kBackward ? 2 : 1;
  static constexpr int kQuad = sizeof(Quad);
  static constexpr int kSlabItems = 2 * NT;  // of a lane's units, over all rows of the tile
  // k_parts where it is known: in one block tensor cores do with one warp per slab; a grid spreads W as far as it can.
  // Else 0; in a cluster at least 2.
  static constexpr int kParts = R == kGrid || R == kStep ? 8 : R == kLocal && !P::kStateInShared ? 1 : 0;
  static constexpr int kItems = items_per_lane(R, NT);
  // Steps that inputs are staged ahead. Where another warp reads them too, a slot rests for a step before it is reused.
  static constexpr int kAhead = R == kLocal ? kStages : kStages - 2;
  static constexpr int kBatch = R == kStep ? 4 : 1;  // chunks received at a time, beyond those in registers

  // Whether a warp can have more chunks than its registers hold (plan.cpp).
  static constexpr bool kBeyond = R == kStep || (KC == P::kMostChunks && (R != kLocal || sizeof(Storage) == 4));

  struct alignas(16) Values {
    Sum v[4];
  };

  const Chain& a;
  const Layout layout;
  char* const shared;
  const int lane, warp, g, q;
  const uint32_t staged_here;
  const int slab_in_block, k_part, slab, unit, group;
  const bool inside;  // these units are in the rows
  const int first_chunk, chunk_count;
  int products = 0;  // so far
  // Of the tile that is walked: the lane's first row, and its units there, in the step that is staged or stored next.
  int first_row;
  char *input, *states, *output;
  int rows_now, rows_before;  // of this step and of the one before
  // The latest outputs, not yet stored.
  Quad finished[kItems];
  uint4 registers[KC > 0 ? KC : 1][2][2];
  Exchange<P, R, NT> exchange;

  RNNKERN_INLINE ChainKernel(const Chain& chain, char* shared_memory)
      : a(chain),
        layout(make_layout(
            R, chain.slabs_per_block, chain.k_parts, chain.state_chunks, chain.chunks_per_warp, KC, NT, sizeof(Storage),
            sizeof(Sum) == 8, P::kStateInShared, kBackward)),
        shared(shared_memory),
        lane(ptx::thread() & 31),
        warp(ptx::thread() >> 5),
        g(lane >> 2),
        q(lane & 3),
        staged_here(
            ptx::kept(
                ptx::shared_address(shared_memory) + layout.staged +
                (warp * kStages * kInputs * kItems * 32 + lane) * kQuad)),
        slab_in_block(warp % chain.slabs_per_block),
        k_part(kParts == 1 ? 0 : warp / chain.slabs_per_block),
        slab(ptx::block() % chain.members * chain.slabs_per_block + slab_in_block),
        unit(slab * kSlab + 4 * g),
        group(ptx::block() / chain.members),
        inside(unit < chain.H),
        first_chunk(k_part * chain.chunks_per_warp),
        chunk_count(max(0, min(chain.chunks_per_warp, chain.chunks - first_chunk))),
        exchange(chain, group, warp, lane, unit, shared_memory + layout.state, shared_memory + layout.arrivals) {}

  RNNKERN_INLINE int k_parts() const { return kParts > 0 ? kParts : a.k_parts; }
  // Whether sums go through shared memory.
  RNNKERN_INLINE bool divided() const { return R != kLocal || k_parts() > 1; }

#include "cuda/rows.inc"

  // ---- The product ----------------------------------------------------------------------------------------------------

  RNNKERN_INLINE const char* packed_chunk(int chunk) const {
    return a.weights + (static_cast<int64_t>(slab) * a.chunks + first_chunk + chunk) * kPackedBytes + 16 * lane;
  }
  static RNNKERN_INLINE void load_weights(Weights& w, const char* from) {
#pragma unroll
    for (int v = 0; v < 4; ++v) w[v >> 1][v & 1] = *reinterpret_cast<const uint4*>(from + v * kTileBytes);
  }
  RNNKERN_INLINE char* kept_chunk(int chunk) const {  // in shared memory, beyond the registers
    return shared + layout.weights + (warp * (a.chunks_per_warp - KC) + chunk - KC) * kPackedBytes + 16 * lane;
  }

  RNNKERN_INLINE void keep_weights() {
#pragma unroll
    for (int c = 0; c < KC; ++c) {
#pragma unroll
      for (int v = 0; v < 4; ++v) registers[c][v >> 1][v & 1] = uint4{0, 0, 0, 0};
      if (c < chunk_count) load_weights(registers[c], packed_chunk(c));
    }
    if constexpr (kBeyond && R != kStep) {
      for (int c = KC; c < chunk_count; ++c) {  // written and read by the same lane
        Weights w;
        load_weights(w, packed_chunk(c));
#pragma unroll
        for (int v = 0; v < 4; ++v) *reinterpret_cast<uint4*>(kept_chunk(c) + v * kTileBytes) = w[v >> 1][v & 1];
      }
    }
  }

  // Where the warps of a slab find the sums of one of its parts.
  RNNKERN_INLINE Values* reduced(int part, int j) const {
    const int buffer = R == kStep ? 0 : products & 1;  // of two: a fast warp may be one product ahead of the others
    return reinterpret_cast<Values*>(shared + layout.reduced) +
           (((buffer * k_parts() + part) * a.slabs_per_block + slab_in_block) * kSlabItems + j) * 32 + lane;
  }

  // Item j's four units among a tile's sums.
  static RNNKERN_INLINE Values pick(const Sum (&sum)[2][4], int j) {
    return {{sum[0][j & 1], sum[0][2 + (j & 1)], sum[1][j & 1], sum[1][2 + (j & 1)]}};
  }

  // This warp's part of W s: in `items` where it is the whole, else in shared memory. Calls meanwhile() where there is
  // time for it. False if the state did not come.
  template <class Meanwhile>
  RNNKERN_INLINE bool product(Values (&items)[kItems], const Meanwhile& meanwhile) {
    if (R != kLocal) meanwhile();
    if (!exchange.before_receive()) return false;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      typename P::Partial partial;
      if constexpr (KC > 0) {
        typename Exchange<P, R, NT>::template Arrival<KC> arrival;
        if (!exchange.template receive<KC>(arrival, nt, first_chunk, chunk_count)) return false;
        if (R == kLocal && nt == 0) meanwhile();
#pragma unroll
        for (int c = 0; c < KC; ++c) {
          // No such chunk. Tensor cores multiply zeros by zeros; but in a cluster it is a neighbour's, which may be infinite.
          if ((P::kStateInShared || R == kCluster) && c >= chunk_count) continue;
          P::add(partial, registers[c], exchange.operand(arrival, c, nt, first_chunk));
        }
      }
      for (int c = KC; kBeyond && c < chunk_count; c += kBatch) {
        typename Exchange<P, R, NT>::template Arrival<kBatch> arrival;
        if (!exchange.template receive<kBatch>(arrival, nt, first_chunk + c, chunk_count - c)) return false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (c + i >= chunk_count) break;
          Weights w;
          load_weights(w, R == kStep ? packed_chunk(c + i) : kept_chunk(c + i));
          P::add(partial, w, exchange.operand(arrival, i, nt, first_chunk + c));
        }
      }
      Sum sum[2][4];
      P::finish(partial, sum);
#pragma unroll
      for (int j = 2 * nt; j < 2 * nt + 2; ++j) {
        if (divided()) {
          *reduced(k_part, j) = pick(sum, j);
        } else if (kItems == kSlabItems) {
          items[j % kItems] = pick(sum, j);
        }
      }
    }
    return true;
  }

  // An item's sums, with 0 for units that do not exist, which are zeros everywhere and stay it: 0 times an infinite state is NaN.
  RNNKERN_INLINE Values of_units(Values sums) const {
    const int existing = a.hidden_size - unit;
    if (existing < 4) {
#pragma unroll
      for (int u = 0; u < 4; ++u) sums.v[u] = u < existing ? sums.v[u] : Sum(0);
    }
    return sums;
  }

  // Adds the parts of the slab's item j, in order.
  RNNKERN_INLINE Values add_parts(int j) const {
    Values sum = *reduced(0, j);
#pragma unroll
    for (int part = 1; part < (kParts > 0 ? kParts : 8); ++part) {
      if (kParts == 0 && part >= k_parts()) break;
      const Values more = *reduced(part, j);
#pragma unroll
      for (int u = 0; u < 4; ++u) sum.v[u] += more.v[u];
    }
    return sum;
  }

  // ---- A step ---------------------------------------------------------------------------------------------------------

  struct Gradients {
    Values r, delta;
    Quad arrived;  // e, in as few registers as its storage takes; g = e + r is added up once more where it is asked for
    bool has;
  };

  // All items together: their chains of operations do not wait for each other.
  RNNKERN_INLINE void forward_items(int step, const Quad (&inputs)[kItems][kInputs], const Values (&sums)[kItems]) {
    Values h[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      unpack(h[i].v, inputs[i][0]);
#pragma unroll
      for (int u = 0; u < 4; ++u) h[i].v[u] += sums[i].v[u];
    }
    if (a.relu) {
#pragma unroll
      for (int k = 0; k < 4 * kItems; ++k) h[k >> 2].v[k & 3] = Relu::f(h[k >> 2].v[k & 3]);
    } else {
#pragma unroll
      for (int k = 0; k < 4 * kItems; ++k) h[k >> 2].v[k & 3] = P::tanh(h[k >> 2].v[k & 3]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has_item(i)) break;
      if (a.offsets && row_of(i) >= rows_now) load_initial(h[i].v, row_of(i));
      if (step + 1 < a.T) send(i, h[i].v);
      finished[i] = rounded(h[i].v);
    }
  }

  RNNKERN_INLINE Gradients gradients_of(int row, const Quad (&inputs)[kInputs], const Values& sum) const {
    Gradients gradients;
    Sum e[4], h[4];
    gradients.arrived = inputs[0];
    unpack(e, inputs[0]);
    unpack(h, inputs[kInputs - 1]);
    gradients.has = row < rows_now;
    gradients.r = sum;
    if (row >= rows_before) load_initial(gradients.r.v, row);
    const Sum limit = static_cast<Sum>(a.clip);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Sum x = e[u] + gradients.r.v[u];
      const Sum clamped = x > limit ? limit : x < -limit ? -limit : x;  // NaN stays NaN
      const Sum delta = a.relu ? Relu::times_derivative(clamped, h[u]) : Tanh::times_derivative(clamped, h[u]);
      gradients.delta.v[u] = gradients.has ? delta : Sum(0);
    }
    return gradients;
  }

  RNNKERN_INLINE void backward_item(int step, int i, const Gradients& gradients) {
    const int row = row_of(i);
    if (step < a.T) send(i, gradients.delta.v);
    finished[i] = rounded(gradients.delta.v);
    if (row < rows_before && !gradients.has && inside) {  // grad_h0
      *reinterpret_cast<Quad*>(a.final_.data + row * a.final_.row_stride + unit * sizeof(Storage)) =
          rounded(gradients.r.v);
    }
  }

  // Where half of a slab's warps have no item, they sum the statistics of the others' items, and nobody waits for that.
  RNNKERN_INLINE bool has_helpers() const { return divided() && R != kLocal && k_parts() >= 2 * kSlabItems; }

  RNNKERN_INLINE void help(int step) const {
    const int j = k_part - kSlabItems;
    if (j < 0 || j >= kSlabItems) return;
    const int distance = (warp - (j * a.slabs_per_block + slab_in_block)) * kStages * kInputs * kItems * 32 * kQuad;
    Quad inputs[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) inputs[k] = staged_quad(staged(step, k, 0) - distance);
    const int row = first_row + row_of_item(j);
    statistics(step, row, gradients_of(row, inputs, of_units(add_parts(j))));
  }

  // Writes a row's sums of squares over the slab's units, as float64: those of small gradients leave float32's range.
  RNNKERN_INLINE void statistics(int step, int row, const Gradients& gradients) const {
    Sum e[4], total[4];
    unpack(e, gradients.arrived);
#pragma unroll
    for (int u = 0; u < 4; ++u) total[u] = e[u] + gradients.r.v[u];
    const double square = sum_of_squares(total, gradients.r.v, gradients.delta.v, e);
    if (g < 4 && row < a.B) {
      const int64_t slabs = a.members * a.slabs_per_block;
      a.partials[((time_of(step) * slabs + slab) * 4 + g) * a.B + row] = gradients.has ? square : 0.0;
    }
  }

  RNNKERN_INLINE bool step(int step, bool multiply) {
    rows_before = rows_now;
    rows_now = step < a.T ? rows_of(step) : 0;
    ptx::wait_copies<kAhead - 1>();
    Quad inputs[kItems][kInputs];
    if (step < a.T) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!has_item(i)) break;
#pragma unroll
        for (int k = 0; k < kInputs; ++k) inputs[i][k] = staged_quad(staged(step, k, i));
      }
    }
    const auto meanwhile = [&] {
      if (step > a.first_step) store_finished(step - 1, rows_before);
      stage(step + kAhead);
    };
    Values sums[kItems] = {};
    if (multiply) {
      if (!product(sums, meanwhile)) {
        exchange.give_up(step);
        if (R != kCluster) return false;
        exchange.flag(products) = 1;
      }
      if (divided()) {
        ptx::sync_block();
        if (R == kCluster && exchange.flag(products) != 0) return false;  // all warps together
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (has_item(i)) sums[i] = of_units(add_parts(slab_item(i)));
        }
        if constexpr (kBackward && R != kLocal) {
          if (a.partials && has_helpers() && step < a.T) help(step);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sums[i] = of_units(sums[i]);
      }
      ++products;
    } else {
      meanwhile();
    }
    Gradients gradients[kBackward ? kItems : 1];
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!has_item(i)) break;
        gradients[i] = gradients_of(row_of(i), inputs[i], sums[i]);
        backward_item(step, i, gradients[i]);
      }
    } else {
      forward_items(step, inputs, sums);
    }
    if (step + (kBackward ? 0 : 1) < a.T) exchange.published();
    if (kBackward && a.partials && step < a.T && !(multiply && has_helpers())) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (has_item(i)) statistics(step, row_of(i), gradients[kBackward ? i : 0]);
      }
    }
    if (multiply) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (has_item(i)) exchange.reset(slab_item(i));
      }
      exchange.after_resets();
    }
    return true;
  }

  RNNKERN_INLINE bool walk(int tile) {
    first_row = tile * NT * kRows + 2 * q;
    const int inside_time = min(a.first_step, a.T - 1);
    input = first_of(a.input, inside_time);
    states = kBackward ? first_of(a.states, inside_time) : nullptr;
    output = first_of(a.output, inside_time);
    rows_now = a.first_step > 0 ? rows_of(a.first_step - 1) : 0;
    // step() lets the kAhead - 1 latest groups fly: those of the steps after its own.
    for (int s = a.first_step; s < a.first_step + kAhead; ++s) stage(s);
    if (!kBackward && a.sends_initial) {  // the state before the first step
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!has_item(i)) break;
        Sum v[4];
        load_initial(v, row_of(i));
        send(i, v);
      }
      exchange.published();
    }
    for (int s = a.first_step; s < a.last_step; ++s) {
      if (!step(s, !kBackward || s > 0)) return false;
    }
    if (a.last_step > a.first_step) store_finished(a.last_step - 1, rows_now);
    return true;
  }

  RNNKERN_INLINE void run() {
    exchange.begin();
    keep_weights();
    for (int tile = group; tile < a.tiles; tile += a.groups) {
      exchange.begin_tile(tile);
      if (!walk(tile)) break;
    }
    exchange.end();
  }
};

}  // namespace rnnkern::cuda
