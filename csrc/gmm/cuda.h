// The kernels of gmm on the GPU as the launcher sees them: plain data in, plain functions; and the choice between them.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/tuning.h"
#include "gmm/kernel.h"

namespace fastkd::gmm {

struct DeviceFitParams : FitParams {
  unsigned capacity = 0;        // values that a thread keeps in shared memory
  unsigned scalars_offset = 0;  // bytes of shared memory before the scalars of each thread; behind them its values
  // gmm_select of rows: all that is wanted, and weights are null
  void* posterior = nullptr;
  uint8_t* mask = nullptr;
  bool monotone = false;
  double threshold = 0;
};

// Who works on a problem.
enum class FitTeam {
  kEighthOfWarp,  // 4 lanes
  kQuarterOfWarp,
  kWarp,
  kCluster,  // all threads of a block, or of a cluster of blocks
};

struct FitPlan {
  FitTeam team;
  unsigned capacity;  // as in DeviceFitParams
  unsigned scalars_offset;
  Geometry geometry;
};

constexpr unsigned kLaneThreads = 128;     // of a block, where a problem belongs to lanes
constexpr unsigned kFitNumbers = 8;        // of a reduction at most
constexpr int64_t kMaxLanesValues = 1024;  // of a problem that belongs to lanes

constexpr unsigned kFitScalars = 6;  // 8 bytes each, of a thread

constexpr unsigned fit_threads(bool cluster) { return cluster ? kThreads : kLaneThreads; }  // of a block at most

// values: of all problems together. What is not known here is how they are spread: sizes are in device memory.
inline FitPlan plan_fit(int64_t problems, int64_t values, bool weighted, DeviceLimits limits) {
  const int64_t each = problems > 0 ? (values + problems - 1) / problems : 0, multiprocessors = limits.multiprocessors;
  const unsigned value_bytes = weighted ? 16 : 8;
  const auto scalars = [](unsigned threads) { return std::size_t{threads} * kFitScalars * 8; };
  // of what a thread of a block of `threads` must keep, as much as there is room for behind `before` bytes
  const auto capacity = [&](int64_t wanted, unsigned threads, std::size_t before) {
    const int64_t room = limits.shared_bytes > before ? (limits.shared_bytes - before) / (threads * value_bytes) : 0;
    return static_cast<unsigned>(wanted < room ? wanted : room);
  };
  if (each <= kMaxLanesValues && problems >= 4 * multiprocessors) {
    FASTKD_CHECK(problems < int64_t{1} << 32, "problems are ", problems, ", must be fewer than 2^32");
    // few lanes for a problem, so that what each of them does once an iteration counts little; but the GPU must be filled
    const bool few = problems * 4 < 128 * multiprocessors;
    const FitTeam team = few || each > 256 ? FitTeam::kWarp : each > 96 ? FitTeam::kQuarterOfWarp : FitTeam::kEighthOfWarp;
    const unsigned lanes = team == FitTeam::kWarp ? 32 : team == FitTeam::kQuarterOfWarp ? 8 : 4;
    const unsigned kept = capacity((each + lanes - 1) / lanes, kLaneThreads, scalars(kLaneThreads));
    const unsigned blocks = grid_size(problems, 1, 1u << 16, kLaneThreads / lanes);
    return {team, kept, 0, {blocks, kLaneThreads, 1, scalars(kLaneThreads) + std::size_t{kept} * kLaneThreads * value_bytes}};
  }
  // four values a thread for a small one; more blocks while they would have nothing to do otherwise, or where it does not fit
  const unsigned threads = each >= 4 * kThreads ? kThreads : each > 0 ? static_cast<unsigned>((each + 127) / 128 * 32) : 32;
  const auto before = [&](unsigned cluster) {
    return cluster_shared_bytes(threads, cluster, 2 * kFitNumbers) + scalars(threads);
  };
  const auto share = [&](unsigned cluster) { return (each + int64_t{threads} * cluster - 1) / (int64_t{threads} * cluster); };
  unsigned cluster = 1;
  while (2 * cluster <= limits.max_cluster && 2 * cluster <= tuned(Knob::kGmmLargestCluster) &&
         share(cluster) > tuned(Knob::kGmmClusterValues) &&
         (problems * 2 * cluster <= multiprocessors || capacity(share(cluster), threads, before(cluster)) < share(cluster))) {
    cluster *= 2;
  }
  const unsigned kept = capacity(share(cluster), threads, before(cluster));
  return {FitTeam::kCluster,
          kept,
          static_cast<unsigned>(before(cluster) - scalars(threads)),
          {one_cluster_each("problems", problems, cluster), threads, cluster,
           before(cluster) + std::size_t{kept} * threads * value_bytes}};
}

struct DevicePosteriorParams : PosteriorParams {
  int64_t chunk;  // elements of a block at a time
};

struct PosteriorPlan {
  int64_t chunk;
  Geometry geometry;
};

// pack: elements that a thread takes at once
inline PosteriorPlan plan_posterior(int64_t elements, int64_t pack, DeviceLimits limits) {
  // a thread prepares the mixture once for its share of a chunk, unless another begins there: long, but some for everyone
  const int64_t step = kThreads * pack, steps = elements / (step * limits.multiprocessors * 8);
  const int64_t chunk = step * (steps < 1 ? 1 : steps < 16 ? steps : 16);
  return {chunk, {grid_size(elements, chunk, 1u << 20, 1), kThreads}};
}

using FitKernel = void (*)(DeviceFitParams);
FitKernel plain_fit_kernel(FitTeam team);
FitKernel weighted_fit_kernel(FitTeam team);

}  // namespace fastkd::gmm
