// The maths of the divergences, for one float or for a register of them, on CPU and GPU. Data, sums and their order are theirs.
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
// The cross-entropy with a label l is that at T = 1, with d/ds_j = q_j - [j = l].
//
// Where rows are alike, these sums cancel, and what is left may be below 0. As probabilities sum to 1, a divergence is also
// a sum of terms that are not negative, and 0 only where the two probabilities are equal:
//   KL(x || y) = sum_j p_x (e^l - 1 - l),               l = log p_y - log p_x
//   KL(q || m) = sum_j m ((1 + v) log(1 + v) - v),      v = q / m - 1 = beta (q - p) / m;    KL(p || m) alike
// An error of the normalisers in l has no effect of first order. The first forms are cheaper; the second are for rows where
// those come out below kSmallDivergence: there an error of a few ulps is a large one.
//
// What a side has instructions of its own for, it brings along as a class P (Registers in cpu_math.h, Scalars in
// cuda_math.cuh):
//   V, S              a float or a register of them, and one of its elements
//   number, divide    a double as V; the quotient of two, which is 1 where they are equal
//   all               whether a comparison holds for all of V, where it pays to ask: it may say no
//   kUnit             exponents are counted in this: ln 2 where exponentials are powers of 2
//   reciprocal        1 / x for normal x > 0
//   floored           the argument, but no smaller than the smallest normal number; NaN stays
//   log               ln x of a ratio of probabilities, to what the rows' dtype can tell, in units of kLogUnit
//   exact_log         ln x in full, for x = 0 some finite number; NaN stays
//   kAddsTiniest      whether log and reciprocal are kept from 0 by adding kTiniest, not by floors
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

// A factor of gradients, which a large temperature would make infinite, and its product with 0 a NaN.
template <typename S>
FASTKD_HOST_DEVICE S finite(double factor) {
  constexpr double kMost = sizeof(S) == 8 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
  return static_cast<S>(factor > kMost ? kMost : factor < -kMost ? -kMost : factor);
}

template <typename S>
constexpr double kSmallDivergence = sizeof(S) == 8 ? 0x1p-30 : 0x1p-10;

// The cross-entropy with a label from its logit; log_z is log sum e^(s - top).
template <typename S>
FASTKD_HOST_DEVICE double cross_entropy(double log_z, S logit, S top) {
  return log_z - (static_cast<double>(logit) - static_cast<double>(top));
}

// Exponents of a row, in units of kUnit: a of logits of side y, b of side x. For Jensen-Shannon y is the student.
template <class P>
struct Exponents {
  using V = typename P::V;
  V scale, top_y, top_x;  // scale: 1 / T in those units
  FASTKD_OWN_SIDE V a(V y) const { return (y - top_y) * scale; }
  FASTKD_OWN_SIDE V b(V x) const { return (x - top_x) * scale; }
};

// ---- KL, cross-entropy ----------------------------------------------------------------------------------

// c b - a, whose expectation under p_x is D, but for the normalisers
template <typename V>
FASTKD_HOST_DEVICE V linear_term(V c, V a, V b) {
  return c * b - a;
}
// D from that expectation. log_x is c log Zx, log_y is log Zy; or log_x is 0, and log_y the logarithm of Zy / Zx.
FASTKD_HOST_DEVICE double divergence_value(double mean, double log_x, double log_y) { return mean - log_x + log_y; }

template <class P>
struct Linear : Exponents<P> {
  using V = typename P::V;
  using S = typename P::S;
  V c, f_y{}, f_x{}, ratio{}, shift{};

  // Once D is known. scale: weight, reduction and T^2 / T; log_ratio: log Zy - c log Zx
  FASTKD_OWN_SIDE void finish(double scale, double z_y, double z_x, double log_ratio, double divergence) {
    f_y = P::number(finite<S>(P::divide(scale, z_y)));
    f_x = P::number(finite<S>(P::divide(scale, z_x)));
    ratio = P::number(P::divide(z_y, z_x));
    shift = P::number(log_ratio - divergence);
  }
  FASTKD_OWN_SIDE V y_gradient(V e_y, V e_x) const { return f_y * (e_y - e_x * ratio); }  // exactly 0 for equal rows
  FASTKD_OWN_SIDE V x_gradient(V e_x, V term) const { return weigh(e_x * f_x, term * static_cast<S>(P::kUnit) + shift); }
};

// c b - a by differences of logits. Those of rows near each other are subtracted as they are, which costs no digits; others
// relative to their maxima.
template <class P>
struct Differences {
  using V = typename P::V;
  V inverse_temperature, zero_y, zero_x, apart;
  FASTKD_OWN_SIDE Differences(V inverse_t, V top_y, V top_x, bool near)
      : inverse_temperature(inverse_t),
        zero_y(near ? V{} : top_y),
        zero_x(near ? V{} : top_x),
        apart(near ? top_x - top_y : V{}) {}
  template <typename S>
  FASTKD_OWN_SIDE static bool are_near(S top_y, S top_x) {
    return top_y - top_x <= 1 && top_x - top_y <= 1;
  }
  FASTKD_OWN_SIDE V operator()(V y, V x, V c) const { return (c * (x - zero_x) - (y - zero_y) - apart) * inverse_temperature; }
};

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

// ---- Jensen-Shannon -----------------------------------------------------------------------------------

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

template <class P>
struct JensenShannon : Exponents<P> {
  using V = typename P::V;
  using S = typename P::S;
  V beta, one_minus_beta, f_q{}, f_p{}, k_q{}, k_p{};

  FASTKD_OWN_SIDE V mixture(V q, V p) const { return beta * p + one_minus_beta * q; }
  // q log(q / m) and p log(p / m), terms of KL(q || m) and KL(p || m), in units of kLogUnit. Probabilities may be subnormal or 0,
  // where reciprocal and log overflow. On the GPU the smallest normal number keeps them from it, which changes nothing else: it
  // is added in the multiply-adds, at no cost. CPUs may have none, and have a floor in the logarithm.
  struct Terms {
    V q, p;
  };
  FASTKD_OWN_SIDE Terms terms(V q, V p) const {
    if constexpr (P::kAddsTiniest) {
      const V inverse_m = P::reciprocal(beta * p + (one_minus_beta * q + P::kTiniest));
      return {q * P::log(q * inverse_m + P::kTiniest), p * P::log(p * inverse_m + P::kTiniest)};
    } else {
      const V inverse_m = P::reciprocal(P::floored(mixture(q, p)));
      return {weigh(q, P::log(q * inverse_m)), weigh(p, P::log(p * inverse_m))};
    }
  }
  // The same, as terms that are not negative, in units of 1; difference = q - p, exactly 0 for equal rows.
  struct ExactTerms {
    MixtureTerm<V> q, p;
  };
  FASTKD_OWN_SIDE ExactTerms exact_terms(V q, V p, V difference) const {
    const V m = mixture(q, p), inverse_m = P::reciprocal(P::floored(m));
    const V to_q = beta * difference, to_p = -one_minus_beta * difference;
    if (P::all(is_near<S>(m, to_q) & is_near<S>(m, to_p))) {  // the rule in rows that are alike: no logarithm
      return {near_term<S>(inverse_m, to_q), near_term<S>(inverse_m, to_p)};
    }
    return {mixture_term<S>(m, inverse_m, to_q, weigh(q, P::exact_log(q * inverse_m))),
            mixture_term<S>(m, inverse_m, to_p, weigh(p, P::exact_log(p * inverse_m)))};
  }
  // Once Kq and Kp are known; beta in full. Who has exponentials in the place of probabilities gives Kq / Zs and Kp / Zt.
  FASTKD_OWN_SIDE void finish(double scale, double wide_beta, double kq, double kp) {
    const double nothing = (kq - kq) + (kp - kp);  // or NaN: where one side is, both gradients are
    f_q = P::number(finite<S>(scale * (1.0 - wide_beta) * P::kLogUnit));
    f_p = P::number(finite<S>(scale * wide_beta * P::kLogUnit));
    k_q = P::number(kq * (1.0 / P::kLogUnit) + nothing);
    k_p = P::number(kp * (1.0 / P::kLogUnit) + nothing);
  }
  FASTKD_OWN_SIDE V q_gradient(V q, V term) const { return f_q * (term - q * k_q); }
  FASTKD_OWN_SIDE V p_gradient(V p, V term) const { return f_p * (term - p * k_p); }
};

// D from KL(q || m) and KL(p || m)
FASTKD_HOST_DEVICE double jensen_shannon_value(double beta, double kq, double kp) { return beta * kp + (1.0 - beta) * kq; }

}  // namespace fastkd::FASTKD_ISA::divergence_math
