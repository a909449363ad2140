// The small kernels around the chain: W packed for it, step offsets brought to the device, statistics added up.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/product.cuh"

namespace rnnkern::cuda {

// packed (slabs, chunks, 4 vectors, 32 lanes, 16 bytes): what lane (g, q) needs of unit 4g + v of a slab, see product.cuh.
// Each thread makes one vector. Units and k beyond H are zeros. Strides in elements: for W' those of W, exchanged.
template <class P>
__global__ void pack_kernel(
    uint4* packed, const typename P::Storage* w, int64_t unit_stride, int64_t k_stride, int H, int chunks,
    int64_t vectors) {
  using Storage = typename P::Storage;
  constexpr int kValues = 16 / sizeof(Storage);
  const int64_t index = ptx::thread_of_grid();
  if (index >= vectors) return;
  const int lane = index & 31, v = index >> 5 & 3;
  const int64_t tile = index >> 7;
  const int64_t unit = tile / chunks * kSlab + 4 * (lane >> 2) + v;
  const int64_t k0 = (tile % chunks * 4 + (lane & 3)) * kValues;
  uint4 bits = {0, 0, 0, 0};
  Storage* const values = reinterpret_cast<Storage*>(&bits);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int64_t k = k0 + i;
    if (unit < H && k < H) values[i] = P::store(P::operand(P::load(w[unit * unit_stride + k * k_stride])));
  }
  packed[index] = bits;
}

// Host functions that launch the other two.

// to (count): offsets that travel as kernel arguments, so that no copy from host memory has to be kept or pinned.
void bring_offsets(int64_t* to, const int64_t* from, int64_t count, cudaStream_t);

// stats (4, T, B) = sums of partials (T, slabs, 4, B) over the slabs, in order.
void add_statistics(double* stats, const double* partials, int T, int slabs, int B, cudaStream_t);

}  // namespace rnnkern::cuda
