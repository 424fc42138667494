// Draws from an alias table on the GPU.
//
// Mapping: one thread a draw, grid-stride. A draw is a function of (seed, global index) in integers (math.h), so the
// result equals the CPU's bit for bit, whatever the grid. Bytes: 8 written, and at most two sectors read at random (the
// bin, and the top bin while the top table misses L2).
#include "alias/math.h"
#include "common/device.cuh"
#include "common/launch.cuh"

namespace fastkd::alias {
namespace {

using namespace alias_math;
using namespace device;

struct SampleParams {
  const uint64_t* table;         // [items]
  const uint64_t* block_weight;  // [blocks]
  const uint64_t* top;           // [blocks, 2]
  const uint64_t* total;         // [1]: sum of block_weight
  const int64_t* stream;         // [2]: seed, next index
  int64_t items;
  int64_t blocks;
  int64_t count;
  uint64_t offset;
  uint64_t stride;
  int64_t* out;  // [count]
};

// inspect: streaming sample_kernel loads=128 stores=64
FASTKD_KERNEL(kThreads) sample_kernel(const SampleParams p) {
  const uint64_t seed = static_cast<uint64_t>(p.stream[0]);
  const uint64_t first = static_cast<uint64_t>(p.stream[1]) + p.offset;
  const uint64_t total = *p.total;
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < p.count; i += step) {
    const DrawWords words = draw_words(seed, first + static_cast<uint64_t>(i) * p.stride);
    const Bin bin = uniform_bin(words.top, static_cast<uint64_t>(p.blocks));
    const Pack<uint64_t> entry = load_pack(p.top + 2 * bin.index);
    const uint64_t other =
        entry.value[1] < static_cast<uint64_t>(p.blocks) ? entry.value[1] : 0;  // a broken table must not fault
    const uint64_t block = multiply_high(bin.fraction, total) < entry.value[0] ? bin.index : other;
    const Bin inner = uniform_bin(words.block, static_cast<uint64_t>(block_items(p.items, static_cast<int64_t>(block))));
    const uint64_t word = p.table[block * kBlockSize + inner.index];
    const bool own = multiply_high(inner.fraction, p.block_weight[block]) < threshold_of(word);
    p.out[i] = static_cast<int64_t>(block * kBlockSize + (own ? inner.index : alias_of(word)));
  }
}

Tensor sample(Tensor table, Tensor block_weight, Tensor top, Tensor stream, int64_t count, int64_t offset, int64_t stride) {
  check_dtype("table", table, {ScalarType::Long});
  check_dim("table", table, 1);
  const int64_t items = table.size(0), blocks = block_count(items);
  FASTKD_CHECK(items > 0, "table has shape ", shape_of(table), ", must hold at least one item");
  check_dtype("block_weight", block_weight, {ScalarType::Long});
  check_shape("block_weight", block_weight, {blocks});
  check_dtype("top", top, {ScalarType::Long});
  check_shape("top", top, {blocks, 2});
  check_dtype("stream", stream, {ScalarType::Long});
  check_shape("stream", stream, {2});
  check_device("block_weight", block_weight, "table", table);
  check_device("top", top, "table", table);
  check_device("stream", stream, "table", table);
  FASTKD_CHECK(table.is_contiguous() && block_weight.is_contiguous() && top.is_contiguous(),
               "table, block_weight and top must be contiguous");
  FASTKD_CHECK(count >= 0, "count is ", count, ", must be at least 0");
  FASTKD_CHECK(stride >= 1, "stride is ", stride, ", must be at least 1");
  stream = torch::stable::contiguous(stream);

  const DeviceContext context(table);
  const int64_t dims[] = {0};
  Tensor total = torch::stable::sum(block_weight, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
  Tensor out = context.empty({count}, ScalarType::Long);
  if (count == 0) return out;
  const auto words = [](const Tensor& t) { return static_cast<const uint64_t*>(t.const_data_ptr()); };
  const SampleParams params{words(table),
                            words(block_weight),
                            words(top),
                            words(total),
                            static_cast<const int64_t*>(stream.const_data_ptr()),
                            items,
                            blocks,
                            count,
                            static_cast<uint64_t>(offset),
                            static_cast<uint64_t>(stride),
                            static_cast<int64_t*>(out.mutable_data_ptr())};
  context.launch("alias_sample", sample_kernel, {grid_size(count, 4), kThreads}, params);
  return out;
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("alias_sample", TORCH_BOX(&sample)); }

}  // namespace fastkd::alias
