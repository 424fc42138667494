// What happens between the sweeps of a fit, and what a posterior needs beforehand: scalars of one problem, for CPU and GPU.
#pragma once

#include "gmm/kernel.h"
#include "gmm/math.h"

namespace fastkd::FASTKD_ISA::gmm_math {

using ::fastkd::gmm::FitParams;
using ::fastkd::gmm::Status;

constexpr int kLloydCap = 300;  // scikit-learn's KMeans stops there too; a dozen is usual

// What the values are like before they enter the frame.
struct Survey {
  double low = __builtin_inf(), high = -__builtin_inf(), largest_weight = 0;
  double finite = 0;  // finite values
  double kept = 0;    // of them, those of positive weight
  bool bad_weight = false;
};

// ---- the start ---------------------------------------------------------------------------------

// A split of the values in two by a threshold.
struct Split {
  double threshold;
  double centre[2];  // means of the two sides
  double between;    // sum of squares between them, which k-means maximises; -1: a side is empty
};

// Lloyd's algorithm from a threshold, to convergence: while it is active, it wants the values up to the threshold measured.
struct Lloyd {
  double threshold;
  Split split;
  double count = -1;
  int iteration = 0;
  bool active = true;

  FASTKD_HOST_DEVICE explicit Lloyd(double start) : threshold(start), split{start, {0, 0}, -1} {}

  // below: number, weight and weighted sum of the values up to the threshold; total: weight and weighted sum of all.
  FASTKD_HOST_DEVICE void advance(const double (&below)[3], const double (&total)[2]) {
    const double above = total[0] - below[1], mean = total[1] / total[0];
    active = false;
    if (below[0] == count || !(below[1] > 0) || !(above > 0)) return;  // in one dimension the count tells the partition
    count = below[0];
    const double low = below[2] / below[1], high = (total[1] - below[2]) / above;
    split = {threshold, {low, high}, below[1] * (low - mean) * (low - mean) + above * (high - mean) * (high - mean)};
    if (!(low < high)) return;
    threshold = low + 0.5 * (high - low);
    active = ++iteration < kLloydCap;
  }
};

// The two starts, of whose local optima of k-means the better is taken: from the centres (low, high) an outlier is found,
// from a split at the mean the bulk of a skewed distribution; k-means++ finds either, by chance.
FASTKD_HOST_DEVICE Lloyd outer_start(double low, double high) { return Lloyd(low + 0.5 * (high - low)); }
FASTKD_HOST_DEVICE Lloyd inner_start(const double (&total)[2]) { return Lloyd(total[1] / total[0]); }
FASTKD_HOST_DEVICE Split better_split(const Split& outer, const Split& inner, double low, double high) {
  const Split best = inner.between > outer.between ? inner : outer;
  return best.between < 0 ? Split{low, {low, high}, 0} : best;
}

// Whether a problem comes with parameters to start from that the CPU would raise for.
FASTKD_HOST_DEVICE bool negative_start(const FitParams& params, int64_t b) {
  if (params.init_weights == nullptr) return false;
  bool negative = false;
  for (int k = 0; k < 2; ++k) negative |= params.init_weights[2 * b + k] < 0 || params.init_deviations[2 * b + k] < 0;
  return negative;
}

// Given parameters in the frame; false where they are not all finite.
FASTKD_HOST_DEVICE bool start_from(const FitParams& params, int64_t b, const Frame& frame, const Regularisation& reg,
                                   Mixture* mixture) {
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

// ---- the end -----------------------------------------------------------------------------------

struct Result {
  double weight[2], mean[2], deviation[2];
  int64_t iterations;
  double log_likelihood;
  Status status;
};

// Whether there is anything to fit. If not, *result is what there is to say.
FASTKD_HOST_DEVICE bool can_fit(const Survey& survey, double reg_covar, Result* result) {
  const double unit = square_root(reg_covar);
  if (survey.bad_weight || survey.kept == 0) {
    *result = {{0, 0}, {0, 0}, {unit, unit}, 0, 0, survey.bad_weight ? Status::kInvalid : Status::kTooFew};
    return false;
  }
  if (survey.kept == 1 || survey.low == survey.high) {
    const Status status = survey.kept == 1 ? Status::kTooFew : Status::kConstant;
    *result = {{1, 0}, {survey.low, survey.low}, {unit, unit}, 0, 0, status};
    return false;
  }
  return true;
}

// The EM iterations of a problem, as far as they have come.
struct Progress {
  double bound = -__builtin_inf();  // mean log-likelihood in the frame
  int64_t iterations = 0;
  bool converged = false;

  FASTKD_HOST_DEVICE bool active(const FitParams& params) const { return iterations < params.max_iter && !converged; }
  FASTKD_HOST_DEVICE void advance(const FitParams& params, double log_likelihood) {
    ++iterations;
    converged = magnitude(log_likelihood - bound) < params.tol;
    bound = log_likelihood;
  }
};

// In the units of the values, the component of lower mean first.
FASTKD_HOST_DEVICE Result result_of(const Mixture& mixture, const Progress& progress, const Frame& frame, double low, double high,
                                    bool all_finite) {
  Result result;
  const bool in_order = mixture.mean[0] <= mixture.mean[1];
  const double bounds = larger(magnitude(low), magnitude(high));
  for (int k = 0; k < 2; ++k) {
    const auto component = [&](const double (&pair)[2]) { return in_order ? pair[k] : pair[1 - k]; };
    result.weight[k] = component(mixture.weight);
    result.mean[k] = clamp(frame.leave(component(mixture.mean)), -bounds, bounds);
    result.deviation[k] = clamp(frame.leave_length(square_root(component(mixture.variance))), 0, kLargest);
  }
  result.iterations = progress.iterations;
  result.log_likelihood = progress.bound + frame.log_jacobian();
  result.status = !all_finite ? Status::kNonFinite : progress.converged ? Status::kConverged : Status::kMaxIter;
  return result;
}

FASTKD_HOST_DEVICE void store_result(const FitParams& params, int64_t b, const Result& result) {
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

// A mixture as the posterior of its low component needs it: in a frame about the low mean.
struct PosteriorMixture {
  Frame frame;
  Densities densities;
  double bottom, top;  // values are clamped to these
  bool decided;        // a component of no weight (constant or too few values) leaves nothing to compute
  double decision;

  // log-odds of the low component
  template <typename V>
  FASTKD_HOST_DEVICE V log_odds(V u) const {
    const V t0 = u, t1 = u - densities.mean[1];
    return densities.constant[0] - t0 * t0 * densities.half_precision[0] -
           (densities.constant[1] - t1 * t1 * densities.half_precision[1]);
  }
};

FASTKD_HOST_DEVICE PosteriorMixture posterior_mixture(const double* weight, const double* mean, const double* deviation,
                                                      bool monotone) {
  PosteriorMixture result;
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
  result.frame = frame;
  result.densities = densities(mixture);
  result.bottom = monotone ? 0.0 : -kFar;
  result.top = monotone ? span : kFar;
  result.decided = !(weight[0] > 0) || !(weight[1] > 0);
  result.decision = weight[0] > 0 ? 1.0 : 0.0;
  return result;
}

}  // namespace fastkd::FASTKD_ISA::gmm_math
