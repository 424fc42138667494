// What the kernels of relation share: squares above the diagonal, pairs of points in 16 bytes, sums over all rows.
#pragma once

#include "common/reduce.cuh"
#include "relation/cuda.h"
#include "relation/math.h"

namespace fastkd::FASTKD_ISA::relation {

using namespace device;
using namespace relation_math;
using ::fastkd::relation::DeviceParams;
using ::fastkd::relation::RowSums;

// The square `index` of those on and above the diagonal: row, column.
FASTKD_DEVICE void triangular_tile(int64_t index, int64_t* row, int64_t* column) {
  int64_t c = static_cast<int64_t>((::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (c * (c + 1) / 2 > index) --c;
  while ((c + 1) * (c + 2) / 2 <= index) ++c;
  *row = index - c * (c + 1) / 2;
  *column = c;
}

FASTKD_DEVICE double square_root(double x) { return ::sqrt(x); }

FASTKD_DEVICE Pair<double> pair_at(double half_square) { return pair_of(2 * half_square, square_root(2 * half_square)); }

FASTKD_DEVICE Side<double> side_of(const Pack<double>& pack) { return {pack.value[0], pack.value[1]}; }

// Adds up read(row, n) of all rows; all lanes of a warp come, and have the same bits.
template <int N, typename Read>
FASTKD_DEVICE void sum_rows(const DeviceParams& p, double (&sums)[N], const Read& read) {
  for (int64_t row = lane_index(); row < p.points; row += kWarp) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += read(p.rows[row], n);
  }
  reduce_lanes<kWarp>(sums, Sum{});
}

FASTKD_DEVICE double number_of_pairs(const DeviceParams& p) {
  return static_cast<double>(p.points) * static_cast<double>(p.points - 1);
}

// 1 / mu of both sides, from the sums of all rows.
FASTKD_DEVICE void inverse_means(const DeviceParams& p, double (&inverse)[2]) {
  double sums[2] = {};
  sum_rows(p, sums, [](const RowSums& row, int n) { return n == 0 ? row.distance[0] : row.distance[1]; });
#pragma unroll
  for (int side = 0; side < 2; ++side) inverse[side] = number_of_pairs(p) / sums[side];
}

}  // namespace fastkd::FASTKD_ISA::relation
