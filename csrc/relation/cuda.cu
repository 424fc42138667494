// relation on the GPU: checks, outputs, launches; and what is done row by row.
//
// Five launches: squared distances, their inverses, slopes of the distance term (where it has a weight), triangles (once more
// for a teacher that requires a gradient), the sums of all. They wait for one another only in the stream.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "relation/cuda_rows.cuh"
#include "relation/operator.h"

namespace fastkd::relation {
namespace {

using namespace device;
using namespace FASTKD_ISA::relation_math;
using FASTKD_ISA::relation::inverse_means;
using FASTKD_ISA::relation::pair_at;

constexpr unsigned kRowsOfBlock = kThreads / kWarp;

FASTKD_DEVICE int64_t row_of_warp() { return static_cast<int64_t>(block_index()) * kRowsOfBlock + warp_index(); }

// E and n of a row, by a warp; sums of its distances, and the loss of the angles between a direction and itself.
// Bytes: 8 for each part of the features read, 16 written, a pair and side.
// inspect: streaming inverses_of_rows stores=128
FASTKD_KERNEL(kThreads)
inverses_of_rows(const DeviceParams p) {
  const int64_t row = row_of_warp(), points = p.points;
  if (row >= points) return;
  double sums[3] = {};
  for (int64_t k = lane_index(); k < points; k += kWarp) {
    double self[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      double squared = 0;
      for (int64_t split = 0; split < p.splits && k != row; ++split) {
        squared += p.squares[(side * p.splits + split) * points * points + row * points + k];
      }
      const Pair<double> pair = pair_at(squared / 2);
      Pack<double> pack;
      pack.value[0] = squared / 2;
      pack.value[1] = pair.inverse;
      store_pack(p.sides[side] + 2 * (row * points + k), pack);
      sums[side] += k != row ? pair.distance : 0;
      self[side] = pair.self_cosine;
    }
    sums[2] += smooth_l1(self[0] - self[1], slope_of(self[0] - self[1]));
  }
  reduce_lanes<kWarp>(sums, Sum{});
  if (lane_index() == 0) p.rows[row] = {{sums[0], sums[1]}, {0, 0}, 0, sums[2]};
}

// Loss and slopes of the distance term of a row, by a warp.
FASTKD_KERNEL(kThreads)
distances_of_rows(const DeviceParams p) {
  const int64_t row = row_of_warp(), points = p.points;
  if (row >= points) return;
  double inverse[2], sums[3] = {};
  inverse_means(p, inverse);
  for (int64_t k = lane_index(); k < points; k += kWarp) {
    if (k == row) continue;
    const int64_t at = 2 * (row * points + k);
    const double distance[2] = {pair_at(p.sides[0][at]).distance, pair_at(p.sides[1][at]).distance};
    const double x = distance_difference(distance[0], distance[1], inverse[0], inverse[1]), slope = slope_of(x);
    sums[0] += slope * distance[0];
    sums[1] -= slope * distance[1];
    sums[2] += smooth_l1(x, slope);
  }
  reduce_lanes<kWarp>(sums, Sum{});
  if (lane_index() != 0) return;
  RowSums& out = p.rows[row];
  out.slope_distance[0] = sums[0];
  out.slope_distance[1] = sums[1];
  out.distance_loss = sums[2];
}

FASTKD_KERNEL(kThreads)
sum_of_all(const DeviceParams p) {
  const double n = static_cast<double>(p.points);
  ClusterGroup group;
  double rows[2] = {}, blocks[1] = {};
  sum_strided(p.points, group, rows, [&](int64_t i, int s) { return s == 0 ? p.rows[i].distance_loss : p.rows[i].angle_loss; });
  sum_strided(p.loss_blocks, group, blocks, [&](int64_t i, int) { return p.losses[i]; });
  double sums[2] = {rows[0], rows[1] + 2 * blocks[0]};
  group.reduce(sums, Sum{});
  if (thread_index() != 0) return;
  const double distance = p.distance ? sums[0] / (n * n) : 0, angle = p.angle ? sums[1] / (n * n * n) : 0;
  const double loss = p.weight[0] * distance + p.weight[1] * angle;
  if (p.wide) {
    *static_cast<double*>(p.loss) = loss;
    static_cast<double*>(p.terms)[0] = distance;
    static_cast<double*>(p.terms)[1] = angle;
  } else {
    *static_cast<float*>(p.loss) = static_cast<float>(loss);
    static_cast<float*>(p.terms)[0] = static_cast<float>(distance);
    static_cast<float*>(p.terms)[1] = static_cast<float>(angle);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation(Tensor student, Tensor teacher, double distance_weight, double angle_weight,
                                                    bool student_gradient, bool teacher_gradient, std::optional<Tensor> numbers) {
  take_numbers(numbers, distance_weight, angle_weight);
  const DeviceContext context(student);
  const auto fresh = [&](std::initializer_list<int64_t> shape, ScalarType type) { return context.empty(shape, type); };
  const Relation in(student, teacher, distance_weight, angle_weight, {student_gradient, teacher_gradient}, fresh);
  DeviceParams params{in.params};
  const int64_t points = params.points;
  int64_t columns = 0;
  for (int side = 0; side < 2; ++side) {
    params.features[side] = features_of(in.features[side]);
    columns = columns > params.features[side].columns ? columns : params.features[side].columns;
  }
  const SquaresPlan squares = plan_squares(points, columns, context.limits());
  const Geometry triangles = plan_triangles(points);
  params.splits = squares.splits;
  params.split_columns = squares.split_columns;
  const Tensor parts = fresh({2, squares.splits, points, points}, ScalarType::Double);
  const Tensor sides = fresh({2, points, points, 2}, ScalarType::Double);
  const Tensor rows = fresh({points, static_cast<int64_t>(sizeof(RowSums) / sizeof(double))}, ScalarType::Double);
  params.loss_blocks = params.angle ? triangles.blocks : 0;
  const Tensor losses = fresh({params.loss_blocks}, ScalarType::Double);
  params.squares = static_cast<double*>(parts.mutable_data_ptr());
  params.sides[0] = static_cast<double*>(sides.mutable_data_ptr());
  params.sides[1] = params.sides[0] + 2 * points * points;
  params.rows = static_cast<RowSums*>(rows.mutable_data_ptr());
  params.losses = static_cast<double*>(losses.mutable_data_ptr());
  params.weight[0] = distance_weight;
  params.weight[1] = angle_weight;
  params.wide = in.loss.scalar_type() == ScalarType::Double;
  params.loss = in.loss.mutable_data_ptr();
  params.terms = in.terms.mutable_data_ptr();

  const Geometry by_rows{static_cast<unsigned>((points + kRowsOfBlock - 1) / kRowsOfBlock), kThreads};
  context.launch("relation", squares_kernel(), squares.geometry, params);
  context.launch("relation", inverses_of_rows, by_rows, params);
  if (params.distance) context.launch("relation", distances_of_rows, by_rows, params);
  for (int side = 0; side < 2; ++side) {
    const bool gradient = params.pairs[side] != nullptr, loss = side == 0 && params.angle;
    if (!gradient && !loss) continue;
    params.own = side;
    context.launch("relation", triangles_kernel(gradient, loss), triangles, params);
  }
  context.launch("relation", sum_of_all, Geometry{1, kThreads, 1, cluster_shared_bytes(kThreads, 1, 2)}, params);
  return in.outputs();
}

Tensor relation_backward(Tensor features, Tensor pairs, Tensor grad_loss) {
  features = check_backward(features, pairs, grad_loss);
  const DeviceContext context(features);
  const int64_t points = features.size(0), columns = features.size(1);
  Tensor gradient = context.empty({points, columns}, features.scalar_type());
  const DeviceGradientParams params{features_of(features), static_cast<const double*>(pairs.const_data_ptr()),
                                    grad_loss.const_data_ptr(), grad_loss.scalar_type() == ScalarType::Double,
                                    gradient.mutable_data_ptr()};
  context.launch("relation_backward", gradient_kernel(), plan_gradient(points, columns), params);
  return gradient;
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("relation", TORCH_BOX(&relation));
  m.impl("relation_backward", TORCH_BOX(&relation_backward));
}

}  // namespace fastkd::relation
