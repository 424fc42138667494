// EM for mixtures of two 1-D Gaussians on the GPU: one launch from the values to the parameters.
//
// Mapping: a group of threads shares a problem: 4, 8 or 32 lanes, a block, or a cluster of blocks; plan_fit() chooses. Several
// problems of a warp stop at different iterations: finished ones come along, their results unchanged, until the last is done.
// The threads of a cluster decide by reduced numbers only, which are the same bits in all of them. No atomics: sums have a
// fixed order, in which the problem alone counts.
//
// Bytes: values and weights once, 72 of results a problem. Everything else is arithmetic: a value and iteration take
//   the two log-densities in fp64, their difference d, and a sum of the larger                8 fp64
//   e = 2^-|d|, its range reduced in fp64, a polynomial of the rest in fp32                   3 fp64, 6 fp32, 1 conversion
//   the smaller responsibility s = e / (1 + e) in fp32, which keeps its relative accuracy,
//   and the larger as 1 - s in fp64                                                           1 fp64, 1 special, 1 conversion
//   the moments of both components in fp64                                                    6 fp64
// and some 27 selects and instructions for integers: 55 in all (sm_90). log(1 + e) is taken of the product of all.
// An H200 issues 128 instructions a cycle and multiprocessor, 64 of them fp64, 16 special or conversions.
// fp32 is good enough there: the errors of e and s are a few 2^-24 of the smaller responsibility, as often up as down, and
// average out. Where there are so few values that they do not, while EM, leaving a saddle, makes them grow, the E-step is fp64.
#pragma once

#include "gmm/cuda_values.cuh"

namespace fastkd::FASTKD_ISA::gmm {

using ::fastkd::gmm::FitKernel;
using ::fastkd::gmm::FitTeam;
using ::fastkd::gmm::kFitNumbers;

constexpr double kExactBelow = 32;  // values of a problem
constexpr double kLn2 = 0.6931471805599453;

FASTKD_DEVICE Moments moments_of(const double* sums) { return {{sums[0], sums[3]}, {sums[1], sums[4]}, {sums[2], sums[5]}}; }

// r, r (u - centre), r (u - centre)^2 onto three sums
FASTKD_DEVICE void add_moments(double r, double offset, double square, double* sums) {
  sums[0] += r;
  sums[1] += r * offset;
  sums[2] += r * square;
}

// Moments of the two sides of a threshold.
template <class Group, bool kWeighted>
FASTKD_DEVICE Moments hard_moments(const Values<Group, kWeighted>& values, bool wanted, const Split& split, Group& group) {
  double sums[6] = {};
  const auto add = [&](double u, double w) {
    const double t0 = u - split.centre[0], t1 = u - split.centre[1];
    const bool low = u <= split.threshold;
    add_moments(low ? w : 0.0, t0, t0 * t0, sums);
    add_moments(low ? 0.0 : w, t1, t1 * t1, sums + 3);
  };
  if (wanted) values.each(add);
  group.reduce(sums, Sum{});
  return moments_of(sums);
}

// e = 2^-|d| and s = e / (1 + e).
struct Odds {
  float one_more;  // 1 + e
  double smaller;  // s
};
template <bool kExact>
FASTKD_DEVICE Odds odds_of(double d) {
  if constexpr (kExact) {
    const double e = device::exp(-magnitude(d) * kLn2);
    return {static_cast<float>(1.0 + e), e / (1.0 + e)};
  } else {
    const float e = power_of_minus(d), one_more = 1.0f + e;
    return {one_more, static_cast<double>(e * reciprocal(one_more))};
  }
}

// The E-step and the sums of the M-step about `centre`, of one thread; kAtMeans: which are the means of the mixture.
template <bool kAtMeans, bool kExact, class Group, bool kWeighted>
FASTKD_DEVICE void add_soft_moments(const Values<Group, kWeighted>& values, const Densities& in, const double (&centre)[2],
                                    double (&sums)[7]) {
  const double m0 = in.mean[0], m1 = in.mean[1];  // log-densities to base 2
  const double c0 = in.constant[0] * kLog2E, c1 = in.constant[1] * kLog2E;
  const double h0 = in.half_precision[0] * kLog2E, h1 = in.half_precision[1] * kLog2E;
  // without weights the product of the 1 + e: a float in [1, 2) times 2^exponent
  float product = 1;
  int exponent = 0;
  values.each([&](double u, double w) {
    const double t0 = u - m0, t1 = u - m1, q0 = t0 * t0, q1 = t1 * t1;
    const double a0 = c0 - h0 * q0, a1 = c1 - h1 * q1, d = a0 - a1;
    const bool low = bits_as<uint64_t>(d) >> 63 == 0;  // the likelier one; where d is 0, both
    const Odds odds = odds_of<kExact>(d);
    const double larger_one = 1.0 - odds.smaller, top = low ? a0 : a1;
    double r0 = low ? larger_one : odds.smaller, r1 = low ? odds.smaller : larger_one;
    if constexpr (kWeighted) {
      r0 *= w;
      r1 *= w;
      sums[6] += w * (top + static_cast<double>(device::log(odds.one_more)) * kLog2E);
    } else {
      sums[6] += top;
      const unsigned bits = bits_as<unsigned>(product * odds.one_more);
      exponent += static_cast<int>(bits >> 23) - 127;
      product = bits_as<float>((bits & 0x7fffffu) | 0x3f800000u);
    }
    if constexpr (kAtMeans) {
      add_moments(r0, t0, q0, sums);
      add_moments(r1, t1, q1, sums + 3);
    } else {
      const double o0 = u - centre[0], o1 = u - centre[1];
      add_moments(r0, o0, o0 * o0, sums);
      add_moments(r1, o1, o1 * o1, sums + 3);
    }
  });
  if constexpr (!kWeighted) sums[6] += exponent + static_cast<double>(device::log(product)) * kLog2E;
}

template <bool kAtMeans, class Group, bool kWeighted>
FASTKD_DEVICE Moments soft_moments(const Values<Group, kWeighted>& values, bool wanted, bool exact, const Densities& in,
                                   const double (&centre)[2], Group& group, double* log_likelihood) {
  double sums[7] = {};
  if (wanted && exact) {
    add_soft_moments<kAtMeans, true>(values, in, centre, sums);
  } else if (wanted) {
    add_soft_moments<kAtMeans, false>(values, in, centre, sums);
  }
  group.reduce(sums, Sum{});
  *log_likelihood = sums[6] * kLn2;
  return moments_of(sums);
}

// Lloyd's algorithm from both starts at once: a sweep serves both until each has converged.
template <class Group, bool kWeighted>
FASTKD_DEVICE Split split_in_two(const Values<Group, kWeighted>& values, bool wanted, double low, double high,
                                 const double (&total)[2], Group& group) {
  Lloyd outer = outer_start(low, high), inner = inner_start(total);
  outer.active = inner.active = wanted;
  while (group.any(outer.active || inner.active)) {
    unsigned counts[2] = {};  // of one thread
    double sums[6] = {};      // number, weight, weighted sum of either
    const auto add = [&](double u, double w) {
      const double weighted = kWeighted ? w * u : u;
      if (u <= outer.threshold) {
        ++counts[0];
        if constexpr (kWeighted) sums[1] += w;
        sums[2] += weighted;
      }
      if (u <= inner.threshold) {
        ++counts[1];
        if constexpr (kWeighted) sums[4] += w;
        sums[5] += weighted;
      }
    };
    if (outer.active || inner.active) values.each(add);
    sums[0] = counts[0];
    sums[3] = counts[1];
    if constexpr (kWeighted) {
      group.reduce(sums, Sum{});
    } else {
      double plain[4] = {sums[0], sums[2], sums[3], sums[5]};
      group.reduce(plain, Sum{});
      sums[0] = sums[1] = plain[0];
      sums[2] = plain[1];
      sums[3] = sums[4] = plain[2];
      sums[5] = plain[3];
    }
    if (outer.active) outer.advance({sums[0], sums[1], sums[2]}, total);
    if (inner.active) inner.advance({sums[3], sums[4], sums[5]}, total);
  }
  return better_split(outer.split, inner.split, low, high);
}

// The EM iterations from a mixture on. done(mixture, progress) once for each problem that is live.
template <class Group, bool kWeighted, typename Done>
FASTKD_DEVICE void iterate(const DeviceFitParams& p, const Values<Group, kWeighted>& values, bool live, bool exact, double weight,
                           const Regularisation& reg, Mixture mixture, Group& group, const Done& done) {
  Progress progress;
  bool active = live;
  while (group.any(active)) {
    const Densities current = densities(mixture);
    double log_likelihood, again;
    bool cancelled;
    mixture = maximise(soft_moments<true>(values, active, exact, current, current.mean, group, &log_likelihood), current.mean,
                       reg, &cancelled);
    if (group.any(active && cancelled)) {
      const double centre[2] = {mixture.mean[0], mixture.mean[1]};
      bool still;
      const Mixture better =
          maximise(soft_moments<false>(values, active && cancelled, exact, current, centre, group, &again), centre, reg, &still);
      if (cancelled) mixture = better;
    }
    if (!active) continue;
    progress.advance(p, log_likelihood / weight);
    active = progress.active(p);
    if (!active) done(mixture, progress);
  }
}

// One problem, or none: threads of the warp that have none come along. Its group's first thread writes the parameters.
template <class Group, bool kWeighted>
FASTKD_DEVICE void fit_problem(const DeviceFitParams& p, int64_t b, bool present, Group& group) {
  Values<Group, kWeighted> values(p, b, present, group);
  const auto finish = [&](const Result& result) {
    if (p.posterior != nullptr) {
      values.finish(result);
    } else if (present && group.index() == 0) {
      store_result(p, b, result);
    }
  };
  bool all_finite;
  const Survey survey = values.gather(group, &all_finite);
  Result nothing;
  const bool live = can_fit(survey, p.reg_covar, &nothing);
  if (!live) {
    values.clear();
    finish(nothing);
  }
  if (group.any(live)) {
    const Frame frame = live ? frame_of(survey.low, survey.high, square_root(p.reg_covar), p.normalize) : Frame{1, 0, 1};
    const double low = frame.enter(survey.low), high = frame.enter(survey.high);
    double total[2];
    values.enter(live, {frame, survey.low, survey.high, survey.largest_weight}, total, group);
    const Regularisation reg = regularisation(frame, survey.low, survey.high, p.reg_covar, p.normalize, total[0] / survey.kept);
    Mixture mixture{};
    const bool fresh = live && !start_from(p, b, frame, reg, &mixture);
    if (group.any(fresh)) {
      bool cancelled;
      const Split split = split_in_two(values, fresh, low, high, total, group);
      const Mixture hard = maximise(hard_moments(values, fresh, split, group), split.centre, reg, &cancelled);
      if (fresh) mixture = hard;
    }
    iterate(p, values, live, survey.kept < kExactBelow, total[0], reg, mixture, group,
            [&](const Mixture& fitted, const Progress& progress) {
              const Scalars scalars = values.scalars();
              finish(result_of(fitted, progress, scalars.frame, scalars.low, scalars.high, all_finite));
            });
  }
  if (p.posterior != nullptr) values.select();
}

// On a multiprocessor at least: four blocks of lanes leave a thread 128 registers, which only a plain fit on sm_90 and newer
// does with.
template <class Group, bool kWeighted>
constexpr unsigned kFitBlocks = Group::kWholeCluster         ? 1
                                : kWeighted || !kHasClusters ? 3
                                                             : 4;

// inspect: anywhere fit_problems<*> loads=32
template <class Group, bool kWeighted>
FASTKD_KERNEL(::fastkd::gmm::fit_threads(Group::kWholeCluster), kFitBlocks<Group, kWeighted>)
fit_problems(const DeviceFitParams p) {
  each_row<Group>(p.layout.problems, [&](int64_t index, Group& group) {
    const bool present = index < p.layout.problems;
    fit_problem<Group, kWeighted>(p, present ? index : 0, present, group);
  });
}

template <bool kWeighted>
FitKernel fit_kernel(FitTeam team) {
  switch (team) {
    case FitTeam::kEighthOfWarp: return fit_problems<LaneGroup<4>, kWeighted>;
    case FitTeam::kQuarterOfWarp: return fit_problems<LaneGroup<8>, kWeighted>;
    case FitTeam::kWarp: return fit_problems<LaneGroup<32>, kWeighted>;
    default: return fit_problems<LoopClusterGroup<kFitNumbers>, kWeighted>;
  }
}

}  // namespace fastkd::FASTKD_ISA::gmm
