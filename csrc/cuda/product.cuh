// One chunk of a step's product, for every dtype behind one face.
//
// The product of a step is r (32 units x 8 rows) += W (32 x k) s (k x 8) for one slab of 32 hidden units and 8 batch rows;
// s is the state that the step starts from, h_{t-1} or delta_{t+1}. k goes chunk by chunk, a chunk being 64 bytes of a row
// of s: 32 values of 16 bits, 16 of 32 or 8 of 64.
//
// Who holds what, with g = lane / 4 and q = lane % 4 as the tensor cores' fragments have them:
//   W      lane (g, q): of its units 4g .. 4g+3 the 16 bytes at 16 q of the chunk         (weights[mt][half], 2 mt + half)
//   s      lane (g, q): of row g the 16 bytes at 16 q of the chunk; 512 bytes per chunk, in the order of place_of_row
//   r      lane (g, q): units 4g .. 4g+3 of the rows 2q and 2q + 1                        (sum[mt][2 half + (row & 1)])
// The units of an mma tile (its rows g and g + 8) are 4g + 2 mt and 4g + 2 mt + 1, and its k are taken as they lie in the
// lane's 16 bytes: any order serves as long as W and s have the same, and so all memory accesses are whole vectors.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace rnnkern::cuda {

// Even rows first: the rows 2q of a store and all rows of a load then lie side by side, without bank conflicts.
RNNKERN_INLINE int place_of_row(int row) { return (row >> 1) + 4 * (row & 1); }

using Weights = uint4[2][2];  // a lane's part of a chunk of a slab

// Without a branch, where tanhf has one that lanes and units take differently: below 0.55 x + x s q(s), s = x^2, a least
// squares fit with an error of 4e-11; above 1 - 2 / (e^2x + 1). A few ulp at most, from the approximate exponential.
RNNKERN_INLINE float tanh_vector(float a) {
  const float s = a * a, size = fabsf(a);
  float q = 0.0023653887f;
  q = fmaf(q, s, -0.0083888899f);
  q = fmaf(q, s, 0.021775225f);
  q = fmaf(q, s, -0.053958618f);
  q = fmaf(q, s, 0.13333288f);
  q = fmaf(q, s, -0.33333333f);
  const float small = fmaf(s * q, a, a);
  const float large = fmaf(-2.0f, ptx::reciprocal_approx(ptx::exp2_approx(2.88539008f * size) + 1.0f), 1.0f);
  return size < 0.55f ? small : copysignf(large, a);
}
RNNKERN_INLINE double tanh_vector(double a) { return tanh(a); }
#include "cell.h"

// Four adjacent units of one row, as they lie in memory.
struct alignas(16) Quad64 {
  double v[4];
};

// ---- Tensor cores -----------------------------------------------------------------------------------------------------

template <class Derived>
struct TensorCore {
  using Sum = float;
  static constexpr int kMostChunks = 8;          // of W that a warp's registers hold
  static constexpr bool kStateInShared = false;  // its part of s comes to the lane in a register vector
  // Four independent chains of mma, two for each half of the slab, so that one does not wait for the other.
  struct Partial {
    float c[2][2][4] = {};  // [k half][mt][]
  };
  static RNNKERN_INLINE void add(Partial& p, const Weights& w, uint4 s) {
#pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
      const uint4 lo = w[mt][0], hi = w[mt][1];
      Derived::mma(p.c[0][mt], lo.x, hi.x, lo.y, hi.y, s.x, s.y);
      Derived::mma(p.c[1][mt], lo.z, hi.z, lo.w, hi.w, s.z, s.w);
    }
  }
  static RNNKERN_INLINE void finish(const Partial& p, float (&sum)[2][4]) {
#pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[mt][i] = p.c[0][mt][i] + p.c[1][mt][i];
    }
  }
};

struct BFloat16 : TensorCore<BFloat16> {
  using Storage = __nv_bfloat16;
  using Quad = uint2;
  // Two fp16-accurate digits more than bfloat16 keeps.
  static RNNKERN_INLINE float tanh(float a) { return ptx::tanh_approx(a); }
  static RNNKERN_INLINE float load(Storage x) { return __bfloat162float(x); }
  static RNNKERN_INLINE Storage store(float x) { return __float2bfloat16_rn(x); }
  static RNNKERN_INLINE float operand(float x) { return x; }
  template <class... Args>
  static RNNKERN_INLINE void mma(Args&&... args) {
    ptx::mma_bf16(args...);
  }
};

struct Float16 : TensorCore<Float16> {
  using Storage = __half;
  using Quad = uint2;
  static RNNKERN_INLINE float tanh(float a) { return Tanh::f(a); }
  static RNNKERN_INLINE float load(Storage x) { return __half2float(x); }
  static RNNKERN_INLINE Storage store(float x) { return __float2half_rn(x); }
  static RNNKERN_INLINE float operand(float x) { return x; }
  template <class... Args>
  static RNNKERN_INLINE void mma(Args&&... args) {
    ptx::mma_fp16(args...);
  }
};

struct TensorFloat32 : TensorCore<TensorFloat32> {
  using Storage = float;
  using Quad = uint4;
  static RNNKERN_INLINE float tanh(float a) { return Tanh::f(a); }
  static RNNKERN_INLINE float load(float x) { return x; }
  static RNNKERN_INLINE float store(float x) { return x; }
  static RNNKERN_INLINE float operand(float x) { return ptx::round_tf32(x); }  // what the tensor core reads of W and s
  template <class... Args>
  static RNNKERN_INLINE void mma(Args&&... args) {
    ptx::mma_tf32(args...);
  }
};

// ---- Plain multiply-adds, for the full accuracy of float32 and float64 --------------------------------------------------

template <class S>
struct Scalar {
  using Sum = S;
  static constexpr int kMostChunks = 6;
  static constexpr bool kStateInShared = true;  // the lane needs all 8 rows of s at its 16 q
  static constexpr int kValues = 16 / sizeof(S);
  struct Partial {
    S c[4][kRows] = {};  // [unit][row], of this lane's k only
  };
  // s: the chunk's 512 bytes in shared memory.
  static RNNKERN_INLINE void add(Partial& p, const Weights& w, const char* s) {
    const int q = ptx::thread() & 3;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint4 bits = *reinterpret_cast<const uint4*>(s + place_of_row(row) * kChunkBytes + 16 * q);
      const S* const state = reinterpret_cast<const S*>(&bits);
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) {
        const S* const weight = reinterpret_cast<const S*>(&w[unit >> 1][unit & 1]);
#pragma unroll
        for (int i = 0; i < kValues; ++i) p.c[unit][row] = fma_(weight[i], state[i], p.c[unit][row]);
      }
    }
  }
  // Adds the four lanes' parts of k, each lane keeping its rows 2q and 2q + 1.
  static RNNKERN_INLINE void finish(const Partial& p, S (&sum)[2][4]) {
    const int q = ptx::thread() & 3;
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      S half[4];  // rows 4 (q / 2) .. + 3
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const S low = p.c[unit][i], high = p.c[unit][i + 4];
        half[i] = (q & 2 ? high : low) + ptx::shuffle_xor(q & 2 ? low : high, 2);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const S low = half[i], high = half[i + 2];
        sum[unit >> 1][2 * (unit & 1) + i] = (q & 1 ? high : low) + ptx::shuffle_xor(q & 1 ? low : high, 1);
      }
    }
  }
  static RNNKERN_INLINE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
  static RNNKERN_INLINE double fma_(double a, double b, double c) { return fma(a, b, c); }
  using Storage = S;
  static RNNKERN_INLINE S tanh(S a) { return Tanh::f(a); }
  static RNNKERN_INLINE S load(S x) { return x; }
  static RNNKERN_INLINE S store(S x) { return x; }
  static RNNKERN_INLINE S operand(S x) { return x; }
};

struct Float32 : Scalar<float> {
  using Quad = uint4;
};

struct Float64 : Scalar<double> {
  using Quad = Quad64;
};

}  // namespace rnnkern::cuda
