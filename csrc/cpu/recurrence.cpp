#include "cpu/recurrence.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/flush.h"

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

// Bounds of `parts` runs of samples with about the same number of rows over all steps. A packed sequence's samples
// come longest first.
std::vector<int64_t> divide(const Steps& steps, int parts) {
  std::vector<int64_t> bounds(parts + 1, steps.B);
  bounds[0] = 0;
  if (!steps.batch_sizes) {
    for (int i = 1; i < parts; ++i) bounds[i] = steps.B * i / parts;
    return bounds;
  }
  const int64_t all = steps.T ? steps.offsets[steps.T - 1] + steps.batch_sizes[steps.T - 1] : 0;
  int64_t length = steps.T, done = 0, b = 0;
  for (int i = 1; i < parts; ++i) {
    for (; b < steps.B && done < all * i / parts; ++b) {
      while (length > 0 && steps.batch_sizes[length - 1] <= b) --length;
      done += length;
    }
    bounds[i] = b;
  }
  return bounds;
}

// Below this many multiply-adds a second thread costs more than it brings (opening a parallel region takes about 1 µs).
constexpr int64_t kWorkPerThread = 1 << 17;

int useful_threads(const Steps& steps, int threads) {
  const int64_t rows =
      steps.offsets && steps.T ? steps.offsets[steps.T - 1] + steps.batch_sizes[steps.T - 1] : steps.T * steps.B;
  const double work = static_cast<double>(rows) * steps.H * steps.H;
  const int64_t useful = static_cast<int64_t>(std::min(work / kWorkPerThread, 1e9)) + 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, steps.B, useful})));
}

// pack(p0, p1) over all panels, then walk(b0, b1, scratch) over all samples, by one team. The team may come out smaller
// than asked for (inside another parallel region it is one thread): each member takes every size-th share.
template <class Pack, class Walk>
void run(const Kernels& kernels, const Steps& steps, int threads, Pack pack, Walk walk) {
  const int parts = useful_threads(steps, threads);
  const std::vector<int64_t> bounds = divide(steps, parts);
  std::vector<Buffer> scratch(parts);
  for (int i = 0; i < parts; ++i) scratch[i] = allocate(kernels.scratch_bytes(steps.H, bounds[i + 1] - bounds[i]));
  const int64_t panels = kernels.panels(steps.H);

#pragma omp parallel num_threads(parts)
  {
    const FlushSubnormals flush;
    const int me = omp_get_thread_num(), size = omp_get_num_threads();
    pack(panels * me / size, panels * (me + 1) / size);
#pragma omp barrier
    for (int i = me; i < parts; i += size) walk(bounds[i], bounds[i + 1], scratch[i].get());
  }
}

}  // namespace

void recurrence(const Forward& job, const Weights& w, Dtype dtype, Nonlinearity nonlinearity, int threads) {
  const Kernels& kernels = instruction_set().kernels[dtype];
  const Buffer packed = allocate(kernels.packed_bytes(job.steps.H));
  const Factor factor{w.data, w.column_stride, w.row_stride, job.steps.H};  // h_{t-1} W': summed over W's columns
  run(
      kernels, job.steps, threads, [&](int64_t p0, int64_t p1) { kernels.pack(factor, p0, p1, packed.get()); },
      [&](int64_t b0, int64_t b1, void* scratch) {
        kernels.forward[nonlinearity](job, packed.get(), b0, b1, scratch);
      });
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
      [&](int64_t b0, int64_t b1, void* scratch) {
        Backward mine = job;
        mine.finite_weights = finite;
        kernels.backward[nonlinearity](mine, packed.get(), b0, b1, scratch);
      });
}

}  // namespace rnnkern::cpu
