// Where the elements of a packed tensor lie, without a division for each: a block splits the index of its first element,
// its threads count on from there in 32 bits. CPU and CUDA.
#pragma once

#include "common/divisor.h"

namespace fastkd::FASTKD_ISA {

constexpr int64_t kNarrow = INT64_C(1) << 29;  // sums and differences of some numbers up to that fit 32 bits

// Coordinates, innermost first; the last one, beyond the axes, is not bounded.
template <int kAxes>
struct Digits {
  int64_t at[kAxes + 1];
};
// The same on short axes. over[i]: how often axis i began anew on the way; of the last axis, how much further the last
// coordinate is.
template <int kAxes>
struct NarrowDigits {
  uint32_t at[kAxes];
  uint32_t over[kAxes];
};

// Indices as coordinates on axes of given sizes, innermost first, each from 1 to 2^62.
template <int kAxes>
class Radix {
 public:
  Radix() = default;
  explicit Radix(const int64_t (&sizes)[kAxes]) {
    for (int i = 0; i < kAxes; ++i) {
      wide_[i] = Divisor<uint64_t>(static_cast<uint64_t>(sizes[i]));
      narrow_[i] = Divisor<uint32_t>(sizes[i] <= kNarrow ? static_cast<uint32_t>(sizes[i]) : 1);
    }
  }

  // Of any index from 0 to 2^62.
  FASTKD_HOST_DEVICE Digits<kAxes> split(int64_t index) const {
    Digits<kAxes> result;
    uint64_t rest = static_cast<uint64_t>(index);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAxes; ++i) {
      const uint64_t quotient = wide_[i].quotient(rest);
      result.at[i] = static_cast<int64_t>(wide_[i].remainder(rest, quotient));
      rest = quotient;
    }
    result.at[kAxes] = static_cast<int64_t>(rest);
    return result;
  }

  // Of the element `step` further on, step and all axes up to kNarrow.
  FASTKD_HOST_DEVICE NarrowDigits<kAxes> advance(const Digits<kAxes>& from, uint32_t step) const {
    NarrowDigits<kAxes> result;
    uint32_t rest = step;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAxes; ++i) {
      const uint32_t sum = static_cast<uint32_t>(from.at[i]) + rest;
      rest = narrow_[i].quotient(sum);
      result.at[i] = narrow_[i].remainder(sum, rest);
      result.over[i] = rest;
    }
    return result;
  }

 private:
  Divisor<uint64_t> wide_[kAxes];
  Divisor<uint32_t> narrow_[kAxes];
};

}  // namespace fastkd::FASTKD_ISA
