// The alias table on the CPU: checks, threads, the top table, updates.
#include "alias/kernel.h"
#include "alias/math.h"
#include "alias/quantile.h"
#include "common/tensor.h"

#include <algorithm>
#include <cmath>

namespace fastkd::alias {
namespace {

using namespace alias_math;
using uint128 = unsigned __int128;

constexpr int64_t kGrainItems = 1 << 14;
constexpr int64_t kGrainBlocks = 4;

// The tensors of a table, checked, with their data.
struct Table {
  int64_t items;
  int64_t blocks;
  uint64_t* bins;
  uint64_t* block_weight;
  uint64_t* top;

  Table(const Tensor& table, const Tensor& weights, const Tensor* top_tensor) {
    check_dtype("table", table, {ScalarType::Long});
    check_dim("table", table, 1);
    items = table.size(0);
    FASTKD_CHECK(items > 0, "table has shape ", shape_of(table), ", must hold at least one item");
    blocks = block_count(items);
    check_dtype("block_weight", weights, {ScalarType::Long});
    check_shape("block_weight", weights, {blocks});
    FASTKD_CHECK(table.is_contiguous() && weights.is_contiguous(), "table and block_weight must be contiguous");
    bins = static_cast<uint64_t*>(table.mutable_data_ptr());
    block_weight = static_cast<uint64_t*>(weights.mutable_data_ptr());
    top = nullptr;
    if (top_tensor != nullptr) {
      check_dtype("top", *top_tensor, {ScalarType::Long});
      check_shape("top", *top_tensor, {blocks, 2});
      FASTKD_CHECK(top_tensor->is_contiguous(), "top must be contiguous");
      top = static_cast<uint64_t*>(top_tensor->mutable_data_ptr());
    }
  }

  uint64_t total() const {
    uint64_t sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += block_weight[b];
    return sum;
  }
};

void check_scores(const char* name, const Tensor& scores) {
  check_dtype(name, scores, kFloats);
  check_dim(name, scores, 1);
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
  check_dtype("inverse_temperature", t, {ScalarType::Double});
  FASTKD_CHECK(t.numel() == 1, "inverse_temperature has shape ", shape_of(t), ", must be a single number");
  const double value = *static_cast<const double*>(t.const_data_ptr());
  FASTKD_CHECK(value >= 0 && value <= std::numeric_limits<double>::max(), "inverse_temperature is ", value,
               ", must be finite and at least 0");
  return value;
}

// The same packing one level up, over blocks; 128-bit products, since a block may hold all of 2^52.
void pack_top(const Table& t) {
  const uint64_t total = t.total();
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

Tensor inverse_temperature(Tensor scores, double iqpr) {
  check_scores("scores", scores);
  FASTKD_CHECK(iqpr >= 1 && iqpr <= std::numeric_limits<double>::max(), "iqpr is ", iqpr, ", must be finite and at least 1");
  FASTKD_CHECK(scores.size(0) > 0, "scores has shape ", shape_of(scores), ", must hold at least one item");
  scores = torch::stable::contiguous(scores);
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
  check_scores("scores", scores);
  const int64_t items = scores.size(0), blocks = block_count(items);
  FASTKD_CHECK(items > 0, "scores has shape ", shape_of(scores), ", must hold at least one item");
  const double lambda = checked_inverse_temperature(inverse_temperature);
  scores = torch::stable::contiguous(scores);
  Scores view{kernel_dtype(scores), scores.const_data_ptr(), 0, lambda * kLog2E, 0, 0};
  FASTKD_CHECK(view.kappa <= std::numeric_limits<double>::max(), "inverse_temperature is ", lambda, ", too large");
  view.reference = checked_maximum("scores", view.dtype, view.data, items);
  FASTKD_CHECK(view.reference > -std::numeric_limits<double>::infinity(),
               "scores are all -inf, must hold at least one finite score");

  Tensor table = empty_cpu({items}, ScalarType::Long), weights = empty_cpu({blocks}, ScalarType::Long);
  Tensor top = empty_cpu({blocks, 2}, ScalarType::Long), scale = empty_cpu({4}, ScalarType::Double);
  const Table t(table, weights, &top);
  const Kernels& k = kernels();

  // partition function in units of 2^-32, rounded up: integers, so any order gives the same sum
  parallel(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      t.block_weight[b] = k.partition(view, b * kBlockSize, b * kBlockSize + block_items(items, b));
    }
  });
  uint128 partition = 0;
  for (int64_t b = 0; b < blocks; ++b) partition += t.block_weight[b];
  int bits = 0;  // 2^bits >= partition / 2^32
  while ((uint128{1} << (32 + bits)) < partition) ++bits;
  view.exponent = kTotalBits - 1 - bits;

  parallel(blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    uint64_t* const block = scratch<uint64_t>(kBlockSize + kListWords);
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t capacity = k.quantise(view, b * kBlockSize, b * kBlockSize + block_items(items, b), block);
      pack(t, b, block, capacity, block + kBlockSize);
    }
  });
  pack_top(t);
  double* const s = static_cast<double*>(scale.mutable_data_ptr());
  s[0] = view.reference;
  s[1] = view.kappa;
  s[2] = view.exponent;
  s[3] = static_cast<double>(t.total());
  return {table, weights, top, scale};
}

uint64_t shifted(uint64_t weight, int shift) {
  return shift == 0 ? weight : shift > 63 ? 0 : (weight + (uint64_t{1} << (shift - 1))) >> shift;
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

  // The new weights of every item under `scores`, in the order given.
  void quantise(const Scores& scores) { kernels().quantise(scores, 0, static_cast<int64_t>(weight_.size()), weight_.data()); }

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

  // An upper bound of the table's total weight after the changes and a division of all other weights by 2^shift.
  uint128 total(int shift) const {
    std::vector<uint64_t> sums(table_.block_weight, table_.block_weight + table_.blocks);
    for (int64_t b = 0; b < table_.blocks; ++b) {
      if (shift > 0) sums[b] = shifted(sums[b], shift) + static_cast<uint64_t>(block_items(table_.items, b));
    }
    for_each_block(shift, [&](int64_t block, uint64_t*, uint64_t sum) { sums[block] = sum; });
    uint128 total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
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
  const Table t(table, block_weight, &top);
  check_dtype("scale", scale, {ScalarType::Double});
  check_shape("scale", scale, {4});
  FASTKD_CHECK(scale.is_contiguous(), "scale must be contiguous");
  check_dtype("indices", indices, {ScalarType::Long});
  check_dim("indices", indices, 1);
  check_scores("scores", scores);
  const int64_t count = indices.size(0);
  check_shape("scores", scores, {count});
  if (count == 0) return;
  indices = torch::stable::contiguous(indices);
  scores = torch::stable::contiguous(scores);
  const int64_t* const index = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    FASTKD_CHECK(index[i] >= 0 && index[i] < t.items, "indices[", i, "] is ", index[i], ", must be in [0, ", t.items, ")");
  }
  double* const s = static_cast<double*>(scale.mutable_data_ptr());
  FASTKD_CHECK(s[1] >= 0 && s[2] >= -64 && s[2] < kTotalBits, "scale is not that of a table from alias_build");
  Scores view{kernel_dtype(scores), scores.const_data_ptr(), s[0], s[1], static_cast<int>(s[2]), 0};
  const double maximum = checked_maximum("scores", view.dtype, view.data, count);
  const double largest_t = maximum > view.reference ? (maximum - view.reference) * view.kappa : 0.0;
  FASTKD_CHECK(largest_t < kLargestT, "scores hold ", maximum, ", too far above ", view.reference,
               ", the largest score of the build, for this inverse temperature; build a new table");
  view.largest_t = static_cast<int>(largest_t + 0x1p-45);  // t is rounded to 45 bits: may reach the next integer

  // Make room, where the new weights are large: for the largest of them, then for the total.
  const int exponent = view.exponent;
  int shift = std::max(0, exponent + view.largest_t - (kTotalBits - 2));
  Changes changes(t, index, count);
  uint128 total;
  for (;; ++shift) {
    view.exponent = exponent - shift;
    changes.quantise(view);
    total = changes.total(shift);
    if (total < (uint128{1} << kTotalBits)) break;
  }
  FASTKD_CHECK(total > 0, "scores would leave no item with a positive weight");  // before anything is written

  if (shift > 0) rescale(t, shift);
  changes.for_each_block(
      0, [&](int64_t block, uint64_t* weights, uint64_t sum) { pack(t, block, weights, sum, weights + kBlockSize); });
  pack_top(t);
  s[2] = view.exponent;
  s[3] = static_cast<double>(t.total());
}

Tensor sample(Tensor table, Tensor block_weight, Tensor top, Tensor stream, int64_t count, int64_t offset, int64_t stride) {
  const Table t(table, block_weight, &top);
  check_dtype("stream", stream, {ScalarType::Long});
  check_shape("stream", stream, {2});
  FASTKD_CHECK(count >= 0, "count is ", count, ", must be at least 0");
  FASTKD_CHECK(stride >= 1, "stride is ", stride, ", must be at least 1");
  stream = torch::stable::contiguous(stream);
  const int64_t* const state = static_cast<const int64_t*>(stream.const_data_ptr());
  const uint64_t seed = static_cast<uint64_t>(state[0]), first = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(offset);
  Tensor out = empty_cpu({count}, ScalarType::Long);
  const TableView view{t.bins, t.block_weight, t.top, t.items, t.blocks, t.total()};
  int64_t* const indices = static_cast<int64_t*>(out.mutable_data_ptr());
  const Kernels& k = kernels();
  parallel(count, 4096, [&](int64_t begin, int64_t end) {
    const uint64_t at = first + static_cast<uint64_t>(begin) * static_cast<uint64_t>(stride);
    k.sample(view, seed, at, static_cast<uint64_t>(stride), end - begin, indices + begin);
  });
  return out;
}

Tensor weights(Tensor table, Tensor block_weight) {
  const Table t(table, block_weight, nullptr);
  Tensor out = empty_cpu({t.items}, ScalarType::Long);
  uint64_t* const data = static_cast<uint64_t*>(out.mutable_data_ptr());
  parallel(t.blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) unpack(t, b, data + b * kBlockSize);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("alias_inverse_temperature", TORCH_BOX(&inverse_temperature));
  m.impl("alias_build", TORCH_BOX(&build));
  m.impl("alias_update_", TORCH_BOX(&update_));
  m.impl("alias_sample", TORCH_BOX(&sample));
  m.impl("alias_weights", TORCH_BOX(&weights));
}

}  // namespace fastkd::alias
