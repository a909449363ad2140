// Which rows of a sequence the products δᵀ x and δ W need: where a chain has vanished, all others of δ are exactly 0.
#pragma once

#include <vector>

#include "cpu/kernel.h"

namespace rnnkern::cpu {

// Rows [begin, end).
struct Run {
  int64_t begin, end;
};

// The runs of rows, in order, outside of which every element of delta is 0, and of x finite: 0 * inf is NaN, which nobody may
// leave out. Rows are looked at by kRowsAtOnce, and no longer than until one of them is needed.
constexpr int64_t kRowsAtOnce = 128;
std::vector<Run> needed_rows(
    const StridedRows& delta, const StridedRows& x, int64_t rows, int64_t H, int64_t I, Dtype, int threads);
// What lies in either.
std::vector<Run> united(std::vector<Run>, const std::vector<Run>&);

}  // namespace rnnkern::cpu
