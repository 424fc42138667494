// EM for mixtures of two 1-D Gaussians on the CPU, compiled once for each instruction set.
//
// Mapping: one thread takes one problem from its values to its parameters; where a problem is more than its share of
// the work, a team of threads takes the chunks of each sweep. Sums go chunk by chunk in order either way: the same
// bits for any number of threads. The values are read and converted once, into fp64 scratch (8 n bytes, in cache for
// all but the largest n); non-finite values and zero weights are squeezed out on the way. Then every sweep is
//   Lloyd:  one comparison and two sums a value;
//   EM:     one exponential and one division a value. The log(1 + e) of the log-likelihood is taken of the product of 512
//           of them (each is in (1, 2], so it cannot overflow); only with sample weights is it one logarithm a value.
// Arithmetic-bound: 3 to 4 cycles a value and iteration on AVX-512, where reading it from L2 takes a fraction of one.
#include "gmm/kernel.h"

#include "common/simd.h"
#include "gmm/cpu_problem.h"
#include "gmm/math.h"

namespace fastkd::FASTKD_ISA::gmm {
namespace {

using ::fastkd::gmm::Kernels;
using ::fastkd::gmm::PosteriorParams;

constexpr int64_t kProductTerms = 512;  // factors in (1, 2] that fit a double

// ---- sweeps ------------------------------------------------------------------------------------

// Number, weight and weighted sum of the values up to the threshold.
void split_at(const Problem& problem, double threshold, double (&total)[3]) {
  problem.sum(total, [&](int64_t chunk, double* out) {
    F64 sums[3] = {};
    const F64 t = broadcast<F64>(threshold), one = broadcast<F64>(1.0);
    const auto body = [&](F64 u, F64 w, auto use_weight, F64(&sum)[3]) __attribute__((always_inline)) {
      if constexpr (use_weight()) {
        const I64 below = (u <= t) & (w > 0.0);
        sum[0] += below ? one : F64{};
        sum[1] += below ? w : F64{};
        sum[2] += below ? w * u : F64{};
      } else {
        sum[0] += u <= t ? one : F64{};
        sum[2] += u <= t ? u : F64{};
      }
    };
    problem.registers(chunk, 0, int64_t(problem.counts[chunk]), sums, body);
    for (int k = 0; k < 3; ++k) out[k] = reduce_sum(sums[k]);
    if (problem.w == nullptr) out[1] = out[0];
  });
}

FASTKD_INLINE Moments moments_of(const double* total) {
  return {{total[0], total[3]}, {total[1], total[4]}, {total[2], total[5]}};
}

// r, r (u - centre), r (u - centre)^2 onto three sums
FASTKD_INLINE void add_moments(F64 r, F64 offset, F64* sum) {
  const F64 weighted = r * offset;
  sum[0] += r;
  sum[1] += weighted;
  sum[2] += weighted * offset;
}

// Moments of the two sides of a threshold.
Moments hard_moments(const Problem& problem, double threshold, const double (&centre)[2]) {
  double total[6];
  problem.sum(total, [&](int64_t chunk, double* out) {
    F64 sums[6] = {};
    const F64 t = broadcast<F64>(threshold), c0 = broadcast<F64>(centre[0]), c1 = broadcast<F64>(centre[1]);
    const auto body = [&](F64 u, F64 w, auto, F64(&sum)[6]) __attribute__((always_inline)) {
      add_moments(u <= t ? w : F64{}, u - c0, sum);
      add_moments(u <= t ? F64{} : w, u - c1, sum + 3);
    };
    problem.registers(chunk, 0, int64_t(problem.counts[chunk]), sums, body);
    for (int k = 0; k < 6; ++k) out[k] = reduce_sum(sums[k]);
  });
  return moments_of(total);
}

// The E-step and the sums of the M-step about `centre`; AtMeans: which are the means of the mixture.
template <bool AtMeans>
Moments soft_moments(const Problem& problem, const Densities& densities, const double (&centre)[2], double* log_likelihood) {
  double total[7];
  problem.sum(total, [&](int64_t chunk, double* out) {
    F64 sums[8] = {};  // six moments, the log-likelihood, and the product of the 1 + e not yet in it
    const F64 m0 = broadcast<F64>(densities.mean[0]), m1 = broadcast<F64>(densities.mean[1]);
    const F64 c0 = broadcast<F64>(densities.constant[0]), c1 = broadcast<F64>(densities.constant[1]);
    const F64 h0 = broadcast<F64>(densities.half_precision[0]), h1 = broadcast<F64>(densities.half_precision[1]);
    const F64 centre0 = broadcast<F64>(centre[0]), centre1 = broadcast<F64>(centre[1]);
    const auto body = [&](F64 u, F64 w, auto use_weight, F64(&sum)[8]) __attribute__((always_inline)) {
      const F64 t0 = u - m0, t1 = u - m1;
      const F64 a0 = c0 - t0 * t0 * h0, a1 = c1 - t1 * t1 * h1;
      const F64 d = a0 - a1;
      const F64 e = exp(minimum(d, -d));
      F64 r0, r1;
      responsibilities(d, e, r0, r1);
      if constexpr (use_weight()) {
        r0 *= w;
        r1 *= w;
        sum[6] += w * (maximum(a0, a1) + log(1.0 + e));
      } else {
        sum[6] += maximum(a0, a1);
        sum[7] *= 1.0 + e;
      }
      add_moments(r0, AtMeans ? t0 : u - centre0, sum);
      add_moments(r1, AtMeans ? t1 : u - centre1, sum + 3);
    };
    const int64_t count = int64_t(problem.counts[chunk]), step = kProductTerms * L;
    for (int64_t first = 0; first < count; first += step) {
      sums[7] = broadcast<F64>(1.0);
      problem.registers(chunk, first, first + step < count ? first + step : count, sums, body);
      sums[6] += log(sums[7]);
    }
    for (int k = 0; k < 7; ++k) out[k] = reduce_sum(sums[k]);
  });
  *log_likelihood = total[6];
  return moments_of(total);
}

// ---- the fit -----------------------------------------------------------------------------------

Split lloyd(const Problem& problem, Lloyd search, const double (&total)[2]) {
  while (search.active) {
    double below[3];
    split_at(problem, search.threshold, below);
    search.advance(below, total);
  }
  return search.split;
}

// The better of two local optima of k-means, then the M-step of its hard assignment.
Mixture initialise(const Problem& problem, double low, double high, const double (&total)[2], const Regularisation& reg) {
  const Split outer = lloyd(problem, outer_start(low, high), total), inner = lloyd(problem, inner_start(total), total);
  const Split best = better_split(outer, inner, low, high);
  bool cancelled;
  return maximise(hard_moments(problem, best.threshold, best.centre), best.centre, reg, &cancelled);
}

Result fit_problem(const FitParams& params, int64_t b, const Problem& problem) {
  const Survey survey = gather(params, b, problem);
  Result result;
  if (!can_fit(survey, params.reg_covar, &result)) return result;
  const Frame frame = frame_of(survey.low, survey.high, square_root(params.reg_covar), params.normalize);
  double total[2];
  enter(problem, frame, survey.largest_weight, total);
  const Regularisation reg =
      regularisation(frame, survey.low, survey.high, params.reg_covar, params.normalize, total[0] / survey.kept);

  Mixture mixture;
  if (!start_from(params, b, frame, reg, &mixture)) {
    mixture = initialise(problem, frame.enter(survey.low), frame.enter(survey.high), total, reg);
  }
  Progress progress;
  while (progress.active(params)) {
    const Densities current = densities(mixture);
    double log_likelihood, again;
    bool cancelled;
    mixture = maximise(soft_moments<true>(problem, current, current.mean, &log_likelihood), current.mean, reg, &cancelled);
    if (cancelled) {
      const double centre[2] = {mixture.mean[0], mixture.mean[1]};
      mixture = maximise(soft_moments<false>(problem, current, centre, &again), centre, reg, &cancelled);
    }
    progress.advance(params, log_likelihood / total[0]);
  }
  return result_of(mixture, progress, frame, survey.low, survey.high, survey.finite == double(problem.n));
}

void fit(const FitParams& params, int64_t b, const Team& team, double* scratch) {
  const Problem problem(params.layout.size(b), params.sample_weight != nullptr, scratch, team);
  store_result(params, b, fit_problem(params, b, problem));
}

// ---- the posterior -----------------------------------------------------------------------------

// Stores the posterior of a pair of registers as float or double, and posterior > threshold as that dtype sees it.
template <typename T>
FASTKD_INLINE void store_pair(const F64 (&p)[2], double threshold, T* posterior, uint8_t* mask, int64_t count) {
  constexpr int kWidth = kLanes<Vector<T>>;
  Vector<T> rounded[kPair / kWidth];
  if constexpr (std::is_same_v<T, double>) {
    for (int k = 0; k < 2; ++k) rounded[k] = p[k];
  } else {
    const F32Half half[2] = {__builtin_convertvector(p[0], F32Half), __builtin_convertvector(p[1], F32Half)};
    std::memcpy(rounded, half, sizeof rounded);
  }
  const T bound = T(threshold);
  uint8_t selected[kPair];
  for (int k = 0; k < kPair / kWidth; ++k) {
    if (count > k * kWidth) store_up_to(posterior + k * kWidth, rounded[k], count - k * kWidth);
    for (int lane = 0; lane < kWidth; ++lane) selected[k * kWidth + lane] = rounded[k][lane] > bound;
  }
  if (count >= kPair) {
    std::memcpy(mask, selected, kPair);
  } else {
    for (int64_t i = 0; i < count; ++i) mask[i] = selected[i];
  }
}

template <typename T>
void posterior_of(const PosteriorParams& params, int64_t b, int64_t first, int64_t last) {
  const double* weight = params.weights + 2 * b;
  const double* mean = params.means + 2 * b;
  const double* deviation = params.deviations + 2 * b;
  const int64_t begin = params.layout.begin(b), packed = params.layout.packed_begin(b), size = params.layout.size(b);
  T* const posterior = static_cast<T*>(params.posterior) + packed;
  uint8_t* const mask = params.mask + packed;

  const PosteriorMixture mixture = posterior_mixture(weight, mean, deviation, params.monotone);
  const F64 decision = broadcast<F64>(mixture.decision);
  const F64 bottom = broadcast<F64>(mixture.bottom), top = broadcast<F64>(mixture.top);
  for (int64_t i = first; i < last; i += kPair) {
    F64 x[2], p[2];
    load_pair(params.dtype, params.values, begin + i, i < size ? (last < size ? last : size) - i : 0, x);
    for (int k = 0; k < 2; ++k) {
      const F64 d = mixture.log_odds(minimum(maximum(mixture.frame.enter(x[k]), bottom), top));
      F64 low, high;
      responsibilities(d, exp(minimum(d, -d)), low, high);
      p[k] = is_finite(x[k]) ? (mixture.decided ? decision : low) : F64{};
    }
    store_pair(p, params.threshold, posterior + i, mask + i, last - i);
  }
}

void posterior(const PosteriorParams& params, int64_t b, int64_t first, int64_t last) {
  return params.dtype == Dtype::kFloat64 ? posterior_of<double>(params, b, first, last)
                                         : posterior_of<float>(params, b, first, last);
}

}  // namespace

extern const Kernels kernels{fit, posterior};

}  // namespace fastkd::FASTKD_ISA::gmm
