// The driver of the weight gradient: divides its rows and columns among a thread team.
#include "cpu/weight_gradient.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/member.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"

namespace rnnkern::cpu {

// The kernel reads and writes every sum once for 256 rows or less, so many rows pay for many sums. Times of oneDNN's product
// over those of the kernel, on two threads of a Xeon: 1.2 to 2.6 from (N, H, I) = (64, 64, 64) to (512, 256, 256); 0.77 at (64, 512,
// 512), 0.89 at (512, 512, 512), 0.96 at (512, 1024, 1024), 1.22 at (1024, 1024, 1024).
constexpr int64_t kFewSums = 1 << 16, kManyRows = 1 << 10;

bool has_weight_gradient(Dtype dtype, int64_t rows, int64_t H, int64_t I) {
  return dtype == kBFloat16 && instruction_set().weight_gradient && (H * I <= kFewSums || rows >= kManyRows);
}

namespace {

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 21;
// Rows that pay for sums of their own.
constexpr int64_t kRowsPerPart = 1 << 10;

StridedRows from(const StridedRows& matrix, int64_t row) {
  return {static_cast<const uint16_t*>(matrix.data) + row * matrix.stride, matrix.stride};
}

// Rows [begin, end) of all.
std::vector<RowRun> rows_between(const WeightGradient& job, int64_t begin, int64_t end) {
  std::vector<RowRun> runs;
  for (int64_t i = 0, row = 0; i < job.count; row += job.runs[i++].rows) {
    const RowRun& run = job.runs[i];
    const int64_t first = std::max(begin - row, int64_t{0}), last = std::min(end - row, run.rows);
    if (first < last)
      runs.push_back({last - first, from(run.delta, first), {from(run.x[0], first), from(run.x[1], first)}});
  }
  return runs;
}

}  // namespace

void weight_gradient(const WeightGradient& job, int threads) {
  const WeightGradientKernel& kernel = *instruction_set().weight_gradient;
  const auto panels_of = [&](int64_t columns) { return (columns + kernel.panel - 1) / kernel.panel; };
  const int64_t height = panels_of(job.H), width = panels_of(job.I[0]) + panels_of(job.I[1]);
  if (height == 0 || width == 0) return;
  int64_t rows = 0;
  for (int64_t i = 0; i < job.count; ++i) rows += job.runs[i].rows;
  const double work = static_cast<double>(rows) * job.H * (job.I[0] + job.I[1]);
  const int64_t useful = std::min<int64_t>(threads, static_cast<int64_t>(std::min(work / kWorkPerThread, 1e9)) + 1);
  // Threads that share rows pack all of them each; so rows are divided first, but no further than the sums of a part pay for,
  // and however many threads there are: the bits depend on it.
  const int64_t parts = rows < 2 * kRowsPerPart ? 1 : 2;
  const int64_t down = std::min(std::max<int64_t>(useful / parts, 1), height);
  const int64_t across = std::min(std::max<int64_t>(useful / parts / down, 1), width);
  const int64_t jobs = parts * down * across, team = std::min(useful, jobs);
  std::vector<std::vector<RowRun>> runs;
  std::vector<WeightGradient> of_part(parts, job);
  for (int64_t i = 0; i < parts; ++i) {
    runs.push_back(rows_between(job, rows * i / parts, rows * (i + 1) / parts));
    of_part[i].runs = runs[i].data();
    of_part[i].count = static_cast<int64_t>(runs[i].size());
  }
  const size_t bytes = kernel.sums_bytes(job),
               scratch_bytes = kernel.scratch_bytes((height + down - 1) / down, (width + across - 1) / across);
  const Buffer scratch = allocate(team * scratch_bytes), sums = allocate(parts * bytes);
  std::vector<Member::Flag> flags(team);
  run_team(static_cast<int>(team), [&](int me, int size) {
    for (int64_t i = me; i < jobs; i += size) {
      const int64_t part = i % parts, down_at = i / parts % down, across_at = i / parts / down;
      kernel.sum(
          of_part[part], height * down_at / down, height * (down_at + 1) / down, width * across_at / across,
          width * (across_at + 1) / across, static_cast<char*>(scratch.get()) + me * scratch_bytes,
          static_cast<char*>(sums.get()) + part * bytes);
    }
    Member(flags.data(), me, size).meet(false);
    kernel.round(job, height * me / size, height * (me + 1) / size, sums.get(), parts, bytes);
  });
}

}  // namespace rnnkern::cpu
