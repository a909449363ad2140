// What only a GPU has: thread and block indices, barriers, shuffles, tensor cores, asynchronous copies, memory with an
// order. The kernels reach the hardware through these functions alone, so that a host twin of this header can run them.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define RNNKERN_INLINE __device__ __forceinline__

namespace rnnkern::cuda::ptx {

constexpr unsigned kFullWarp = 0xffffffffu;

RNNKERN_INLINE int thread() { return static_cast<int>(threadIdx.x); }
RNNKERN_INLINE int threads() { return static_cast<int>(blockDim.x); }
RNNKERN_INLINE int block() { return static_cast<int>(blockIdx.x); }
// The block's dynamic shared memory.
RNNKERN_INLINE char* shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
RNNKERN_INLINE void sync_block() { __syncthreads(); }
RNNKERN_INLINE void sync_warp() { __syncwarp(); }
RNNKERN_INLINE bool any(bool value) { return __any_sync(kFullWarp, value); }

template <class T>
RNNKERN_INLINE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

RNNKERN_INLINE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Shared memory by its 32-bit address: kept in a register, where a pointer would be made anew at every use. ------------

RNNKERN_INLINE uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

RNNKERN_INLINE uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

RNNKERN_INLINE void store_shared(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

RNNKERN_INLINE void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// The same value, which the compiler then keeps instead of computing it again.
RNNKERN_INLINE uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- Global memory that other blocks write while this kernel runs: relaxed accesses at gpu scope, past the L1. -------

RNNKERN_INLINE uint4 load_relaxed(const void* global) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return v;
}

RNNKERN_INLINE void store_relaxed(void* global, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x),
               "r"(v.y)
               : "memory");
}

RNNKERN_INLINE void store_relaxed(void* global, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Orders this thread's earlier accesses before its later ones, for every thread of the GPU.
RNNKERN_INLINE void fence_gpu() { __threadfence(); }

// A word that the host sees.
RNNKERN_INLINE void tell_host(unsigned long long* mapped, unsigned long long word) {
  *static_cast<volatile unsigned long long*>(mapped) = word;
  __threadfence_system();
}

RNNKERN_INLINE long long nanoseconds() {
  long long time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// ---- Copies from global to shared memory that this thread alone waits for. Where not `valid`, zeros are written. ------

template <int kBytes>
RNNKERN_INLINE void copy_async(uint32_t shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
                 "r"(source_bytes)
                 : "memory");
  }
}

RNNKERN_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of the latest groups are still on their way.
template <int kPending>
RNNKERN_INLINE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Clusters (compute capability 9.0 and later): blocks that write into each other's shared memory. -------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNNKERN_HAS_CLUSTERS 1
#else
#define RNNKERN_HAS_CLUSTERS 0
#endif

#if RNNKERN_HAS_CLUSTERS
// An address of this block's shared memory, in block `rank` of the cluster.
RNNKERN_INLINE uint32_t address_in(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// A barrier completes a phase when everyone it counts has arrived and all bytes announced have come.
RNNKERN_INLINE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

RNNKERN_INLINE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is complete.
RNNKERN_INLINE bool barrier_test(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// The same; may sleep for a moment before it says no.
RNNKERN_INLINE bool barrier_done(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Stores into another block's shared memory; the barrier there counts the bytes when they have come.
RNNKERN_INLINE void store_remote(uint32_t to, uint2 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(barrier)
               : "memory");
}

RNNKERN_INLINE void store_remote(uint32_t to, uint4 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

RNNKERN_INLINE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
#endif

// ---- Tensor cores: c (16 x 8) += a (16 x k) b (k x 8), k = 16 for 16-bit values and 8 for TF32. ------------------------

RNNKERN_INLINE void mma_bf16(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

RNNKERN_INLINE void mma_fp16(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

RNNKERN_INLINE void mma_tf32(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

RNNKERN_INLINE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

RNNKERN_INLINE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

RNNKERN_INLINE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

RNNKERN_INLINE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- From the host ------------------------------------------------------------------------------------------------------

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args...);
}

RNNKERN_INLINE int64_t thread_of_grid() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

}  // namespace rnnkern::cuda::ptx
