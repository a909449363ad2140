// Blocks and threads as fibers, and memory between them that is late: what the twin of ptx.cuh is made of.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace twin {

struct Fiber {
  int thread, block;
};
struct Grid {
  int blocks, threads, cluster;
};

// Waits and orders that a test removes, or a block whose stores get lost, to see that it is noticed.
enum Mutation : int { kNone, kNoBlockBarrier, kNoWaitForData, kNoWaitForCopies, kNoFence, kMuteBlock };

// Runs `kernel` in every thread of a grid until all have left it. Throws std::runtime_error where none ever would.
void run(int blocks, int threads, int cluster, int shared_bytes, const std::function<void()>& kernel);
void seed(uint64_t seed, Mutation mutation);

Mutation mutation();
const Grid& grid();
const Fiber& current();
long long time();
void yield();

// All lanes of a warp: each gives up to 32 bytes, and sees what the others gave.
using Given = std::array<std::array<uint32_t, 8>, 32>;
const Given& meet(const void* mine, size_t bytes);
void sync_block();
void sync_cluster();

// Shared memory, and its addresses: the block's number over an offset of 20 bits.
char* shared_of(int block);
uint32_t address_of(const void* shared);
void* at(uint32_t address, size_t bytes);  // checked
uint32_t address_in(uint32_t address, int rank);

void store_late(char* to, const void* from, size_t bytes);
void deliver_own();

void copy_async(void* to, const void* from, size_t bytes);  // zeros where `from` is null
void commit_copies();
void wait_copies(int pending);

void barrier_init(void* barrier, int arrivals);
void barrier_expect(void* barrier, int bytes);
bool barrier_done(void* barrier, int parity);
void store_remote(uint32_t to, const void* from, size_t bytes, uint32_t barrier);

}  // namespace twin
