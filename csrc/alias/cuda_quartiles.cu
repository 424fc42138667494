// Lambda from the quartiles of the scores on the GPU: radix selection (quantile.h), without a copy or a sort.
//
// Each pass counts a digit of 11 bits of the keys that share the digits found so far: in shared memory for each block of
// threads, equal digits of a warp as one (scores share their leading bits), then in global memory. After each pass one block
// of threads finds the digits of the four ranks. fp32 takes 3 passes over the scores, fp64 6, 16 bits 2.
#include <cmath>

#include "alias/cuda_scores.cuh"
#include "alias/keys.h"
#include "alias/operator.h"
#include "common/bits.h"
#include "common/scan.cuh"
#include "common/tuning.h"

namespace fastkd::alias {
namespace {

using namespace alias_keys;

constexpr unsigned kFindThreads = 512;
constexpr int kDigitsEach = kDigits / kFindThreads;

// What is known between two passes.
struct Selection {
  uint64_t prefix[kRanks];     // of the key of each rank
  int64_t rank[kRanks];        // among those that share the prefix
  uint64_t distinct[kRanks];   // different prefixes
  uint32_t histogram[kRanks];  // which of them is a rank's
  uint32_t histograms;
  uint32_t invalid;  // a NaN or +inf is among the scores
  int64_t finite;    // scores above -inf
};

struct QuartileParams {
  const void* scores;
  int64_t items;
  double log_ratio;  // ln IQPR
  Selection* selection;
  uint64_t* counts;  // [passes, kRanks, kDigits]
  int64_t count_words;
  int pass;
  double* lambda;
};

template <typename T>
FASTKD_DEVICE auto raw_bits(T element) {
  if constexpr (sizeof(T) == 2) {
    return element.bits;
  } else {
    return bits_as<std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>>(element);
  }
}
template <typename T, typename Bits>
FASTKD_DEVICE double value_of(Bits bits) {
  return static_cast<double>(to_compute(bits_as<T>(bits)));
}

FASTKD_KERNEL(kThreads) clear_counts_kernel(const QuartileParams p) {
  const int64_t first = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  for (int64_t i = first; i < p.count_words; i += static_cast<int64_t>(block_count()) * kThreads) p.counts[i] = 0;
  if (first == 0) *p.selection = {{}, {}, {}, {}, 1, 0, 0};
}

// inspect: streaming count_digits_kernel<*> loads=128
template <typename T>
FASTKD_KERNEL(kThreads)
count_digits_kernel(const QuartileParams p) {
  using Bits = decltype(raw_bits(T{}));
  const Digit digit = digit_of_pass(8 * sizeof(Bits), p.pass);
  const Bits lowest = static_cast<Bits>(key_of(raw_bits(device::lowest(T{}))) + 1);
  const unsigned histograms = p.selection->histograms, words = histograms * kDigits;
  Bits distinct[kRanks];
#pragma unroll
  for (int h = 0; h < kRanks; ++h) distinct[h] = static_cast<Bits>(p.selection->distinct[h]);
  const Shared<uint32_t> count(0, words);
  for (unsigned i = thread_index(); i < words; i += kThreads) count.store(i, 0);
  block_barrier();
  bool invalid = false;
  each_element(static_cast<const T*>(p.scores), p.items, [&](T element) {
    invalid = invalid || !(to_compute(element) < kInfinity<Compute<T>>);
    const Bits key = key_of(raw_bits(element));
    const unsigned own = digit.of(key);
#pragma unroll
    for (int h = 0; h < kRanks; ++h) {
      if (static_cast<unsigned>(h) >= histograms) break;
      const bool counts = key >= lowest && digit.follows(key, distinct[h]);
      const unsigned lanes = ballot(counts);
      if (lanes == 0) continue;
      const unsigned leader = lowest_bit(lanes), common = shuffle(own, leader);
      const unsigned equal = ballot(counts && own == common);
      if (lane_index() == leader) {
        count.atomic_add(h * kDigits + common, bit_count(equal));
      } else if (counts && own != common) {
        count.atomic_add(h * kDigits + own, 1);
      }
    }
  });
  if (invalid) p.selection->invalid = 1;
  block_barrier();
  uint64_t* const total = p.counts + int64_t{p.pass} * kRanks * kDigits;
  for (unsigned i = thread_index(); i < words; i += kThreads) {
    const uint32_t n = count.load(i);
    if (n > 0) atomic_add(total + i, uint64_t{n});
  }
}

template <typename T>
FASTKD_KERNEL(kFindThreads)
find_digits_kernel(const QuartileParams p) {
  using Bits = decltype(raw_bits(T{}));
  constexpr int kBits = 8 * sizeof(Bits);
  const Digit digit = digit_of_pass(kBits, p.pass);
  Selection& selection = *p.selection;
  const unsigned found_offset = 2 * scan_bytes(kFindThreads, 1);
  const Shared<uint64_t> found(found_offset, 2 * kRanks);  // digit and rank among those that share it
  const uint64_t* const counts = p.counts + int64_t{p.pass} * kRanks * kDigits;
  int64_t finite = selection.finite;
#pragma unroll 1
  for (int r = 0; r < kRanks; ++r) {
    const uint64_t* const own = counts + selection.histogram[r] * kDigits + thread_index() * kDigitsEach;
    uint64_t before[1] = {0}, total[1];
    for (int k = 0; k < kDigitsEach; ++k) before[0] += own[k];
    block_scan(before, total, r % 2 * scan_bytes(kFindThreads, 1));
    if (p.pass == 0) finite = static_cast<int64_t>(total[0]);
    uint64_t rank = static_cast<uint64_t>(p.pass == 0 ? rank_of(r, finite) : selection.rank[r]), start = before[0];
    if (total[0] == 0 && thread_index() == 0) {
      found.store(2 * r, 0);
      found.store(2 * r + 1, 0);
    }
    for (int k = 0; k < kDigitsEach; ++k) {
      if (rank >= start && rank < start + own[k]) {
        found.store(2 * r, thread_index() * kDigitsEach + k);
        found.store(2 * r + 1, rank - start);
      }
      start += own[k];
    }
  }
  block_barrier();
  if (thread_index() != 0) return;
  selection.finite = finite;
  selection.histograms = 0;
  for (int r = 0; r < kRanks; ++r) {
    selection.prefix[r] |= found.load(2 * r) << digit.shift;
    selection.rank[r] = static_cast<int64_t>(found.load(2 * r + 1));
    if (r == 0 || selection.prefix[r] != selection.prefix[r - 1])
      selection.distinct[selection.histograms++] = selection.prefix[r];
    selection.histogram[r] = selection.histograms - 1;
  }
  if (p.pass + 1 < pass_count(kBits)) return;
  double value[kRanks];
  for (int r = 0; r < kRanks; ++r) value[r] = value_of<T>(bits_of(static_cast<Bits>(selection.prefix[r])));
  const double lower = interpolate(value[0], value[1], position_of(1, finite));
  const double range = interpolate(value[2], value[3], position_of(3, finite)) - lower;
  const bool valid = selection.invalid == 0 && finite > 0;
  *p.lambda = !valid ? static_cast<double>(__builtin_nan("")) : range > 0 ? p.log_ratio / range : 0.0;
}

Tensor inverse_temperature(Tensor scores, double iqpr, std::optional<Tensor> numbers) {
  take_numbers(numbers, iqpr);
  check_quartiles(scores, iqpr);
  const DeviceContext context(scores);
  const Dtype dtype = kernel_dtype(scores);
  const int element_size = static_cast<int>(scores.element_size()), passes = pass_count(8 * element_size);
  const int64_t words = int64_t{passes} * kRanks * kDigits;
  Tensor out = context.empty({}, ScalarType::Double), counts = context.empty({words}, ScalarType::Long);
  Tensor selection = context.empty({static_cast<int64_t>(sizeof(Selection))}, ScalarType::Byte);
  QuartileParams params{scores.const_data_ptr(),
                        scores.size(0),
                        std::log(iqpr),
                        static_cast<Selection*>(selection.mutable_data_ptr()),
                        static_cast<uint64_t*>(counts.mutable_data_ptr()),
                        words,
                        0,
                        static_cast<double*>(out.mutable_data_ptr())};
  context.launch("alias quartiles clear", clear_counts_kernel, {grid_size(words, 4), kThreads}, params);
  const unsigned most = static_cast<unsigned>(tuned(Knob::kAliasQuartileBlocks)) * context.limits().multiprocessors;
  const unsigned blocks = grid_size(params.items, kAhead * 16 / element_size, most);
  const auto count = for_dtype(dtype, []<typename T>() { return &count_digits_kernel<T>; });
  const auto find = for_dtype(dtype, []<typename T>() { return &find_digits_kernel<T>; });
  for (; params.pass < passes; ++params.pass) {
    const unsigned histograms = params.pass == 0 ? 1 : kRanks;
    context.launch("alias quartiles count", count, {blocks, kThreads, 1, std::size_t{histograms} * kDigits * 4}, params);
    context.launch("alias quartiles find", find, {1, kFindThreads, 1, 2 * scan_bytes(kFindThreads, 1) + 2 * kRanks * 8}, params);
  }
  return out;
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("alias_inverse_temperature", TORCH_BOX(&inverse_temperature)); }

}  // namespace fastkd::alias
