// The vector kernels of the alias table as the launcher sees them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastkd::alias {

// A view of scores [items] with the map from score to weight: t = (score - reference) * kappa, weight 2^(exponent + t).
struct Scores {
  Dtype dtype;
  const void* data;
  double reference;
  double kappa;
  int exponent;
  int largest_t;  // floor of the largest t, rounded to fixed point, among the scores: 0 in a build
};

struct Extent {
  double maximum;  // of the scores that are not NaN; -inf where there is none
  bool invalid;    // a NaN or +inf is among them
};

struct TableView {
  const uint64_t* table;         // [items] bins
  const uint64_t* block_weight;  // [blocks]
  const uint64_t* top;           // [blocks, 2]: threshold, alias
  int64_t items;
  int64_t blocks;
  uint64_t total;  // sum of block_weight
};

struct Kernels {
  Extent (*extent)(Dtype dtype, const void* data, int64_t begin, int64_t end);
  // sum over the items of floor(2^32 * 2^t) + 1, an upper bound of the partition function; at most 2^31 items
  uint64_t (*partition)(const Scores& scores, int64_t begin, int64_t end);
  // weights of items [begin, end) -> out; returns their sum
  uint64_t (*quantise)(const Scores& scores, int64_t begin, int64_t end, uint64_t* out);
  // fills the bins of one block of `count` items with the given weights of sum `capacity`; lists: 2 * (count + 2) words
  void (*pack)(const uint64_t* weights, int64_t count, uint64_t capacity, uint64_t* lists, uint64_t* bins);
  // item indices of draws first, first + stride, ... (count of them)
  void (*sample)(const TableView& view, uint64_t seed, uint64_t first, uint64_t stride, int64_t count, int64_t* out);
};

}  // namespace fastkd::alias

FASTKD_DECLARE_KERNELS(alias)
