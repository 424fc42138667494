// Geometry of the moments' kernels, for tests on sizes that no machine holds.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "moments/cuda.h"

namespace fastkd::moments {
namespace {

// (team, or -1 for columns; pixels of a piece, pieces; width, height, whether packs; blocks, threads, shared bytes)
std::vector<int64_t> plan(bool channels_last, int64_t outer, int64_t channels, int64_t pixels, int64_t size, bool aligned,
                          int64_t multiprocessors) {
  const Maps maps{Dtype::kFloat32, nullptr, channels_last, outer, channels, pixels};
  const DevicePlan found = plan_device(maps, size, aligned, {16, static_cast<unsigned>(multiprocessors)});
  return {channels_last ? -1 : static_cast<int64_t>(found.team),
          found.piece,
          found.pieces,
          found.width,
          found.height,
          found.packs,
          found.geometry.blocks,
          found.geometry.threads,
          static_cast<int64_t>(found.geometry.shared_bytes)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def(
      "plan_moments(bool channels_last, int outer, int channels, int pixels, int size, bool aligned, int multiprocessors) "
      "-> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) { m.impl("plan_moments", TORCH_BOX(&plan)); }

}  // namespace fastkd::moments
