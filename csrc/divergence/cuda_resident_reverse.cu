// Instances of cuda_resident.cuh: reverse KL.
#include "divergence/cuda_resident.cuh"

namespace fastkd::divergence {

RowKernel resident_reverse_kernel(Dtype dtype, Team team, bool plain) {
  using namespace FASTKD_ISA::divergence;
  return resident_of<Family::kReverse>(dtype, team, plain);
}

}  // namespace fastkd::divergence
