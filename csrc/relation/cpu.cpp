// Relational distillation on the CPU: workspaces, threads, and the sums over rows in a fixed order.
#include <algorithm>
#include <atomic>

#include "relation/operator.h"

namespace fastkd::relation {
namespace {

constexpr int64_t kGrain = 1 << 20;  // operations worth a thread: 20 to 100 us, as waking it takes a tenth of that

constexpr int64_t kSkew = 17 * kPad;  // doubles, about a fourth of 4 KB

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Tensor fresh(std::initializer_list<int64_t> shape, ScalarType type) { return empty_cpu(shape, type); }
double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// body(i) for each i, the next one to whichever thread is free: rows differ in their work. `work`: operations of all.
template <typename Body>
void each(int64_t count, int64_t work, const Body& body) {
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), work / kGrain, count});
  std::atomic<int64_t> next{0};
  parallel(std::max<int64_t>(threads, 1), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

// E of all pairs, over features in fp64, a block of columns at a time.
void half_squares(const Features& features, double* out, int64_t stride) {
  const int64_t points = features.points, blocks = padded(points, kRowBlock) / kRowBlock;
  Widened widened{nullptr, padded(std::min(features.columns, kColumnBlock), kPad) + kPad, 0};
  const Tensor memory = empty_cpu({blocks * kRowBlock, widened.stride}, ScalarType::Double);
  widened.data = doubles(memory);
  const Kernels& k = kernels();
  for (int64_t first = 0; first < features.columns; first += kColumnBlock) {
    const int64_t count = std::min(kColumnBlock, features.columns - first);
    widened.columns = padded(count, kPad);
    parallel(blocks * kRowBlock, std::max<int64_t>(1, kGrain / count),
             [&](int64_t begin, int64_t end) { k.widen(features, begin, end, first, count, doubles(memory), widened.stride); });
    each(blocks, points * points * count,
         [&](int64_t block) { k.half_squares(widened, block * kRowBlock, points, first == 0, out, stride); });
  }
}

// Sum over rows, in order.
template <typename Read>
double sum_of(const Params& params, const Read& read) {
  double sum = 0;
  for (int64_t row = 0; row < params.points; ++row) sum += read(params.rows[row]);
  return sum;
}

void write(const Tensor& out, int64_t index, double value) {
  if (out.scalar_type() == ScalarType::Double) {
    doubles(out)[index] = value;
  } else {
    static_cast<float*>(out.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation(Tensor student, Tensor teacher, double distance_weight, double angle_weight,
                                                    bool student_gradient, bool teacher_gradient, std::optional<Tensor> numbers) {
  take_numbers(numbers, distance_weight, angle_weight);
  Relation in(student, teacher, distance_weight, angle_weight, {student_gradient, teacher_gradient}, fresh);
  Params& params = in.params;
  const Kernels& k = kernels();
  const int64_t points = params.points, squared = points * points;
  // no two rows of the four matrices a multiple of 4 KB apart: the same k of all that are in use would share a set of L1
  params.stride = padded(points, kPad) + kPad;
  const int64_t matrix = points * params.stride + kSkew;
  Tensor matrices = empty_cpu({4, matrix}, ScalarType::Double);
  Tensor rows = empty_cpu({points, static_cast<int64_t>(sizeof(RowSums) / sizeof(double))}, ScalarType::Double);
  params.rows = static_cast<RowSums*>(rows.mutable_data_ptr());
  for (int side = 0; side < 2; ++side) {
    double* const half_square = doubles(matrices) + 2 * side * matrix;
    params.side[side] = {half_square, half_square + matrix};
    half_squares(features_of(in.features[side]), half_square, params.stride);
  }
  each(points, 32 * squared, [&](int64_t row) { k.inverses(params, row); });
  const double pairs = static_cast<double>(points) * static_cast<double>(points - 1);
  if (params.distance) {
    for (int side = 0; side < 2; ++side) {
      params.inverse_mean[side] = pairs / (2 * sum_of(params, [&](const RowSums& row) { return row.distance[side]; }));
    }
    each(points, 32 * squared, [&](int64_t row) { k.distance_row(params, row); });
    for (int side = 0; side < 2; ++side) {
      const double sum = 2 * sum_of(params, [&](const RowSums& row) { return row.slope_distance[side]; });
      params.through_mean[side] = sum * params.inverse_mean[side] / pairs;
    }
  }
  for (int side = 0; side < 2; ++side) {
    if (params.pairs[side] == nullptr && (side == 1 || !params.angle)) continue;
    each(padded(points, kOwners) / kOwners, squared * (params.angle ? 14 * points : 32), [&](int64_t block) {
      k.triangles(params, block * kOwners, side, scratch<double>(kOwners * kScratchRows * params.stride));
    });
  }
  const double n = static_cast<double>(points);
  const double distance =
      params.distance ? 2 * sum_of(params, [](const RowSums& row) { return row.distance_loss; }) / (n * n) : 0;
  const double angle = params.angle ? sum_of(params, [](const RowSums& row) { return row.angle_loss; }) / (n * n * n) : 0;
  write(in.terms, 0, distance);
  write(in.terms, 1, angle);
  write(in.loss, 0, distance_weight * distance + angle_weight * angle);
  return in.outputs();
}

Tensor relation_backward(Tensor features, Tensor pairs, Tensor grad_loss) {
  features = check_backward(features, pairs, grad_loss);
  Tensor gradient = empty_cpu({features.size(0), features.size(1)}, features.scalar_type());
  const Features in = features_of(features);
  const double scale = grad_loss.scalar_type() == ScalarType::Double ? *static_cast<const double*>(grad_loss.const_data_ptr())
                                                                     : *static_cast<const float*>(grad_loss.const_data_ptr());
  const Kernels& k = kernels();
  const double* const of_pairs = static_cast<const double*>(pairs.const_data_ptr());
  void* const out = gradient.mutable_data_ptr();
  const int64_t panel = k.panel_columns, panels = padded(in.columns, panel) / panel;
  each(panels, 2 * in.points * in.points * in.columns, [&](int64_t i) {
    k.gradient(in, of_pairs, scale, i * panel, out, scratch<double>(panel * padded(in.points, kRowBlock)));
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation", FASTKD_CPU_BOX(relation));
  m.impl("relation_backward", FASTKD_CPU_BOX(relation_backward));
}

}  // namespace fastkd::relation
