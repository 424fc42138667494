// Sixteen bytes of elements, and the type that an element is computed in: for kernels on a GPU and emulated ones.
#pragma once

#include <type_traits>

#include "common/isa.h"

namespace fastkd::FASTKD_ISA::device {

constexpr unsigned kWarp = 32;

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
template <typename T>
struct alignas(16) Pack {
  T value[kPack<T>];
};

// The same as it was loaded, 16-bit elements two to a word: as halves, a load would be waited for where they are told apart.
template <typename T>
struct alignas(16) Words {
  using Word = std::conditional_t<sizeof(T) == 2, unsigned, T>;
  Word value[16 / sizeof(Word)];
};

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// In what exponents are counted where exponentials of what is stored in T are taken (exp_units): in ln 2, and so in base 2, for
// 16 bits.
template <typename T>
constexpr double kUnit = sizeof(T) == 2 ? 0.693147180559945309417 : 1.0;
// e^x = exp_units<T>(x * kPerUnit<T>), with a relative error of |x| 2^-24 for 16 bits.
template <typename T>
constexpr Compute<T> kPerUnit = static_cast<Compute<T>>(1 / kUnit<T>);

}  // namespace fastkd::FASTKD_ISA::device
