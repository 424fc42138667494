// What the CUDA launchers share: the caller's device and stream, launches with errors as exceptions, fresh outputs.
// tests/emulated/common/launch.cuh is the same for emulated launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/geometry.h"
#include "common/tensor.h"

#define FASTKD_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m)

namespace fastkd {

// Makes the tensor's device current while it lives; launches go to torch's current stream on it.
class DeviceContext {
 public:
  explicit DeviceContext(const Tensor& tensor) : device_(tensor.get_device()), guard_(device_) {}

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    return empty_on(aoti_torch_device_type_cuda(), device_, shape, type, strides);
  }

  DeviceLimits limits() const {
    return {attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMaxCluster : 1,
            static_cast<unsigned>(attribute(cudaDevAttrMultiProcessorCount))};
  }

  // kernel(params), in the caller's stream. `name` is for the error.
  template <typename Params>
  void launch(const char* name, void (*kernel)(Params), const Geometry& geometry, const Params& params) const {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {geometry.cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = geometry.blocks;
    config.blockDim = geometry.threads;
    config.dynamicSmemBytes = geometry.shared_bytes;
    config.stream = stream();
    config.attrs = &cluster;
    config.numAttrs = geometry.cluster > 1 ? 1 : 0;
    if (geometry.cluster > kPortableCluster) {
      check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    if (geometry.shared_bytes > kPortableSharedBytes) {
      check(name,
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(geometry.shared_bytes)));
    }
    check(name, cudaLaunchKernelEx(&config, kernel, params));
  }

 private:
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  static void check(const char* name, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the launch failed, the context did not: later calls must not find this error
    fail("launch of ", name, " failed: ", cudaGetErrorString(error));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastkd
