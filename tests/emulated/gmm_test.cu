// Geometry of the fits and posteriors, for tests on sizes that no machine holds.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "gmm/cuda.h"

namespace fastkd::gmm {
namespace {

// (team, capacity, offset of the scalars, blocks, threads, cluster, bytes of shared memory)
std::vector<int64_t> fit(int64_t problems, int64_t values, bool weighted, int64_t max_cluster, int64_t multiprocessors,
                         int64_t shared_bytes) {
  const FitPlan p =
      plan_fit(problems, values, weighted,
               {static_cast<unsigned>(max_cluster), static_cast<unsigned>(multiprocessors), static_cast<unsigned>(shared_bytes)});
  return {static_cast<int64_t>(p.team),
          p.capacity,
          p.scalars_offset,
          p.geometry.blocks,
          p.geometry.threads,
          p.geometry.cluster,
          static_cast<int64_t>(p.geometry.shared_bytes)};
}

// (chunk, blocks, threads)
std::vector<int64_t> posterior(int64_t elements, int64_t pack, int64_t multiprocessors) {
  const PosteriorPlan p = plan_posterior(elements, pack, {16, static_cast<unsigned>(multiprocessors)});
  return {p.chunk, p.geometry.blocks, p.geometry.threads};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def("plan_gmm_fit(int problems, int values, bool weighted, int max_cluster, int multiprocessors, int shared_bytes) -> int[]");
  m.def("plan_gmm_posterior(int elements, int pack, int multiprocessors) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("plan_gmm_fit", TORCH_BOX(&fit));
  m.impl("plan_gmm_posterior", TORCH_BOX(&posterior));
}

}  // namespace fastkd::gmm
