// Division by numbers that are known when a kernel is launched, as a multiplication, CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA {

FASTKD_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
#endif
}

// floor(n / d) for n < 2^(w-1) and 1 <= d <= 2^(w-1), where UInt has w bits (Granlund & Montgomery, "Division by invariant
// integers using multiplication", PLDI 1994). With s = ceil(log2 d), M = floor(2^(w+s) / d) + 1 lies above 2^(w+s) / d by
// at most 1, so n M / 2^(w+s) lies above n / d by less than n / 2^(w+s) < 1 / d: too little to reach the next integer.
// M has w + 1 bits; magic is without the highest. n below 2^(w-1) keeps the sum within w bits.
template <typename UInt>
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(UInt divisor) : minus_divisor_(UInt{0} - divisor) {
    while (shift_ < 8 * sizeof(UInt) - 1 && (UInt{1} << shift_) < divisor) ++shift_;
    const unsigned __int128 excess = static_cast<unsigned __int128>((UInt{1} << shift_) - divisor) << (8 * sizeof(UInt));
    magic_ = static_cast<UInt>(excess / divisor + 1);
  }
  FASTKD_HOST_DEVICE UInt quotient(UInt n) const { return (multiply_high(n, magic_) + n) >> shift_; }
  FASTKD_HOST_DEVICE UInt remainder(UInt n, UInt quotient) const { return n + quotient * minus_divisor_; }

 private:
  UInt minus_divisor_ = ~UInt{0};  // negated here, which spares the kernels an instruction for each remainder
  UInt magic_ = 1;
  unsigned shift_ = 0;
};

}  // namespace fastkd::FASTKD_ISA
