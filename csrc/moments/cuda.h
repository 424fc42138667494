// The kernels of moments on the GPU as the launcher sees them: plain data in, plain functions; and their geometry.
#pragma once

#include "common/geometry.h"
#include "common/tuning.h"
#include "moments/kernel.h"

namespace fastkd::moments {

enum class Team { kLane, kFewLanes, kWarp, kBlock };  // that has a row

constexpr unsigned kLaneThreads = 128;  // of a block where rows belong to lanes
constexpr unsigned kFewLanes = 4;
constexpr int kRowPacks = 4;                         // of 16 bytes, that a thread has on their way
constexpr int64_t kWarpPacks = 32 * kRowPacks;       // of a warp
constexpr unsigned kMergeWidth = 32;                 // channels of a block that merges parts
constexpr int kPixelsAhead = 5, kNumbersAhead = 16;  // pixels that a thread has on their way: of a pack of channels, of one

struct DevicePlan {
  int64_t piece, pieces;   // pixels of a part, parts of a sample
  unsigned width, height;  // threads of a block, channels and pixels, where channels lie side by side
  bool packs;              // of channels
  Team team;               // of rows
  Geometry geometry;
};

inline int64_t pieces_of(int64_t n, int64_t of) { return (n + of - 1) / of; }

// Few channels are cut into parts, so that there are blocks for all multiprocessors.
inline DevicePlan plan_columns(const Maps& maps, int64_t size, bool aligned, DeviceLimits limits) {
  DevicePlan plan{};
  const int64_t pack = 16 / size;
  plan.packs = aligned && maps.channels % pack == 0;
  const int64_t units = plan.packs ? maps.channels / pack : maps.channels;
  const int64_t ahead = plan.packs ? kPixelsAhead : kNumbersAhead;
  // a few pixels for each thread, and neighbours in memory for the threads of a warp
  const int64_t height = std::clamp<int64_t>(pieces_of(maps.pixels, 4), 1, kThreads / std::min<int64_t>(units, 32));
  plan.height = static_cast<unsigned>(height);
  plan.width = static_cast<unsigned>(std::min<int64_t>(units, kThreads / height));
  const int64_t blocks = pieces_of(units, plan.width) * maps.outer;
  const int64_t wanted = pieces_of(tuned(Knob::kMomentsBlocks) * limits.multiprocessors, blocks);
  plan.piece = pieces_of(maps.pixels, std::clamp<int64_t>(wanted, 1, pieces_of(maps.pixels, 2 * ahead * height)));
  plan.pieces = pieces_of(maps.pixels, plan.piece);
  const unsigned threads = (plan.width * plan.height + 31) / 32 * 32;
  plan.geometry = {one_cluster_each("parts of x", blocks * plan.pieces, 1), threads, 1,
                   (std::size_t{threads} * (plan.packs ? static_cast<unsigned>(pack) : 1) * 2 + threads) * sizeof(double)};
  return plan;
}

inline DevicePlan plan_rows(const Maps& maps, int64_t size, DeviceLimits limits) {
  DevicePlan plan{};
  const int64_t rows = maps.outer * maps.channels, packs = pieces_of(maps.pixels * size, 16);
  plan.piece = maps.pixels;
  plan.pieces = 1;
  if (packs <= 2 * kWarpPacks) {
    plan.team = packs <= kRowPacks ? Team::kLane : packs <= 2 * kRowPacks * kFewLanes ? Team::kFewLanes : Team::kWarp;
    FASTKD_CHECK(rows < int64_t{1} << 32, "maps are ", rows, ", must be fewer than 2^32");
    const unsigned lanes = plan.team == Team::kLane ? 1 : plan.team == Team::kFewLanes ? kFewLanes : 32;
    plan.geometry = {grid_size(rows, 1, 1u << 16, kLaneThreads / lanes), kLaneThreads};
    return plan;
  }
  plan.team = Team::kBlock;
  constexpr int64_t kBlockPacks = kThreads / 32 * kWarpPacks;
  const int64_t wanted = pieces_of(tuned(Knob::kMomentsBlocks) * limits.multiprocessors, rows);
  const int64_t pieces = std::clamp<int64_t>(wanted, 1, pieces_of(packs, 2 * kBlockPacks));
  if (pieces > 1) {
    plan.piece = pieces_of(pieces_of(packs, pieces), kWarpPacks) * kWarpPacks * 16 / size;
    plan.pieces = pieces_of(maps.pixels, plan.piece);
  }
  const int64_t of_piece = pieces_of(plan.piece * size, 16);
  const unsigned warps = static_cast<unsigned>(std::min<int64_t>(kThreads / 32, pieces_of(of_piece, kWarpPacks)));
  plan.geometry = {one_cluster_each("parts of x", rows * plan.pieces, 1), warps * 32, 1, std::size_t{warps} * 3 * sizeof(double)};
  return plan;
}

inline DevicePlan plan_device(const Maps& maps, int64_t size, bool aligned, DeviceLimits limits) {
  return maps.channels_last ? plan_columns(maps, size, aligned, limits) : plan_rows(maps, size, limits);
}

struct DeviceParams {
  Maps maps;
  int64_t piece, pieces;
  unsigned width, height;
  double* part_mean;  // [..., channels] for each part, or null where results have one part
  double* part_m2;
  void* mean;
  void* var;
};

struct DeviceBackwardParams {
  Maps maps;
  int64_t piece, pieces;
  unsigned width, height;
  double inverse_count;
  const void* mean;
  const void* grad_mean;
  const void* grad_var;
  void* gradient;
};

using ForwardKernel = void (*)(DeviceParams);
using BackwardKernel = void (*)(DeviceBackwardParams);
ForwardKernel rows_kernel(Dtype dtype, Team team);
BackwardKernel rows_backward_kernel(Dtype dtype, Team team);
ForwardKernel columns_kernel(Dtype dtype, bool packs);
BackwardKernel columns_backward_kernel(Dtype dtype, bool packs);
ForwardKernel merge_kernel();

}  // namespace fastkd::moments
