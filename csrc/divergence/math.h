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

// (log m / p)-type factors are finite wherever their probability is positive
template <typename V>
FASTKD_HOST_DEVICE V mixture(V p, V q, V beta, V one_minus_beta) {
  return beta * p + one_minus_beta * q;
}

}  // namespace fastkd::FASTKD_ISA::divergence_math
