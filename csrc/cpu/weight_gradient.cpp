// The driver of the weight gradient: divides its rows and columns among a thread team.
#include "cpu/weight_gradient.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/flush.h"
#include "cpu/member.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"

namespace rnnkern::cpu {

// The kernel reads and writes every sum once for 256 rows or less, so many rows pay for many sums. Times of oneDNN's product
// over those of the kernel, on two threads of a Xeon: 1.2 to 2.6 from (N, H, I) = (64, 64, 64) to (512, 256, 256); 0.77 at (64, 512,
// 512), 0.89 at (512, 512, 512), 0.96 at (512, 1024, 1024), 1.22 at (1024, 1024, 1024).
constexpr int64_t kFewSums = 1 << 16, kManyRows = 1 << 10;

// In float32 PyTorch's products run at 0.87 of the processor's peak, and one gradient by the kernel takes 1.1 times as long. Where x
// is not much narrower than h, both of a layer's and the bias's are faster by it: a training step was 1.04 times as fast at (B, H) = (4,
// 64), 1.06 at (16, 64) and (64, 128), 1.09 at (64, 64), 1.03 at (64, 256), 1.02 at (16, 256) and (64, 512); 0.96 at (1, 128) and (4, 256), and
// with I = 1 0.9 at (64, 256) and 0.96 at (64, 128).
constexpr int64_t kFewSumsInFloat32 = 1 << 12, kManyRowsInFloat32 = 1 << 12, kNarrowest = 4;

namespace {

// Null: there is none.
const WeightGradientKernel* kernel_of(Dtype dtype) {
  auto set = kInstructionSets;
  while (*set != &instruction_set()) ++set;
  while (*set && !(*set)->weight_gradient[dtype]) ++set;
  return *set ? (*set)->weight_gradient[dtype] : nullptr;
}

}  // namespace

bool has_weight_gradient(Dtype dtype, int64_t rows, int64_t H, int64_t I) {
  return dtype == kBFloat16 && kernel_of(dtype) && (H * I <= kFewSums || rows >= kManyRows);
}

bool has_layer_gradients(Dtype dtype, int64_t rows, int64_t H, int64_t I) {
  if (dtype == kBFloat16) return has_weight_gradient(dtype, rows, H, I) && has_weight_gradient(dtype, rows, H, H);
  const bool few_sums = H * std::max(H, I) <= kFewSumsInFloat32;
  return kernel_of(dtype) && kNarrowest * I >= H && rows >= (few_sums ? kManyRows : kManyRowsInFloat32);
}

namespace {

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 21;
// Rows that pay for sums of their own.
constexpr int64_t kRowsPerPart = 1 << 10;

// Rows [begin, end) of all, whose elements have `size` bytes.
std::vector<RowRun> rows_between(const WeightGradient& job, int64_t begin, int64_t end, int64_t size) {
  const auto from = [size](const StridedRows& matrix, int64_t row) -> StridedRows {
    return {static_cast<const char*>(matrix.data) + row * matrix.stride * size, matrix.stride};
  };
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

void weight_gradient(const WeightGradient& job, Dtype dtype, int threads) {
  const WeightGradientKernel& kernel = *kernel_of(dtype);
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
    runs.push_back(rows_between(job, rows * i / parts, rows * (i + 1) / parts, kernel.element_size));
    of_part[i].runs = runs[i].data();
    of_part[i].count = static_cast<int64_t>(runs[i].size());
  }
  const size_t bytes = kernel.sums_bytes(job),
               scratch_bytes = kernel.scratch_bytes((height + down - 1) / down, (width + across - 1) / across);
  const Buffer scratch = allocate(team * scratch_bytes), sums = allocate(parts * bytes);
  std::vector<Member::Flag> flags(team);
  run_team(static_cast<int>(team), [&](int me, int size) {
    const FlushSubnormals flush;
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
