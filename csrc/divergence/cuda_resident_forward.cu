// Instances of cuda_resident.cuh: forward KL and soft cross-entropy.
#include "divergence/cuda_resident.cuh"

namespace fastkd::divergence {

RowKernel resident_forward_kernel(Dtype dtype, Team team, bool plain) {
  using namespace FASTKD_ISA::divergence;
  return resident_of<Family::kForward>(dtype, team, plain);
}

}  // namespace fastkd::divergence
