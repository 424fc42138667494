// The maths of a mixture of two 1-D Gaussians, for one double or for a register of them, on CPU and GPU.
//
// Density of component k at u: log(w_k N(u; m_k, v_k)) = c_k - h_k (u - m_k)^2, with h = 1 / (2 v) and
// c = log w - log(2 pi v) / 2. The E-step is one sigmoid of the difference d of the two: with e = exp(-|d|), the
// larger responsibility is 1 / (1 + e), the smaller e / (1 + e), and the log-likelihood is the larger density + log(1 + e).
//
// The M-step is scikit-learn's: n_k = sum r + 10 eps, m_k = sum(r u) / n_k, v_k = sum(r (u - m_k)^2) / n_k + reg, weights
// n_k over their sum. Its sums are taken about a centre, the mean before the step, so that nothing cancels:
//   delta = (s1 + 10 eps (origin - centre)) / n_k,  m_k = centre + delta,  v_k = (s2 - 2 delta s1 + delta^2 s0) / n_k + reg
// where origin is the place of 0 in the units of u: the 10 eps pull there. Sample weights scale the 10 eps by their mean.
//
// Everything happens in a frame in which the data span about 1, so that squares neither overflow nor underflow for
// any input. Its scale is a power of two: without normalisation, the frame costs no rounding but that of x - min x.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA::gmm_math {

constexpr double kLargest = 1.7976931348623157e308;
constexpr double kEpsilon = 2.220446049250313e-16;
constexpr double kLogTwoPi = 1.8378770664093454836;
constexpr double kFar = 0x1p40;    // times the span: as good as infinitely far, and its square still leaves linear terms bits
constexpr double kNear = 0x1p-60;  // times the span: as good as one point

// The compiler's own names off the GPU: no library header, whose inline functions would not be of this instruction set.
#if defined(__CUDA_ARCH__)
FASTKD_HOST_DEVICE double natural_log(double x) { return ::log(x); }
FASTKD_HOST_DEVICE double square_root(double x) { return ::sqrt(x); }
#else
FASTKD_HOST_DEVICE double natural_log(double x) { return __builtin_log(x); }
FASTKD_HOST_DEVICE double square_root(double x) { return __builtin_sqrt(x); }
#endif

FASTKD_HOST_DEVICE double clamp(double x, double low, double high) { return x > low ? (x < high ? x : high) : low; }
FASTKD_HOST_DEVICE double larger(double a, double b) { return a > b ? a : b; }
FASTKD_HOST_DEVICE double magnitude(double x) { return x < 0 ? -x : x; }

// The power of two that brings x >= 0 into [1, 2), as far as it is a normal number.
FASTKD_HOST_DEVICE double inverse_power_of_two(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int64_t exponent = (bits >> 52) - 1023;  // -1023 for subnormal x
  const int64_t inverse = exponent < -1022 ? 1022 : exponent > 1022 ? -1022 : -exponent;
  bits = (inverse + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// ---- frames ------------------------------------------------------------------------------------

// u = (x scale - shift) gain
struct Frame {
  double scale, shift, gain;

  template <typename V>
  FASTKD_HOST_DEVICE V enter(V x) const {
    return (x * scale - shift) * gain;
  }
  FASTKD_HOST_DEVICE double leave(double u) const { return (u / gain + shift) / scale; }
  FASTKD_HOST_DEVICE double enter_length(double x) const { return x * scale * gain; }
  FASTKD_HOST_DEVICE double leave_length(double u) const { return u / gain / scale; }
  FASTKD_HOST_DEVICE double log_jacobian() const { return natural_log(scale) + natural_log(gain); }
};

// Frame of data in [low, high], low < high: [0, 1] exactly when normalising, else about the larger of span and unit.
FASTKD_HOST_DEVICE Frame frame_of(double low, double high, double unit, bool normalize) {
  const double span = high - low;  // may overflow
  const double scale = inverse_power_of_two(clamp(normalize ? span : larger(span, unit), 0, kLargest));
  const double shift = low * scale;
  return {scale, shift, normalize ? 1.0 / (high * scale - shift) : 1.0};
}

// Frame about a point, for values of any size: x - origin in units of about `unit`; infinite where that overflows.
FASTKD_HOST_DEVICE Frame frame_about(double origin, double unit) {
  const double power = inverse_power_of_two(clamp(unit, 0, kLargest));
  const double down = power < 1 ? power : 1, up = power < 1 ? 1 : power;
  return {down, origin * down, up};
}

// ---- the mixture -------------------------------------------------------------------------------

struct Mixture {
  double weight[2], mean[2], variance[2];
};

// What the E-step needs of it.
struct Densities {
  double mean[2], constant[2], half_precision[2];
};

FASTKD_HOST_DEVICE Densities densities(const Mixture& mixture) {
  Densities result;
  for (int k = 0; k < 2; ++k) {
    result.mean[k] = mixture.mean[k];
    result.half_precision[k] = 0.5 / mixture.variance[k];
    result.constant[k] = natural_log(larger(mixture.weight[k], 0x1p-1000)) - 0.5 * (natural_log(mixture.variance[k]) + kLogTwoPi);
  }
  return result;
}

// From one exponential to the responsibilities: d = log-odds of component 0, e = exp(-|d|).
template <typename V>
FASTKD_HOST_DEVICE void responsibilities(V d, V e, V& low, V& high) {
  const V larger_one = 1.0 / (1.0 + e), smaller_one = e * larger_one;
  low = d > 0.0 ? larger_one : smaller_one;
  high = d > 0.0 ? smaller_one : larger_one;
}

// ---- the M-step --------------------------------------------------------------------------------

// Sums of r, r (u - centre) and r (u - centre)^2 for each component.
struct Moments {
  double s0[2], s1[2], s2[2];
};

struct Regularisation {
  double mass;      // 10 eps, in units of the mean sample weight
  double origin;    // where that mass sits: at 0, or on the way there
  double variance;  // reg_covar in the frame
  double floor;     // below this variance the data's own rounding begins
};

FASTKD_HOST_DEVICE Regularisation regularisation(const Frame& frame, double low, double high, double reg_covar, bool normalize,
                                                 double mean_weight) {
  const double span = frame.enter(high) - frame.enter(low);
  // where 0 is far beyond the data (1e16 and 1e16 + 2), 10 eps of mass there would tear the means off them
  const double origin = clamp(-frame.shift, -0x1p20 * span, 0x1p20 * span);
  const double variance = normalize ? reg_covar : reg_covar * frame.scale * frame.scale;
  // one of the two is no less than about eps^2, the frame being of the size of the span or of sqrt(reg_covar)
  const double floor = larger(span * span, variance) * (kEpsilon * kEpsilon);
  return {10 * kEpsilon * mean_weight, normalize ? 0.0 : origin, variance, floor};
}

// The mixture after the M-step. *cancelled is set where a mean moved so far, in its new deviations, that its variance
// lost more than 20 bits: take the sums again about the new means.
FASTKD_HOST_DEVICE Mixture maximise(const Moments& sums, const double (&centre)[2], const Regularisation& reg, bool* cancelled) {
  Mixture result;
  double n[2];
  *cancelled = false;
  for (int k = 0; k < 2; ++k) {
    n[k] = sums.s0[k] + reg.mass;
    const double delta = (sums.s1[k] + reg.mass * (reg.origin - centre[k])) / n[k];
    const double squares = sums.s2[k] - 2 * delta * sums.s1[k] + delta * delta * sums.s0[k];
    result.mean[k] = centre[k] + delta;
    result.variance[k] = larger(larger(squares, 0) / n[k] + reg.variance, reg.floor);
    *cancelled = *cancelled || result.variance[k] < 0x1p-20 * (sums.s2[k] / n[k]);
  }
  for (int k = 0; k < 2; ++k) result.weight[k] = n[k] / (n[0] + n[1]);
  return result;
}

}  // namespace fastkd::FASTKD_ISA::gmm_math
