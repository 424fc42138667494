// Instances of cuda_resident.cuh: Jensen-Shannon.
#include "divergence/cuda_resident.cuh"

namespace fastkd::divergence {

RowKernel resident_jensen_shannon_kernel(Dtype dtype, Team team, bool plain) {
  using namespace FASTKD_ISA::divergence;
  return resident_of<Family::kJensenShannon>(dtype, team, plain);
}

}  // namespace fastkd::divergence
