// What crosses between the drivers (recurrence.cpp), the bindings and the kernels of each instruction set.
//
// T steps, B samples, H hidden units. Pointers are raw, strides are in elements, the last dimension has stride 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/member.h"

namespace rnnkern::cpu {

enum Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };
enum Nonlinearity : int { kTanh, kRelu, kNonlinearities };

// Which rows a step has, and in which order the steps are walked.
struct Steps {
  int64_t T, B, H;
  const int64_t* batch_sizes;  // (T), non-increasing; null: every step has B rows
  const int64_t* offsets;      // (T), the first packed row of each step; null with batch_sizes
  bool reverse;

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t all_rows() const { return !batch_sizes ? T * B : T == 0 ? 0 : offsets[T - 1] + batch_sizes[T - 1]; }
};

// The rows of a (T, B, H) or packed (N, H) tensor of element type S.
template <class S>
struct Rows {
  S* data;
  int64_t step_stride;  // unused when packed
  int64_t row_stride;

  S* at(const Steps& steps, int64_t t, int64_t b) const {
    return data + (steps.offsets ? steps.offsets[t] * row_stride : t * step_stride) + b * row_stride;
  }
  S* at(int64_t b) const { return data + b * row_stride; }
};

// The same, of an element type that only the kernel knows.
struct AnyRows {
  void* data;
  int64_t step_stride, row_stride;

  template <class S>
  Rows<S> as() const {
    return {static_cast<S*>(data), step_stride, row_stride};
  }
};

// How the recurrence multiplies all rows by W_ih on its way: within each step, or a few steps' rows at a time between them.
enum RowProductKind : int { kNoRowProduct, kInSteps, kBetweenSteps };

// The input's projection, or the gradient of the input (between steps only), where the kernels say that they are faster than PyTorch's
// product over all steps, and steps are dense.
struct RowProduct {
  RowProductKind kind = kNoRowProduct;
  AnyRows rows{};  // (T, B, size): x, or its gradient
  int64_t size = 0;
  // For the drivers to fill in:
  const void* packed = nullptr;  // the factor
  bool finite_weights = false;   // see below
  void* scratch = nullptr;       // one thread's
};

struct Forward {
  Steps steps;
  AnyRows z;   // like h; may be h itself; unused where steps do their own projection
  AnyRows h0;  // (B, H)
  AnyRows h;
  const void* bias = nullptr;  // (H), to be added to every row of z; null for none
  RowProduct projection{};     // z = x W_ih'
};

struct Backward {
  Steps steps;
  AnyRows grad_h;   // like h
  AnyRows grad_hn;  // (B, H); data is null for zeros
  AnyRows h;
  AnyRows delta;    // like h
  AnyRows grad_h0;  // (B, H)
  double clip;
  double* stats;        // (4, T, B), zeroed by the caller; null for none
  bool finite_weights;  // 0 * w_hh is 0, so that a chain of zeros needs no product
  RowProduct grad_x{};  // <- delta W_ih
};

// A factor (in, out) of a product rows(., in) x factor, element (i, o) at data + i*in_stride + o*out_stride.
struct Factor {
  const void* data;
  int64_t in_stride, out_stride, in, out;
};

// What one thread takes through the whole sequence: rows [b0, b1), of which it computes the hidden units of panels [p0, p1).
// Rows are independent of each other. The hidden units of a row are not: the threads that share them meet at every step.
struct Part {
  int64_t b0, b1, p0, p1;
  Member member;

  bool is_shared() const { return member.size() > 1; }
  // Of its rows, how many step t has: the first ones.
  int64_t rows_of(const Steps& steps, int64_t t) const {
    const int64_t rows = steps.rows(t);
    return rows < b0 ? 0 : (rows < b1 ? rows : b1) - b0;
  }
};

// The kernels of one instruction set for one dtype.
struct Kernels {
  int64_t work_per_meeting;        // multiply-adds in the time that a meeting of threads takes, or a little more
  int64_t (*panels)(int64_t out);  // the packed factor is made of so many panels
  size_t (*packed_bytes)(int64_t in, int64_t out);
  size_t (*scratch_bytes)(int64_t H, bool shared);  // for each row, a multiple of kAlignment
  // Fills panels [p0, p1); returns whether every element was finite.
  bool (*pack)(const Factor&, int64_t p0, int64_t p1, void* packed);
  // Scratch is that of the part's rows; threads that share rows share it.
  void (*forward[kNonlinearities])(const Forward&, const void* packed, Part&, void* scratch);
  void (*backward[kNonlinearities])(const Backward&, const void* packed, Part&, void* scratch);
  // The fastest way for so many rows (rows, in) a step and a factor (in, out).
  RowProductKind (*projection_kind)(int64_t rows, int64_t in, int64_t out);
  bool (*has_input_gradient)(int64_t rows, int64_t in, int64_t out);
  size_t (*row_product_bytes)(int64_t rows, int64_t in);  // a thread's scratch, a multiple of kAlignment
};

constexpr size_t kAlignment = 64;  // of packed and scratch

// Rows of a matrix, `stride` elements apart.
struct StridedRows {
  const void* data;
  int64_t stride;
};

// Some rows of delta (n, H), and of the x (n, I) that are multiplied with it.
constexpr int kFactors = 2;
struct RowRun {
  int64_t rows;
  StridedRows delta, x[kFactors];
};

// grad[i] (H, I[i]) <- the sum of delta' x[i] over all runs, and delta_sum (H) <- that of delta. I = 0 for one that nobody wants.
struct WeightGradient {
  const RowRun* runs;
  int64_t count, H, I[kFactors];
  void* grad[kFactors];
  void* delta_sum = nullptr;  // null: nobody wants it
};

// Its kernel. Rows of the gradients are divided in panels of so many, and columns, one gradient's after the other's.
struct WeightGradientKernel {
  int64_t element_size, panel;
  size_t (*scratch_bytes)(int64_t height, int64_t width);  // of a thread that takes so many panels
  size_t (*sums_bytes)(const WeightGradient&);
  // sums <- of these panels, in float32
  void (*sum)(
      const WeightGradient&, int64_t row0, int64_t row1, int64_t column0, int64_t column1, void* scratch, void* sums);
  // The gradients, rows of these panels <- `count` sums, `stride` bytes apart.
  void (*round)(const WeightGradient&, int64_t row0, int64_t row1, void* sums, int64_t count, size_t stride);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels* kernels[kDtypes];  // null: those of the next set are as good
  const WeightGradientKernel* weight_gradient[kDtypes] =
      {};  // null: the next set's; if none has one, PyTorch's product is as good
};

// One per isa_*.cpp.
extern const InstructionSet kGeneric;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx512Bf16;
extern const InstructionSet kAmx;
#endif

}  // namespace rnnkern::cpu
