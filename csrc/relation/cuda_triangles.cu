// All triangles, on the GPU: the loss of their angles, and its gradients with respect to the distances. The maths: math.h.
//
// Mapping: a distance (i, j) belongs to four lanes, which take every fourth point k and the three angles of the triangle: 36
// operations in fp64 with the gradient, which stays in registers. Each triangle is computed three times, once for each of its
// sides, so that every sum has one owner and one order: no atomics, no workspace. A block takes 8 x 8 distances; the rows of
// both groups pass through shared memory, 16 bytes (E, n) a pair.
// Bytes: 2 B^2 (E, n) read once for each 8 points, from L2; B = 512: 64 x 8 MB / 2 for 67 M x 36 operations, of which an H200
// does 14 T/s (170 us; a GPU with 1/64 of its units for fp64 some 5 ms); B = 64, the usual batch: 2016 x 62 x 36 operations,
// bound by latency.
#include "common/device.cuh"
#include "relation/cuda_rows.cuh"

namespace fastkd::FASTKD_ISA::relation {

// What a lane adds up of its triangles.
struct Sums {
  double product = 0, weight = 0, loss = 0;

  template <bool kGradient, bool kLoss>
  FASTKD_DEVICE void add(const Angles<double>& own, const Angles<double>& other) {
    const double x_k = own.cosine_k - other.cosine_k, g_k = slope_of(x_k);
    if constexpr (kLoss) loss += smooth_l1(x_k, g_k);
    if constexpr (kGradient) {
      const double g_i = slope_of(own.cosine_i - other.cosine_i), g_j = slope_of(own.cosine_j - other.cosine_j);
      product += g_i * own.inverse_i + g_j * own.inverse_j - g_k * own.inverse_k;
      weight += g_i * own.cosine_i + g_j * own.cosine_j;
    }
  }
};

}  // namespace fastkd::FASTKD_ISA::relation

namespace fastkd::relation {
namespace {

using namespace device;
using namespace FASTKD_ISA::relation_math;
using FASTKD_ISA::relation::inverse_means;
using FASTKD_ISA::relation::number_of_pairs;
using FASTKD_ISA::relation::pair_at;
using FASTKD_ISA::relation::side_of;
using FASTKD_ISA::relation::sum_rows;
using FASTKD_ISA::relation::Sums;
using FASTKD_ISA::relation::triangular_tile;

// The gradient of the distance term, of the side that p.own says.
struct DistanceTerm {
  double inverse[2] = {}, through = 0;  // own side, the other one

  FASTKD_DEVICE void prepare(const DeviceParams& p) {
    double means[2];
    inverse_means(p, means);
    inverse[0] = p.own == 0 ? means[0] : means[1];
    inverse[1] = p.own == 0 ? means[1] : means[0];
    double sums[1] = {};
    sum_rows(p, sums, [&](const RowSums& row, int) { return p.own == 0 ? row.slope_distance[0] : row.slope_distance[1]; });
    through = sums[0] * inverse[0] / number_of_pairs(p);
  }
  FASTKD_DEVICE double gradient(const Side<double> (&ij)[2], double scale) const {
    const Pair<double> own = pair_at(ij[0].half_square), other = pair_at(ij[1].half_square);
    const double slope = slope_of(distance_difference(own.distance, other.distance, inverse[0], inverse[1]));
    return distance_gradient(slope, inverse[0], through, own.distance_slope, scale);
  }
};

// inspect: streaming triangles_of_pairs<*> loads=128
template <bool kGradient, bool kLoss>
FASTKD_KERNEL(kThreads, 2)
triangles_of_pairs(const DeviceParams p) {
  const int64_t points = p.points;
  const double* const sides[2] = {p.own == 0 ? p.sides[0] : p.sides[1], p.own == 0 ? p.sides[1] : p.sides[0]};
  int64_t tile_i, tile_j;
  triangular_tile(block_index(), &tile_i, &tile_j);
  const unsigned third = thread_index() % kThirds, edge = thread_index() / kThirds;
  const unsigned row_i = edge / kEdgeTile, row_j = edge % kEdgeTile;
  const int64_t i = tile_i * kEdgeTile + row_i, j = tile_j * kEdgeTile + row_j;
  const bool valid = i < j && j < points;
  constexpr unsigned kMatrix = 2 * kEdgeTile * kThirdPitch;  // the rows of i, then those of j
  const Shared<Pack<double>> rows(0, 2 * kMatrix);

  Side<double> ij[2] = {};
  if (valid) {
#pragma unroll
    for (int s = 0; s < 2; ++s) ij[s] = side_of(load_pack(sides[s] + 2 * (i * points + j)));
  }
  Sums sums;
  for (int64_t first = 0; p.angle && first < points; first += kThirdChunk) {
    if (first > 0) block_barrier();
#pragma unroll
    for (unsigned r = 0; r < 4 * kEdgeTile * kThirdChunk / kThreads; ++r) {
      const unsigned row = thread_index() / kThirdChunk + r * (kThreads / kThirdChunk), column = thread_index() % kThirdChunk;
      const int64_t point = ((row / kEdgeTile) % 2 == 0 ? tile_i : tile_j) * kEdgeTile + row % kEdgeTile;
      const bool inside = point < points && first + column < points;
      const double* const from = row < 2 * kEdgeTile ? sides[0] : sides[1];
      rows.store(row * kThirdPitch + column, inside ? load_pack(from + 2 * (point * points + first + column)) : Pack<double>{});
    }
    block_barrier();
#pragma unroll 2
    for (unsigned column = third; column < kThirdChunk; column += kThirds) {
      const int64_t k = first + column;
      if (k == i || k == j) continue;
      const unsigned at_i = row_i * kThirdPitch + column, at_j = (kEdgeTile + row_j) * kThirdPitch + column;
      const Angles<double> own = angles_of(ij[0], side_of(rows.load(at_i)), side_of(rows.load(at_j)));
      const Angles<double> other = angles_of(ij[1], side_of(rows.load(kMatrix + at_i)), side_of(rows.load(kMatrix + at_j)));
      sums.add<kGradient, kLoss>(own, other);
    }
  }

  if constexpr (kGradient) {
    double parts[2] = {sums.product, sums.weight};
    reduce_lanes<kThirds>(parts, Sum{});
    DistanceTerm distance;
    if (p.distance) distance.prepare(p);
    if (third == 0 && valid) {
      double gradient = 0.0 * (ij[0].half_square + ij[1].half_square);  // NaN where the loss is
      if (p.angle) gradient += p.angle_scale * (parts[0] - ij[0].inverse * ij[0].inverse * parts[1]);
      if (p.distance) gradient += distance.gradient(ij, p.distance_scale);
      double* const pairs = p.own == 0 ? p.pairs[0] : p.pairs[1];
      pairs[i * points + j] = gradient;
      pairs[j * points + i] = gradient;
    }
    if (third == 0 && i == j && i < points) (p.own == 0 ? p.pairs[0] : p.pairs[1])[i * points + i] = 0;
  }
  if constexpr (kLoss) {
    double loss[1] = {valid ? sums.loss : 0};
    reduce_lanes<kWarp>(loss, Sum{});
    const Shared<double> warps(2 * kMatrix * sizeof(Pack<double>), kThreads / kWarp);
    if (lane_index() == 0) warps.store(warp_index(), loss[0]);
    block_barrier();
    if (thread_index() == 0) {
      double sum = 0;
      for (unsigned w = 0; w < kThreads / kWarp; ++w) sum += warps.load(w);
      p.losses[block_index()] = sum;
    }
  }
}

}  // namespace

Kernel triangles_kernel(bool gradient, bool loss) {
  if (!gradient) return triangles_of_pairs<false, true>;
  return loss ? triangles_of_pairs<true, true> : triangles_of_pairs<true, false>;
}

}  // namespace fastkd::relation
