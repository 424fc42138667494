// Scores as unsigned keys in their order, for selection by digits, and what quartiles are made of, CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA::alias_keys {

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int kRanks = 4;  // items below and above each of the two quartiles

// Order-preserving; 16-bit floats go by their own bits.
template <typename Bits>
FASTKD_HOST_DEVICE Bits key_of(Bits bits) {
  constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  return bits & sign ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | sign);
}
template <typename Bits>
FASTKD_HOST_DEVICE Bits bits_of(Bits key) {
  constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  return key & sign ? static_cast<Bits>(key ^ sign) : static_cast<Bits>(~key);
}

// The digit of a pass, highest first: bits [shift, shift + bits) of the key.
struct Digit {
  int shift, bits;

  template <typename Bits>
  FASTKD_HOST_DEVICE unsigned of(Bits key) const {
    return static_cast<unsigned>(key >> shift) & ((1u << bits) - 1);
  }
  // Whether the digits before are those of the prefix.
  template <typename Bits>
  FASTKD_HOST_DEVICE bool follows(Bits key, Bits prefix) const {
    const int above = shift + bits;
    return above == 8 * static_cast<int>(sizeof(Bits)) || (key >> above) == (prefix >> above);
  }
};
FASTKD_HOST_DEVICE int pass_count(int key_bits) { return (key_bits + kDigitBits - 1) / kDigitBits; }
FASTKD_HOST_DEVICE Digit digit_of_pass(int key_bits, int pass) {
  const int left = key_bits - pass * kDigitBits, bits = left < kDigitBits ? left : kDigitBits;
  return {left - bits, bits};
}

// Where the first (1) or third (3) quartile lies among `count` sorted items.
FASTKD_HOST_DEVICE double position_of(int quarters, int64_t count) { return 0.25 * quarters * static_cast<double>(count - 1); }
FASTKD_HOST_DEVICE int64_t rank_of(int r, int64_t count) {
  const int64_t below = static_cast<int64_t>(position_of(r < 2 ? 1 : 3, count));
  return r % 2 == 0 ? below : (below + 1 < count ? below + 1 : count - 1);
}

// Linear interpolation, numpy's and torch's default. Three quarters of the distance as what is left after one: no fused
// multiply-add rounds otherwise than without.
FASTKD_HOST_DEVICE double interpolate(double below, double above, double position) {
  const double fraction = position - static_cast<double>(static_cast<int64_t>(position)), distance = above - below;
  const double quarter = 0.25 * distance;
  return below + (fraction > 0.5 ? distance - quarter : fraction * distance);
}

}  // namespace fastkd::FASTKD_ISA::alias_keys
