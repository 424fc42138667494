// The interface of csrc/common/launch.cuh for emulated launches: tensors are on the CPU, fresh ones hold NaN.
#pragma once

#include "common/geometry.h"
#include "common/tensor.h"
#include "emulator.h"

#define FASTKD_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CPU, m)

namespace fastkd {

class DeviceContext {
 public:
  explicit DeviceContext(const Tensor&) {}

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    Tensor result = empty_on(aoti_torch_device_type_cpu(), 0, shape, type, strides);
    const std::size_t bytes = static_cast<std::size_t>(result.numel()) * result.element_size();
    if (bytes > 0) std::memset(result.mutable_data_ptr(), 0xff, bytes);  // what a kernel leaves out shows
    return result;
  }

  // a small device: few multiprocessors fill it, and little fits its shared memory
  DeviceLimits limits() const { return {emulator::settings().max_cluster, 4, 32 << 10}; }

  template <typename Params>
  void launch(const char* name, void (*kernel)(Params), const Geometry& geometry, const Params& params) const {
    emulator::run(name, geometry, [&] { kernel(params); });
  }
};

}  // namespace fastkd
