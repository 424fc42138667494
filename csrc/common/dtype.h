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

// function.operator()<T>() of the type of a dtype of floats; the caller checked that it is one.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // it is the side of the function's that this is called on
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
