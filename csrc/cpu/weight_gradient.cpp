// The driver of the weight gradient: divides its rows and columns among a thread team.
#include "cpu/weight_gradient.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"

namespace rnnkern::cpu {

// The kernel reads and writes every sum once for 512 rows or less, so many rows pay for many sums. Times of oneDNN's
// product over those of the kernel, on two threads of a Xeon: 1.4 to 2.4 from (N, H, I) = (32, 64, 64) to (256, 256, 256), 0.78 at
// (64, 512, 512), 0.96 at (256, 512, 512), 0.79 at (256, 1024, 1024), 1.07 at (1024, 1024, 1024).
constexpr int64_t kFewSums = 1 << 16, kManyRows = 1 << 10;

bool has_weight_gradient(Dtype dtype, const std::vector<RowPair>& pairs, int64_t H, int64_t I) {
  if (dtype != kBFloat16 || !instruction_set().weight_gradient) return false;
  int64_t rows = 0;
  for (const RowPair& pair : pairs) rows += pair.rows;
  return H * I <= kFewSums || rows >= kManyRows;
}

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 21;

void weight_gradient(const WeightGradient& job, int threads) {
  const WeightGradientKernel& kernel = *instruction_set().weight_gradient;
  const int64_t height = (job.H + kernel.panel - 1) / kernel.panel, width = (job.I + kernel.panel - 1) / kernel.panel;
  if (height == 0 || width == 0) return;
  int64_t rows = 0;
  for (int64_t i = 0; i < job.count; ++i) rows += job.pairs[i].rows;
  const double work = static_cast<double>(rows) * job.H * job.I;
  const int64_t useful = std::min<int64_t>(threads, static_cast<int64_t>(std::min(work / kWorkPerThread, 1e9)) + 1);
  // Each packs all of x for its columns; so first the rows are divided.
  const int64_t down = std::min(useful, height), across = std::min(useful / down, width);
  const int64_t parts = down * across;
  const size_t bytes = kernel.scratch_bytes((height + down - 1) / down);
  const Buffer scratch = allocate(parts * bytes);
  run_team(static_cast<int>(parts), [&](int me, int size) {
    for (int64_t part = me; part < parts; part += size) {
      const int64_t i = part % down, j = part / down;
      kernel.run(
          job, height * i / down, height * (i + 1) / down, width * j / across, width * (j + 1) / across,
          static_cast<char*>(scratch.get()) + part * bytes);
    }
  });
}

}  // namespace rnnkern::cpu
