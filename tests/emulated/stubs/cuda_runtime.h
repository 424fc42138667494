// As much of the CUDA runtime as csrc/common/launch.cuh asks for, of devices that a test describes.
#pragma once

#include <cstddef>
#include <cstdio>
#include <map>

#define __global__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct cudaDeviceProp {
  char name[64];
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace stub {

struct Device {
  int major = 0, minor = 0;
  cudaError_t launch = cudaSuccess;  // what a launch answers
  int questions = 0, launches = 0;   // so far
};
inline std::map<int, Device> devices;
inline int current = 0;

}  // namespace stub

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  stub::Device& d = stub::devices[device];
  ++d.questions;
  *value = which == cudaDevAttrComputeCapabilityMajor ? d.major : which == cudaDevAttrComputeCapabilityMinor ? d.minor : 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::snprintf(properties->name, sizeof(properties->name), "Stub GPU %d", device);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 80;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 0;
  return cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Params), const Params&) {
  ++stub::devices[stub::current].launches;
  return stub::devices[stub::current].launch;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "a stub's error"; }
