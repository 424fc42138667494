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
#include "gmm/math.h"

namespace fastkd::FASTKD_ISA::gmm {
namespace {

using namespace gmm_math;
using ::fastkd::gmm::FitParams;
using ::fastkd::gmm::kChunk;
using ::fastkd::gmm::Kernels;
using ::fastkd::gmm::kPartials;
using ::fastkd::gmm::PosteriorParams;
using ::fastkd::gmm::Status;
using ::fastkd::gmm::Team;

constexpr int L = kLanes<F64>;
constexpr int kPair = 2 * L;            // values in a register of fp32
constexpr int kLloydCap = 300;          // scikit-learn's KMeans stops there too; a dozen is usual
constexpr int64_t kProductTerms = 512;  // factors in (1, 2] that fit a double

constexpr double kNan = __builtin_nan("");
constexpr double kInfinity = __builtin_inf();

// ---- reading -----------------------------------------------------------------------------------

FASTKD_INLINE void split(F32 v, F64 (&pair)[2]) {
  F32Half half[2];
  std::memcpy(half, &v, sizeof v);
  for (int k = 0; k < 2; ++k) pair[k] = __builtin_convertvector(half[k], F64);
}

// Two registers of values from `index`, of which the first `count` exist; NaN beyond.
FASTKD_INLINE void load_pair(Dtype dtype, const void* data, int64_t index, int64_t count, F64 (&pair)[2]) {
  switch (dtype) {
    case Dtype::kFloat64: {
      const double* p = static_cast<const double*>(data) + index;
      pair[0] = load_up_to(p, count, kNan);
      pair[1] = count > L ? load_up_to(p + L, count - L, kNan) : broadcast<F64>(kNan);
      return;
    }
    case Dtype::kBFloat16: return split(load_up_to(static_cast<const BFloat16*>(data) + index, count, float(kNan)), pair);
    case Dtype::kFloat16: return split(load_up_to(static_cast<const Float16*>(data) + index, count, float(kNan)), pair);
    default: return split(load_up_to(static_cast<const float*>(data) + index, count, float(kNan)), pair);
  }
}

FASTKD_INLINE I64 is_finite(F64 x) { return x - x == 0.0; }

// 1 in the first `count` lanes, 0 in the others
FASTKD_INLINE F64 first_lanes(int64_t count) {
  F64 mask = {};
  for (int i = 0; i < L; ++i) mask[i] = i < count ? 1.0 : 0.0;
  return mask;
}

// ---- one problem, cut into chunks --------------------------------------------------------------

struct Problem {
  int64_t n, chunks;
  double* u;       // values, then values in the frame; chunk c starts at c * kChunk
  double* w;       // weights, or null for 1
  double* counts;  // of each chunk: the values that take part
  double* partials;
  const Team* team;

  Problem(int64_t n_, bool weighted, double* scratch, const Team& team_) : n(n_), chunks(::fastkd::gmm::chunks_of(n_)), team(&team_) {
    const int64_t padded = (n + 15) / 16 * 16;
    u = scratch;
    w = weighted ? u + padded : nullptr;
    partials = u + padded * (weighted ? 2 : 1);
    counts = partials + chunks * kPartials;
  }

  // body(chunk, out) for each chunk, with out[0..kPartials) its own
  template <typename Body>
  void each(const Body& body) const {
    struct Call {
      const Problem* problem;
      const Body* body;
    } call{this, &body};
    const auto task = [](void* argument, int64_t chunk) {
      const Call& it = *static_cast<const Call*>(argument);
      (*it.body)(chunk, it.problem->partials + chunk * kPartials);
    };
    if (chunks == 1) {
      task(&call, 0);
    } else {
      team->run(chunks, task, &call);
    }
  }

  // the same with N sums a chunk, totalled in order
  template <int N, typename Body>
  void sum(double (&total)[N], const Body& body) const {
    each(body);
    for (double& t : total) t = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      for (int k = 0; k < N; ++k) total[k] += partials[c * kPartials + k];
    }
  }

  // body(u, w, use_weight, sums) for each register of values [first, last) of a chunk: use_weight says whether w is
  // other than 1, as in the last register, where it is 0 in the lanes beyond the end
  template <int N, typename Body>
  FASTKD_INLINE void registers(int64_t chunk, int64_t first, int64_t last, F64 (&sums)[N], const Body& body) const {
    const double* const values = u + chunk * kChunk;
    int64_t i = first;
    if (w == nullptr) {
      const F64 one = broadcast<F64>(1.0);
      for (; i <= last - L; i += L) body(load(values + i), one, std::false_type{}, sums);
      if (i < last) body(load(values + i), first_lanes(last - i), std::true_type{}, sums);
    } else {
      const double* const weights = w + chunk * kChunk;  // 0 beyond the end
      for (; i < last; i += L) body(load(values + i), load(weights + i), std::true_type{}, sums);
    }
  }
};

// ---- sweeps ------------------------------------------------------------------------------------

// What the values are like before they enter the frame.
struct Survey {
  double low = kInfinity, high = -kInfinity, largest_weight = 0;
  double finite = 0;       // finite values
  double kept = 0;         // of them, those of positive weight
  bool bad_weight = false;
};

// Converts the values (and weights) into scratch and squeezes out what takes no part.
Survey gather(const FitParams& params, int64_t b, const Problem& problem) {
  const int64_t begin = params.layout.begin(b), weight_begin = params.layout.packed_begin(b);
  problem.each([&](int64_t chunk, double* out) {
    const int64_t first = chunk * kChunk, n = problem.n - first < kChunk ? problem.n - first : kChunk;
    double* const u = problem.u + first;
    double* const w = problem.w != nullptr ? problem.w + first : nullptr;
    const F64 zero = {}, one = broadcast<F64>(1.0);
    F64 low = broadcast<F64>(kInfinity), high = -low, largest = {}, finite = {}, kept = {}, bad = {};
    for (int64_t i = 0; i < n; i += kPair) {
      F64 x[2], weight[2] = {one, one};
      load_pair(params.dtype, params.values, begin + first + i, n - i, x);
      if (w != nullptr) load_pair(params.weight_dtype, params.sample_weight, weight_begin + first + i, n - i, weight);
      for (int k = 0; k < 2; ++k) {
        const I64 here = is_finite(x[k]), heavy = here & (weight[k] > 0.0);
        finite += here ? one : zero;
        kept += heavy ? one : zero;
        low = minimum(low, heavy ? x[k] : low);
        high = maximum(high, heavy ? x[k] : high);
        store(u + i + k * L, x[k]);
        if (w != nullptr) {
          if (i + (k + 1) * L <= n) {
            bad += (weight[k] >= 0.0) & (weight[k] <= kLargest) ? zero : one;
          } else {
            for (int64_t lane = 0; i + k * L + lane < n; ++lane) bad[0] += weight[k][lane] >= 0.0 && weight[k][lane] <= kLargest ? 0 : 1;
          }
          largest = maximum(largest, heavy ? weight[k] : largest);
          store(w + i + k * L, weight[k]);
        }
      }
    }
    const double count = reduce_sum(kept);
    if (count < double(n)) {
      int64_t end = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (!(u[i] - u[i] == 0.0) || (w != nullptr && !(w[i] > 0.0))) continue;
        u[end] = u[i];
        if (w != nullptr) w[end] = w[i];
        ++end;
      }
    }
    problem.counts[chunk] = count;
    const double results[] = {reduce_min(low), reduce_max(high), reduce_max(largest), reduce_sum(finite), reduce_sum(bad)};
    std::memcpy(out, results, sizeof results);
  });
  Survey survey;
  for (int64_t c = 0; c < problem.chunks; ++c) {
    const double* out = problem.partials + c * kPartials;
    survey.low = out[0] < survey.low ? out[0] : survey.low;
    survey.high = larger(out[1], survey.high);
    survey.largest_weight = larger(out[2], survey.largest_weight);
    survey.finite += out[3];
    survey.kept += problem.counts[c];
    survey.bad_weight = survey.bad_weight || out[4] > 0;
  }
  return survey;
}

// Values into the frame, weights to at most 1, and lanes beyond the end to 0. Returns the sum of weights and of w u.
void enter(const Problem& problem, const Frame& frame_, double largest_weight, double (&total)[2]) {
  problem.sum(total, [&](int64_t chunk, double* out) {
    const Frame frame = frame_;
    const int64_t n = int64_t(problem.counts[chunk]);
    double* const u = problem.u + chunk * kChunk;
    double* const w = problem.w != nullptr ? problem.w + chunk * kChunk : nullptr;
    F64 weight_sum = {}, sum = {};
    for (int64_t i = 0; i < n; i += L) {
      F64 values = frame.enter(load(u + i)), weights = broadcast<F64>(1.0);
      if (w != nullptr) weights = load(w + i) / largest_weight;
      if (n - i < L) {
        const I64 exists = first_lanes(n - i) > 0.0;
        values = exists ? values : F64{};
        weights = exists ? weights : F64{};
      }
      store(u + i, values);
      if (w != nullptr) store(w + i, weights);
      weight_sum += weights;
      sum += weights * values;
    }
    out[0] = reduce_sum(weight_sum);
    out[1] = reduce_sum(sum);
  });
}

// Number, weight and weighted sum of the values up to the threshold.
void split_at(const Problem& problem, double threshold, double (&total)[3]) {
  problem.sum(total, [&](int64_t chunk, double* out) {
    F64 sums[3] = {};
    const F64 t = broadcast<F64>(threshold), one = broadcast<F64>(1.0);
    problem.registers(chunk, 0, int64_t(problem.counts[chunk]), sums, [&](F64 u, F64 w, auto use_weight, F64(&sum)[3]) __attribute__((always_inline)) {
      if constexpr (use_weight()) {
        const I64 below = (u <= t) & (w > 0.0);
        sum[0] += below ? one : F64{};
        sum[1] += below ? w : F64{};
        sum[2] += below ? w * u : F64{};
      } else {
        sum[0] += u <= t ? one : F64{};
        sum[2] += u <= t ? u : F64{};
      }
    });
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
    problem.registers(chunk, 0, int64_t(problem.counts[chunk]), sums, [&](F64 u, F64 w, auto, F64(&sum)[6]) __attribute__((always_inline)) {
      add_moments(u <= t ? w : F64{}, u - c0, sum);
      add_moments(u <= t ? F64{} : w, u - c1, sum + 3);
    });
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
    const int64_t count = int64_t(problem.counts[chunk]);
    for (int64_t first = 0; first < count; first += kProductTerms * L) {
      const int64_t last = first + kProductTerms * L < count ? first + kProductTerms * L : count;
      sums[7] = broadcast<F64>(1.0);
      problem.registers(chunk, first, last, sums, [&](F64 u, F64 w, auto use_weight, F64(&sum)[8]) __attribute__((always_inline)) {
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
      });
      sums[6] += log(sums[7]);
    }
    for (int k = 0; k < 7; ++k) out[k] = reduce_sum(sums[k]);
  });
  *log_likelihood = total[6];
  return moments_of(total);
}

// ---- the fit -----------------------------------------------------------------------------------

// Lloyd's algorithm from (low, high) to convergence, then the M-step of its hard assignment. total: sums of w and w u.
Mixture initialise(const Problem& problem, double low, double high, const double (&total)[2], const Regularisation& reg) {
  double centre[2] = {low, high}, threshold = low, count = -1;
  for (int iteration = 0; iteration < kLloydCap; ++iteration) {
    const double next = centre[0] + 0.5 * (centre[1] - centre[0]);
    double below[3];
    split_at(problem, next, below);
    const double weight_above = total[0] - below[1];
    if (below[0] == count || !(below[1] > 0) || !(weight_above > 0)) break;  // in one dimension the count tells the partition
    threshold = next;
    count = below[0];
    centre[0] = below[2] / below[1];
    centre[1] = (total[1] - below[2]) / weight_above;
    if (!(centre[0] < centre[1])) break;
  }
  bool cancelled;
  return maximise(hard_moments(problem, threshold, centre), centre, reg, &cancelled);
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
    mixture->variance[k] = larger(deviation * deviation, larger(reg.floor, 0x1p-1000));
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
  const double smallest = larger(larger(span, frame.enter_length(unit)) / kFar, 0x1p-500);
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
  return params.dtype == Dtype::kFloat64 ? posterior_of<double>(params, b, first, last) : posterior_of<float>(params, b, first, last);
}

}  // namespace

extern const Kernels kernels{fit, posterior};

}  // namespace fastkd::FASTKD_ISA::gmm
