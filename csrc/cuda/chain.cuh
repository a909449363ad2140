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

namespace rnnkern::cuda {

template <class P>
RNNKERN_INLINE void load_quad(typename P::Sum (&v)[4], const void* memory) {
  const auto quad = *static_cast<const typename P::Quad*>(memory);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = P::load(reinterpret_cast<const typename P::Storage*>(&quad)[i]);
}

// The kernels are instances of this. KC: chunks of W that a warp keeps in registers, the others lie in shared memory.
template <class P, Regime R, bool kBackward, int KC, int NT>
struct ChainKernel {
  using Sum = typename P::Sum;
  using Storage = typename P::Storage;
  using Quad = typename P::Quad;
  static constexpr int kItems = 2 * NT;  // of a lane's units, over all rows of the tile
  static constexpr int kInputs = kBackward ? 2 : 1;
  static constexpr int kKept = R == kLocal ? NT : 1;  // tiles whose sums wait in registers
  static constexpr int kBatch = 4;  // chunks of the state received at a time, beyond the registers

  const Chain& a;
  const Layout layout;
  char* const shared;
  const int lane, warp, g, q;
  const int slab_in_block, k_part, slab, unit, group, member;
  const int first_chunk, chunk_count;
  int products = 0;  // so far
  uint4 registers[KC > 0 ? KC : 1][2][2];
  Exchange<P, R, NT> exchange;

  RNNKERN_INLINE ChainKernel(const Chain& chain, char* shared_memory)
      : a(chain),
        layout(make_layout(R, chain.slabs_per_block, chain.k_parts, chain.chunks, chain.chunks_per_warp, KC, NT,
                           sizeof(Storage), sizeof(Sum) == 8, P::kStateInShared, kBackward)),
        shared(shared_memory),
        lane(ptx::thread() & 31),
        warp(ptx::thread() >> 5),
        g(lane >> 2),
        q(lane & 3),
        slab_in_block(warp % chain.slabs_per_block),
        k_part(warp / chain.slabs_per_block),
        slab(ptx::block() % chain.members * chain.slabs_per_block + slab_in_block),
        unit(slab * kSlab + 4 * g),
        group(ptx::block() / chain.members),
        member(ptx::block() % chain.members),
        first_chunk(k_part * chain.chunks_per_warp),
        chunk_count(max(0, min(chain.chunks_per_warp, chain.chunks - first_chunk))),
        exchange(chain, group, member, warp, lane, shared_memory + layout.state) {}

  // ---- Rows and steps -----------------------------------------------------------------------------------------------

  RNNKERN_INLINE int time_of(int step) const { return a.backward_in_time ? a.T - 1 - step : step; }
  // Rows that a step has; none before the first and after the last.
  RNNKERN_INLINE int rows_of(int step) const {
    if (step < 0 || step >= a.T) return 0;
    if (a.offsets == nullptr) return a.B;
    const int t = time_of(step);
    return static_cast<int>(a.offsets[t + 1] - a.offsets[t]);
  }
  // Where row 0 of a step begins, in elements.
  RNNKERN_INLINE int64_t start_of(const Rows& rows, int step) const {
    const int t = time_of(step);
    return a.offsets ? a.offsets[t] * rows.row_stride : t * rows.time_stride;
  }
  RNNKERN_INLINE Storage* at(const Rows& rows, int64_t start, int row) const {
    return reinterpret_cast<Storage*>(rows.data) + start + row * rows.row_stride + unit;
  }
  // The row of the lane's item j.
  RNNKERN_INLINE int row_of(int tile, int j) const { return (tile * NT + (j >> 1)) * kRows + 2 * q + (j & 1); }

  // ---- Inputs -------------------------------------------------------------------------------------------------------

  RNNKERN_INLINE Quad* staged(int step, int input, int i) const {
    const int items = (kItems + a.k_parts - 1) / a.k_parts;
    return reinterpret_cast<Quad*>(shared + layout.staged) +
           ((step % kStages * kInputs + input) * items + i) * ptx::threads() + ptx::thread();
  }

  RNNKERN_INLINE void stage_quad(Quad* to, const Storage* from, bool valid) const {
    if (a.aligned) {
      if constexpr (sizeof(Quad) <= 16) {
        ptx::copy_async<sizeof(Quad)>(to, from, valid && unit < a.H);
      } else {
        const bool whole = valid && unit < a.H;
        ptx::copy_async<16>(to, from, whole);
        ptx::copy_async<16>(reinterpret_cast<char*>(to) + 16, reinterpret_cast<const char*>(from) + 16, whole);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        reinterpret_cast<Storage*>(to)[i] = valid && unit + i < a.H ? from[i] : P::store(Sum(0));
      }
    }
  }

  // Starts the copies of a step's inputs. Every call is one group of copies, also past the end.
  RNNKERN_INLINE void stage(int step, int tile) const {
    if (step < min(a.T, a.last_step)) {
      const int rows = rows_of(step);
      const int64_t input = start_of(a.input, step), states = kBackward ? start_of(a.states, step) : 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int j = k_part + i * a.k_parts;
        if (j >= kItems) break;
        const int row = row_of(tile, j);
        const bool valid = row < rows;
        const int safe_row = valid ? row : 0;  // an address inside the tensor, even where nothing is read
        stage_quad(staged(step, 0, i), at(a.input, input, safe_row), valid);
        if constexpr (kBackward) stage_quad(staged(step, 1, i), at(a.states, states, safe_row), valid);
      }
    }
    ptx::commit_copies();
  }

  // Four units of a row of h0 or grad_hn.
  RNNKERN_INLINE void load_initial(Sum (&v)[4], int row) const {
    const Storage* const from = at(a.initial, 0, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = a.initial.data && row < a.B && unit + i < a.H ? P::load(from[i]) : Sum(0);
    }
  }

  RNNKERN_INLINE void store_quad(const Rows& rows, int64_t start, int row, const Quad& quad) const {
    Storage* const to = at(rows, start, row);
    if (a.aligned) {
      if (unit < a.H) *reinterpret_cast<Quad*>(to) = quad;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (unit + i < a.H) to[i] = reinterpret_cast<const Storage*>(&quad)[i];
      }
    }
  }

  static RNNKERN_INLINE Quad rounded(const Sum (&v)[4]) {
    Quad quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) reinterpret_cast<Storage*>(&quad)[i] = P::store(v[i]);
    return quad;
  }

  // The state as the next product reads it. Every NaN becomes the usual one: a word of ones means "not there yet".
  RNNKERN_INLINE void send(int j, const Sum (&v)[4]) {
    Quad quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Sum x = unit + i < a.H ? v[i] : Sum(0);
      reinterpret_cast<Storage*>(&quad)[i] = P::store(P::operand(x == x ? x : Sum(NAN)));
    }
    exchange.send(unit, j >> 1, q + 4 * (j & 1), quad);
  }

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
    if constexpr (R != kStep) {
      for (int c = KC; c < chunk_count; ++c) {  // written and read by the same lane
        Weights w;
        load_weights(w, packed_chunk(c));
#pragma unroll
        for (int v = 0; v < 4; ++v) *reinterpret_cast<uint4*>(kept_chunk(c) + v * kTileBytes) = w[v >> 1][v & 1];
      }
    }
  }

  // This warp's part of W s: in sum where it is the whole, else in shared memory. False if the state did not come in time.
  RNNKERN_INLINE bool product(Sum (&sum)[kKept][2][4]) {
    exchange.before_receive();
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      typename P::Partial partial;
      if constexpr (KC > 0) {
        typename Exchange<P, R, NT>::template Arrival<KC> arrival;
        if (!exchange.template receive<KC>(arrival, nt, first_chunk, chunk_count)) return false;
#pragma unroll
        for (int c = 0; c < KC; ++c) {
          if (P::kStateInShared && c >= chunk_count) continue;  // no such chunk; tensor cores multiply zeros by zeros
          P::add(partial, registers[c], exchange.operand(arrival, c, nt, first_chunk));
        }
      }
      for (int c = KC; c < chunk_count; c += kBatch) {
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
      P::finish(partial, sum[kKept == NT ? nt : 0]);
      if (divided()) {
#pragma unroll
        for (int j = 2 * nt; j < 2 * nt + 2; ++j) {
          Sum* const to = reduced(k_part, j);
#pragma unroll
          for (int v = 0; v < 4; ++v) to[v] = sum[kKept == NT ? nt : 0][v >> 1][2 * (v & 1) + (j & 1)];
        }
      }
    }
    return true;
  }

  // Whether sums go through shared memory.
  RNNKERN_INLINE bool divided() const { return R != kLocal || a.k_parts > 1; }
  // Where the warps of a slab find the sums of one of its parts.
  RNNKERN_INLINE Sum* reduced(int part, int j) const {
    const int buffer = products & 1;  // of two: a fast warp may be one step ahead of the others
    return reinterpret_cast<Sum*>(shared + layout.reduced) +
           ((((buffer * a.k_parts + part) * a.slabs_per_block + slab_in_block) * kItems + j) * 32 + lane) * 4;
  }

  // ---- A step ---------------------------------------------------------------------------------------------------------

  // The lane's i-th item, j-th of the slab, from the product's sums.
  RNNKERN_INLINE void item(int step, int tile, int i, int j, const Sum (&sum)[4], int rows, int rows_before) {
    const int row = row_of(tile, j);
    const bool has = row < rows;
    Sum out[4];
    if constexpr (!kBackward) {
      if (has) {
        Sum z[4];
        load_quad<P>(z, staged(step, 0, i));
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const Sum x = z[v] + sum[v];
          out[v] = a.relu ? Relu::f(x) : P::tanh(x);
        }
      } else {
        load_initial(out, row);
      }
      if (step + 1 < a.T) send(j, out);
      if (has) store_quad(a.output, start_of(a.output, step), row, rounded(out));
    } else {
      const bool had = row < rows_before;
      Sum r[4], e[4] = {}, h[4] = {}, total[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) r[v] = sum[v];
      if (!had) load_initial(r, row);
      if (has) {
        load_quad<P>(e, staged(step, 0, i));
        load_quad<P>(h, staged(step, 1, i));
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        total[v] = e[v] + r[v];
        const Sum limit = a.clip, x = total[v];
        const Sum clamped = x > limit ? limit : x < -limit ? -limit : x;  // NaN stays NaN
        out[v] = a.relu ? Relu::times_derivative(clamped, h[v]) : Tanh::times_derivative(clamped, h[v]);
        if (!has) out[v] = 0;
      }
      if (step < a.T) send(j, out);
      if (has) store_quad(a.output, start_of(a.output, step), row, rounded(out));
      if (had && !has) store_quad(a.final_, 0, row, rounded(r));
      if (a.partials && step < a.T) statistics(step, row, has, total, r, out);
    }
  }

  // Sums of squares over the slab's units, in float64: the squares of small gradients leave float32's range.
  RNNKERN_INLINE void statistics(int step, int row, bool has, const Sum (&total)[4], const Sum (&r)[4],
                                 const Sum (&delta)[4]) const {
    double squares[3] = {0, 0, 0};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (unit + v < a.H) {
        squares[0] = fma(double(total[v]), double(total[v]), squares[0]);
        squares[1] = fma(double(r[v]), double(r[v]), squares[1]);
        squares[2] = fma(double(delta[v]), double(delta[v]), squares[2]);
      }
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
#pragma unroll
      for (int k = 0; k < 3; ++k) squares[k] += ptx::shuffle_xor(squares[k], mask);
    }
    if (g < 3 && row < a.B) {  // lane (g, q) writes the g-th
      const int64_t slabs = a.members * a.slabs_per_block;
      double* const to = a.partials + ((time_of(step) * slabs + slab) * 3 + g) * a.B + row;
      *to = has ? (g == 0 ? squares[0] : g == 1 ? squares[1] : squares[2]) : 0.0;
    }
  }

  RNNKERN_INLINE bool step(int step, int tile, bool multiply) {
    Sum sum[kKept][2][4] = {};
    if (multiply) {
      if (!product(sum)) {
        exchange.give_up(step);
        return false;
      }
      ++products;
      if (divided()) ptx::sync_block();
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int j = k_part + i * a.k_parts;
        if (j < kItems) exchange.reset(unit, j >> 1, q + 4 * (j & 1));
      }
      exchange.after_resets();
    }
    ptx::wait_copies<kStages - 1>();
    const int rows = rows_of(step), rows_before = rows_of(step - 1);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int j = k_part + i * a.k_parts;
      if (j >= kItems) break;
      Sum item_sum[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) item_sum[v] = sum[kKept == NT ? i >> 1 : 0][v >> 1][2 * (v & 1) + (i & 1)];
      if (multiply && divided()) {
#pragma unroll
        for (int v = 0; v < 4; ++v) item_sum[v] = 0;
        for (int part = 0; part < a.k_parts; ++part) {
          const Sum* const from = reduced(part, j);
#pragma unroll
          for (int v = 0; v < 4; ++v) item_sum[v] += from[v];
        }
      }
      item(step, tile, i, j, item_sum, rows, rows_before);
    }
    if (step + (kBackward ? 0 : 1) < a.T) exchange.published();
    return true;
  }

  RNNKERN_INLINE bool walk(int tile) {
    // The wait in step() lets the kStages - 1 latest groups fly: those of the steps after its own.
    for (int s = a.first_step; s < a.first_step + kStages - 1; ++s) stage(s, tile);
    if (!kBackward && a.sends_initial) {  // the state before the first step
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int j = k_part + i * a.k_parts;
        if (j >= kItems) break;
        Sum v[4];
        load_initial(v, row_of(tile, j));
        send(j, v);
      }
      exchange.published();
    }
    for (int s = a.first_step; s < a.last_step; ++s) {
      stage(s + kStages - 1, tile);
      if (!step(s, tile, !kBackward || s > 0)) return false;
    }
    return true;
  }

  RNNKERN_INLINE void run() {
    exchange.begin();
    keep_weights();
    for (int tile = group; tile < a.tiles; tile += a.groups) {
      exchange.begin_tile(tile);
      if (!walk(tile)) break;
    }
  }
};

}  // namespace rnnkern::cuda
