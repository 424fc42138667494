// Relational distillation on the CPU, compiled once for each instruction set. The maths: math.h.
//
// Mapping: each row of a matrix has one owner, which sums in a fixed order: the same bits for any number of threads.
//   distances  4 x 2 pairs of points at a time in registers, over features widened to fp64: 2 operations a pair and feature
//              on 6/8 of a load. Differences are taken before they are squared: equal points are at distance 0 exactly.
//   triangles  i < j < k, a register of k at a time. The owner of row r takes those with i = r (sides ij and ik are its own)
//              and those with j = r (side jk is): 47 and 36 operations a triangle, of which 2 x 11 are the cosines of student
//              and teacher. That is half as much again as every triangle once, and takes no memory for partial sums.
//   gradient   a panel of 2 registers of columns, 4 rows at a time: 2 operations a pair and feature.
// Bound by arithmetic: B^3 / 6 * 83 operations against 4 B^2 numbers that stay in cache (B = 256: 232 MFLOP, 2 MB).
#include "relation/kernel.h"

#include "common/simd.h"
#include "relation/math.h"

namespace fastkd::FASTKD_ISA::relation {
namespace {

using ::fastkd::relation::Features;
using ::fastkd::relation::Kernels;
using ::fastkd::relation::kOwners;
using ::fastkd::relation::kPad;
using ::fastkd::relation::kRowBlock;
using ::fastkd::relation::kScratchRows;
using ::fastkd::relation::Matrices;
using ::fastkd::relation::Params;
using ::fastkd::relation::RowSums;
using ::fastkd::relation::Widened;
using relation_math::Angles;
using relation_math::angles_of;
using relation_math::distance_difference;
using relation_math::distance_gradient;
using relation_math::Pair;
using relation_math::pair_of;
using relation_math::Side;
using relation_math::smooth_l1;

constexpr int L = kLanes<F64>;
static_assert(kPad % L == 0);

FASTKD_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// ---- features -----------------------------------------------------------------------------------

template <typename T>
void widen_row(const T* from, int64_t count, double* out) {
  constexpr int kWidth = kLanes<Vector<T>>;
  int64_t i = 0;
  for (; i < count; i += kWidth) {
    const Vector<T> v = load_up_to(from + i, count - i, Scalar<T>(0));
    if constexpr (std::is_same_v<T, double>) {
      store(out + i, v);
    } else {
      F32Half half[2];
      std::memcpy(half, &v, sizeof v);
      store(out + i, __builtin_convertvector(half[0], F64));
      if (i + L < padded(count)) store(out + i + L, __builtin_convertvector(half[1], F64));
    }
  }
  for (; i < padded(count); i += L) store(out + i, F64{});
}

void widen(const Features& features, int64_t begin, int64_t end, int64_t first, int64_t count, double* out, int64_t stride) {
  for (int64_t row = begin; row < end; ++row) {
    double* const to = out + row * stride;
    if (row >= features.points) {
      std::memset(to, 0, padded(count) * sizeof(double));
      continue;
    }
    const int64_t at = row * features.stride + first;
    for_dtype(features.dtype, [&]<typename T>() { widen_row(static_cast<const T*>(features.data) + at, count, to); });
  }
}

constexpr int kRows = 4, kColumns = 2;  // pairs in registers

void half_squares(const Widened& widened, int64_t row, int64_t points, bool first, double* out, int64_t stride) {
  const int64_t width = widened.stride;
  for (int64_t j = row; j < points; j += kColumns) {  // stays in L1 for all rows of the block
    for (int64_t i = row; i < row + kRowBlock && i < j + kColumns; i += kRows) {
      const double *const x = widened.data + i * width, *const y = widened.data + j * width;
      F64 sum[kRows][kColumns] = {};
      for (int64_t d = 0; d < widened.columns; d += L) {
        F64 other[kColumns];
        for (int c = 0; c < kColumns; ++c) other[c] = load(y + c * width + d);
        for (int r = 0; r < kRows; ++r) {
          const F64 own = load(x + r * width + d);
          for (int c = 0; c < kColumns; ++c) sum[r][c] += (own - other[c]) * (own - other[c]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; ++c) {
          if (i + r >= j + c || j + c >= points) continue;
          double& target = out[(i + r) * stride + j + c];
          target = 0.5 * reduce_sum(sum[r][c]) + (first ? 0.0 : target);
        }
      }
    }
  }
}

// ---- pairs --------------------------------------------------------------------------------------

// As in math.h, in two instructions.
FASTKD_INLINE F64 slope_of(F64 x) { return minimum(broadcast<F64>(1.0), maximum(broadcast<F64>(-1.0), x)); }

// Those of the lanes 0, 1, 2, ... that are in [begin, end).
FASTKD_INLINE I64 lanes_between(int64_t begin, int64_t end) {
  I64 lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return (lane >= begin) & (lane < end);
}

FASTKD_INLINE int64_t first_register(int64_t row) { return (row + 1) / L * L; }

FASTKD_INLINE Pair<F64> pair_at(const double* half_square) {
  const F64 squared = 2.0 * load(half_square);
  return pair_of(squared, square_root(squared));
}

void inverses(const Params& params, int64_t row) {
  const int64_t points = params.points, at = row * params.stride;
  double* const half_square[2] = {params.side[0].half_square + at, params.side[1].half_square + at};
  double* const inverse[2] = {params.side[0].inverse + at, params.side[1].inverse + at};
  for (int side = 0; side < 2; ++side) {
    for (int64_t k = (row + 1) / kPad * kPad; k <= row; ++k) half_square[side][k] = 0;
    for (int64_t k = points; k < params.stride; ++k) half_square[side][k] = 0;
  }
  F64 distance[2] = {}, angle = {};
  for (int64_t k = first_register(row); k < points; k += L) {
    const I64 exists = lanes_between(row + 1 - k, points - k);
    F64 self[2];
    for (int side = 0; side < 2; ++side) {
      const Pair<F64> pair = pair_at(half_square[side] + k);
      distance[side] += exists ? pair.distance : F64{};
      store(inverse[side] + k, pair.inverse);
      self[side] = pair.self_cosine;
    }
    const F64 x = self[0] - self[1];
    angle += exists ? smooth_l1(x, slope_of(x)) : F64{};
  }
  for (int side = 0; side < 2; ++side) {
    for (int64_t k = padded(points); k < params.stride; ++k) inverse[side][k] = 0;
  }
  // of (a; b, b) and (b; a, a)
  params.rows[row] = {{reduce_sum(distance[0]), reduce_sum(distance[1])}, {0, 0}, 0, 2 * reduce_sum(angle)};
}

void distance_row(const Params& params, int64_t row) {
  const int64_t points = params.points, at = row * params.stride;
  F64 through[2] = {}, loss = {};
  for (int64_t k = first_register(row); k < points; k += L) {
    const I64 exists = lanes_between(row + 1 - k, points - k);
    const Pair<F64> pair[2] = {pair_at(params.side[0].half_square + at + k), pair_at(params.side[1].half_square + at + k)};
    const F64 x = distance_difference(pair[0].distance, pair[1].distance, params.inverse_mean[0], params.inverse_mean[1]);
    const F64 slope = slope_of(x);
    loss += exists ? smooth_l1(x, slope) : F64{};
    through[0] += exists ? slope * pair[0].distance : F64{};
    through[1] -= exists ? slope * pair[1].distance : F64{};
  }
  RowSums& sums = params.rows[row];
  sums.distance_loss = reduce_sum(loss);
  for (int side = 0; side < 2; ++side) sums.slope_distance[side] = reduce_sum(through[side]);
}

// ---- triangles ----------------------------------------------------------------------------------

// A row of E and n of the side that gets the gradient, and of the other one.
struct Rows {
  const double* half_square[2];
  const double* inverse[2];

  Rows(const Params& params, int64_t row, int own) {
    for (int s = 0; s < 2; ++s) {
      half_square[s] = params.side[s == 0 ? own : 1 - own].half_square + row * params.stride;
      inverse[s] = params.side[s == 0 ? own : 1 - own].inverse + row * params.stride;
    }
  }
  FASTKD_INLINE Side<F64> at(int s, int64_t k) const { return {load(half_square[s] + k), load(inverse[s] + k)}; }
  FASTKD_INLINE Side<F64> all(int s, int64_t k) const {
    return {broadcast<F64>(half_square[s][k]), broadcast<F64>(inverse[s][k])};
  }
};

// Of two products, each rounded by itself: a difference contracted with one of them would not be 0 for equal sides.
FASTKD_INLINE F64 difference_of(F64 own, F64 other) {
#if __has_builtin(__builtin_assoc_barrier)  // GCC's; others contract within a statement only
  return __builtin_assoc_barrier(own) - __builtin_assoc_barrier(other);
#else
  return own - other;
#endif
}

// For k > j, a register at a time: body(k, cosines of the own side, differences to the other side).
template <typename Body>
FASTKD_INLINE void each_triangle(const Rows& i, const Rows& j, int64_t j_index, int64_t points, const Body& body) {
  const Side<F64> ij[2] = {i.all(0, j_index), i.all(1, j_index)};
  const auto visit = [&](int64_t k, auto mask) __attribute__((always_inline)) {
    const Angles<F64> own = angles_of(ij[0], i.at(0, k), j.at(0, k)), other = angles_of(ij[1], i.at(1, k), j.at(1, k));
    body(k, own, mask(difference_of(own.cosine_i, other.cosine_i)), mask(difference_of(own.cosine_j, other.cosine_j)),
         mask(difference_of(own.cosine_k, other.cosine_k)));
  };
  int64_t k = first_register(j_index);
  const I64 exists = lanes_between(j_index + 1 - k, L);  // beyond the points all are 0
  if (k < points) visit(k, [&](F64 x) __attribute__((always_inline)) { return exists ? x : F64{}; });
  for (k += L; k < points; k += L) visit(k, [](F64 x) __attribute__((always_inline)) { return x; });
}

FASTKD_INLINE void add_to(double* p, F64 v) { store(p, load(p) + v); }

// The owner of a row, and its sums: of t and w for each k, of those for each j where the row is i, and of the loss.
struct Owner {
  int64_t row;
  Rows rows;
  double *products, *weights, *own_products, *own_weights;
  F64 loss = {};

  Owner(const Params& params, int64_t row_, int side, double* scratch)
      : row(row_),
        rows(params, row_, side),
        products(scratch),
        weights(scratch + params.stride),
        own_products(scratch + 2 * params.stride),
        own_weights(scratch + 3 * params.stride) {}
};

// Triangles of i, the owner's row, and of j.
template <bool Gradient>
FASTKD_INLINE void add_first(Owner& i, const Rows& j, int64_t j_index, int64_t points) {
  F64 loss = i.loss, product = {}, weight = {};
  each_triangle(i.rows, j, j_index, points,
                [&](int64_t k, const Angles<F64>& own, F64 x_i, F64 x_j, F64 x_k) __attribute__((always_inline)) {
                  const F64 g_i = slope_of(x_i), g_j = slope_of(x_j), g_k = slope_of(x_k);
                  loss += smooth_l1(x_i, g_i) + smooth_l1(x_j, g_j) + smooth_l1(x_k, g_k);
                  if constexpr (Gradient) {
                    const F64 t_i = g_i * own.inverse_i, w_i = g_i * own.cosine_i;
                    const F64 difference = g_j * own.inverse_j - g_k * own.inverse_k;
                    product += t_i + difference;
                    weight += w_i + g_j * own.cosine_j;
                    add_to(i.products + k, t_i - difference);
                    add_to(i.weights + k, w_i + g_k * own.cosine_k);
                  }
                });
  i.loss = loss;
  if constexpr (Gradient) {
    i.own_products[j_index] = reduce_sum(product);
    i.own_weights[j_index] = reduce_sum(weight);
  }
}

// Triangles of i and of j, the owner's row.
FASTKD_INLINE void add_middle(const Owner& j, const Rows& i, int64_t points) {
  each_triangle(i, j.rows, j.row, points,
                [&](int64_t k, const Angles<F64>& own, F64 x_i, F64 x_j, F64 x_k) __attribute__((always_inline)) {
                  const F64 g_i = slope_of(x_i), g_j = slope_of(x_j), g_k = slope_of(x_k);
                  add_to(j.products + k, g_j * own.inverse_j + g_k * own.inverse_k - g_i * own.inverse_i);
                  add_to(j.weights + k, g_j * own.cosine_j + g_k * own.cosine_k);
                });
}

// All triangles of kOwners rows: another row stays in L1 for all of them.
template <bool Gradient>
FASTKD_INLINE void add_triangles(const Params& params, Owner* owners, int count, int side) {
  const int64_t points = params.points, first = owners[0].row;
  for (int64_t j = first + 1; j < points - 1; ++j) {
    const Rows rows(params, j, side);
    for (int n = 0; n < count && owners[n].row < j; ++n) add_first<Gradient>(owners[n], rows, j, points);
  }
  for (int64_t i = 0; Gradient && i < owners[count - 1].row; ++i) {
    const Rows rows(params, i, side);
    for (int n = 0; n < count; ++n) {
      if (i < owners[n].row) add_middle(owners[n], rows, points);
    }
  }
}

void finish_row(const Params& params, const Owner& owner, int side) {
  const int64_t points = params.points, row = owner.row, at = row * params.stride;
  double* const pairs = params.pairs[side];
  pairs[row * points + row] = 0;
  for (int64_t k = first_register(row); k < points; k += L) {
    const double* const half_square[2] = {params.side[side].half_square + at + k, params.side[1 - side].half_square + at + k};
    F64 gradient = 0.0 * (load(half_square[0]) + load(half_square[1]));  // NaN where the loss is
    if (params.angle) {
      const F64 inverse = load(params.side[side].inverse + at + k);
      const F64 product = load(owner.products + k) + load(owner.own_products + k);
      const F64 weight = load(owner.weights + k) + load(owner.own_weights + k);
      gradient += params.angle_scale * (product - inverse * inverse * weight);
    }
    if (params.distance) {
      const Pair<F64> own = pair_at(half_square[0]), other = pair_at(half_square[1]);
      const F64 slope =
          slope_of(distance_difference(own.distance, other.distance, params.inverse_mean[side], params.inverse_mean[1 - side]));
      gradient += distance_gradient(slope, params.inverse_mean[side], params.through_mean[side], own.distance_slope,
                                    params.distance_scale);
    }
    for (int lane = 0; lane < L; ++lane) {
      if (k + lane <= row || k + lane >= points) continue;
      pairs[row * points + k + lane] = gradient[lane];
      pairs[(k + lane) * points + row] = gradient[lane];
    }
  }
}

void triangles(const Params& params, int64_t row, int side, double* scratch) {
  static_assert(kOwners == 4);
  const int64_t points = params.points, part = kScratchRows * params.stride;
  const int count = points - row < kOwners ? static_cast<int>(points - row) : kOwners;
  const bool gradient = params.pairs[side] != nullptr;
  // rows beyond the last are not looked at
  Owner owners[kOwners] = {{params, row, side, scratch},
                           {params, row + 1, side, scratch + part},
                           {params, row + 2, side, scratch + 2 * part},
                           {params, row + 3, side, scratch + 3 * part}};
  if (params.angle && gradient) {
    std::memset(scratch, 0, kOwners * part * sizeof(double));
    add_triangles<true>(params, owners, count, side);
  } else if (params.angle) {
    add_triangles<false>(params, owners, count, side);
  }
  for (int n = 0; n < count; ++n) {
    if (params.angle && side == 0) params.rows[row + n].angle_loss += 2 * reduce_sum(owners[n].loss);
    if (gradient) finish_row(params, owners[n], side);
  }
}

// ---- the gradient of the features ---------------------------------------------------------------

constexpr int kPanel = 2 * L;  // columns

// The first `count` columns of a row's part of the panel.
template <typename T>
FASTKD_INLINE void narrow(const F64 (&from)[2], int64_t count, T* to) {
  if constexpr (std::is_same_v<T, double>) {
    store_up_to(to, from[0], count);
    if (count > L) store_up_to(to + L, from[1], count - L);
  } else {
    const F32Half half[2] = {__builtin_convertvector(from[0], F32Half), __builtin_convertvector(from[1], F32Half)};
    F32 v;
    std::memcpy(&v, half, sizeof v);
    store_up_to(to, v, count);
  }
}

void gradient(const Features& features, const double* pairs, double scale, int64_t column, void* out, double* scratch) {
  const int64_t points = features.points;
  const int64_t count = features.columns - column < kPanel ? features.columns - column : kPanel;
  const int64_t rows = (points + kRows - 1) / kRows * kRows;
  std::memset(scratch, 0, rows * kPanel * sizeof(double));
  widen(features, 0, points, column, count, scratch, kPanel);
  for (int64_t i = 0; i < points; i += kRows) {
    const double* of_row[kRows];
    F64 sum[kRows][2] = {}, own[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      of_row[r] = pairs + (i + r < points ? i + r : i) * points;
      for (int c = 0; c < 2; ++c) own[r][c] = load(scratch + (i + r) * kPanel + c * L);
    }
    for (int64_t j = 0; j < points; ++j) {
      for (int c = 0; c < 2; ++c) {
        const F64 other = load(scratch + j * kPanel + c * L);
        for (int r = 0; r < kRows; ++r) sum[r][c] += of_row[r][j] * (own[r][c] - other);
      }
    }
    for (int r = 0; r < kRows && i + r < points; ++r) {
      const F64 scaled[2] = {scale * sum[r][0], scale * sum[r][1]};
      const int64_t at = (i + r) * features.columns + column;
      for_dtype(features.dtype, [&]<typename T>() { narrow(scaled, count, static_cast<T*>(out) + at); });
    }
  }
}

}  // namespace

extern const Kernels kernels{widen, half_squares, inverses, distance_row, triangles, gradient, kPanel};

}  // namespace fastkd::FASTKD_ISA::relation
