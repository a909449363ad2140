#include "cpu/needed_rows.h"

#include <algorithm>

#include "cpu/team.h"

namespace rnnkern::cpu {
namespace {

// Numbers as their bits: those of the sign and the exponent tell all that is asked here.
template <class Bits>
bool is_zero(const Bits* row, int64_t size) {
  Bits seen = 0;
  for (int64_t i = 0; i < size; ++i) seen |= row[i];
  return static_cast<Bits>(seen << 1) == 0;
}

template <class Bits, Bits kExponent>
bool is_finite(const Bits* row, int64_t size) {
  Bits infinite = 0;
  for (int64_t i = 0; i < size; ++i) infinite |= (row[i] & kExponent) == kExponent;
  return !infinite;
}

template <class Bits, Bits kExponent>
bool is_needed(const StridedRows& delta, const StridedRows& x, int64_t H, int64_t I, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!is_zero(static_cast<const Bits*>(delta.data) + row * delta.stride, H)) return true;
  }
  for (int64_t row = begin; row < end; ++row) {
    if (!is_finite<Bits, kExponent>(static_cast<const Bits*>(x.data) + row * x.stride, I)) return true;
  }
  return false;
}

constexpr decltype(&is_needed<uint32_t, 0x7f800000>) kIsNeeded[kDtypes] = {
    is_needed<uint32_t, 0x7f800000>, is_needed<uint64_t, 0x7ff0000000000000>, is_needed<uint16_t, 0x7f80>,
    is_needed<uint16_t, 0x7c00>};

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 1 << 16;

}  // namespace

std::vector<Run> needed_rows(
    const StridedRows& delta, const StridedRows& x, int64_t rows, int64_t H, int64_t I, Dtype dtype, int threads) {
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce, elements = rows * (H + I);
  const auto end_of = [&](int64_t block) { return std::min(rows, (block + 1) * kRowsAtOnce); };
  std::vector<char> needed(blocks);
  // In turns: the blocks that take long, those of zeros, are often neighbours.
  run_team(static_cast<int>(std::min<int64_t>(threads, elements / kElementsPerThread + 1)), [&](int me, int size) {
    for (int64_t i = me; i < blocks; i += size) {
      needed[i] = kIsNeeded[dtype](delta, x, H, I, i * kRowsAtOnce, end_of(i));
    }
  });
  std::vector<Run> runs;
  for (int64_t i = 0; i < blocks; ++i) {
    if (!needed[i]) continue;
    if (i > 0 && needed[i - 1]) runs.back().end = end_of(i);
    else runs.push_back({i * kRowsAtOnce, end_of(i)});
  }
  return runs;
}

std::vector<Run> united(std::vector<Run> runs, const std::vector<Run>& others) {
  runs.insert(runs.end(), others.begin(), others.end());
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  std::vector<Run> all;
  for (const Run& run : runs) {
    if (!all.empty() && run.begin <= all.back().end) all.back().end = std::max(all.back().end, run.end);
    else all.push_back(run);
  }
  return all;
}

}  // namespace rnnkern::cpu
