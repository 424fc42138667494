// Marks functions that g++ compiles for the CPU and nvcc for both sides; and those that call what a side brings along, which
// nvcc compiles for the GPU alone.
#pragma once

#if defined(__CUDACC__)
#define FASTKD_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTKD_OWN_SIDE __device__ __forceinline__
#else
#define FASTKD_HOST_DEVICE inline __attribute__((always_inline))
#define FASTKD_OWN_SIDE FASTKD_HOST_DEVICE
#endif
