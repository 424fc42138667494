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
using ::fastkd::gmm::Status;

constexpr int kLloydCap = 300;          // scikit-learn's KMeans stops there too; a dozen is usual
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

// A split of the values in two by a threshold.
struct Split {
  double threshold;
  double centre[2];  // means of the two sides
  double between;    // sum of squares between them, which k-means maximises; -1: a side is empty
};

// Lloyd's algorithm from a threshold, to convergence. total: sums of w and w u.
Split lloyd(const Problem& problem, double threshold, const double (&total)[2]) {
  Split split{threshold, {0, 0}, -1};
  const double mean = total[1] / total[0];
  double count = -1;
  for (int iteration = 0; iteration < kLloydCap; ++iteration) {
    double below[3];
    split_at(problem, threshold, below);
    const double above = total[0] - below[1];
    if (below[0] == count || !(below[1] > 0) || !(above > 0)) break;  // in one dimension the count tells the partition
    count = below[0];
    const double low = below[2] / below[1], high = (total[1] - below[2]) / above;
    split = {threshold, {low, high}, below[1] * (low - mean) * (low - mean) + above * (high - mean) * (high - mean)};
    if (!(low < high)) break;
    threshold = low + 0.5 * (high - low);
  }
  return split;
}

// The better of two local optima of k-means, then the M-step of its hard assignment. From the centres (low, high) an
// outlier is found, from a split at the mean the bulk of a skewed distribution; k-means++ finds either, by chance.
Mixture initialise(const Problem& problem, double low, double high, const double (&total)[2], const Regularisation& reg) {
  const Split outer = lloyd(problem, low + 0.5 * (high - low), total), inner = lloyd(problem, total[1] / total[0], total);
  Split best = inner.between > outer.between ? inner : outer;
  if (best.between < 0) best = {low, {low, high}, 0};
  bool cancelled;
  return maximise(hard_moments(problem, best.threshold, best.centre), best.centre, reg, &cancelled);
}

// Given parameters in the frame; false where they are not all finite.
bool start_from(const FitParams& params, int64_t b, const Frame& frame, const Regularisation& reg, Mixture* mixture) {
  if (params.init_weights == nullptr) return false;
  const double* weights = params.init_weights + 2 * b;
  const double* means = params.init_means + 2 * b;
  const double* deviations = params.init_deviations + 2 * b;
  for (int k = 0; k < 2; ++k) {
    const double total = weights[k] - weights[k] + means[k] - means[k] + deviations[k] - deviations[k];
    if (!(total == 0)) return false;
    mixture->weight[k] = weights[k] / (weights[0] + weights[1]);
    mixture->mean[k] = clamp(frame.enter(means[k]), -kFar, kFar);
    const double deviation = clamp(frame.enter_length(deviations[k]), 0, kFar);
    mixture->variance[k] = larger(deviation * deviation, reg.floor);
  }
  return weights[0] + weights[1] > 0;
}

struct Result {
  double weight[2], mean[2], deviation[2];
  int64_t iterations;
  double log_likelihood;
  Status status;
};

Result fit_problem(const FitParams& params, int64_t b, const Problem& problem) {
  const Survey survey = gather(params, b, problem);
  const double unit = square_root(params.reg_covar);
  if (survey.bad_weight) return {{}, {}, {}, 0, 0, Status::kBadWeight};
  if (survey.kept == 0) return {{0, 0}, {0, 0}, {unit, unit}, 0, 0, Status::kTooFew};
  if (survey.kept == 1 || survey.low == survey.high) {
    return {{1, 0}, {survey.low, survey.low}, {unit, unit}, 0, 0, survey.kept == 1 ? Status::kTooFew : Status::kConstant};
  }
  const Frame frame = frame_of(survey.low, survey.high, unit, params.normalize);
  double total[2];
  enter(problem, frame, survey.largest_weight, total);
  const Regularisation reg =
      regularisation(frame, survey.low, survey.high, params.reg_covar, params.normalize, total[0] / survey.kept);

  Mixture mixture;
  if (!start_from(params, b, frame, reg, &mixture)) {
    mixture = initialise(problem, frame.enter(survey.low), frame.enter(survey.high), total, reg);
  }
  double bound = -kInfinity;
  int64_t iteration = 0;
  bool converged = false;
  while (iteration < params.max_iter && !converged) {
    ++iteration;
    const Densities current = densities(mixture);
    double log_likelihood, again;
    bool cancelled;
    mixture = maximise(soft_moments<true>(problem, current, current.mean, &log_likelihood), current.mean, reg, &cancelled);
    if (cancelled) {
      const double centre[2] = {mixture.mean[0], mixture.mean[1]};
      mixture = maximise(soft_moments<false>(problem, current, centre, &again), centre, reg, &cancelled);
    }
    log_likelihood /= total[0];
    converged = magnitude(log_likelihood - bound) < params.tol;
    bound = log_likelihood;
  }

  Result result;
  const int low = mixture.mean[0] <= mixture.mean[1] ? 0 : 1;
  const double bounds = larger(magnitude(survey.low), magnitude(survey.high));
  for (int k = 0; k < 2; ++k) {
    const int from = k ^ low;
    result.weight[k] = mixture.weight[from];
    result.mean[k] = clamp(frame.leave(mixture.mean[from]), -bounds, bounds);
    result.deviation[k] = clamp(frame.leave_length(square_root(mixture.variance[from])), 0, kLargest);
  }
  result.iterations = iteration;
  result.log_likelihood = bound + frame.log_jacobian();
  result.status = survey.finite < double(problem.n) ? Status::kNonFinite : converged ? Status::kConverged : Status::kMaxIter;
  return result;
}

void fit(const FitParams& params, int64_t b, const Team& team, double* scratch) {
  const Problem problem(params.layout.size(b), params.sample_weight != nullptr, scratch, team);
  const Result result = fit_problem(params, b, problem);
  for (int k = 0; k < 2; ++k) {
    params.weights[2 * b + k] = result.weight[k];
    params.means[2 * b + k] = result.mean[k];
    params.deviations[2 * b + k] = result.deviation[k];
  }
  params.iterations[b] = result.iterations;
  params.log_likelihood[b] = result.log_likelihood;
  params.status[b] = result.status;
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

  // a component of no weight (constant or too few values) leaves nothing to compute
  const bool decided = !(weight[0] > 0) || !(weight[1] > 0);
  const F64 decision = broadcast<F64>(weight[0] > 0 ? 1.0 : 0.0);
  const double unit = larger(deviation[0], deviation[1]);
  const Frame frame = frame_about(mean[0], larger(mean[1] - mean[0], unit));
  Mixture mixture;
  const double span = frame.enter(mean[1]);
  const double smallest = kNear * larger(larger(span, frame.enter_length(unit)), 0x1p-52);
  for (int k = 0; k < 2; ++k) {
    const double length = larger(frame.enter_length(deviation[k]), smallest);
    mixture.weight[k] = weight[k];
    mixture.mean[k] = k * span;
    mixture.variance[k] = length * length;
  }
  const Densities in = densities(mixture);
  const F64 bottom = broadcast<F64>(params.monotone ? 0.0 : -kFar), top = broadcast<F64>(params.monotone ? span : kFar);
  for (int64_t i = first; i < last; i += kPair) {
    F64 x[2], p[2];
    load_pair(params.dtype, params.values, begin + i, i < size ? (last < size ? last : size) - i : 0, x);
    for (int k = 0; k < 2; ++k) {
      const F64 u = minimum(maximum(frame.enter(x[k]), bottom), top);
      const F64 t0 = u, t1 = u - in.mean[1];
      const F64 d = in.constant[0] - t0 * t0 * in.half_precision[0] - (in.constant[1] - t1 * t1 * in.half_precision[1]);
      F64 low, high;
      responsibilities(d, exp(minimum(d, -d)), low, high);
      p[k] = is_finite(x[k]) ? (decided ? decision : low) : F64{};
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
