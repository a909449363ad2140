// Aligned memory for what the kernels pack and keep while they run.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/kernel.h"

namespace rnnkern::cpu {

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using Buffer = std::unique_ptr<void, Free>;

inline Buffer allocate(size_t bytes) {
  return Buffer(::operator new(std::max<size_t>(bytes, 1), std::align_val_t{kAlignment}));
}

}  // namespace rnnkern::cpu
