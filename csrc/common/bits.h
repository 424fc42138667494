// The bits of a value as another type of the same size, CPU and CUDA.
#pragma once

#include <cstring>

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA {

template <typename To, typename From>
FASTKD_HOST_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fastkd::FASTKD_ISA
