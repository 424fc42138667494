// The maths of divergences from a sparse teacher, for one double or a register of them, on CPU and GPU.
//
// A row has entries i in S: classes with log p_i given. z_j = s_j / T, e_j = e^(z_j - top). All classes outside of S are the
// tail R. Whatever becomes of it, what is left is a divergence over few outcomes o with weights e_o of the student:
//   bucket        o in S and R, where e_R is the sum of the tail's e_j, p_R = 1 - sum_S p, or as it is given
//   renormalize   o in S, with p_i divided by their sum
//   drop          o in S and R, as bucket; but the sum is over S alone, and p_R is not looked at
// with q_o = e_o / sum e. Sums over outcomes are in double, and so is 1 - sum p: their error is some 2^-52, and that of
// log1mexp(logsumexp(log p)) would be no smaller. The sum of the tail is one of exponentials of the tail's classes alone,
// relative to the tail's own maximum: it is as exact where it is small, and log q_R is finite as long as one of its logits is.
//
// For a divergence D = sum_o d_o with slopes u_o = dD/dq_o, and t_o = q_o u_o (0 where the sum leaves o out),
//   dD/dz_o = t_o - q_o sum_o' t_o'          (the softmax's Jacobian), for outcomes;
//   dD/dz_j = dD/dz_R e_j / e_R              for a class of the tail, as dz_R/dz_j = e_j / e_R;
//   dD/dz_j = 0                              there for renormalize.
// With l = log q - log p, c = 1 for drop and 0 for the others (where c changes nothing, as sum t then grows by c):
//   forward KL    d = -p l                              t = -p
//   reverse KL    d = q l                               t = q (l + c)
//   JSD           d = beta p log(p/m) + (1-beta) q log(q/m)     t = (1-beta) q log(q/m),    m = beta p + (1-beta) q
// JSD's u is (1-beta) (log(q/m) + 1 - (beta p + (1-beta) q) / m), whose last terms are 0, whether or not the outcomes are all.
//
// bucket and renormalize are divergences of two distributions. Their d are summed as terms that are not negative and 0 where the
// two probabilities are equal, see divergence/math.h; those of drop may be negative, and so may their sum.
#pragma once

#include "divergence/math.h"
#include "sparse/kernel.h"

namespace fastkd::FASTKD_ISA::sparse_math {

using namespace divergence_math;
using ::fastkd::sparse::Kind;
using ::fastkd::sparse::Tail;

// Beyond rounding; for probabilities of 16 bits, rounding is rounding of the logarithms, and grows with them.
constexpr double kLogProbTolerance = 1e-3;
FASTKD_HOST_DEVICE double sum_tolerance(Dtype dtype, double entropy) {
  const double eps = dtype == Dtype::kBFloat16 ? 0x1p-8 : dtype == Dtype::kFloat16 ? 0x1p-11 : 0.0;
  return kLogProbTolerance + eps * entropy;
}

// What the sums of a row's entries say of its probabilities: log p_i = (log p_i as given - shift) - log_total.
struct Probabilities {
  double shift = 0, log_total = 0;
  double tail = 0;  // p_R
  double sum = 0;   // of all that was given
  bool wrong = false;
};

// top: the largest log-probability; sum: of e^(log p - top); entropy: of p |log p|; given_tail: p_R, or NaN where it is to follow
// from the sum; tail_empty: every class has an entry. Sums beyond 1 are roundings, and divided by; so is the sum of all with a
// tail that was given.
template <class P>
FASTKD_OWN_SIDE Probabilities probabilities_of(Tail rule, double top, double sum, double entropy, double given_tail,
                                               bool tail_empty, Dtype dtype) {
  Probabilities result;
  const bool given = given_tail == given_tail;
  const double all = sum > 0 ? sum * P::exp_one(top) : 0.0, tolerance = sum_tolerance(dtype, entropy);
  const double total = given ? all + given_tail : all;
  result.sum = total;
  result.wrong = !(total <= 1 + tolerance) || (given && !(total >= 1 - tolerance));
  const bool whole = rule == Tail::kRenormalize || (rule == Tail::kBucket && !given && (all >= 1 || tail_empty)) ||
                     (rule == Tail::kBucket && given && tail_empty);
  if (whole) {
    result.shift = top;
    result.log_total = P::log_one(sum);
  } else if (rule == Tail::kBucket) {
    result.log_total = given ? P::log_one(total) : 0.0;
    result.tail = given ? given_tail / total : 1 - all;
  }
  return result;
}

// Terms of D of outcomes.
template <class P>
struct Terms {
  using V = typename P::V;
  Kind kind;
  bool drop;
  JensenShannon<P> mixture;
  V beta, one_minus_beta;

  FASTKD_OWN_SIDE Terms(Kind of, Tail tail, double b)
      : kind(of),
        drop(tail == Tail::kDrop),
        mixture{{V{}, V{}, V{}}, P::number(b), P::number(1.0 - b)},
        beta(P::number(b)),
        one_minus_beta(P::number(1.0 - b)) {}

  struct Term {
    V value, slope;  // d and t
  };
  FASTKD_OWN_SIDE Term operator()(V q, V p, V log_q, V log_p) const {
    const V l = log_q - log_p;
    if (kind == Kind::kForward) return {drop ? weigh(p, -l) : kl_term<double>(p, q, l), -p};
    if (kind == Kind::kReverse) {
      const V one = P::number(drop ? 1.0 : 0.0), product = weigh(q, l);
      return {drop ? product : kl_term<double>(q, p, -l), drop ? weigh(q, l + one) : product};
    }
    const auto of = mixture.exact_terms(q, p, q - p);
    return {
        drop ? beta * of.p.gradient + one_minus_beta * of.q.gradient : beta * of.p.divergence + one_minus_beta * of.q.divergence,
        one_minus_beta * of.q.gradient};
  }
  // The sum of t, once it is known: for two distributions it need not be rounded.
  FASTKD_HOST_DEVICE double slopes(double sum) const { return kind == Kind::kForward && !drop ? -1.0 : sum; }
};

}  // namespace fastkd::FASTKD_ISA::sparse_math
