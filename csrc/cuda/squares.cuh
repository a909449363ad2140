// Sums of squares over a slab's units, four at once, for the statistics of the backward chain.
#pragma once

#include "cuda/ptx.cuh"

namespace rnnkern::cuda {

// The lanes (0..7, q) hold four units each of a row, of four vectors. Lane (k, q) returns the k-th's sum of squares.
RNNKERN_INLINE double sum_of_squares(
    const double (&x)[4], const double (&y)[4], const double (&z)[4], const double (&w)[4]) {
  double sums[4] = {0, 0, 0, 0};
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    sums[0] = fma(x[u], x[u], sums[0]);
    sums[1] = fma(y[u], y[u], sums[1]);
    sums[2] = fma(z[u], z[u], sums[2]);
    sums[3] = fma(w[u], w[u], sums[3]);
  }
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += ptx::shuffle_xor(sums[k], mask);
  }
  const int k = (ptx::thread() & 31) >> 2;
  return k == 0 ? sums[0] : k == 1 ? sums[1] : k == 2 ? sums[2] : sums[3];
}

RNNKERN_INLINE uint32_t exponent_of_largest(const float (&v)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int u = 0; u < 4; ++u) largest = max(largest, __float_as_uint(v[u]) & 0x7fffffffu);
  return largest >> 23;
}

// The squares of float32 in float32, scaled by the power of two that brings the row's largest value near 1: float64 would
// cost more than all else in a step.
RNNKERN_INLINE double sum_of_squares(
    const float (&x)[4], const float (&y)[4], const float (&z)[4], const float (&w)[4]) {
  uint32_t exponents = exponent_of_largest(x) | exponent_of_largest(y) << 8 | exponent_of_largest(z) << 16 |
                       exponent_of_largest(w) << 24;
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) exponents = __vmaxu4(exponents, ptx::shuffle_xor(exponents, mask));
  float sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float (&v)[4] = k == 0 ? x : k == 1 ? y : k == 2 ? z : w;
    const int exponent = exponents >> 8 * k & 255;
    const float scale = __uint_as_float(max(254 - exponent, 1) << 23);
    sums[k] = 0;
#pragma unroll
    for (int u = 0; u < 4; ++u) sums[k] = fmaf(scale * v[u], scale * v[u], sums[k]);
  }
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += ptx::shuffle_xor(sums[k], mask);
  }
  const int k = (ptx::thread() & 31) >> 2;
  // Dividing by scale squared, with the exponent of a float64.
  const int exponent = exponents >> 8 * min(k, 3) & 255;
  const double factor = __hiloint2double((1023 + 2 * (127 - max(254 - exponent, 1))) << 20, 0);
  return factor * static_cast<double>(k == 0 ? sums[0] : k == 1 ? sums[1] : k == 2 ? sums[2] : sums[3]);
}

}  // namespace rnnkern::cuda
