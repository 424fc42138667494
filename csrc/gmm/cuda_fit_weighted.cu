// Fits with sample weights.
#include "gmm/cuda_fit.cuh"

namespace fastkd::gmm {

FitKernel weighted_fit_kernel(FitTeam team) { return FASTKD_ISA::gmm::fit_kernel<true>(team); }

}  // namespace fastkd::gmm
