// Makes a GPU of cuda_runtime.h the current one while it lives.
#pragma once

#include "cuda_runtime.h"

namespace torch::stable::accelerator {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(fake::current) { fake::current = device; }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() { fake::current = before_; }

 private:
  int before_;
};

}  // namespace torch::stable::accelerator
