// Threads that share rows, each with hidden units of its own, meet after every step.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace rnnkern::cpu {

// One thread's place among them. They must all be running at once: each waits for the others.
class Member {
 public:
  // Written by one member, read by all others.
  struct alignas(64) Flag {
    std::atomic<uint64_t> at[2] = {};  // 2 * meeting + what the member brought, of an even and an odd meeting
  };

  Member(Flag* flags, int index, int size) : flags_(flags), index_(index), size_(size) {}

  int index() const { return index_; }
  int size() const { return size_; }

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
    flags_[index_].at[turn].store(2 * meeting + mine, std::memory_order_release);
    bool any = mine;
    for (int other = 0; other < size_; ++other) {
      if (other != index_) any |= wait(flags_[other].at[turn], meeting);
    }
    return any;
  }

 private:
  // The others take as long for their steps as this one, so a short while is enough, unless one of them has no processor:
  // then it may be this one's that it needs.
  static constexpr int kSpins = 128;

  static bool wait(const std::atomic<uint64_t>& flag, uint64_t meeting) {
    for (int spins = 0;; ++spins) {
      const uint64_t seen = flag.load(std::memory_order_acquire);
      if (seen / 2 == meeting) return seen % 2;
      if (spins >= kSpins) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#elif defined(__aarch64__)
      else __asm__ volatile("yield");
#endif
    }
  }

  Flag* flags_;  // [size]
  int index_, size_;
  uint64_t meetings_ = 0;
};

}  // namespace rnnkern::cpu
