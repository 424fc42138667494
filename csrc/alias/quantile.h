// Exact quartiles of many scores by radix selection: no copy, no sort, any number of items, any number of threads.
//
// Scores map to unsigned keys in their order; each pass counts one digit of 11 bits of the keys that share the digits
// found so far. fp32 takes 3 streams over the data, fp64 6. Counts are integers: the same result for any threads.
#pragma once

#include <array>
#include <bit>
#include <cmath>

#include "common/tensor.h"

namespace fastkd::alias {

struct Quartiles {
  double lower;
  double upper;
};

namespace selection {

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// Order-preserving keys; 16-bit floats go by their own bits.
template <typename Bits>
Bits key_of(Bits bits) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  return bits & sign ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | sign);
}
template <typename Bits>
Bits bits_of(Bits key) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  return key & sign ? static_cast<Bits>(key ^ sign) : static_cast<Bits>(~key);
}

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
template <typename Bits, size_t R>
std::array<Bits, R> select(const Bits* data, int64_t items, std::array<int64_t, R> ranks, Bits lowest) {
  constexpr int kBits = 8 * sizeof(Bits);
  constexpr int64_t kChunk = int64_t{1} << 18;
  const int64_t chunks = (items + kChunk - 1) / kChunk;
  std::array<Bits, R> prefix{};
  for (int shift = kBits; shift > 0;) {
    const int digit_bits = std::min(kDigitBits, shift);
    const int above = shift;  // bits above are fixed by now
    shift -= digit_bits;
    // one histogram for each different prefix
    std::array<size_t, R> histogram_of{};
    size_t histograms = 0;
    for (size_t r = 0; r < R; ++r) histogram_of[r] = r > 0 && prefix[r] == prefix[r - 1] ? histograms - 1 : histograms++;
    std::vector<int64_t> counts(static_cast<size_t>(kDigits) * histograms, 0);
    std::vector<std::vector<int64_t>> partial(std::min<int64_t>(chunks, 64));
    const int64_t groups = static_cast<int64_t>(partial.size());
    parallel(groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        std::vector<int64_t>& local = partial[g];
        local.assign(counts.size(), 0);
        for (int64_t i = items * g / groups; i < items * (g + 1) / groups; ++i) {
          const Bits key = key_of(data[i]);
          const size_t digit = static_cast<size_t>(key >> shift) & (kDigits - 1);
          for (size_t r = 0, h = 0; h < histograms; ++r) {
            if (r > 0 && histogram_of[r] == histogram_of[r - 1]) continue;
            const bool same = above == kBits || (key >> (above % kBits)) == (prefix[r] >> (above % kBits));
            local[h * kDigits + (digit & ((size_t{1} << digit_bits) - 1))] += same && key >= lowest;
            ++h;
          }
        }
      }
    });
    for (const auto& local : partial) {
      for (size_t i = 0; i < local.size(); ++i) counts[i] += local[i];
    }
    for (size_t r = 0; r < R; ++r) {
      const int64_t* count = counts.data() + histogram_of[r] * kDigits;
      int64_t digit = 0;
      while (digit + 1 < (int64_t{1} << digit_bits) && ranks[r] >= count[digit]) ranks[r] -= count[digit++];
      prefix[r] = static_cast<Bits>(prefix[r] | static_cast<Bits>(digit) << shift);
    }
  }
  return prefix;
}

// First and third quartile with linear interpolation (numpy's and torch's default) of the scores above -inf.
template <typename Bits>
Quartiles quartiles_of(Dtype dtype, const Bits* data, int64_t items, Bits minus_infinity) {
  const Bits lowest = static_cast<Bits>(key_of(minus_infinity) + 1);
  int64_t finite = 0;
  for (int64_t i = 0; i < items; ++i) finite += key_of(data[i]) >= lowest;
  const double positions[2] = {0.25 * static_cast<double>(finite - 1), 0.75 * static_cast<double>(finite - 1)};
  std::array<int64_t, 4> ranks{};
  for (int q = 0; q < 2; ++q) {
    ranks[2 * q] = static_cast<int64_t>(positions[q]);
    ranks[2 * q + 1] = std::min(ranks[2 * q] + 1, finite - 1);
  }
  const std::array<Bits, 4> keys = select<Bits, 4>(data, items, ranks, lowest);
  double quartile[2];
  for (int q = 0; q < 2; ++q) {
    const double below = value_of(bits_of(keys[2 * q]), dtype), above = value_of(bits_of(keys[2 * q + 1]), dtype);
    const double fraction = positions[q] - std::floor(positions[q]);
    quartile[q] = below + fraction * (above - below);
  }
  return {quartile[0], quartile[1]};
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
