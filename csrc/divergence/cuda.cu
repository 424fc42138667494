// The backward of divergence on the GPU: gradient[r, :] *= grad_loss[r], in place.
//
// Mapping: a grid-stride loop over rows of blocks; the factor is read on the device, and a row whose factor is 1 (the
// usual loss.backward()) costs its blocks one load and no traffic. Bytes otherwise: 2 * rows * classes * size.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.cuh"

namespace fastkd::divergence {
namespace {

struct ScaleParams {
  void* gradient;      // [rows, classes]
  const void* factor;  // [1] or [rows], float or double
  bool wide_factor;    // double
  int64_t factor_stride;
  int64_t rows;
  int64_t classes;
};

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__device__ __forceinline__ void assign(float& out, float x) { out = x; }
__device__ __forceinline__ void assign(double& out, double x) { out = x; }
__device__ __forceinline__ void assign(__nv_bfloat16& out, float x) { out = __float2bfloat16(x); }
__device__ __forceinline__ void assign(__half& out, float x) { out = __float2half(x); }

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleParams p) {
  for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
    const double factor = p.wide_factor ? static_cast<const double*>(p.factor)[r * p.factor_stride]
                                        : static_cast<const float*>(p.factor)[r * p.factor_stride];
    if (factor == 1.0) continue;
    T* const row = static_cast<T*>(p.gradient) + r * p.classes;
    using Compute = decltype(to_compute(T{}));
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.classes; i += step) {
      assign(row[i], to_compute(row[i]) * static_cast<Compute>(factor));
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
  const CudaContext context(gradient);
  const ScaleParams params{gradient.mutable_data_ptr(),
                           grad_loss.const_data_ptr(),
                           grad_loss.scalar_type() == ScalarType::Double,
                           scalar ? 0 : grad_loss.stride(0),
                           rows,
                           classes};
  const dim3 grid(std::min(grid_size(classes, 4), 64u), static_cast<unsigned>(std::min<int64_t>(rows, 32768)));
  const cudaStream_t stream = context.stream();
  switch (gradient.scalar_type()) {
    case ScalarType::Double: scale_kernel<double><<<grid, kThreads, 0, stream>>>(params); break;
    case ScalarType::BFloat16: scale_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(params); break;
    case ScalarType::Half: scale_kernel<__half><<<grid, kThreads, 0, stream>>>(params); break;
    default: scale_kernel<float><<<grid, kThreads, 0, stream>>>(params); break;
  }
  check_launch("divergence_backward_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { m.impl("divergence_backward_", TORCH_BOX(&backward_)); }

}  // namespace fastkd::divergence
