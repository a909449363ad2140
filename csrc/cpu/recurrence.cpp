#include "cpu/recurrence.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/flush.h"
#include "cpu/team.h"

namespace rnnkern::cpu {

const InstructionSet* const kInstructionSets[] = {
#if defined(__x86_64__)
    &kAmx,     &kAvx512Bf16, &kAvx512, &kAvx2,
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

// A set whose kernels do not serve the dtype has what the sets after it have.
const Kernels& kernels_of(Dtype dtype) {
  auto set = kInstructionSets;
  while (*set != &instruction_set()) ++set;
  while (!(*set)->kernels[dtype]) ++set;
  return *(*set)->kernels[dtype];
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
    if (useful / groups <= 1) return int64_t{1};
    // A member that has no processor of its own would have all others wait for it.
    const int64_t available = std::min<int64_t>(useful, omp_get_num_procs()) / groups;
    const double step = static_cast<double>(steps.B) / groups * H * H;
    return std::min<int64_t>(
        {available, kernels.panels(H), static_cast<int64_t>(std::min(step / kernels.work_per_meeting, 1e9))});
  };
  int64_t groups = std::max<int64_t>(1, std::min(useful, steps.B));
  if (!may_share) return {static_cast<int>(groups), 1};
  int64_t members = members_of(groups);
  if (steps.B <= 2 * useful && kernels.packed_bytes(H, H) >= kLargeFactor) {
    const int64_t fewer = (steps.B + kRowsPerGroup - 1) / kRowsPerGroup;
    if (fewer < groups && members_of(fewer) > 1) groups = fewer, members = members_of(fewer);
  }
  return {static_cast<int>(groups), static_cast<int>(std::max<int64_t>(1, members))};
}

// Several chains of the same size side by side, each by a part of the team, or one after the other by all of it.
struct Plan {
  Division of_chain;
  bool side_by_side;
  int threads;
};

// Side by side where that keeps more threads busy, or as many without meetings.
Plan plan(const Kernels& kernels, const Steps& steps, int chains, int threads, bool may_share) {
  const Division alone = divide(kernels, steps, threads, may_share);
  if (chains > 1 && threads >= chains) {
    const Division beside = divide(kernels, steps, threads / chains, may_share);
    const int used = chains * beside.threads();
    if (used > alone.threads() || (used == alone.threads() && beside.members < alone.members)) {
      return {beside, true, used};
    }
  }
  return {alone, false, alone.threads()};
}

// A factor of one call, which its team packs.
class PackedFactor {
 public:
  PackedFactor(const Kernels& kernels, const Factor& factor)
      : kernels_(kernels), factor_(factor), data_(allocate(kernels.packed_bytes(factor.in, factor.out))) {}

  // The part of member `me`.
  void pack(int me, int size) {
    const int64_t panels = kernels_.panels(factor_.out);
    if (!kernels_.pack(factor_, panels * me / size, panels * (me + 1) / size, data_.get())) is_finite_ = false;
  }
  const void* data() const { return data_.get(); }
  bool is_finite() const { return is_finite_; }

 private:
  const Kernels& kernels_;
  const Factor factor_;
  const Buffer data_;
  std::atomic<bool> is_finite_{true};
};

// What the members of a team need for the products that their jobs have, if any.
class RowProducts {
 public:
  RowProducts(const Kernels& kernels, const Steps& steps, int threads)
      : kernels_(kernels), steps_(steps), threads_(threads) {}

  void add(const Factor& factor) {
    factors_.emplace_back(kernels_, factor);
    bytes_ = kernels_.row_product_bytes(steps_.B, factor.in);
    scratch_ = allocate(threads_ * bytes_);
  }
  void pack(int me, int size) {
    for (PackedFactor& factor : factors_) factor.pack(me, size);
  }
  void fill_in(RowProduct& product, int chain, int me) const {
    if (factors_.empty()) return;
    product.packed = factors_[chain].data();
    product.finite_weights = factors_[chain].is_finite();
    product.scratch = static_cast<char*>(scratch_.get()) + me * bytes_;
  }

 private:
  const Kernels& kernels_;
  const Steps& steps_;
  const int threads_;
  std::deque<PackedFactor> factors_;
  size_t bytes_ = 0;
  Buffer scratch_;
};

// pack(me, size) by each member of a team, then walk(me, chain, part, scratch) over all samples and panels.
template <class Pack, class Walk>
void run(const Kernels& kernels, const Steps& steps, int chains, int threads, Pack pack, Walk walk) {
  const int64_t panels = kernels.panels(steps.H);
  const bool may_share = Clock::now().time_since_epoch().count() >= no_sharing_before.load(std::memory_order_relaxed);
  const Plan planned = plan(kernels, steps, chains, threads, may_share);
  const size_t row_bytes = kernels.scratch_bytes(steps.H, planned.of_chain.members > 1);
  const Buffer scratch = allocate(chains * steps.B * row_bytes);
  std::vector<Member::Flag> flags((chains + 1) * planned.threads);  // of the groups of each chain, and of the team

  run_team(planned.threads, [&](int me, int size) {
    const FlushSubnormals flush;
    pack(me, size);
    Member(&flags[chains * planned.threads], me, size).meet(false);

    // A team that comes out smaller, as one thread inside another parallel region, shares no rows.
    const auto [division, side_by_side, used] =
        size == planned.threads ? planned : plan(kernels, steps, chains, size, false);
    if (me >= used) return;
    const int first = side_by_side ? me / division.threads() : 0, last = side_by_side ? first : chains - 1;
    const int group = me % division.threads() / division.members, member = me % division.members;
    const int64_t b0 = bound(steps, group, division.groups), b1 = bound(steps, group + 1, division.groups);
    for (int chain = first; chain <= last; ++chain) {
      Part part{
          b0,
          b1,
          panels * member / division.members,
          panels * (member + 1) / division.members,
          {&flags[chain * planned.threads + group * division.members], member, division.members}};
      walk(me, chain, part, static_cast<char*>(scratch.get()) + (chain * steps.B + b0) * row_bytes);
      if (part.member.is_dissolved()) {
        no_sharing_before = (Clock::now() + kPauseOfSharing * part.member.waited()).time_since_epoch().count();
      }
    }
  });
}

}  // namespace

RowProductKind projection_kind(Dtype dtype, int64_t rows, int64_t in, int64_t out) {
  return kernels_of(dtype).projection_kind(rows, in, out);
}

bool has_input_gradient(Dtype dtype, int64_t rows, int64_t in, int64_t out) {
  return kernels_of(dtype).has_input_gradient(rows, in, out);
}

void recurrence(const std::vector<Chain<Forward>>& chains, Dtype dtype, Nonlinearity nonlinearity, int threads) {
  const Kernels& kernels = kernels_of(dtype);
  const Steps& steps = chains.front().job.steps;
  std::deque<PackedFactor> w_hh;
  RowProducts projections(kernels, steps, threads);
  for (const auto& [job, hidden, input] : chains) {  // x W' and h_{t-1} W': summed over the columns of both
    w_hh.emplace_back(kernels, Factor{hidden.data, hidden.column_stride, hidden.row_stride, steps.H, steps.H});
    if (job.projection.kind != kNoRowProduct)
      projections.add({input.data, input.column_stride, input.row_stride, job.projection.size, steps.H});
  }
  run(
      kernels, steps, static_cast<int>(chains.size()), threads,
      [&](int me, int size) {
        for (PackedFactor& w : w_hh) w.pack(me, size);
        projections.pack(me, size);
      },
      [&](int me, int i, Part& part, void* scratch) {
        Forward job = chains[i].job;
        projections.fill_in(job.projection, i, me);
        kernels.forward[nonlinearity](job, w_hh[i].data(), part, scratch);
      });
}

void recurrence_backward(
    const std::vector<Chain<Backward>>& chains, Dtype dtype, Nonlinearity nonlinearity, int threads) {
  const Kernels& kernels = kernels_of(dtype);
  const Steps& steps = chains.front().job.steps;
  std::deque<PackedFactor> w_hh;
  RowProducts gradients(kernels, steps, threads);
  for (const auto& [job, hidden, input] : chains) {  // delta W: summed over the rows of both
    w_hh.emplace_back(kernels, Factor{hidden.data, hidden.row_stride, hidden.column_stride, steps.H, steps.H});
    if (job.grad_x.kind != kNoRowProduct)
      gradients.add({input.data, input.row_stride, input.column_stride, steps.H, job.grad_x.size});
  }
  run(
      kernels, steps, static_cast<int>(chains.size()), threads,
      [&](int me, int size) {
        for (PackedFactor& w : w_hh) w.pack(me, size);
        gradients.pack(me, size);
      },
      [&](int me, int i, Part& part, void* scratch) {
        Backward job = chains[i].job;
        job.finite_weights = w_hh[i].is_finite();
        gradients.fill_in(job.grad_x, i, me);
        kernels.backward[nonlinearity](job, w_hh[i].data(), part, scratch);
      });
}

}  // namespace rnnkern::cpu
