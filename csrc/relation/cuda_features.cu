// From features to the squared distances of all pairs of points, and from the gradients of those back to features.
//
// Mapping: a block takes a square of 32 x 32, a thread 2 x 2 of it, through shared memory 16 at a time, in fp64; 2 operations a
// pair and feature, 1 load of shared memory. Each result has one owner, or one for each part of the features: no atomics.
// Bytes: features read once for each 32 points; B = 512, d = 512 in fp32: 16 x 1 MB, from L2 (B^2 d / 2 * 2 = 134 Mflop fp64).
#include "common/device.cuh"
#include "relation/cuda_rows.cuh"

namespace fastkd::relation {
namespace {

using namespace device;
using FASTKD_ISA::relation::triangular_tile;

constexpr unsigned kHalf = kFeatureTile / 2;
static_assert(kHalf * kHalf == kThreads && kFeatureChunk == kHalf);

FASTKD_DEVICE double feature(const Features& features, int64_t row, int64_t column) {
  const int64_t at = row * features.stride + column;
  return for_dtype(features.dtype,
                   [&]<typename T>() { return static_cast<double>(to_compute(static_cast<const T*>(features.data)[at])); });
}

FASTKD_KERNEL(kThreads)
squares_of_pairs(const DeviceParams p) {
  const bool teacher = block_index() % 2 != 0;
  const Features features = teacher ? p.features[1] : p.features[0];
  const int64_t points = p.points, split = block_index() / 2 % p.splits;
  int64_t tile_i, tile_j;
  triangular_tile(block_index() / 2 / p.splits, &tile_i, &tile_j);
  const int64_t first_i = tile_i * kFeatureTile, first_j = tile_j * kFeatureTile;
  const int64_t begin = split * p.split_columns;
  const int64_t end = begin + p.split_columns < features.columns ? begin + p.split_columns : features.columns;
  const unsigned y = thread_index() / kHalf, x = thread_index() % kHalf;
  const Shared<double> rows(0, kFeatureTile * kChunkPitch);
  const Shared<double> columns(kFeatureTile * kChunkPitch * sizeof(double), kFeatureTile * kChunkPitch);

  double sum[2][2] = {};
  for (int64_t chunk = begin; chunk < end; chunk += kFeatureChunk) {
    if (chunk > begin) block_barrier();
#pragma unroll
    for (unsigned r = 0; r < 2; ++r) {
      const unsigned row = y + r * kHalf;
      const bool inside = chunk + x < end;
      rows.store(row * kChunkPitch + x, inside && first_i + row < points ? feature(features, first_i + row, chunk + x) : 0);
      columns.store(row * kChunkPitch + x, inside && first_j + row < points ? feature(features, first_j + row, chunk + x) : 0);
    }
    block_barrier();
#pragma unroll
    for (unsigned c = 0; c < kFeatureChunk; ++c) {
      const double own[2] = {rows.load(y * kChunkPitch + c), rows.load((y + kHalf) * kChunkPitch + c)};
      const double other[2] = {columns.load(x * kChunkPitch + c), columns.load((x + kHalf) * kChunkPitch + c)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) sum[r][s] += (own[r] - other[s]) * (own[r] - other[s]);
      }
    }
  }
  double* const out = p.squares + ((teacher ? p.splits : 0) + split) * points * points;
#pragma unroll
  for (unsigned r = 0; r < 2; ++r) {
#pragma unroll
    for (unsigned s = 0; s < 2; ++s) {
      const int64_t i = first_i + y + r * kHalf, j = first_j + x + s * kHalf;
      if (i >= j || j >= points) continue;
      out[i * points + j] = sum[r][s];
      out[j * points + i] = sum[r][s];
    }
  }
}

FASTKD_KERNEL(kThreads)
gradient_of_features(const DeviceGradientParams p) {
  const Features features = p.features;
  const int64_t points = features.points;
  const int64_t across = (features.columns + kFeatureTile - 1) / kFeatureTile;
  const int64_t first_row = block_index() / across * kFeatureTile, first_column = block_index() % across * kFeatureTile;
  const unsigned y = thread_index() / kHalf, x = thread_index() % kHalf;
  const Shared<double> others(0, kFeatureChunk * kFeaturePitch);
  const Shared<double> pairs(kFeatureChunk * kFeaturePitch * sizeof(double), kFeatureTile * kChunkPitch);

  double own[2][2], sum[2][2] = {};
#pragma unroll
  for (unsigned r = 0; r < 2; ++r) {
#pragma unroll
    for (unsigned s = 0; s < 2; ++s) {
      const int64_t row = first_row + y + r * kHalf, column = first_column + x + s * kHalf;
      own[r][s] = row < points && column < features.columns ? feature(features, row, column) : 0;
    }
  }
  for (int64_t chunk = 0; chunk < points; chunk += kFeatureChunk) {
    if (chunk > 0) block_barrier();
#pragma unroll
    for (unsigned r = 0; r < 2; ++r) {
      const int64_t column = first_column + x + r * kHalf, row = first_row + y + r * kHalf;
      const bool other = chunk + y < points && column < features.columns, pair = chunk + x < points && row < points;
      others.store(y * kFeaturePitch + x + r * kHalf, other ? feature(features, chunk + y, column) : 0);
      pairs.store((y + r * kHalf) * kChunkPitch + x, pair ? p.pairs[row * points + chunk + x] : 0);
    }
    block_barrier();
#pragma unroll
    for (unsigned c = 0; c < kFeatureChunk; ++c) {
      if (chunk + c >= points) break;  // no pair: 0 times a feature that is not finite
      const double other[2] = {others.load(c * kFeaturePitch + x), others.load(c * kFeaturePitch + x + kHalf)};
      const double pair[2] = {pairs.load(y * kChunkPitch + c), pairs.load((y + kHalf) * kChunkPitch + c)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) sum[r][s] += pair[r] * (own[r][s] - other[s]);
      }
    }
  }
  const double scale = p.wide ? *static_cast<const double*>(p.scale) : *static_cast<const float*>(p.scale);
#pragma unroll
  for (unsigned r = 0; r < 2; ++r) {
#pragma unroll
    for (unsigned s = 0; s < 2; ++s) {
      const int64_t row = first_row + y + r * kHalf, column = first_column + x + s * kHalf;
      if (row >= points || column >= features.columns) continue;
      const int64_t at = row * features.columns + column;
      const double value = scale * sum[r][s];
      for_dtype(features.dtype,
                [&]<typename T>() { static_cast<T*>(p.out)[at] = from_compute<T>(static_cast<Compute<T>>(value)); });
    }
  }
}

}  // namespace

Kernel squares_kernel() { return squares_of_pairs; }
auto gradient_kernel() -> void (*)(DeviceGradientParams) { return gradient_of_features; }

}  // namespace fastkd::relation
