// Exact quartiles of many scores by radix selection: no copy, no sort, any number of items, any number of threads.
//
// Scores map to unsigned keys in their order; each pass counts one digit of 11 bits of the keys that share the digits
// found so far. fp32 takes 3 streams over the data, fp64 6. Counts are integers: the same result for any threads.
#pragma once

#include <array>
#include <bit>
#include <cmath>

#include "alias/keys.h"
#include "common/tensor.h"

namespace fastkd::alias {

struct Quartiles {
  double lower;
  double upper;
};

namespace selection {

using namespace alias_keys;

inline double value_of(uint64_t bits, Dtype) { return std::bit_cast<double>(bits); }
inline double value_of(uint32_t bits, Dtype) { return std::bit_cast<float>(bits); }
inline double value_of(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(mantissa + 1024, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The keys of the given ranks (ascending) among the items with key >= lowest. `ranks` count from the first such item.
template <typename Bits>
std::array<Bits, kRanks> select(const Bits* data, int64_t items, std::array<int64_t, kRanks> ranks, Bits lowest) {
  constexpr int kBits = 8 * sizeof(Bits);
  constexpr int64_t kChunk = int64_t{1} << 18;
  const int64_t chunks = (items + kChunk - 1) / kChunk;
  std::array<Bits, kRanks> prefix{};
  for (int pass = 0; pass < pass_count(kBits); ++pass) {
    const Digit digit = digit_of_pass(kBits, pass);
    // one histogram for each different prefix
    std::array<size_t, kRanks> histogram_of{};
    std::array<Bits, kRanks> distinct{};
    size_t histograms = 0;
    for (size_t r = 0; r < kRanks; ++r) {
      if (r == 0 || prefix[r] != prefix[r - 1]) distinct[histograms++] = prefix[r];
      histogram_of[r] = histograms - 1;
    }
    std::vector<int64_t> counts(static_cast<size_t>(kDigits) * histograms, 0);
    std::vector<std::vector<int64_t>> partial(std::min<int64_t>(chunks, 64));
    const int64_t groups = static_cast<int64_t>(partial.size());
    parallel(groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        std::vector<int64_t>& local = partial[g];
        local.assign(counts.size(), 0);
        for (int64_t i = items * g / groups; i < items * (g + 1) / groups; ++i) {
          const Bits key = key_of(data[i]);
          for (size_t h = 0; h < histograms; ++h) {
            local[h * kDigits + digit.of(key)] += digit.follows(key, distinct[h]) && key >= lowest;
          }
        }
      }
    });
    for (const auto& local : partial) {
      for (size_t i = 0; i < local.size(); ++i) counts[i] += local[i];
    }
    for (size_t r = 0; r < kRanks; ++r) {
      const int64_t* count = counts.data() + histogram_of[r] * kDigits;
      int64_t found = 0;
      while (found + 1 < (int64_t{1} << digit.bits) && ranks[r] >= count[found]) ranks[r] -= count[found++];
      prefix[r] = static_cast<Bits>(prefix[r] | static_cast<Bits>(found) << digit.shift);
    }
  }
  return prefix;
}

// First and third quartile of the scores above -inf.
template <typename Bits>
Quartiles quartiles_of(Dtype dtype, const Bits* data, int64_t items, Bits minus_infinity) {
  const Bits lowest = static_cast<Bits>(key_of(minus_infinity) + 1);
  int64_t finite = 0;
  for (int64_t i = 0; i < items; ++i) finite += key_of(data[i]) >= lowest;
  std::array<int64_t, kRanks> ranks{};
  for (int r = 0; r < kRanks; ++r) ranks[r] = rank_of(r, finite);
  const std::array<Bits, kRanks> keys = select<Bits>(data, items, ranks, lowest);
  double value[kRanks];
  for (int r = 0; r < kRanks; ++r) value[r] = value_of(bits_of(keys[r]), dtype);
  return {interpolate(value[0], value[1], position_of(1, finite)), interpolate(value[2], value[3], position_of(3, finite))};
}

}  // namespace selection

// Quartiles of the scores that are not -inf (there is at least one, and no NaN).
inline Quartiles quartiles(Dtype dtype, const void* data, int64_t items) {
  using namespace selection;
  switch (dtype) {
    case Dtype::kFloat64: return quartiles_of<uint64_t>(dtype, static_cast<const uint64_t*>(data), items, 0xfff0000000000000ull);
    case Dtype::kBFloat16: return quartiles_of<uint16_t>(dtype, static_cast<const uint16_t*>(data), items, 0xff80);
    case Dtype::kFloat16: return quartiles_of<uint16_t>(dtype, static_cast<const uint16_t*>(data), items, 0xfc00);
    default: return quartiles_of<uint32_t>(dtype, static_cast<const uint32_t*>(data), items, 0xff800000u);
  }
}

}  // namespace fastkd::alias
