// 64-bit fixed-point arithmetic, CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA {

// floor(a b / 2^64)
FASTKD_HOST_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// A uniform integer in [0, bound) from 64 random bits, and what is left of them: the fraction of the bin.
// Each integer has floor or ceil of 2^64 / bound preimages.
struct Bin {
  uint64_t index;
  uint64_t fraction;
};
FASTKD_HOST_DEVICE Bin uniform_bin(uint64_t random, uint64_t bound) { return {multiply_high(random, bound), random * bound}; }

}  // namespace fastkd::FASTKD_ISA
