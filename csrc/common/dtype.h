// Element types of the kernels, free of any framework.
#pragma once

#include <cstdint>

namespace fastkd {

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace fastkd
