// Device code of moments that its kernels share: sets of numbers, their results, slopes of gradients.
#pragma once

#include "common/device.cuh"
#include "moments/cuda.h"
#include "moments/math.h"

namespace fastkd::FASTKD_ISA::moments {

using namespace device;
using ::fastkd::moments::DeviceBackwardParams;
using ::fastkd::moments::DeviceParams;
using moments_math::from_sums;
using moments_math::gradient_of;
using moments_math::merge;

// A count that the compiler knows.
template <int kCount>
struct Whole {
  FASTKD_DEVICE operator int() const { return kCount; }
};

// A set of numbers.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  FASTKD_DEVICE void add(const Moments& other) {
    const double all = count + other.count, share = all > 0 ? other.count / all : 0;
    merge(mean, m2, other.mean, other.m2, share, share * count);
    count = all;
  }
};

template <typename S>
FASTKD_DEVICE void write_result(const DeviceParams& p, int64_t at, double count, double mean, double m2) {
  if (p.part_mean != nullptr) {
    p.part_mean[at] = mean;
    p.part_m2[at] = m2;
  } else {
    static_cast<S*>(p.mean)[at] = static_cast<S>(mean);
    static_cast<S*>(p.var)[at] = static_cast<S>(m2 / count);
  }
}

// What the gradients of the results of a channel say of its elements.
template <typename S>
struct Slope {
  S mean, slope, flat;

  Slope() = default;
  FASTKD_DEVICE Slope(const DeviceBackwardParams& p, int64_t i) {
    const auto at = [&](const void* data) { return data == nullptr ? 0.0 : static_cast<double>(static_cast<const S*>(data)[i]); };
    mean = static_cast<const S*>(p.mean)[i];
    slope = static_cast<S>(2 * at(p.grad_var) * p.inverse_count);
    flat = static_cast<S>(at(p.grad_mean) * p.inverse_count);
  }
  FASTKD_DEVICE S operator()(S x) const { return gradient_of(x, mean, slope, flat); }
};

// Merges the sets of a block's threads, `width` for channels (K each) and `height` for what is merged, into those of the first
// row of threads. All threads of the block come along. Shared memory: 2 K + 1 numbers a thread.
template <int K>
FASTKD_DEVICE void merge_over_height(unsigned width, unsigned height, double& count, double (&mean)[K], double (&m2)[K]) {
  const unsigned threads = thread_count(), own = thread_index(), y = own / width;
  const Shared<double> values(0, 2 * K * threads), counts(2 * K * threads * sizeof(double), threads);
  const auto publish = [&] {
#pragma unroll
    for (unsigned k = 0; k < K; ++k) {
      values.store(2 * k * threads + own, mean[k]);
      values.store((2 * k + 1) * threads + own, m2[k]);
    }
    counts.store(own, count);
  };
  if (height == 1) return;
  publish();
  unsigned step = 1;
  while (2 * step < height) step *= 2;
  for (; step > 0; step /= 2) {
    block_barrier();
    if (y >= step || y + step >= height) continue;
    const unsigned other = own + step * width;
    const double others = counts.load(other), all = count + others, share = all > 0 ? others / all : 0;
#pragma unroll
    for (unsigned k = 0; k < K; ++k) {
      merge(mean[k], m2[k], values.load(2 * k * threads + other), values.load((2 * k + 1) * threads + other), share,
            share * count);
    }
    count = all;
    publish();
  }
}

}  // namespace fastkd::FASTKD_ISA::moments
