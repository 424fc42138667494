// Geometry of relation's kernels, for tests on sizes that no machine holds.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "relation/cuda_rows.cuh"

namespace fastkd::relation {
namespace {

// (splits, features of each, blocks) of the squared distances, blocks of the triangles, blocks of the gradient
std::vector<int64_t> plan(int64_t points, int64_t columns, int64_t multiprocessors) {
  const SquaresPlan squares = plan_squares(points, columns, {16, static_cast<unsigned>(multiprocessors)});
  return {squares.splits, squares.split_columns, squares.geometry.blocks, plan_triangles(points).blocks,
          plan_gradient(points, columns).blocks};
}

// (row, column) of a square on or above the diagonal
std::vector<int64_t> tile(int64_t index) {
  int64_t row, column;
  FASTKD_ISA::relation::triangular_tile(index, &row, &column);
  return {row, column};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def("plan_relation(int points, int columns, int multiprocessors) -> int[]");
  m.def("relation_tile(int index) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("plan_relation", TORCH_BOX(&plan));
  m.impl("relation_tile", TORCH_BOX(&tile));
}

}  // namespace fastkd::relation
