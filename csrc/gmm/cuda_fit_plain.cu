// Fits without sample weights.
#include "gmm/cuda_fit.cuh"

namespace fastkd::gmm {

FitKernel plain_fit_kernel(FitTeam team) { return FASTKD_ISA::gmm::fit_kernel<false>(team); }

}  // namespace fastkd::gmm
