// The backward of divergence on the GPU: gradient[r, :] *= grad_loss[r], in place.
//
// Mapping: a grid-stride loop over rows of blocks; the factor is read on the device, and a row whose factor is 1 (the
// usual loss.backward()) costs its blocks one load and no traffic. Bytes otherwise: 2 * rows * classes * size.
#include "common/device.cuh"
#include "common/launch.cuh"

namespace fastkd::divergence {
namespace {

using namespace device;

struct ScaleParams {
  void* gradient;      // [rows, classes]
  const void* factor;  // [1] or [rows], float or double
  bool wide_factor;    // double
  int64_t factor_stride;
  int64_t rows;
  int64_t classes;
};

template <typename T>
FASTKD_KERNEL(kThreads)
scale_kernel(const ScaleParams p) {
  for (int64_t r = block_index(); r < p.rows; r += block_count()) {
    const double factor = p.wide_factor ? static_cast<const double*>(p.factor)[r * p.factor_stride]
                                        : static_cast<const float*>(p.factor)[r * p.factor_stride];
    if (factor == 1.0) continue;
    T* const row = static_cast<T*>(p.gradient) + r * p.classes;
    for (int64_t i = thread_index(); i < p.classes; i += kThreads) {
      row[i] = from_compute<T>(to_compute(row[i]) * static_cast<Compute<T>>(factor));
    }
  }
}

void backward_(Tensor gradient, Tensor grad_loss) {
  check_dtype("gradient", gradient, kFloats);
  check_dim("gradient", gradient, 2);
  FASTKD_CHECK(gradient.is_contiguous(), "gradient has shape ", shape_of(gradient), ", must be contiguous");
  check_dtype("grad_loss", grad_loss, {ScalarType::Float, ScalarType::Double});
  check_device("grad_loss", grad_loss, "gradient", gradient);
  const int64_t rows = gradient.size(0), classes = gradient.size(1);
  const bool scalar = grad_loss.dim() == 0;
  if (!scalar) check_shape("grad_loss", grad_loss, {rows});
  if (rows == 0 || classes == 0) return;
  const DeviceContext context(gradient);
  const ScaleParams params{gradient.mutable_data_ptr(),
                           grad_loss.const_data_ptr(),
                           grad_loss.scalar_type() == ScalarType::Double,
                           scalar ? 0 : grad_loss.stride(0),
                           rows,
                           classes};
  const auto kernel = [&] {
    switch (gradient.scalar_type()) {
      case ScalarType::Double: return scale_kernel<double>;
      case ScalarType::BFloat16: return scale_kernel<BFloat16>;
      case ScalarType::Half: return scale_kernel<Float16>;
      default: return scale_kernel<float>;
    }
  }();
  context.launch("divergence_backward_", kernel, {static_cast<unsigned>(std::min<int64_t>(rows, 65536)), kThreads}, params);
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("divergence_backward_", TORCH_BOX(&backward_)); }

}  // namespace fastkd::divergence
