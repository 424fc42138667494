// The alias table on the CPU: checks, threads, the top table, updates.
#include "alias/kernel.h"
#include "alias/operator.h"
#include "alias/quantile.h"
#include "common/tensor.h"

#include <algorithm>
#include <cmath>

namespace fastkd::alias {
namespace {

using namespace alias_math;

constexpr int64_t kGrainItems = 1 << 14;
constexpr int64_t kGrainBlocks = 4;

uint64_t sum_of_weights(const Table& t) {
  uint64_t sum = 0;
  for (int64_t b = 0; b < t.blocks; ++b) sum += t.block_weight[b];
  return sum;
}

// Largest score; throws for NaN and +inf.
double checked_maximum(const char* name, Dtype dtype, const void* data, int64_t items) {
  const Kernels& k = kernels();
  const int64_t chunks = (items + kGrainItems - 1) / kGrainItems;
  std::vector<Extent> extents(chunks);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      extents[c] = k.extent(dtype, data, c * kGrainItems, std::min(items, (c + 1) * kGrainItems));
    }
  });
  double maximum = -std::numeric_limits<double>::infinity();
  for (const Extent& extent : extents) {
    FASTKD_CHECK(!extent.invalid, name, " holds NaN or +inf, must be finite, or -inf for items that are never drawn");
    maximum = std::max(maximum, extent.maximum);
  }
  return maximum;
}

double checked_inverse_temperature(const Tensor& t) {
  const double value = *static_cast<const double*>(t.const_data_ptr());
  FASTKD_CHECK(value >= 0 && value <= std::numeric_limits<double>::max(), "inverse_temperature is ", value,
               ", must be finite and at least 0");
  return value;
}

// The same packing one level up, over blocks; 128-bit products, since a block may hold all of 2^52.
void pack_top(const Table& t) {
  const uint64_t total = sum_of_weights(t);
  const uint128 n = static_cast<uint128>(t.blocks);
  std::vector<int64_t> light, heavy;
  for (int64_t b = 0; b < t.blocks; ++b) (t.block_weight[b] * n > total ? heavy : light).push_back(b);
  const auto close = [&](int64_t bin, uint128 threshold, int64_t alias) {
    t.top[2 * bin] = static_cast<uint64_t>(threshold);
    t.top[2 * bin + 1] = static_cast<uint64_t>(alias);
  };
  size_t l = 0, h = 0;
  uint128 rest = heavy.empty() ? 0 : t.block_weight[heavy[0]] * n;
  while (h < heavy.size()) {
    if (rest > total && l < light.size()) {
      close(light[l], t.block_weight[light[l]] * n, heavy[h]);
      rest -= total - t.block_weight[light[l++]] * n;
    } else {
      const bool last = h + 1 == heavy.size();
      close(heavy[h], rest, last ? heavy[h] : heavy[h + 1]);
      if (!last) rest = rest + t.block_weight[heavy[h + 1]] * n - total;
      ++h;
    }
  }
  for (; l < light.size(); ++l) close(light[l], t.block_weight[light[l]] * n, light[l]);
}

// Weights of one block from its bins: what the item keeps plus what others hand to it, over the block's size. Exact.
// A table that somebody tampered with gives other weights, never an access outside the block.
void unpack(const Table& t, int64_t block, uint64_t* weights) {
  const int64_t n = block_items(t.items, block);
  const uint64_t* bins = t.bins + block * kBlockSize;
  std::fill(weights, weights + n, uint64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t alias = alias_of(bins[i]);
    weights[i] += threshold_of(bins[i]);
    weights[alias < static_cast<uint64_t>(n) ? alias : i] += t.block_weight[block] - threshold_of(bins[i]);
  }
  for (int64_t i = 0; i < n; ++i) weights[i] /= static_cast<uint64_t>(n);
}

void pack(const Table& t, int64_t block, const uint64_t* weights, uint64_t capacity, uint64_t* lists) {
  t.block_weight[block] = capacity;
  kernels().pack(weights, block_items(t.items, block), capacity, lists, t.bins + block * kBlockSize);
}

constexpr int64_t kListWords = 2 * (kBlockSize + 2);

Tensor inverse_temperature(Tensor scores, double iqpr, std::optional<Tensor> numbers) {
  take_numbers(numbers, iqpr);
  check_quartiles(scores, iqpr);
  const Dtype dtype = kernel_dtype(scores);
  const double maximum = checked_maximum("scores", dtype, scores.const_data_ptr(), scores.size(0));
  FASTKD_CHECK(maximum > -std::numeric_limits<double>::infinity(), "scores are all -inf, must hold at least one finite score");
  const Quartiles q = quartiles(dtype, scores.const_data_ptr(), scores.size(0));
  Tensor out = empty_cpu({}, ScalarType::Double);
  const double range = q.upper - q.lower;
  const double lambda = range > 0 ? std::log(iqpr) / range : 0.0;
  FASTKD_CHECK(lambda * kLog2E <= std::numeric_limits<double>::max(), "scores have quartiles ", range,
               " apart, too close for iqpr ", iqpr);
  *static_cast<double*>(out.mutable_data_ptr()) = lambda;
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> build(Tensor scores, Tensor inverse_temperature) {
  check_build(scores, inverse_temperature);
  const int64_t items = scores.size(0), blocks = block_count(items);
  const double lambda = checked_inverse_temperature(inverse_temperature);
  Scores view{kernel_dtype(scores), scores.const_data_ptr(), 0, lambda * kLog2E, 0, 0};
  FASTKD_CHECK(view.kappa <= std::numeric_limits<double>::max(), "inverse_temperature is ", lambda, ", too large");
  view.reference = checked_maximum("scores", view.dtype, view.data, items) + 0.0;  // no -0
  FASTKD_CHECK(view.reference > -std::numeric_limits<double>::infinity(),
               "scores are all -inf, must hold at least one finite score");

  Tensor table = empty_cpu({items}, ScalarType::Long), weights = empty_cpu({blocks}, ScalarType::Long);
  Tensor top = empty_cpu({blocks, 2}, ScalarType::Long), scale = empty_cpu({4}, ScalarType::Double);
  const Table t(table, weights, &top, &scale);
  const Kernels& k = kernels();

  // partition function in units of 2^-32, rounded up: integers, so any order gives the same sum
  parallel(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      t.block_weight[b] = k.partition(view, b * kBlockSize, b * kBlockSize + block_items(items, b));
    }
  });
  uint128 partition = 0;
  for (int64_t b = 0; b < blocks; ++b) partition += t.block_weight[b];
  view.exponent = exponent_of(partition);

  parallel(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    uint64_t* const block = scratch<uint64_t>(kBlockSize + kListWords);
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t capacity = k.quantise(view, b * kBlockSize, b * kBlockSize + block_items(items, b), block);
      pack(t, b, block, capacity, block + kBlockSize);
    }
  });
  pack_top(t);
  t.scale[0] = view.reference;
  t.scale[1] = view.kappa;
  t.scale[2] = view.exponent;
  t.scale[3] = static_cast<double>(sum_of_weights(t));
  return {table, weights, top, scale};
}

// Divides every weight by 2^shift (rounded) and packs all blocks anew.
void rescale(const Table& t, int shift) {
  parallel(t.blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    uint64_t* const block = scratch<uint64_t>(kBlockSize + kListWords);
    for (int64_t b = begin; b < end; ++b) {
      unpack(t, b, block);
      uint64_t capacity = 0;
      for (int64_t i = 0; i < block_items(t.items, b); ++i) capacity += block[i] = shifted(block[i], shift);
      pack(t, b, block, capacity, block + kBlockSize);
    }
  });
}

// New scores for some items, ordered by block.
class Changes {
 public:
  Changes(const Table& t, const int64_t* index, int64_t count) : table_(t), index_(index), order_(count), weight_(count) {
    for (int64_t i = 0; i < count; ++i) order_[i] = i;
    // of equal indices the last given comes last, and stays
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || block_of(i) != block_of(i - 1)) first_.push_back(i);
    }
    first_.push_back(count);
  }

  // The new weights of every item under `scores`, in the order given. Returns their sum.
  uint128 quantise(const Scores& scores) {
    uint128 sum = 0;
    const int64_t count = static_cast<int64_t>(weight_.size());
    for (int64_t i = 0; i < count; i += kBlockSize) {  // each sum of 4096 weights below 2^51 fits a word
      sum += kernels().quantise(scores, i, std::min(count, i + kBlockSize), weight_.data() + i);
    }
    return sum;
  }

  // visit(block, weights, their sum) for each touched block, the other weights of it divided by 2^shift.
  template <typename Visit>
  void for_each_block(int shift, const Visit& visit) const {
    parallel(static_cast<int64_t>(first_.size()) - 1, kGrainBlocks, [&](int64_t begin, int64_t end) {
      uint64_t* const weights = scratch<uint64_t>(kBlockSize + kListWords);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t block = block_of(first_[g]);
        unpack(table_, block, weights);
        uint64_t sum = 0;
        for (int64_t i = 0; i < block_items(table_.items, block); ++i) weights[i] = shifted(weights[i], shift);
        for (int64_t i = first_[g]; i < first_[g + 1]; ++i) weights[index_[order_[i]] % kBlockSize] = weight_[order_[i]];
        for (int64_t i = 0; i < block_items(table_.items, block); ++i) sum += weights[i];
        visit(block, weights, sum);
      }
    });
  }

  // Whether any item has a positive weight after the changes and a division of the other weights by 2^shift.
  bool leave_any(int shift) const {
    std::vector<uint64_t> sums(table_.block_weight, table_.block_weight + table_.blocks);
    for_each_block(shift, [&](int64_t block, uint64_t*, uint64_t sum) { sums[block] = sum; });
    uint64_t largest = 0;
    for (uint64_t sum : sums) largest = std::max(largest, sum);
    if (shift == 0 || largest == 0) return largest > 0;
    // a block that was not touched may round to nothing
    std::vector<uint64_t> weights(kBlockSize);
    for (int64_t b = 0, g = 0; b < table_.blocks; ++b) {
      const bool touched = g + 1 < static_cast<int64_t>(first_.size()) && block_of(first_[g]) == b;
      g += touched;
      if (touched && sums[b] > 0) return true;
      if (touched || sums[b] == 0) continue;
      unpack(table_, b, weights.data());
      for (int64_t i = 0; i < block_items(table_.items, b); ++i) {
        if (shifted(weights[i], shift) > 0) return true;
      }
    }
    return false;
  }

 private:
  int64_t block_of(int64_t position) const { return index_[order_[position]] / kBlockSize; }

  const Table& table_;
  const int64_t* index_;
  std::vector<int64_t> order_;    // positions of the changes by item
  std::vector<int64_t> first_;    // positions in order_ where a block begins
  std::vector<uint64_t> weight_;  // new weights, as given
};

void update_(Tensor table, Tensor block_weight, Tensor top, Tensor scale, Tensor indices, Tensor scores) {
  const Table t(table, block_weight, &top, &scale);
  check_changes(table, indices, scores);
  const int64_t count = indices.size(0);
  if (count == 0) return;
  const int64_t* const index = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    FASTKD_CHECK(index[i] >= 0 && index[i] < t.items, "indices[", i, "] is ", index[i], ", must be in [0, ", t.items, ")");
  }
  FASTKD_CHECK(is_scale(t.scale), "scale is not that of a table from alias_build");
  Scores view{kernel_dtype(scores), scores.const_data_ptr(), t.scale[0], t.scale[1], static_cast<int>(t.scale[2]), 0};
  const double maximum = checked_maximum("scores", view.dtype, view.data, count);
  const double largest_t = largest_t_of(maximum, view.reference, view.kappa);
  FASTKD_CHECK(largest_t < kLargestT, "scores hold ", maximum, ", too far above ", view.reference,
               ", the largest score of the build, for this inverse temperature; build a new table");
  view.largest_t = whole_t(largest_t);

  Changes changes(t, index, count);
  const int exponent = view.exponent, least = least_shift(exponent, view.largest_t);
  view.exponent = exponent - least;
  const int shift = shift_for(least, changes.quantise(view), count, sum_of_weights(t), t.items);
  if (shift > least) {
    view.exponent = exponent - shift;
    changes.quantise(view);
  }
  FASTKD_CHECK(changes.leave_any(shift), "scores would leave no item with a positive weight");  // before anything is written

  if (shift > 0) rescale(t, shift);
  changes.for_each_block(
      0, [&](int64_t block, uint64_t* weights, uint64_t sum) { pack(t, block, weights, sum, weights + kBlockSize); });
  pack_top(t);
  t.scale[2] = view.exponent;
  t.scale[3] = static_cast<double>(sum_of_weights(t));
}

Tensor sample(Tensor table, Tensor block_weight, Tensor top, Tensor scale, Tensor stream, int64_t count, int64_t offset,
              int64_t stride) {
  const Table t(table, block_weight, &top, &scale);
  const int64_t* const state = check_stream(table, stream);
  check_draws(count, stride);
  const uint64_t total = check_total("scale", t.scale[3]);
  const uint64_t seed = static_cast<uint64_t>(state[0]), first = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(offset);
  Tensor out = empty_cpu({count}, ScalarType::Long);
  TableView view = t.view();
  view.total = total;
  int64_t* const indices = static_cast<int64_t*>(out.mutable_data_ptr());
  const Kernels& k = kernels();
  parallel(count, 4096, [&](int64_t begin, int64_t end) {
    const uint64_t at = first + static_cast<uint64_t>(begin) * static_cast<uint64_t>(stride);
    k.sample(view, seed, at, static_cast<uint64_t>(stride), end - begin, indices + begin);
  });
  return out;
}

Tensor weights(Tensor table, Tensor block_weight) {
  const Table t(table, block_weight);
  Tensor out = empty_cpu({t.items}, ScalarType::Long);
  uint64_t* const data = static_cast<uint64_t*>(out.mutable_data_ptr());
  parallel(t.blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) unpack(t, b, data + b * kBlockSize);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("alias_inverse_temperature", FASTKD_CPU_BOX(inverse_temperature));
  m.impl("alias_build", FASTKD_CPU_BOX(build));
  m.impl("alias_update_", FASTKD_CPU_BOX(update_));
  m.impl("alias_sample", FASTKD_CPU_BOX(sample));
  m.impl("alias_weights", FASTKD_CPU_BOX(weights));
}

}  // namespace fastkd::alias
