// The polynomial of the natural logarithm that CPU and CUDA share.
#pragma once

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA {

// (ln(1 + f) - f + f^2 / 2) / f^3 for f in [sqrt(1/2) - 1, sqrt(2) - 1], for one float or a register of them: minimax.
template <typename V>
FASTKD_HOST_DEVICE V log_polynomial(V f) {
  V poly = f * -0.0786422027594f + 0.128881152773f;
  poly = poly * f - 0.131299849244f;
  poly = poly * f + 0.141803709249f;
  poly = poly * f - 0.166243586589f;
  poly = poly * f + 0.200023165941f;
  poly = poly * f - 0.250008161209f;
  return poly * f + 0.333333164164f;
}

// f = x / 2^n - 1; ln x = n ln 2 + ln(1 + f), the small terms first
template <typename V>
FASTKD_HOST_DEVICE V log_of_parts(V exponent, V f) {
  const V f2 = f * f;
  const V tail = f * f2 * log_polynomial(f) + exponent * 1.42860682030941723212e-6f - 0.5f * f2;
  return exponent * 0.693145751953125f + (f + tail);
}

}  // namespace fastkd::FASTKD_ISA
