// What the CUDA launchers share: the caller's device and stream, launch errors as exceptions, fresh outputs.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/tensor.h"

namespace fastkd {

// Makes the tensor's device current while it lives, and gives torch's current stream on it.
class CudaContext {
 public:
  explicit CudaContext(const Tensor& tensor) : device_(tensor.get_device()), guard_(device_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    return empty_on(aoti_torch_device_type_cuda(), device_, shape, type);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

constexpr int kThreads = 256;

// Blocks of a grid-stride loop over `items`: enough to fill any GPU, no more than a grid may have.
inline unsigned grid_size(int64_t items, int64_t items_per_thread = 1) {
  const int64_t per_block = kThreads * items_per_thread;
  return static_cast<unsigned>(std::clamp<int64_t>((items + per_block - 1) / per_block, 1, int64_t{1} << 16));
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  FASTKD_CHECK(error == cudaSuccess, "launch of ", kernel, " failed: ", cudaGetErrorString(error));
}

}  // namespace fastkd
