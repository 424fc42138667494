// Exact quartiles of many scores by radix selection: no copy, no sort, any number of items, any number of threads.
//
// Scores map to unsigned keys in their order; each pass counts one digit of 11 bits of the keys that share the digits
// found so far. fp32 takes 3 streams over the data, fp64 6. Counts are integers: the same result for any threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

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

constexpr int64_t kChunk = int64_t{1} << 18;  // items whose counts fit 32 bits, so that the histograms stay in the nearest cache
constexpr size_t kLanes = kRanks;             // histograms of a chunk

// The different prefixes of the keys that are looked for, which of them each rank has, and the keys that follow each: from
// `first`, `span` of them more.
template <typename Bits>
struct Prefixes {
  std::array<Bits, kRanks> distinct{};
  std::array<size_t, kRanks> of_rank{};
  size_t count = 0;
  std::array<Bits, kRanks> first{}, span{};

  Prefixes(const std::array<Bits, kRanks>& prefix, Digit digit, Bits lowest) {
    for (size_t r = 0; r < kRanks; ++r) {
      if (r == 0 || prefix[r] != prefix[r - 1]) distinct[count++] = prefix[r];
      of_rank[r] = count - 1;
      const Bits last = static_cast<Bits>(prefix[r] | ((uint64_t{2} << (digit.shift + digit.bits - 1)) - 1));
      first[r] = std::max(prefix[r], lowest);
      span[r] = static_cast<Bits>(last - first[r]);
    }
  }
};

// Adds the digits of a chunk's keys, from `lowest` on, to the histogram of the prefix that they follow.
template <typename Bits>
void count_digits(const Bits* data, int64_t items, Digit digit, const Prefixes<Bits>& prefixes, Bits lowest, bool first,
                  int64_t* counts) {
  alignas(64) uint32_t local[kLanes * kDigits] = {};
  if (first) {
    // every key counts, and many have the same digit: an addition that waits for the one before takes turns among lanes
    for (int64_t i = 0; i < items; ++i) {
      const Bits key = key_of(data[i]);
      local[(i % kLanes) * kDigits + digit.of(key)] += key >= lowest;
    }
  } else {
    // few keys follow: they are found in vectors, put together without a branch that would be mispredicted, then counted
    constexpr int64_t kGathered = 1024;
    Bits keys[kGathered], follows[kGathered];
    for (int64_t begin = 0; begin < items; begin += kGathered) {
      const int64_t count = std::min(kGathered, items - begin);
      for (int64_t i = 0; i < count; ++i) {
        const Bits key = keys[i] = key_of(data[begin + i]);
        Bits any = 0;
        for (size_t r = 0; r < kRanks; ++r) any |= static_cast<Bits>(key - prefixes.first[r]) <= prefixes.span[r];
        follows[i] = any;
      }
      int64_t found = 0;
      for (int64_t i = 0; i < count; ++i) {
        keys[found] = keys[i];
        found += follows[i];
      }
      for (int64_t i = 0; i < found; ++i) {
        for (size_t h = 0; h < prefixes.count; ++h) {
          local[h * kDigits + digit.of(keys[i])] += digit.follows(keys[i], prefixes.distinct[h]);
        }
      }
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    int64_t* of_prefix = counts + (first ? 0 : lane * kDigits);
    for (size_t d = 0; d < kDigits; ++d) of_prefix[d] += local[lane * kDigits + d];
  }
}

// The keys at the given ranks among the items with key >= lowest; `ranks_of` their number, ascending.
template <typename Bits, typename Ranks>
std::array<Bits, kRanks> select(const Bits* data, int64_t items, Bits lowest, Ranks&& ranks_of) {
  constexpr int kBits = 8 * sizeof(Bits);
  const int64_t chunks = (items + kChunk - 1) / kChunk, groups = std::min<int64_t>(chunks, 64);
  std::array<Bits, kRanks> prefix{};
  std::array<int64_t, kRanks> ranks{};
  for (int pass = 0; pass < pass_count(kBits); ++pass) {
    const Digit digit = digit_of_pass(kBits, pass);
    const Prefixes<Bits> prefixes(prefix, digit, lowest);
    std::vector<std::vector<int64_t>> partial(groups);
    parallel(groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        partial[g].assign(kLanes * kDigits, 0);
        for (int64_t c = chunks * g / groups; c < chunks * (g + 1) / groups; ++c) {
          const int64_t at = c * kChunk;
          count_digits(data + at, std::min(kChunk, items - at), digit, prefixes, lowest, pass == 0, partial[g].data());
        }
      }
    });
    std::vector<int64_t> counts(kLanes * kDigits, 0);
    for (const auto& of_group : partial) {
      for (size_t i = 0; i < of_group.size(); ++i) counts[i] += of_group[i];
    }
    if (pass == 0) ranks = ranks_of(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    for (size_t r = 0; r < kRanks; ++r) {
      const int64_t* count = counts.data() + prefixes.of_rank[r] * kDigits;
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
  const std::array<Bits, kRanks> keys = select(data, items, lowest, [&](int64_t count) {
    finite = count;
    std::array<int64_t, kRanks> ranks{};
    for (int r = 0; r < kRanks; ++r) ranks[r] = rank_of(r, count);
    return ranks;
  });
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
