// The kernels of relation on the GPU as the launcher sees them: plain data in, plain functions; and their geometry.
#pragma once

#include "common/geometry.h"
#include "common/tuning.h"
#include "relation/kernel.h"

namespace fastkd::relation {

constexpr unsigned kFeatureTile = 32;   // points, or columns: a block of threads takes a square of them, four a thread
constexpr unsigned kFeatureChunk = 16;  // of the other dimension at a time, through shared memory
constexpr unsigned kFeaturePitch = kFeatureTile + 1;
constexpr unsigned kChunkPitch = kFeatureChunk + 1;
constexpr int64_t kLeastColumns = 64;  // features worth a block

constexpr unsigned kEdgeTile = 8;                        // points: a block takes the distances between two such groups
constexpr unsigned kThirds = 4;                          // lanes that share the triangles of a distance
constexpr unsigned kThirdChunk = 32;                     // third points in shared memory at a time
constexpr unsigned kThirdPitch = kThirdChunk + kThirds;  // 16 bytes each: rows half a line apart, free of bank conflicts
static_assert(kEdgeTile * kEdgeTile * kThirds == kThreads);

// Squares on and above the diagonal, of `tile` points each.
constexpr int64_t triangular_tiles(int64_t points, int64_t tile) {
  const int64_t each = (points + tile - 1) / tile;
  return each * (each + 1) / 2;
}

// RowSums are over all columns here.
struct DeviceParams : Params {
  Features features[2];
  int64_t splits;         // parts of the features, summed by different blocks
  int64_t split_columns;  // of each, a multiple of kFeatureChunk
  double* squares;        // [2, splits, points, points] sums of squared differences
  double* sides[2];       // [points, points, 2]: E and n of math.h, in one 16-byte access
  double* losses;         // of each block of triangles
  int64_t loss_blocks;
  double weight[2];  // distance, angle
  int own;           // the side that gets gradients
  bool wide;         // loss and terms in fp64
  void* loss;
  void* terms;
};

struct DeviceGradientParams {
  Features features;
  const double* pairs;
  const void* scale;  // of the incoming gradient, on the device
  bool wide;          // it is fp64
  void* out;          // [points, columns], packed
};

struct SquaresPlan {
  int64_t splits, split_columns;
  Geometry geometry;
};

// Features are cut where there are too few pairs of points to fill the GPU.
inline SquaresPlan plan_squares(int64_t points, int64_t columns, DeviceLimits limits) {
  const int64_t tiles = triangular_tiles(points, kFeatureTile);
  const auto ceil_of = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  int64_t splits = ceil_of(limits.multiprocessors, tiles);
  if (splits > ceil_of(columns, kLeastColumns)) splits = ceil_of(columns, kLeastColumns);
  const int64_t most = tuned(Knob::kRelationSplits);
  if (splits > most) splits = most;
  const int64_t each = ceil_of(ceil_of(columns, splits), kFeatureChunk) * kFeatureChunk;
  FASTKD_CHECK(tiles <= kMaxBlocks / (2 * most), "points are ", points, ", must be fewer");
  return {
      splits, each, {static_cast<unsigned>(tiles * splits * 2), kThreads, 1, 2 * kFeatureTile * kChunkPitch * sizeof(double)}};
}

inline Geometry plan_triangles(int64_t points) {
  const int64_t tiles = triangular_tiles(points, kEdgeTile);
  FASTKD_CHECK(tiles <= kMaxBlocks, "points are ", points, ", must be fewer");
  return {static_cast<unsigned>(tiles), kThreads, 1, (4 * kEdgeTile * kThirdPitch * 2 + kThreads / 32) * sizeof(double)};
}

inline Geometry plan_gradient(int64_t points, int64_t columns) {
  const int64_t blocks = ((points + kFeatureTile - 1) / kFeatureTile) * ((columns + kFeatureTile - 1) / kFeatureTile);
  FASTKD_CHECK(blocks <= kMaxBlocks, "features are ", points, " x ", columns, ", must be fewer");
  return {static_cast<unsigned>(blocks), kThreads, 1,
          (kFeatureChunk * kFeaturePitch + kFeatureTile * kChunkPitch) * sizeof(double)};
}

using Kernel = void (*)(DeviceParams);
Kernel squares_kernel();
Kernel triangles_kernel(bool gradient, bool loss);
auto gradient_kernel() -> void (*)(DeviceGradientParams);

}  // namespace fastkd::relation
