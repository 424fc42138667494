// The kernels of relation as the launcher sees them: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastkd::relation {

constexpr int64_t kRowBlock = 16;      // rows that a task of the distances takes: with kColumnBlock of fp64 they fit L1
constexpr int64_t kColumnBlock = 256;  // features widened to fp64 at a time
constexpr int kOwners = 4;             // rows that a task of the triangles takes
constexpr int64_t kScratchRows = 4;    // of each
constexpr int64_t kPad = 8;            // doubles: rows of matrices on the CPU are padded to whole registers of any set

struct Features {
  Dtype dtype;
  const void* data;  // [points, columns]
  int64_t points;
  int64_t columns;
  int64_t stride;  // elements from row to row
};

// E and n of all pairs i < j, as in math.h: [points, stride] each; 0 in the padding and up to the diagonal from the last
// multiple of kPad.
struct Matrices {
  double* half_square;
  double* inverse;
};

// Sums of a row over the columns beyond the diagonal.
struct RowSums {
  double distance[2];  // student, teacher
  double slope_distance[2];
  double distance_loss;
  double angle_loss;
};

struct Params {
  int64_t points;
  int64_t stride;    // of the matrices
  Matrices side[2];  // student, teacher
  RowSums* rows;     // [points]
  bool distance;     // whether the term has a weight
  bool angle;
  double distance_scale;  // 2 weight / B^2
  double angle_scale;     // 2 weight / B^3
  double inverse_mean[2];
  double through_mean[2];
  double* pairs[2];  // [points, points] gradients, or null
};

// Features in fp64 for a block of columns: [points, stride], rows and columns padded with zeros.
struct Widened {
  const double* data;
  int64_t stride;   // not a power of two: a column must not lie in a few lines of the cache only
  int64_t columns;  // a multiple of kPad
};

struct Kernels {
  // Rows [begin, end) of columns [first, first + count).
  void (*widen)(const Features& features, int64_t begin, int64_t end, int64_t first, int64_t count, double* out, int64_t stride);
  // E of kRowBlock rows from `row` on, beyond the diagonal; adds to what is there unless the columns are the first.
  void (*half_squares)(const Widened& widened, int64_t row, int64_t points, bool first, double* out, int64_t stride);
  void (*inverses)(const Params& params, int64_t row);      // n, and the sums of distances
  void (*distance_row)(const Params& params, int64_t row);  // loss and slopes of the distance term
  // The triangles that kOwners rows from `row` on need: their loss where they begin with one of them, and
  // pairs[side][row, k] for k > row, mirrored. scratch: kOwners * kScratchRows * stride doubles
  void (*triangles)(const Params& params, int64_t row, int side, double* scratch);
  // Columns of the gradient from `column` on, as many as a panel has. scratch: panel_columns * (points padded to kRowBlock)
  void (*gradient)(const Features& features, const double* pairs, double scale, int64_t column, void* out, double* scratch);
  int64_t panel_columns;
};

}  // namespace fastkd::relation

FASTKD_DECLARE_KERNELS(relation)
