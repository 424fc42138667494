// Instances of cuda_resident.cuh: reverse KL.
#include "divergence/cuda_resident.cuh"

namespace fastkd::divergence {

RowKernel resident_reverse_kernel(Dtype dtype, Team team) {
  using namespace FASTKD_ISA::divergence;
  return resident_of<Family::kReverse>(dtype, team);
}

}  // namespace fastkd::divergence
