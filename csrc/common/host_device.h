// Marks functions that g++ compiles for the CPU and nvcc for both sides.
#pragma once

#if defined(__CUDACC__)
#define FASTKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTKD_HOST_DEVICE inline __attribute__((always_inline))
#endif
