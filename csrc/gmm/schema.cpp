// The operators of gmm: batched mixtures of two 1-D Gaussians. Semantics: fastkd/ops/gmm.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // EM for each of B problems: values [n] (B = 1), [B, n] with optional lengths [B], or flat [total] with offsets [B + 1].
  // Parameters are float64 [B, 2], lower mean first, in the units of the values; deviations are standard deviations,
  // which unlike variances neither overflow nor underflow where the values do not. A problem whose initial
  // parameters are not all finite starts afresh. iterations and status are int64 [B], log_likelihood float64 [B].
  m.def(
      "gmm_fit(Tensor values, Tensor? offsets, Tensor? lengths, Tensor? sample_weight, Tensor? init_weights, "
      "Tensor? init_means, Tensor? init_deviations, bool normalize, SymInt max_iter, float tol, float reg_covar, Tensor? "
      "numbers=None) "
      "-> (Tensor weights, Tensor means, Tensor deviations, Tensor iterations, Tensor log_likelihood, Tensor status)");

  // Posterior of the low component of each value, in the shape of the values, and posterior > threshold.
  m.def(
      "gmm_posterior(Tensor values, Tensor? offsets, Tensor? lengths, Tensor weights, Tensor means, Tensor deviations, "
      "bool monotone, float threshold, Tensor? numbers=None) -> (Tensor posterior, Tensor mask)");

  // Both at once for the values of a fit: where they stay on the chip, they are read once.
  m.def(
      "gmm_select(Tensor values, Tensor? offsets, Tensor? lengths, Tensor? sample_weight, bool normalize, SymInt max_iter, "
      "float tol, float reg_covar, bool monotone, float threshold, Tensor? numbers=None) -> (Tensor posterior, Tensor mask)");
}
