// The maths of the divergences, for one float or for a register of them, on CPU and GPU.
//
// For one row: a = (s - max s) / T and b = (t - max t) / T, so that q = e^a / Zs, p = e^b / Zt,
// log q = a - log Zs and log p = b - log Zt. Every product with a probability treats 0 * inf as 0
// (masked classes, logit -inf): the select looks at the probability, never at the infinite factor.
//
// A divergence D has a "from" side x and a "to" side y: forward KL and soft cross-entropy go from the
// teacher to the student, reverse KL from the student to the teacher. With c = 1 for KL, 0 for cross-entropy:
//   D        = sum_j p_x (c log p_x - log p_y)  =  (sum_j e_x (c a_x - a_y)) / Zx - c log Zx + log Zy
//   dD/dy_j  = (p_y - p_x) / T
//   dD/dx_j  = p_x (c log p_x - log p_y - D) / T
// Jensen-Shannon, m = beta p + (1 - beta) q, Kp = KL(p || m), Kq = KL(q || m):
//   D        = beta Kp + (1 - beta) Kq
//   dD/ds_j  = (1 - beta) q (log(q / m) - Kq) / T,     dD/dt_j = beta p (log(p / m) - Kp) / T
//
// Where rows are alike, these sums cancel, and what is left may be below 0. As probabilities sum to 1, a divergence is also
// a sum of terms that are not negative, and 0 only where the two probabilities are equal:
//   KL(x || y) = sum_j p_x (e^l - 1 - l),               l = log p_y - log p_x
//   KL(q || m) = sum_j m ((1 + v) log(1 + v) - v),      v = q / m - 1 = beta (q - p) / m;    KL(p || m) alike
// An error of the normalisers in l has no effect of first order. The first forms are cheaper; the second are for rows where
// those come out below kSmallDivergence: there an error of a few ulps is a large one.
#pragma once

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA::divergence_math {

// probability * factor, 0 where the probability is 0 whatever the factor; a NaN stays one. The probability may carry
// a scale of either sign (weights may be negative).
template <typename V>
FASTKD_HOST_DEVICE V weigh(V probability, V factor) {
  const V product = probability * factor;
  return probability != 0 ? product : V{};
}

// D from the expectation of its terms; log_x and log_y are log Zx and log Zy
template <typename S>
FASTKD_HOST_DEVICE S divergence_value(S mean, S log_x, S log_y, S c) {
  return mean - c * log_x + log_y;
}

// A factor of gradients, which a large temperature would make infinite, and its product with 0 a NaN.
template <typename S>
FASTKD_HOST_DEVICE S finite(double factor) {
  constexpr double kMost = sizeof(S) == 8 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
  return static_cast<S>(factor > kMost ? kMost : factor < -kMost ? -kMost : factor);
}

template <typename S>
constexpr double kSmallDivergence = sizeof(S) == 8 ? 0x1p-30 : 0x1p-10;

// One term of KL(x || y): p_x (e^l - 1 - l), by its series where that would cancel. Where p_y is so small that it has lost
// digits, or is 0, it is no less than p_x (1 + l), as e^l is not less than 1 + l; NaN stays.
template <typename S, typename V>
FASTKD_HOST_DEVICE V kl_term(V p_x, V p_y, V l) {
  constexpr S kNear = sizeof(S) == 8 ? S(0x1p-6) : S(0x1p-2);
  V series = l * S(1.0 / 5040) + S(1.0 / 720);
  series = series * l + S(1.0 / 120);
  series = series * l + S(1.0 / 24);
  series = series * l + S(1.0 / 6);
  series = series * l + S(0.5);
  const V near = p_x * (l * l * series), rest = p_y - p_x - weigh(p_x, l), far = rest < 0 ? V{} : rest;
  return (l < kNear) & (l > -kNear) ? near : far;
}

// q log(q / m), for the gradient, and m ((1 + v) log(1 + v) - v), for the divergence.
template <typename V>
struct MixtureTerm {
  V gradient, divergence;
};

// Whether q is so near to m that the series holds; difference = q - m. Also where 1 / m has its floor (m may be subnormal) and
// q log(q / m) could be too small: there the series is wrong, by less than 2^-124, but as positive as it is everywhere.
template <typename S, typename V>
FASTKD_HOST_DEVICE auto is_near(V m, V difference) {
  constexpr S kNear = sizeof(S) == 8 ? S(0x1p-10) : S(0x1p-6), kTiniest = sizeof(S) == 8 ? S(0x1p-1020) : S(0x1p-124);
  const V bound = m * kNear + kTiniest;
  return (difference < bound) & (difference > -bound);
}
template <typename S, typename V>
FASTKD_HOST_DEVICE MixtureTerm<V> near_term(V inverse_m, V difference) {
  const V v = difference * inverse_m;
  V series = v * S(1.0 / 12) - S(1.0 / 6);  // in float, v^3 / 20 is below half an ulp of 1 / 2
  if constexpr (sizeof(S) == 8) {
    series = v * S(1.0 / 30) - S(1.0 / 20);
    series = (series * v + S(1.0 / 12)) * v - S(1.0 / 6);
  }
  const V divergence = difference * v * (series * v + S(0.5));
  return {divergence + difference, divergence};
}

// log_ratio = q log(q / m)
template <typename S, typename V>
FASTKD_HOST_DEVICE MixtureTerm<V> mixture_term(V m, V inverse_m, V difference, V log_ratio) {
  const auto near = near_term<S>(inverse_m, difference);
  const auto use_near = is_near<S>(m, difference);
  return {use_near ? near.gradient : log_ratio, use_near ? near.divergence : log_ratio - difference};
}

}  // namespace fastkd::FASTKD_ISA::divergence_math
