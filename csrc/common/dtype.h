// Element types of the kernels, free of any framework.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastkd {

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Calls function<T>() with the type T of a dtype, [&]<typename T>() { ... }. The dtype is one of floats, which the operator
// checked.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // a function of the host alone is called on the host alone
#endif
template <typename Function>
FASTKD_HOST_DEVICE auto for_dtype(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat64: return function.template operator()<double>();
    case Dtype::kBFloat16: return function.template operator()<BFloat16>();
    case Dtype::kFloat16: return function.template operator()<Float16>();
    default: return function.template operator()<float>();
  }
}

}  // namespace fastkd
