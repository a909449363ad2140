// Subnormal numbers are flushed to zero while this lives: a vanishing chain runs through them, and some processors
// handle them in microcode, a hundred times slower. The thread's own setting comes back at the end.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rnnkern::cpu {

// How this thread computes with floating-point numbers.
#if defined(__SSE2__)
using FloatMode = unsigned;
constexpr FloatMode kFlush = 0x8000 | 0x0040;  // results, and operands
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
constexpr FloatMode kFlush = 1ull << 24;
inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = unsigned;
constexpr FloatMode kFlush = 0;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

class FlushSubnormals {
 public:
  FlushSubnormals() : before_(float_mode()) { set_float_mode(before_ | kFlush); }
  ~FlushSubnormals() { set_float_mode(before_); }

  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  const FloatMode before_;
};

}  // namespace rnnkern::cpu
