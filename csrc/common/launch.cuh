// What the CUDA launchers share: the caller's device and stream, launches with errors as exceptions, fresh outputs.
// tests/emulated/common/launch.cuh is the same for emulated launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <tuple>

#include "common/architectures.h"
#include "common/geometry.h"
#include "common/tensor.h"

#define FASTKD_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m)

namespace fastkd {

static __global__ void cluster_probe() {}  // never launched

// Makes the tensor's device current while it lives; launches go to torch's current stream on it.
class DeviceContext {
 public:
  explicit DeviceContext(const Tensor& tensor) : device_(tensor.get_device()), guard_(device_) { check_architecture(); }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    return empty_on(aoti_torch_device_type_cuda(), device_, shape, type, strides);
  }

  // Asked of each device once; of those from 64 on at each call.
  DeviceLimits limits() const {
    static std::atomic<uint64_t> cache[64];  // 0: not asked yet
    std::atomic<uint64_t>& known = cache[device_ % 64];
    uint64_t packed = known.load(std::memory_order_relaxed);
    if (packed == 0 || device_ >= 64) {
      const auto shared_bytes = static_cast<uint64_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
      packed = shared_bytes << 32 | static_cast<unsigned>(attribute(cudaDevAttrMultiProcessorCount)) << 8 | max_cluster();
      if (device_ < 64) known.store(packed, std::memory_order_relaxed);
    }
    return {static_cast<unsigned>(packed & 0xff), static_cast<unsigned>(packed >> 8 & 0xffffff),
            static_cast<unsigned>(packed >> 32)};
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
    const void* const function = reinterpret_cast<const void*>(kernel);
    if (geometry.cluster > kPortableCluster) allow(name, function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (geometry.shared_bytes > kPortableSharedBytes) {
      allow(name, function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits().shared_bytes));
    }
    check(name, cudaLaunchKernelEx(&config, kernel, params));
  }

 private:
  // What a kernel must be allowed on the current device, once: it stays so, and asking again may wait for copies under way.
  // Always to the same value, so that no thread takes back what another one is about to use.
  void allow(const char* name, const void* kernel, cudaFuncAttribute what, int value) const {
    static std::mutex mutex;
    static std::set<std::tuple<int32_t, const void*, cudaFuncAttribute>> allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device_, kernel, what);
    if (allowed.count(key) != 0) return;
    check(name, cudaFuncSetAttribute(kernel, what, value));
    allowed.insert(key);
  }
  // Whether there is code for the device in this library, asked once: torch may have code for GPUs that this build has not.
  void check_architecture() const {
    static std::atomic<uint64_t> known{0};  // a bit for each device that has
    const uint64_t bit = device_ < 64 ? uint64_t{1} << device_ : 0;
    if ((known.load(std::memory_order_relaxed) & bit) != 0) return;
    const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
    if (!any_architecture_fits(FASTKD_CUDA_ARCHITECTURES, major, minor)) fail_without_code(major, minor);
    known.fetch_or(bit, std::memory_order_relaxed);
  }
  [[noreturn]] void fail_without_code(int major, int minor) const {
    cudaDeviceProp properties{};
    const bool named = cudaGetDeviceProperties(&properties, device_) == cudaSuccess;
    fail(no_architecture_fits(FASTKD_CUDA_ARCHITECTURES, named ? properties.name : "this GPU", major, minor));
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  // Clusters need code that was compiled for them (PTX of an older architecture runs on Hopper, too, without), and 16 blocks
  // need multiprocessors side by side, which a part of a GPU may not have: asked for a block that fills one.
  unsigned max_cluster() const {
    cudaFuncAttributes code{};
    check("cudaFuncGetAttributes", cudaFuncGetAttributes(&code, cluster_probe));
    if (attribute(cudaDevAttrComputeCapabilityMajor) < 9 || code.ptxVersion < 90) return 1;
    // bytes of shared memory: more than half of what a multiprocessor has, and no more than a block can have, 99 KiB on 12.0
    const int filling = std::min(128 << 10, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    check("cudaFuncSetAttribute", cudaFuncSetAttribute(cluster_probe, cudaFuncAttributeMaxDynamicSharedMemorySize, filling));
    const bool larger = cudaFuncSetAttribute(cluster_probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    cudaGetLastError();
    for (unsigned cluster = larger ? kMaxCluster : kPortableCluster; cluster > 1; cluster /= 2) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {cluster, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = cluster;
      config.blockDim = 32;
      config.dynamicSmemBytes = static_cast<size_t>(filling);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, cluster_probe, &config) == cudaSuccess && clusters > 0) return cluster;
      cudaGetLastError();
    }
    return 1;
  }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  void check(const char* name, cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the launch failed, the context did not: later calls must not find this error
    if (error == cudaErrorNoKernelImageForDevice) {  // where architectures fit by number only, as of a Jetson
      fail_without_code(attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrComputeCapabilityMinor));
    }
    fail("launch of ", name, " failed: ", cudaGetErrorString(error));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastkd
