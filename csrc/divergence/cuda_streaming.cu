// Instances of cuda_streaming.cuh.
#include "divergence/cuda_streaming.cuh"

namespace fastkd::divergence {
namespace {

template <typename T, bool kJensenShannon>
RowKernel of(Team team) {
  using namespace device;
  using namespace FASTKD_ISA::divergence;
  return team == Team::kCluster ? streaming_rows<T, kJensenShannon, ClusterGroup>
                                : streaming_rows<T, kJensenShannon, LaneGroup<sizeof(T) == 8 ? 32 : 8>>;
}

template <typename T>
RowKernel of(bool jensen_shannon, Team team) {
  return jensen_shannon ? of<T, true>(team) : of<T, false>(team);
}

}  // namespace

RowKernel streaming_kernel(Dtype dtype, bool jensen_shannon, Team team) {
  return for_dtype(dtype, [&]<typename T>() { return of<T>(jensen_shannon, team); });
}

}  // namespace fastkd::divergence
