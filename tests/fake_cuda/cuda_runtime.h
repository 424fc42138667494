// As much of the CUDA runtime as csrc/common/launch.cuh calls, over GPUs that are described by numbers. Where CUDA refuses a
// call, so does this; what is asked of it is written down.
#pragma once

#include <cstddef>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#define __global__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidClusterSize = 912
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributeNonPortableClusterSizeAllowed = 13 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct FakeStream*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaDeviceProp {
  char name[256];
};

namespace fake {

struct Gpu {
  int major = 9, multiprocessors = 132, block_bytes = 227 << 10, ptx = 90;
  unsigned largest_cluster = 16;  // 1: has none
  int minor = 0;
  bool has_code = true;  // whatever the numbers say
};
using Key = std::tuple<int, const void*, cudaFuncAttribute>;

inline std::vector<Gpu> gpus;
inline thread_local int current = 0;
inline thread_local cudaError_t last = cudaSuccess;
inline std::mutex mutex;  // of what follows
inline std::map<Key, int> attributes;
inline std::vector<Key> asked;  // in their order
inline int launches = 0, questions = 0;

inline const Gpu& gpu() { return gpus[current]; }
inline cudaError_t result(bool good, cudaError_t error) { return good ? cudaSuccess : (last = error); }
inline int attribute(const void* kernel, cudaFuncAttribute which, int otherwise) {
  const auto found = attributes.find({current, kernel, which});
  return found == attributes.end() ? otherwise : found->second;
}
template <typename Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}
inline unsigned cluster_of(const cudaLaunchConfig_t& config) { return config.numAttrs > 0 ? config.attrs->val.clusterDim.x : 1; }
inline cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const unsigned cluster = cluster_of(config);
  const auto most = static_cast<size_t>(attribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 << 10));
  if (config.gridDim.x == 0 || config.gridDim.x % cluster != 0 || config.blockDim.x == 0 || config.blockDim.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > most) return cudaErrorInvalidValue;
  if (!gpu().has_code) return cudaErrorNoKernelImageForDevice;
  const bool allowed = cluster <= 8 || attribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0) != 0;
  return cluster <= gpu().largest_cluster && allowed ? cudaSuccess : cudaErrorInvalidClusterSize;
}

}  // namespace fake

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake::last;
  fake::last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "error " + std::to_string(error);
  return text.c_str();
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const fake::Gpu& gpu = fake::gpus.at(static_cast<size_t>(device));
  const std::lock_guard<std::mutex> lock(fake::mutex);
  ++fake::questions;
  *value = which == cudaDevAttrMultiProcessorCount      ? gpu.multiprocessors
           : which == cudaDevAttrComputeCapabilityMajor ? gpu.major
           : which == cudaDevAttrComputeCapabilityMinor ? gpu.minor
                                                        : gpu.block_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::snprintf(properties->name, sizeof properties->name, "GPU %d", device);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = fake::gpu().ptx;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute which, int value) {
  const fake::Key key{fake::current, fake::address(kernel), which};
  const std::lock_guard<std::mutex> lock(fake::mutex);
  fake::asked.push_back(key);
  const fake::Gpu& gpu = fake::gpu();  // whether one without larger clusters refuses this nobody says: here it does
  const bool good = which == cudaFuncAttributeMaxDynamicSharedMemorySize ? value <= gpu.block_bytes : gpu.largest_cluster > 8;
  if (good) fake::attributes[key] = value;
  return fake::result(good, cudaErrorInvalidValue);
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  return cudaFuncSetAttribute(static_cast<const char*>(kernel), which, value);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  const cudaError_t error = fake::check(*config, fake::address(kernel));
  *clusters = error == cudaSuccess ? 1 : 0;
  return fake::result(error == cudaSuccess, error);
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params&) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  const cudaError_t error = fake::check(*config, fake::address(kernel));
  fake::launches += error == cudaSuccess;
  return fake::result(error == cudaSuccess, error);
}
