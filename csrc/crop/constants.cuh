// center and scale of the channels on their way to the CUDA kernels of crop. A few travel with the launch, as parameters:
// no copy from the host, nothing to wait for, captured in a graph like everything else. More go to a workspace the same way.
#pragma once

#include <algorithm>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "crop/math.h"
#include "crop/segment.cuh"

namespace fastkd::crop {
namespace {

using namespace device;

constexpr unsigned kFewChannels = 32;
constexpr unsigned kConstantsShared = 2 * kFewChannels * sizeof(double);  // bytes

// What a kernel gets.
struct Constants {
  const double* many;  // [2, channels], where there are more than a few
  int32_t channels;    // 0: nothing to do
  double few[2][kFewChannels];
};

// Puts a few constants where every thread finds them; all threads of the block come here.
class ConstantsOnDevice {
 public:
  FASTKD_DEVICE explicit ConstantsOnDevice(const Constants& constants)
      : many_(constants.many), channels_(constants.channels), centers_(0, kFewChannels), scales_(kScales, kFewChannels) {
    if (channels_ == 0 || many_ != nullptr) return;
    const unsigned i = thread_index();
    if (i < static_cast<unsigned>(channels_)) {
      centers_.store(i, constants.few[0][i]);
      scales_.store(i, constants.few[1][i]);
    }
    block_barrier();
  }
  FASTKD_DEVICE bool any() const { return channels_ != 0; }
  FASTKD_DEVICE double center(int channel) const { return many_ != nullptr ? many_[channel] : centers_.load(channel); }
  FASTKD_DEVICE double scale(int channel) const { return many_ != nullptr ? many_[channels_ + channel] : scales_.load(channel); }

 private:
  static constexpr unsigned kScales = kFewChannels * sizeof(double);
  const double* many_;
  int channels_;
  Shared<double> centers_, scales_;
};

// ---- elements as fp64, which normalisation runs in -----------------------------------------------

FASTKD_DEVICE double widen(double x) { return x; }
FASTKD_DEVICE double widen(float x) { return x; }
FASTKD_DEVICE double widen(BFloat16 x) { return to_compute(x); }
FASTKD_DEVICE double widen(Float16 x) { return to_compute(x); }
// In the lowest bits of 2^52, then subtracted: additions are four times as fast as conversions.
FASTKD_DEVICE double widen(uint8_t x) { return bit_cast<double>(UINT64_C(0x4330000000000000) | x) - 0x1p52; }

template <typename Out>
FASTKD_DEVICE Out narrow(double x) {
  return from_compute<Out>(static_cast<Compute<Out>>(x));
}

// ---- the way to the device -----------------------------------------------------------------------

constexpr unsigned kChunk = 256;  // doubles in the parameters of a launch, of which CUDA allows 4 KiB

struct ChunkParams {
  double* to;
  unsigned count;
  double values[kChunk];
};

FASTKD_KERNEL(kChunk) constants_kernel(const ChunkParams p) {
  if (thread_index() < p.count) p.to[thread_index()] = p.values[thread_index()];
}

// The constants, and the workspace that holds many of them, to be kept until the kernel is launched.
struct PlacedConstants {
  Constants constants{};
  std::optional<Tensor> workspace;
};

inline PlacedConstants place_constants(const DeviceContext& context, const std::vector<double>& center,
                                       const std::vector<double>& scale, int64_t channels) {
  PlacedConstants placed;
  Constants& constants = placed.constants;
  if ((center.empty() && scale.empty()) || channels == 0) return placed;
  constants.channels = static_cast<int32_t>(channels);
  const auto value = [&](int64_t i) {
    if (i < channels) return center.empty() ? 0.0 : center[i];
    return scale.empty() ? 1.0 : scale[i - channels];
  };
  if (channels <= kFewChannels) {
    for (int64_t i = 0; i < channels; ++i) constants.few[0][i] = value(i), constants.few[1][i] = value(channels + i);
    return placed;
  }
  placed.workspace = context.empty({2, channels}, ScalarType::Double);
  double* const to = static_cast<double*>(placed.workspace->mutable_data_ptr());
  for (int64_t first = 0; first < 2 * channels; first += kChunk) {
    ChunkParams chunk{to + first, static_cast<unsigned>(std::min<int64_t>(kChunk, 2 * channels - first)), {}};
    for (unsigned i = 0; i < chunk.count; ++i) chunk.values[i] = value(first + i);
    context.launch("crop_constants", constants_kernel, {1, kChunk}, chunk);
  }
  constants.many = to;
  return placed;
}

}  // namespace
}  // namespace fastkd::crop
