// What launchers on the CPU share where they make patches: constants of the channels, and shares of work.
#pragma once

#include <algorithm>

#include "crop/operator.h"

namespace fastkd::crop {

constexpr int64_t kGrainBytes = 64 << 10;  // of output: work worth a thread
constexpr int64_t kGrainPlaces = 2048;
constexpr int64_t kPatternLanes = 16;  // a multiple of every instruction set's registers

struct CpuContext {
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    return empty_cpu(shape, type, strides);
  }
};

// Constants of the channels as the kernels read them.
class ChannelConstants {
 public:
  ChannelConstants(const std::vector<double>& center, const std::vector<double>& scale, int64_t channels, int64_t unit) {
    if (center.empty() && scale.empty()) return;
    // side by side: as many units as make whole registers, as long as that is short; and room for one more register
    period_ = unit > 1 && channels <= 256 ? channels * kPatternLanes : channels;
    for (int64_t i = 0; i < period_ + kPatternLanes; ++i) {
      center_.push_back(center.empty() ? 0.0 : center[i % channels]);
      scale_.push_back(scale.empty() ? 1.0 : scale[i % channels]);
    }
  }
  Normalise view() const { return {period_ > 0 ? center_.data() : nullptr, period_ > 0 ? scale_.data() : nullptr, period_}; }

 private:
  int64_t period_ = 0;
  std::vector<double> center_, scale_;
};

// Rows of the output, of elements of `size` bytes, that are worth a thread.
inline int64_t grain_rows(int64_t row_elements, int64_t size) {
  return std::max<int64_t>(1, kGrainBytes / (row_elements * size));
}

}  // namespace fastkd::crop
