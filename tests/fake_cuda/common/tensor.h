// As much of csrc/common/tensor.h as csrc/common/launch.cuh needs: a tensor is the number of its GPU.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/check.h"

namespace fastkd {

enum class ScalarType { Float };
struct Tensor {
  int32_t device;
  int32_t get_device() const { return device; }
};
inline Tensor empty_on(int32_t, int32_t device, std::initializer_list<int64_t>, ScalarType, std::initializer_list<int64_t>) {
  return {device};
}

}  // namespace fastkd

#define STABLE_TORCH_ERROR_CODE_CHECK(call) static_cast<void>(call)
inline int32_t aoti_torch_device_type_cuda() { return 1; }
inline int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
