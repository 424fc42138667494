// What the long ways through rows of logits share.
#pragma once

#include "common/chunks.cuh"
#include "divergence/math.h"

namespace fastkd::FASTKD_ISA::divergence {

using namespace device;

// The highest element of a pack; a NaN gives way to any.
template <typename T>
FASTKD_DEVICE Compute<T> highest(Words<T> pack) {
  if constexpr (sizeof(T) == 2) {  // words of two first
#pragma unroll
    for (int half = 2; half > 0; half /= 2) {
      Words<T> other = pack;
#pragma unroll
      for (int w = 0; w < half; ++w) other.value[w] = other.value[w + half];
      pack = maximum(pack, other);
    }
  }
  Compute<T> values[kPack<T>];
  unpack(pack, values);
#pragma unroll
  for (int k = 1; k < (sizeof(T) == 2 ? 2 : kPack<T>); ++k) values[0] = maximum(values[0], values[k]);
  return values[0];
}

}  // namespace fastkd::FASTKD_ISA::divergence
