// The maths of moments: what a set of numbers is summed to, and how two such sets become one (Chan, Golub & LeVeque, "Updating
// formulae and a pairwise algorithm for computing sample variances", 1979).
#pragma once

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA::moments_math {

// Adds a set to another one. m2: the sum of squared differences from the mean; share: n_other / n of both together,
// between: n_own n_other / n. An empty set has a mean of 0 and adds nothing; sets of one and the same number keep it exactly.
template <typename F>
FASTKD_HOST_DEVICE void merge(F& mean, F& m2, F other_mean, F other_m2, double share, double between) {
  const F difference = other_mean - mean;
  mean += difference * share;
  m2 += other_m2 + difference * between * difference;
}

// Mean and m2 from sums of x - shift and of its square. What is subtracted is the smaller part, as long as the shift is no
// further from the mean than the numbers are; where nothing is left, rounding must not leave less.
template <typename F>
FASTKD_HOST_DEVICE void from_sums(F shift, F sum, F square, double inverse_count, F& mean, F& m2) {
  const F beside = sum * inverse_count;
  mean = shift + beside;
  m2 = square - sum * beside;
  m2 = m2 < 0.0 ? F{} : m2;  // NaN stays NaN
}

// The gradient of one element: mean, and what a channel's gradients give.
template <typename F>
FASTKD_HOST_DEVICE F gradient_of(F x, F mean, F slope, F flat) {
  return (x - mean) * slope + flat;
}

}  // namespace fastkd::FASTKD_ISA::moments_math
