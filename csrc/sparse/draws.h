// Draws from a teacher's distribution: integers, so that CPU and CUDA have the same.
//
// Class c of a row has weight round(2^E 2^t), t = (logit - maximum) log2 e / T, by the fixed point of alias/math.h, with E as
// large as keeps the total W below 2^61: classes below 2^-43 of the largest, at 128k classes, have none. Draw i of row r takes 64
// bits of Philox at index r ceil(draws / 2) + i / 2, and is the class in whose part of [0, W) floor(bits W / 2^64) lies. Repeated
// draws are merged: p = count / draws, which is an unbiased estimate of the softmax (to 2^-30).
#pragma once

#include "alias/math.h"
#include "common/fixed_point.h"
#include "common/philox.h"

namespace fastkd::FASTKD_ISA::sparse_draws {

// log2 e / T, finite
inline double kappa_of(double temperature) {
  const double kappa = alias_math::kLog2E / temperature;
  return kappa < 1e300 ? kappa : 1e300;
}
inline int exponent_of(int64_t classes) {
  int bits = 0;
  while ((int64_t{1} << bits) < classes) ++bits;
  return 60 - bits;
}

FASTKD_HOST_DEVICE uint64_t place_of(uint64_t seed, int64_t row, int64_t draws, int64_t i, uint64_t total) {
  const int64_t pairs = draws / 2 + draws % 2;
  const Words words = philox(seed, Stream::kTeacher, static_cast<uint64_t>(row * pairs + i / 2));
  const bool even = i % 2 == 0;
  const uint64_t low = even ? words.w[0] : words.w[2], high = even ? words.w[1] : words.w[3];
  return multiply_high(low | high << 32, total);
}

FASTKD_HOST_DEVICE double share(int64_t count, int64_t draws) { return static_cast<double>(count) / static_cast<double>(draws); }

}  // namespace fastkd::FASTKD_ISA::sparse_draws
