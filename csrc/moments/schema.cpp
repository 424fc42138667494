// The operators of moments: mean and variance of each channel of maps. Semantics: fastkd/ops/moments.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // x [N, C, ...], floats. [C] each, over samples and pixels; per_sample: [N, C], over pixels. The variance is biased.
  m.def("channel_moments(Tensor x, bool per_sample) -> (Tensor mean, Tensor var)");

  // (grad_mean + 2 grad_var (x - mean)) / count in the dtype and the memory format of x; mean as the operator gave it.
  m.def("channel_moments_backward(Tensor x, Tensor mean, Tensor? grad_mean, Tensor? grad_var) -> Tensor");
}
