// The maths of relational distillation (Park et al., CVPR 2019, arXiv:1904.05068) over a register of doubles or one of them.
//
// Everything follows from half the squared distances of all pairs, E_ij = |x_i - x_j|^2 / 2, and their inverses
// n_ij = 1 / |x_i - x_j|, by the law of cosines: the cosine at a between b and c is
//   psi_abc = <e_ab, e_ac> = (E_ab + E_ac - E_bc) n_ab n_ac,
// so that a triple costs a dozen operations whatever the number of features. All is in fp64: with the points b and c close
// together, E_ab - E_bc loses as many digits as |x_a - x_b| / |x_a - x_c| has, and fp32 has none to spare.
// A triangle i < j < k has three angles, its sides three gradients. With the slope g = clamp(psi - target, -1, 1) of smooth_l1,
//   t_a = g_a n_ab n_ac,  w_a = g_a psi_a,
//   d/dE_ij = t_i + t_j - t_k - n_ij^2 (w_i + w_j),
// as d psi_i / dE_ij = n_ij n_ik - psi_i n_ij^2 and d psi_k / dE_ij = -n_ik n_jk.
#pragma once

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA::relation_math {

constexpr double kLeastSquaredDistance = 1e-12;  // of two points: that far apart they count in the distance term
constexpr double kLeastDistance = 1e-6;          // its root
constexpr double kCoincident = 1e-24;            // squared distance up to which no direction leads from one to the other

// One term of smooth_l1 (beta = 1): the slope is the difference, cut to [-1, 1]; NaN stays NaN.
template <typename F>
FASTKD_HOST_DEVICE F slope_of(F x) {
  const F low = -1.0 > x ? F{} - 1.0 : x;
  return 1.0 < low ? F{} + 1.0 : low;
}
template <typename F>
FASTKD_HOST_DEVICE F smooth_l1(F x, F slope) {
  return slope * (x - 0.5 * slope);
}

// A side of a triangle: E and n.
template <typename F>
struct Side {
  F half_square;
  F inverse;
};

// The three cosines of a triangle, and the products n n that belong to them.
template <typename F>
struct Angles {
  F cosine_i, cosine_j, cosine_k;
  F inverse_i, inverse_j, inverse_k;
};
template <typename F>
FASTKD_HOST_DEVICE Angles<F> angles_of(const Side<F>& ij, const Side<F>& ik, const Side<F>& jk) {
  const F difference = ik.half_square - jk.half_square;
  Angles<F> angles;
  angles.inverse_i = ij.inverse * ik.inverse;
  angles.inverse_j = ij.inverse * jk.inverse;
  angles.inverse_k = ik.inverse * jk.inverse;
  angles.cosine_i = (ij.half_square + difference) * angles.inverse_i;
  angles.cosine_j = (ij.half_square - difference) * angles.inverse_j;
  angles.cosine_k = (ik.half_square + jk.half_square - ij.half_square) * angles.inverse_k;
  return angles;
}

// What a point at this squared distance is: its distance, its inverse distance (0 where the two coincide), the derivative
// of the distance with respect to E, and |e|^2, the cosine of a direction with itself: 1, 0 where there is none.
template <typename F>
struct Pair {
  F distance, inverse, distance_slope, self_cosine;
};
// distance: the root of `squared`
template <typename F>
FASTKD_HOST_DEVICE Pair<F> pair_of(F squared, F distance) {
  Pair<F> pair;
  pair.distance = squared < kLeastSquaredDistance ? F{} + kLeastDistance : distance;  // NaN stays NaN
  pair.inverse = squared > kCoincident ? 1.0 / distance : F{};
  pair.distance_slope = squared < kLeastSquaredDistance ? F{} : pair.inverse;
  pair.self_cosine = pair.inverse > 0.0 ? F{} + 1.0 : squared * 0.0;  // NaN for NaN and infinity
  return pair;
}

// The difference of two distances over their means, of which the inverses are given: exactly 0 for equal sides, contracted
// or not.
template <typename F>
FASTKD_HOST_DEVICE F distance_difference(F own, F other, double inverse_own, double inverse_other) {
  return (own - other * (inverse_other / inverse_own)) * inverse_own;
}

// d loss / d E of a pair by the distance term: `slope` is that of smooth_l1, through_mean the sum of slope * D over all
// ordered pairs over mu times their number, which is what the gradient takes by way of the mean mu.
template <typename F>
FASTKD_HOST_DEVICE F distance_gradient(F slope, double inverse_mean, double through_mean, F distance_slope, double scale) {
  return (slope - through_mean) * distance_slope * (scale * inverse_mean);
}

}  // namespace fastkd::FASTKD_ISA::relation_math
