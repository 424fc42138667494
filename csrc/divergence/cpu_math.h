// What the formulas of math.h need of the CPU.
#pragma once

#include "common/rows.h"
#include "divergence/math.h"

namespace fastkd::FASTKD_ISA::divergence_math {

template <typename Register>
struct Registers {
  using V = Register;
  using S = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr double kUnit = 1, kLogUnit = 1;
  static constexpr bool kAddsTiniest = false;
  FASTKD_INLINE static V number(double x) { return broadcast<V>(x); }
  FASTKD_INLINE static double divide(double x, double y) { return x / y; }
  template <typename Mask>
  FASTKD_INLINE static bool all(Mask mask) {
    return all_of(mask);
  }
  FASTKD_INLINE static V reciprocal(V x) { return S(1) / x; }
  FASTKD_INLINE static V floored(V x) { return maximum(broadcast<V>(kTiny<S>), x); }
  FASTKD_INLINE static V log(V x) { return fastkd::FASTKD_ISA::log<true>(x); }  // has a floor of its own
  FASTKD_INLINE static V exact_log(V x) { return log(x); }
};

}  // namespace fastkd::FASTKD_ISA::divergence_math
