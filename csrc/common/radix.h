// Where the elements of a packed tensor lie, without a division for each: a block splits the index of its first element,
// its threads count on from there in 32 bits. CPU and CUDA.
#pragma once

#include "common/divisor.h"

namespace fastkd::FASTKD_ISA {

// Coordinates of an element, innermost first; the last one, beyond the axes, is not bounded.
template <int kAxes>
struct Digits {
  int64_t at[kAxes + 1];
};

constexpr int64_t kNarrow = INT64_C(1) << 30;  // an axis of at most that, and a step across it, add up to 31 bits

// An index as coordinates on axes of given sizes, innermost first, each from 1 to 2^62.
template <int kAxes>
class Radix {
 public:
  Radix() = default;
  // Axes beyond `narrow` are divided in 64 bits.
  explicit Radix(const int64_t (&sizes)[kAxes], int64_t narrow = kNarrow) {
    for (int i = 0; i < kAxes; ++i) {
      wide_axes_[i] = Divisor<uint64_t>(static_cast<uint64_t>(sizes[i]));
      narrow_axes_[i] = Divisor<uint32_t>(static_cast<uint32_t>(sizes[i] <= kNarrow ? sizes[i] : 1));
      is_wide_ = is_wide_ || sizes[i] > narrow;
    }
  }

  // Of any index from 0 to 2^62.
  FASTKD_HOST_DEVICE Digits<kAxes> split(int64_t index) const { return carry<uint64_t>(Digits<kAxes>{}, index, wide_axes_); }

  // Of the element `step` < 2^30 further on.
  FASTKD_HOST_DEVICE Digits<kAxes> advance(const Digits<kAxes>& from, uint32_t step) const {
    return is_wide_ ? carry<uint64_t>(from, step, wide_axes_) : carry<uint32_t>(from, step, narrow_axes_);
  }

 private:
  template <typename UInt>
  FASTKD_HOST_DEVICE static Digits<kAxes> carry(const Digits<kAxes>& from, uint64_t step, const Divisor<UInt> (&axes)[kAxes]) {
    Digits<kAxes> result;
    UInt rest = static_cast<UInt>(step);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAxes; ++i) {
      const UInt sum = static_cast<UInt>(from.at[i]) + rest;
      rest = axes[i].quotient(sum);
      result.at[i] = static_cast<int64_t>(sum - rest * axes[i].divisor());
    }
    result.at[kAxes] = from.at[kAxes] + static_cast<int64_t>(rest);
    return result;
  }

  Divisor<uint64_t> wide_axes_[kAxes];
  Divisor<uint32_t> narrow_axes_[kAxes];
  bool is_wide_ = false;
};

}  // namespace fastkd::FASTKD_ISA
