// csrc/cuda/ptx.cuh's twin for a machine without a GPU: the kernels' own source runs as fibers, one for each thread.
//
// What it is strict about: a store that other blocks shall see arrives late, word by word and in any order, but for one
// thread's stores to one address and across its fences; an asynchronous copy is done at once or as late as the waits
// allow; warps take turns at random. It knows nothing of time, of caches that hold old values, and of warps that diverge.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_runtime_api.h>

#include "twin.h"

#define RNNKERN_INLINE inline
#define RNNKERN_HAS_CLUSTERS 1
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline uint32_t __vmaxu4(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 8) out |= max(a >> shift & 255, b >> shift & 255) << shift;
  return out;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

namespace rnnkern::cuda::ptx {

inline int thread() { return twin::current().thread; }
inline int threads() { return twin::grid().threads; }
inline int block() { return twin::current().block; }
inline int64_t thread_of_grid() { return static_cast<int64_t>(block()) * threads() + thread(); }
inline char* shared_memory() { return twin::shared_of(twin::current().block); }
inline void sync_block() {
  if (twin::mutation() != twin::kNoBlockBarrier) twin::sync_block();
}
inline void sync_warp() { twin::meet(nullptr, 0); }
inline void sync_cluster() { twin::sync_cluster(); }

inline bool any(bool value) {
  const uint32_t mine = value;
  bool out = false;
  const auto& all = twin::meet(&mine, sizeof mine);
  for (const auto& lane : all) out |= lane[0] != 0;
  // Who does not ask whether the data has come takes what is there.
  return out && twin::mutation() != twin::kNoWaitForData;
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  const auto& all = twin::meet(&value, sizeof value);
  T out;
  std::memcpy(&out, all[(thread() & 31) ^ mask].data(), sizeof out);
  return out;
}

inline uint32_t kept(uint32_t value) { return value; }
inline uint32_t shared_address(const void* shared) { return twin::address_of(shared); }
inline uint4 load_shared16(uint32_t address) { return *static_cast<uint4*>(twin::at(address, 16)); }
inline uint2 load_shared8(uint32_t address) { return *static_cast<uint2*>(twin::at(address, 8)); }
inline void store_shared(uint32_t address, uint2 v) { *static_cast<uint2*>(twin::at(address, 8)) = v; }
inline void store_shared(uint32_t address, uint4 v) { *static_cast<uint4*>(twin::at(address, 16)) = v; }

inline uint4 load_relaxed(const void* global) {
  twin::yield();
  return *static_cast<const uint4*>(global);
}
template <class Vector>
inline void store_relaxed(void* global, Vector v) {
  twin::store_late(static_cast<char*>(global), &v, sizeof v);
}
inline void fence_gpu() {
  if (twin::mutation() != twin::kNoFence) twin::deliver_own();
}
inline void tell_host(unsigned long long* mapped, unsigned long long word) { *mapped = word; }
inline long long nanoseconds() {
  twin::yield();
  return twin::time();
}

template <int kBytes>
inline void copy_async(uint32_t shared, const void* global, bool valid) {
  twin::copy_async(twin::at(shared, kBytes), valid ? global : nullptr, kBytes);
}
inline void commit_copies() { twin::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  if (twin::mutation() != twin::kNoWaitForCopies) twin::wait_copies(kPending);
}

inline uint32_t address_in(uint32_t shared, int rank) { return twin::address_in(shared, rank); }
inline void barrier_init(uint64_t* barrier, int arrivals) { twin::barrier_init(barrier, arrivals); }
inline void barrier_expect(uint64_t* barrier, int bytes) { twin::barrier_expect(barrier, bytes); }
inline bool barrier_done(uint64_t* barrier, int parity) {
  twin::yield();
  return twin::barrier_done(barrier, parity) || twin::mutation() == twin::kNoWaitForData;
}
inline bool barrier_test(uint64_t* barrier, int parity) { return barrier_done(barrier, parity); }
template <class Vector>
inline void store_remote(uint32_t to, Vector v, uint32_t barrier) {
  twin::store_remote(to, &v, sizeof v, barrier);
}

// Which element of a fragment a lane holds: PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".
template <int kPerRegister, class Value>
inline void mma(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Value value) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  const auto& all = twin::meet(mine, sizeof mine);
  const int g = (thread() & 31) >> 2, q = thread() & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = i >> 1, column = 2 * q + (i & 1);  // of the fragment: rows g and g + 8
    float sum = c[i];
    for (int part = 0; part < 2; ++part) {
      for (int lane = 0; lane < 4; ++lane) {
        for (int k = 0; k < kPerRegister; ++k) {
          sum += value(all[4 * g + lane][2 * part + row], k) * value(all[4 * column + lane][4 + part], k);
        }
      }
    }
    c[i] = sum;
  }
}

template <class... Args>
inline void mma_bf16(float (&c)[4], Args... args) {
  mma<2>(c, args..., [](uint32_t x, int k) { return __uint_as_float(k ? x & 0xffff0000u : x << 16); });
}
template <class... Args>
inline void mma_fp16(float (&c)[4], Args... args) {
  mma<2>(c, args..., [](uint32_t x, int k) { return __half2float({static_cast<uint16_t>(k ? x >> 16 : x)}); });
}
template <class... Args>
inline void mma_tf32(float (&c)[4], Args... args) {
  mma<1>(c, args..., [](uint32_t x, int) { return __uint_as_float(x); });
}

inline float round_tf32(float x) {
  if (x != x) return __uint_as_float(0x7fffffff);
  if (std::isinf(x)) return x;
  return __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000u);
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float tanh_approx(float x) { return std::tanh(x); }

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, int threads, cudaStream_t, Args... args) {
  twin::run(static_cast<int>(blocks), threads, 1, 0, [&] { kernel(args...); });
}

}  // namespace rnnkern::cuda::ptx
