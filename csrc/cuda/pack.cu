#include "cuda/pack.cuh"

#include <algorithm>

namespace rnnkern::cuda {
namespace {

constexpr int kThreads = 256;

struct Piece {
  static constexpr int kCount = 480;  // a kernel's arguments have 4096 bytes
  int64_t values[kCount];
};

__global__ void offsets_kernel(int64_t* to, const __grid_constant__ Piece piece, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.values[i];
}

__global__ void statistics_kernel(double* stats, const double* partials, int T, int slabs, int B) {
  const int64_t rows = static_cast<int64_t>(T) * B;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // of (T, 4, B)
  if (index >= 4 * rows) return;
  const int64_t t = index / (4 * B), kind = index / B % 4, row = index % B;
  double sum = 0;
  for (int slab = 0; slab < slabs; ++slab) sum += partials[((t * slabs + slab) * 4 + kind) * B + row];
  stats[kind * rows + t * B + row] = sum;
}

}  // namespace

void bring_offsets(int64_t* to, const int64_t* from, int64_t count, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += Piece::kCount) {
    Piece piece;
    const int64_t here = std::min<int64_t>(Piece::kCount, count - first);
    std::copy_n(from + first, here, piece.values);
    offsets_kernel<<<1, kThreads, 0, stream>>>(to + first, piece, static_cast<int>(here));
  }
}

void add_statistics(double* stats, const double* partials, int T, int slabs, int B, cudaStream_t stream) {
  const int64_t count = 4 * static_cast<int64_t>(T) * B;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  statistics_kernel<<<blocks, kThreads, 0, stream>>>(stats, partials, T, slabs, B);
}

}  // namespace rnnkern::cuda
