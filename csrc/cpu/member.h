// Threads that share rows, each with hidden units of its own, meet after every step.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace rnnkern::cpu {

// One thread's place among those that share something. They must all be running at once: each waits for the others.
class Member {
 public:
  // Written by one member, read by all others.
  struct alignas(64) Flag {
    std::atomic<uint64_t> at[2] = {};  // 4 * meeting + what the member brought, of an even and an odd meeting
  };

  Member(Flag* flags, int index, int size) : flags_(flags), index_(index), size_(size) {}

  int index() const { return index_; }
  int size() const { return size_; }
  // A thread that has no processor of its own, on a busy machine, would have the others wait at every step. One that has
  // waited for more than half of its time calls for it, and at the end of that meeting all of them know: the group is
  // dissolved, and its first member goes on alone.
  bool is_dissolved() const { return is_dissolved_; }
  // For others, beyond what is usual.
  std::chrono::nanoseconds waited() const { return waited_; }

  // Returns when all members have come to their n-th meeting, this being the n-th of this one: what they wrote before is
  // then visible. True if any of them brought true.
  //
  // One may leave for its next meeting, and come there, while others have not yet looked at its flag of this one; but not
  // further, so two flags in turn are enough. Buffers that are written between meetings and read after them need no more
  // than two copies for the same reason.
  bool meet(bool mine) {
    if (size_ == 1) return mine;
    const uint64_t meeting = ++meetings_;
    const int turn = meeting % 2;
    uint64_t all = (is_late() ? kDissolve : 0) + (mine ? kMine : 0);
    flags_[index_].at[turn].store(4 * meeting + all, std::memory_order_release);
    for (int other = 0; other < size_; ++other) {
      if (other != index_) all |= wait(flags_[other].at[turn], meeting) % 4;
    }
    if (all & kDissolve) is_dissolved_ = true, size_ = 1;
    return all & kMine;
  }

 private:
  using Clock = std::chrono::steady_clock;

  static constexpr uint64_t kMine = 1, kDissolve = 2;
  static constexpr int kSpins = 128;  // about 3 µs
  static constexpr std::chrono::microseconds kPatience{50}, kLate{200};

  bool is_late() const { return waited_ > kLate && 2 * waited_ > Clock::now() - begin_; }

  // The others take as long for their steps as this one, so a short while is enough; unless one of them has no processor:
  // then it may be this one's that it needs.
  uint64_t wait(const std::atomic<uint64_t>& flag, uint64_t meeting) {
    uint64_t seen;
    const auto has_come = [&] { return (seen = flag.load(std::memory_order_acquire)) / 4 == meeting; };
    for (int spins = 0; spins < kSpins; ++spins) {
      if (has_come()) return seen;
      pause();
    }
    const Clock::time_point begin = Clock::now();
    while (!has_come()) {
      if (Clock::now() - begin < kPatience) pause();
      else sched_yield();
    }
    waited_ += Clock::now() - begin;
    return seen;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  Flag* flags_;  // [size]
  int index_, size_;
  bool is_dissolved_ = false;
  uint64_t meetings_ = 0;
  Clock::time_point begin_ = Clock::now();
  std::chrono::nanoseconds waited_{};
};

}  // namespace rnnkern::cpu
