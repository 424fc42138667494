// The integer maths of the alias table, CPU and CUDA: the same bits everywhere.
//
// Weights. Item i of score u_i has weight w_i = round(2^E * 2^t), t = (u_i - reference) * kappa, kappa = lambda log2 e:
// softmax(lambda u) in fixed point. E is as large as keeps the total below 2^52, so that the rounding of N items moves
// the distribution by at most 4/3 N / 2^51 in total variation; 2^t itself is right to 6.4e-10. The only floating point is
// one subtraction and one product in fp64 (each rounded once, nothing to contract), then integers.
//
// Table. Blocks of 4096 items. In a block of n items and weight C = sum w, bin i holds exactly C units of the scaled
// weights a_i = n w_i: the first `threshold` of them belong to item i, the rest to item `alias`. Sum over bins of what
// an item owns is n w_i, exactly. A bin is one word: threshold (52 bits) and alias (12 bits). A top table of the same
// kind chooses the block. Filling order (Huebschle-Schneider & Sanders, arXiv:1903.00227, "sweep"): lights (a_i <= C) and
// heavies in index order, each light filled up by the current heavy, a heavy that falls to C or below closes its own bin
// with the next heavy. In prefix sums: light k goes to the first heavy j with surplus S_j > deficit D_{k-1}; so a GPU
// can compute the same table in parallel.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/divisor.h"
#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/philox.h"

namespace fastkd::FASTKD_ISA::alias_math {

constexpr int kBlockBits = 12;
constexpr int64_t kBlockSize = int64_t{1} << kBlockBits;
constexpr uint64_t kAliasMask = kBlockSize - 1;
constexpr int kTotalBits = 52;  // the total weight stays below 2^52

constexpr double kLog2E = 1.44269504088896340736;

// 2^f = 1 + f (c0 + f (c1 + ...)) for f in [0, 1), coefficients and f in units of 2^-32: minimax, 4.4e-11
FASTKD_HOST_DEVICE constexpr uint32_t exp2_coefficient(int k) {
  constexpr uint32_t kCoefficients[7] = {2977044488u, 1031764554u, 238392259u, 41293032u, 5763423u, 617496u, 92044u};
  return kCoefficients[k];
}
constexpr int kExponentBias = 64;                       // t >= -64 has a positive biased exponent
constexpr double kLargestT = 63.0;                      // of an update; a build has t <= 0
constexpr int kFractionBits = 45;                       // of t in fixed point
constexpr double kFractionScale = 35184372088832.0;     // 2^45
constexpr double kMagic = 6755399441055744.0;           // 1.5 * 2^52: adding it rounds to an integer in the low bits
constexpr uint64_t kMagicBits = 0x4338000000000000ull;  // its bit pattern

// 2^t of a score as a mantissa in units of 2^-32 and a biased exponent: one item at a time, the bits of the vectors in
// cpu_kernel.cpp.
struct Power {
  uint64_t mantissa;  // in [2^32, 2^33)
  uint64_t exponent;  // floor(t) + 64
  bool positive;      // t >= -64 and the score is not -inf
};
FASTKD_HOST_DEVICE Power power_of(double score, double reference, double kappa) {
  const double span = score - reference, difference = span > -1.7e308 ? span : -1.7e308;  // -inf * 0 would be NaN
  const double t = difference * kappa;
  const double below = t < kLargestT ? t : kLargestT, clamped = below > -64.0 ? below : -64.0;
  const double shifted = clamped * kFractionScale + kMagic;  // the product is exact: fused or not
  const uint64_t fixed = bits_as<uint64_t>(shifted) - (kMagicBits - (uint64_t{kExponentBias} << kFractionBits));
  const uint32_t f = static_cast<uint32_t>(fixed >> (kFractionBits - 32));
  uint32_t r = exp2_coefficient(6);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 5; k >= 0; --k) r = multiply_high(r, f) + exp2_coefficient(k);
  return {multiply_high(r, f) + (uint64_t{1} << 32), fixed >> kFractionBits, t >= -64.0 && score > -__builtin_inf()};
}
FASTKD_HOST_DEVICE uint64_t shift_right(uint64_t value, uint64_t shift) { return value >> (shift < 63 ? shift : 63); }

// floor(2^32 2^t) + 1, for t <= 0
FASTKD_HOST_DEVICE uint64_t partition_term(const Power& power) {
  return power.positive ? shift_right(power.mantissa, kExponentBias - power.exponent) + 1 : 0;
}

// 2^(exponent + t) rounded half up; largest_t: floor of the largest t that may come, at most kTotalBits - 2 - exponent.
// Shifted left first, so that one right shift by at least one bit remains; nothing is lost on the left, as the largest
// weight is below 2^(exponent + largest_t + 1).
FASTKD_HOST_DEVICE uint64_t weight_of(const Power& power, int exponent, int largest_t) {
  const int left = exponent + largest_t > 31 ? exponent + largest_t - 31 : 0;
  const uint64_t right = static_cast<uint64_t>(32 + kExponentBias - exponent + left);
  return power.positive ? (shift_right(power.mantissa << left, right - 1 - power.exponent) + 1) >> 1 : 0;
}

// A sum of 64-bit words that may exceed one, as two words that threads can exchange.
using uint128 = unsigned __int128;
struct LongSum {
  uint64_t low, high;  // sums of low and of high halves

  FASTKD_HOST_DEVICE void add(uint64_t value) {
    low += value & 0xffffffffu;
    high += value >> 32;
  }
  FASTKD_HOST_DEVICE uint128 value() const { return (static_cast<uint128>(high) << 32) + low; }
};

// The exponent E of a build whose partition function, in units of 2^-32 and rounded up, is the sum: as large as keeps the
// total weight below 2^52.
FASTKD_HOST_DEVICE int exponent_of(uint128 partition) {
  int bits = 0;
  while ((uint128{1} << (32 + bits)) < partition) ++bits;
  return kTotalBits - 1 - bits;
}

// value / 2^shift, rounded half up
FASTKD_HOST_DEVICE uint64_t shifted(uint64_t value, int shift) {
  return shift == 0 ? value : shift > 63 ? 0 : (value + (uint64_t{1} << (shift - 1))) >> shift;
}

// Whether a table's scale is one that a build could have left: reference, kappa, exponent, total.
FASTKD_HOST_DEVICE bool is_scale(const double* scale) {
  return scale[0] - scale[0] == 0 && scale[1] >= 0 && scale[1] <= 1.7976931348623157e308 && scale[2] >= -64 &&
         scale[2] < kTotalBits && scale[3] > 0;
}
// t of the largest new score where it is positive, and its floor once it is rounded to fixed point: may be the next integer.
FASTKD_HOST_DEVICE double largest_t_of(double maximum, double reference, double kappa) {
  return maximum > reference ? (maximum - reference) * kappa : 0.0;
}
FASTKD_HOST_DEVICE int whole_t(double largest_t) { return static_cast<int>(largest_t + 1 / kFractionScale); }

// An update divides all weights by 2^shift, to make room for new ones. At least by as much as brings the largest of these
// below 2^51; and then, where the `count` new weights sum to `added`, until an upper bound of the new total is below 2^52:
// each rounding adds at most 1, and what the new weights replace is not taken off.
FASTKD_HOST_DEVICE int least_shift(int exponent, int largest_t) {
  const int shift = exponent + largest_t - (kTotalBits - 2);
  return shift > 0 ? shift : 0;
}
FASTKD_HOST_DEVICE int shift_for(int least, uint128 added, int64_t count, uint64_t total, int64_t items) {
  for (int more = 0;; ++more) {
    const int shift = least + more;
    const uint128 old = shifted(total, shift) + (shift > 0 ? static_cast<uint64_t>(items) : 0);
    if (old + (added >> more) + (more > 0 ? static_cast<uint64_t>(count) : 0) < uint128{1} << kTotalBits) return shift;
  }
}

FASTKD_HOST_DEVICE int64_t block_count(int64_t items) { return (items + kBlockSize - 1) / kBlockSize; }
FASTKD_HOST_DEVICE int64_t block_items(int64_t items, int64_t block) {
  const int64_t left = items - block * kBlockSize;
  return left < kBlockSize ? left : kBlockSize;
}

FASTKD_HOST_DEVICE uint64_t pack(uint64_t threshold, uint64_t alias) { return threshold << kBlockBits | alias; }
FASTKD_HOST_DEVICE uint64_t threshold_of(uint64_t bin) { return bin >> kBlockBits; }
FASTKD_HOST_DEVICE uint64_t alias_of(uint64_t bin) { return bin & kAliasMask; }

// The total weight as `scale` holds it, exact in fp64; 0 where it is none that a table can have.
FASTKD_HOST_DEVICE uint64_t total_weight(double total) {
  return total >= 1 && total < 4503599627370496.0 ? static_cast<uint64_t>(total) : 0;
}
constexpr int64_t kNoItem = INT64_MIN;  // what a GPU draws from a table without weight

// The random words of draw `index`: one for the top table, one for the block.
struct DrawWords {
  uint64_t top;
  uint64_t block;
};
FASTKD_HOST_DEVICE DrawWords draw_words(uint64_t seed, uint64_t index) {
  const Words words = philox(seed, Stream::kAlias, index);
  return {words.w[0] | static_cast<uint64_t>(words.w[1]) << 32, words.w[2] | static_cast<uint64_t>(words.w[3]) << 32};
}

}  // namespace fastkd::FASTKD_ISA::alias_math
