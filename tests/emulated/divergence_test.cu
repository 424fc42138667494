// Geometry of the row kernels, for tests on sizes that no machine holds.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/row.cuh"
#include "divergence/cuda.h"

namespace fastkd::divergence {
namespace {

// (resident, one launch, team, blocks, threads, cluster, bytes of shared memory)
std::vector<int64_t> plan(int64_t rows, int64_t classes, int64_t element_size, bool jensen_shannon, bool resident, bool aligned,
                          bool reduced, int64_t max_cluster) {
  const Plan p = plan_rows(rows, classes, static_cast<int>(element_size), jensen_shannon, resident, aligned, reduced,
                           {static_cast<unsigned>(max_cluster), 132});
  return {p.resident,
          p.one_launch,
          static_cast<int64_t>(p.team),
          p.geometry.blocks,
          p.geometry.threads,
          p.geometry.cluster,
          static_cast<int64_t>(p.geometry.shared_bytes)};
}

// (parts, first element of a part) of a float row that lies `offset` elements behind a 16-byte boundary
std::vector<int64_t> parts(int64_t classes, int64_t offset, int64_t part) {
  alignas(16) static float storage[4];
  const device::RowView<float, int64_t> row(storage + offset, classes, device::shift_of(storage + offset));
  return {row.parts(), row.first(part)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def(
      "plan_rows(int rows, int classes, int element_size, bool jensen_shannon, bool resident, bool aligned, bool reduced, int "
      "max_cluster) -> int[]");
  m.def("row_parts(int classes, int offset, int part) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("plan_rows", TORCH_BOX(&plan));
  m.impl("row_parts", TORCH_BOX(&parts));
}

}  // namespace fastkd::divergence
