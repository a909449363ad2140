#include "cpu/recurrence.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/flush.h"
#include "cpu/team.h"

namespace rnnkern::cpu {

const InstructionSet* const kInstructionSets[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kGeneric, nullptr};

static const InstructionSet& choose_instruction_set() {
  const char* const asked = std::getenv("RNNKERN_CPU_ISA");
  std::string names;
  for (auto set = kInstructionSets; *set; ++set) {
    if ((!asked || !*asked) && (*set)->supported()) return **set;
    if (asked && std::string(asked) == (*set)->name) {
      if ((*set)->supported()) return **set;
      throw std::runtime_error(std::string("RNNKERN_CPU_ISA=") + asked + ": this processor does not support it");
    }
    names += std::string(names.empty() ? "" : ", ") + (*set)->name;
  }
  throw std::runtime_error(std::string("RNNKERN_CPU_ISA must be one of ") + names + ", got " + asked);
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose_instruction_set();
  return chosen;
}

namespace {

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(size_t bytes) {
  return Buffer(::operator new(std::max<size_t>(bytes, 1), std::align_val_t{kAlignment}));
}

// Where the i-th of `parts` runs of samples begins, which have about the same number of rows over all steps. A packed
// sequence's samples come longest first.
int64_t bound(const Steps& steps, int i, int parts) {
  if (i == parts) return steps.B;
  if (!steps.batch_sizes) return steps.B * i / parts;
  const int64_t all = steps.all_rows();
  int64_t length = steps.T, done = 0, b = 0;
  for (; b < steps.B && done < all * i / parts; ++b) {
    while (length > 0 && steps.batch_sizes[length - 1] <= b) --length;
    done += length;
  }
  return b;
}

// Where a group was dissolved, a busy machine gave its threads' time to somebody else. No rows are shared for so many times
// what that has cost.
using Clock = std::chrono::steady_clock;
constexpr int kPauseOfSharing = 20;
std::atomic<Clock::rep> no_sharing_before{0};

// How the threads of a team share a job: groups of rows, and the members of each group its hidden units.
struct Division {
  int groups, members;

  int threads() const { return groups * members; }
};

// Below this many multiply-adds a second thread costs more than it brings (opening a parallel region takes about 1 µs).
constexpr int64_t kWorkPerThread = 1 << 17;
// The same for a member's share of a step (meeting the others takes about 0.3 µs).
constexpr int64_t kWorkPerMeeting = 1 << 13;
// Rows that read the factor once for all, as many as the product takes in one block with two panels, or nearly so.
constexpr int64_t kRowsPerGroup = 4;
// A factor that is better read in parts, each by the core that keeps it, than whole by all cores.
constexpr size_t kLargeFactor = 1 << 18;

// Rows go to the threads as long as there are enough: then no thread waits for another. Few rows share their threads.
Division divide(const Kernels& kernels, const Steps& steps, int threads, bool may_share) {
  const int64_t H = steps.H, rows = steps.all_rows();
  const double work = static_cast<double>(rows) * H * H;
  const int64_t useful = std::min<int64_t>(threads, static_cast<int64_t>(std::min(work / kWorkPerThread, 1e9)) + 1);
  const auto members_of = [&](int64_t groups) {
    // A member that has no processor of its own would have all others wait for it.
    const int64_t available = std::min<int64_t>(useful, omp_get_num_procs()) / groups;
    const double step = static_cast<double>(steps.B) / groups * H * H;
    return std::min<int64_t>(
        {available, kernels.panels(H), static_cast<int64_t>(std::min(step / kWorkPerMeeting, 1e9))});
  };
  int64_t groups = std::max<int64_t>(1, std::min(useful, steps.B));
  if (!may_share) return {static_cast<int>(groups), 1};
  int64_t members = members_of(groups);
  if (steps.B <= 2 * useful && kernels.packed_bytes(H) >= kLargeFactor) {
    const int64_t fewer = (steps.B + kRowsPerGroup - 1) / kRowsPerGroup;
    if (fewer < groups && members_of(fewer) > 1) groups = fewer, members = members_of(fewer);
  }
  return {static_cast<int>(groups), static_cast<int>(std::max<int64_t>(1, members))};
}

// pack(p0, p1) over all panels, then walk(part, scratch) over all samples and panels, by one team.
template <class Pack, class Walk>
void run(const Kernels& kernels, const Steps& steps, int threads, Pack pack, Walk walk) {
  const int64_t panels = kernels.panels(steps.H);
  const bool may_share = Clock::now().time_since_epoch().count() >= no_sharing_before.load(std::memory_order_relaxed);
  const Division planned = divide(kernels, steps, threads, may_share);
  const size_t row_bytes = kernels.scratch_bytes(steps.H, planned.members > 1);
  const Buffer scratch = allocate(steps.B * row_bytes);
  std::vector<Member::Flag> flags(2 * planned.threads());  // of the team, and of its groups

  run_team(planned.threads(), [&](int me, int size) {
    const FlushSubnormals flush;
    pack(panels * me / size, panels * (me + 1) / size);
    Member(&flags[planned.threads()], me, size).meet(false);

    const Division division = size == planned.threads() ? planned : divide(kernels, steps, size, may_share);
    if (me >= division.threads()) return;
    const int group = me / division.members, member = me % division.members;
    const int64_t b0 = bound(steps, group, division.groups), b1 = bound(steps, group + 1, division.groups);
    Part part{
        b0,
        b1,
        panels * member / division.members,
        panels * (member + 1) / division.members,
        {&flags[group * division.members], member, division.members}};
    walk(part, static_cast<char*>(scratch.get()) + b0 * row_bytes);
    if (part.member.is_dissolved()) {
      no_sharing_before = (Clock::now() + kPauseOfSharing * part.member.waited()).time_since_epoch().count();
    }
  });
}

}  // namespace

void recurrence(const Forward& job, const Weights& w, Dtype dtype, Nonlinearity nonlinearity, int threads) {
  const Kernels& kernels = instruction_set().kernels[dtype];
  const Buffer packed = allocate(kernels.packed_bytes(job.steps.H));
  const Factor factor{w.data, w.column_stride, w.row_stride, job.steps.H};  // h_{t-1} W': summed over W's columns
  run(
      kernels, job.steps, threads, [&](int64_t p0, int64_t p1) { kernels.pack(factor, p0, p1, packed.get()); },
      [&](Part& part, void* scratch) { kernels.forward[nonlinearity](job, packed.get(), part, scratch); });
}

void recurrence_backward(Backward job, const Weights& w, Dtype dtype, Nonlinearity nonlinearity, int threads) {
  const Kernels& kernels = instruction_set().kernels[dtype];
  const Buffer packed = allocate(kernels.packed_bytes(job.steps.H));
  const Factor factor{w.data, w.row_stride, w.column_stride, job.steps.H};  // delta W: summed over W's rows
  std::atomic<bool> finite{true};
  run(
      kernels, job.steps, threads,
      [&](int64_t p0, int64_t p1) {
        if (!kernels.pack(factor, p0, p1, packed.get())) finite = false;
      },
      [&](Part& part, void* scratch) {
        Backward mine = job;
        mine.finite_weights = finite;
        kernels.backward[nonlinearity](mine, packed.get(), part, scratch);
      });
}

}  // namespace rnnkern::cpu
