// What the files of every instruction set include (isa_*.cpp), before all else: what comes after it may be compiled for an
// instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/kernel.h"

#define RNNKERN_INLINE inline __attribute__((always_inline))
