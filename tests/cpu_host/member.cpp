// Members meet, all of them, each time; what one wrote before the others read after; and all see the group dissolve at the
// same meeting. Prints how many meetings were held and how many groups dissolved; exits with 1 where a member saw
// something else.
//
//   member SIZE GROUPS MEETINGS
#include "cpu/member.h"

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using rnnkern::cpu::Member;

// What a member hands over at a meeting, not atomic: the meeting alone orders it.
struct alignas(64) Slot {
  int64_t at[2];
};

// Whether member i brings true to meeting n: seldom, and not all at once.
static bool brings(int64_t n, int i) { return (n * 7 + i * 3) % 11 == 0; }

int main(int, char** argv) {
  const int size = std::atoi(argv[1]), groups = std::atoi(argv[2]);
  const int64_t meetings = std::atoi(argv[3]);
  int64_t held = 0, dissolved = 0;
  for (int group = 0; group < groups; ++group) {
    std::vector<Member::Flag> flags(size);
    std::vector<Slot> slots(size);
    std::vector<int64_t> last(size);
    std::atomic<bool> wrong{false};
    std::barrier start(size);
    std::vector<std::thread> threads;
    for (int me = 0; me < size; ++me) {
      threads.emplace_back([&, me] {
        start.arrive_and_wait();
        Member member(flags.data(), me, size);
        for (int64_t n = 1; n <= meetings && !member.is_dissolved(); ++n) {
          slots[me].at[n % 2] = n;
          bool expected = false;
          for (int i = 0; i < size; ++i) expected |= brings(n, i);
          if (member.meet(brings(n, me)) != expected) wrong = true;
          for (const Slot& slot : slots) {
            if (slot.at[n % 2] != n) wrong = true;
          }
          last[me] = n;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const int64_t n : last) {
      if (n != last[0]) wrong = true;
    }
    if (wrong) return 1;
    held += last[0];
    dissolved += last[0] < meetings;
  }
  std::printf("%lld %lld\n", static_cast<long long>(held), static_cast<long long>(dissolved));
}
