// Where a problem lies, and the posterior of its low component, on the GPU.
#pragma once

#include <cstring>

#include "common/bits.h"
#include "common/device.cuh"
#include "gmm/cuda.h"
#include "gmm/fit.h"

namespace fastkd::FASTKD_ISA::gmm {

using namespace device;
using namespace gmm_math;
using ::fastkd::gmm::Layout;

// Where a problem lies; nothing, and not valid, where offsets or lengths are not what the CPU would take.
struct Extent {
  int64_t begin = 0;         // in the values
  int64_t packed_begin = 0;  // in packed tensors
  int64_t size = 0;
  bool valid = false;
};

FASTKD_DEVICE Extent extent_of(const Layout& layout, int64_t b) {
  if (layout.offsets == nullptr) {
    const int64_t size = layout.lengths != nullptr ? layout.lengths[b] : layout.columns;
    if (size < 0 || size > layout.columns) return {};
    return {b * layout.stride, b * layout.columns, size, true};
  }
  const int64_t begin = layout.offsets[b], end = layout.offsets[b + 1];
  if (begin < 0 || begin > end || end > layout.elements) return {};
  if ((b == 0 && begin != 0) || (b == layout.problems - 1 && end != layout.elements)) return {};
  return {begin, begin, end - begin, true};
}

FASTKD_DEVICE bool is_finite(double x) { return x - x == 0.0; }

constexpr double kLog2E = 1.4426950408889634;

// 2^x for |x| <= 1/2: a polynomial of relative error 2e-9, so that what counts is the rounding of its last step, 2^-24; the
// special unit's 2^x errs by up to 2^-22.
FASTKD_DEVICE float exp2_near_0(float x) {
  constexpr float c[] = {1.0f, 0.6931471825f, 0.2402264774f, 0.0555033237f, 0.0096184369f, 0.0013398873853f, 0.0001535336196f};
  float p = c[6];
#pragma unroll
  for (int k = 5; k >= 0; --k) p = p * x + c[k];
  return p;
}

// 2^-|x|, relative error 2^-23; 0 where |x| >= 126. Comparisons are of the higher words: fp64 has enough to do.
FASTKD_DEVICE float power_of_minus(double x) {
  constexpr double kRound = 0x1.8p52;              // added, it leaves the nearest integer in the lowest bits
  constexpr unsigned kHighestOf126 = 0x405f8000u;  // of the bits of 126.0
  const uint64_t bits = bits_as<uint64_t>(x);
  const unsigned high = static_cast<unsigned>(bits >> 32) & 0x7fffffffu, near = high < kHighestOf126 ? high : kHighestOf126;
  const double exponent = bits_as<double>(static_cast<uint64_t>(near | 0x80000000u) << 32 | static_cast<unsigned>(bits));
  const double shifted = exponent + kRound, rest = exponent - (shifted - kRound);
  const float scale = bits_as<float>((static_cast<unsigned>(bits_as<uint64_t>(shifted)) + 127u) << 23);
  const float power = exp2_near_0(static_cast<float>(rest)) * scale;
  return high < kHighestOf126 ? power : 0.0f;
}

// Parameters that have a posterior.
FASTKD_DEVICE bool valid_parameters(const double* weight, const double* mean, const double* deviation) {
  bool valid = true;
  for (int k = 0; k < 2; ++k) {
    valid = valid && weight[k] >= 0 && deviation[k] >= 0 && is_finite(weight[k]) && is_finite(mean[k]) && is_finite(deviation[k]);
  }
  return valid;
}

// Posterior of a value as a double or a float.
template <typename Out>
FASTKD_DEVICE Out posterior_of(const PosteriorMixture& mixture, double x) {
  const double d = mixture.log_odds(clamp(mixture.frame.enter(x), mixture.bottom, mixture.top));
  Out low;
  if constexpr (std::is_same_v<Out, double>) {
    double high;
    responsibilities(d, device::exp(-magnitude(d)), low, high);
  } else {
    const float e = power_of_minus(d * kLog2E), smaller = e * reciprocal(1.0f + e);
    low = d > 0 ? 1.0f - smaller : smaller;
  }
  return !is_finite(x) ? Out(0) : mixture.decided ? static_cast<Out>(mixture.decision) : low;
}

}  // namespace fastkd::FASTKD_ISA::gmm
