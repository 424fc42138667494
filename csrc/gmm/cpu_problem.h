// One problem of gmm on the CPU: its values in fp64 scratch, in chunks, and the sweeps that bring them there.
#pragma once

#include "common/simd.h"
#include "gmm/fit.h"
#include "gmm/kernel.h"
#include "gmm/math.h"

namespace fastkd::FASTKD_ISA::gmm {

using namespace gmm_math;
using ::fastkd::gmm::kChunk;
using ::fastkd::gmm::kPartials;
using ::fastkd::gmm::Team;

constexpr int L = kLanes<F64>;
constexpr int kPair = 2 * L;  // values in a register of fp32
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

  Problem(int64_t n_, bool weighted, double* scratch, const Team& team_)
      : n(n_), chunks(::fastkd::gmm::chunks_of(n_)), team(&team_) {
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

// ---- from the values to the frame --------------------------------------------------------------

// Converts the values (and weights) into scratch and squeezes out what takes no part.
inline Survey gather(const FitParams& params, int64_t b, const Problem& problem) {
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
          bad += here & ~((weight[k] >= 0.0) & (weight[k] <= kLargest)) ? one : zero;  // beyond the end nothing is finite
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
inline void enter(const Problem& problem, const Frame& frame_, double largest_weight, double (&total)[2]) {
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

}  // namespace fastkd::FASTKD_ISA::gmm
