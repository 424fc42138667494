// What the formulas of math.h need of the GPU, and logarithms and reciprocals of a row's sums.
#pragma once

#include "common/device.cuh"
#include "common/log.h"
#include "divergence/math.h"

namespace fastkd::FASTKD_ISA::divergence {

using namespace device;
using namespace divergence_math;

// e^x
template <typename T>
FASTKD_DEVICE Compute<T> exp_of(Compute<T> x) {
  return exp_units<T>(x * kPerUnit<T>);
}

// ln x for normal x > 0, within about an ulp; some number where x is NaN. The library's takes care of every float, and so many
// registers that rows would not fit.
FASTKD_DEVICE float log_number(float x) {
  int bits;
  memcpy(&bits, &x, sizeof bits);
  const int n = (bits - 0x3f3504f3) >> 23;
  bits -= n * (1 << 23);
  float mantissa;
  memcpy(&mantissa, &bits, sizeof mantissa);
  return log_of_parts(static_cast<float>(n), mantissa - 1.0f);
}
FASTKD_DEVICE double log_number(double x) { return device::log(x); }
// The same, but NaN stays one.
template <typename S>
FASTKD_DEVICE S log_normal(S x) {
  return log_number(x) + (x - x);
}

// ln z of a sum of exponentials, absolute error 3e-8 for float: the logarithm of the mantissa in float, the rest exact. The
// library's double logarithm would take a third of the time of a bf16 row.
template <typename S>
FASTKD_DEVICE double log_sum(double z) {
  if constexpr (sizeof(S) == 8) {
    return device::log(z);
  } else {
    int64_t bits;
    memcpy(&bits, &z, sizeof bits);
    const int64_t n = (bits - 0x3fe6a09e00000000) >> 52;  // mantissa in [0.707, 1.414)
    bits -= n * (INT64_C(1) << 52);
    double mantissa;
    memcpy(&mantissa, &bits, sizeof mantissa);
    const float rounded = static_cast<float>(mantissa);
    const float rest = static_cast<float>(mantissa - rounded) * reciprocal(rounded);
    return static_cast<double>(n) * 0.693147180559945309417 + (log_normal(rounded) + rest) + (z - z);  // NaN stays one
  }
}

// 1 / x within an ulp, for x in the range of float. The division of doubles is a call, around which all that a thread holds
// would be spilled.
FASTKD_DEVICE double inverse(double x) {
  double result = static_cast<double>(reciprocal(static_cast<float>(x)));
  result *= 2.0 - x * result;
  return result * (2.0 - x * result);
}
template <typename S>
FASTKD_DEVICE double inverse_sum(double z) {
  return sizeof(S) == 8 ? 1.0 / z : inverse(z);
}

// 1 / T, but no more than what leaves differences of logits finite, however small T is.
template <typename S>
FASTKD_DEVICE S inverse_of(double temperature) {
  if constexpr (sizeof(S) == 8) {
    const S result = 1.0 / temperature;
    return result < 0x1p1000 ? result : 0x1p1000;
  } else {
    const double bounded = temperature > 0x1p-100 ? temperature : 0x1p-100;
    return static_cast<S>(inverse(bounded < 0x1p100 ? bounded : 0x1p100));  // beyond, all softmaxes are uniform
  }
}

// For rows of T. For logits of 16 bits logarithms are the instruction's, to base 2: its absolute error near 1, 2^-22, is far
// below what such logits can tell.
template <typename T>
struct Scalars {
  using V = Compute<T>;
  using S = V;
  static constexpr bool kRough = sizeof(T) == 2;
  static constexpr double kUnit = device::kUnit<T>, kLogUnit = kRough ? 0.693147180559945309417 : 1.0;
  static constexpr bool kAddsTiniest = true;
  static constexpr S kTiniest = sizeof(S) == 8 ? S(0x1p-1022) : S(0x1p-126);
  FASTKD_DEVICE static S number(double x) { return static_cast<S>(x); }
  FASTKD_DEVICE static double divide(double x, double y) { return sizeof(S) == 8 ? x / y : x * inverse(y); }
  FASTKD_DEVICE static bool all(bool) { return false; }  // not of all lanes: a branch would cost more than it spares
  FASTKD_DEVICE static S reciprocal(S x) { return device::reciprocal(x); }
  FASTKD_DEVICE static S floored(S x) { return x < kTiniest ? kTiniest : x; }
  FASTKD_DEVICE static S log(S x) {
    if constexpr (kRough) {
      return log2_roughly(x);
    } else {
      return log_number(x);
    }
  }
  FASTKD_DEVICE static S exact_log(S x) { return log_normal(floored(x)); }
};

}  // namespace fastkd::FASTKD_ISA::divergence
