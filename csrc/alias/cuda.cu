// Draws from an alias table on the GPU, and its weights.
//
// Mapping: one thread a draw, grid-stride. A draw is a function of (seed, global index) in integers (math.h), so the
// result equals the CPU's bit for bit, whatever the grid. Bytes: 8 written, and at most two sectors read at random (the
// bin, and the top bin while the top table misses L2).
#include "alias/cuda_pack.cuh"
#include "alias/draw.cuh"
#include "alias/operator.h"
#include "common/launch.cuh"
#include "common/tuning.h"

namespace fastkd::alias {
namespace {

using namespace alias_math;
using namespace device;

struct SampleParams {
  TableView table;        // without its total
  const double* scale;    // [4], the total weight last
  const int64_t* stream;  // [2]: seed, next index
  int64_t count;
  uint64_t offset;
  uint64_t stride;
  int64_t* out;  // [count]
};

// inspect: streaming sample_kernel loads=128 stores=64
FASTKD_KERNEL(kThreads) sample_kernel(const SampleParams p) {
  const uint64_t seed = static_cast<uint64_t>(p.stream[0]);
  const uint64_t first = static_cast<uint64_t>(p.stream[1]) + p.offset;
  const uint64_t total = total_weight(p.scale[3]);
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < p.count; i += step) {
    const int64_t item = draw(p.table, total, draw_words(seed, first + static_cast<uint64_t>(i) * p.stride));
    p.out[i] = total > 0 ? item : kNoItem;
  }
}

Tensor sample(Tensor table, Tensor block_weight, Tensor top, Tensor scale, Tensor stream, int64_t count, int64_t offset,
              int64_t stride) {
  const Table t(table, block_weight, &top, &scale);
  const int64_t* const state = check_stream(table, stream);
  check_draws(count, stride);
  const DeviceContext context(table);
  Tensor out = context.empty({count}, ScalarType::Long);
  if (count == 0) return out;
  const SampleParams params{t.view(),
                            t.scale,
                            state,
                            count,
                            static_cast<uint64_t>(offset),
                            static_cast<uint64_t>(stride),
                            static_cast<int64_t*>(out.mutable_data_ptr())};
  context.launch("alias_sample", sample_kernel, {grid_size(count, tuned(Knob::kAliasDrawsPerThread)), kThreads}, params);
  return out;
}

struct WeightsParams {
  const uint64_t* bins;
  const uint64_t* block_weight;
  int64_t items;
  int64_t blocks;
  uint64_t* weights;  // [items]
};

FASTKD_KERNEL(kPackThreads) weights_kernel(const WeightsParams p) {
  for (int64_t block = block_index(); block < p.blocks; block += block_count()) {
    const int64_t first = block * kBlockSize;
    const unsigned n = static_cast<unsigned>(block_items(p.items, block)), own = thread_index() * kEach;
    uint64_t weights[kEach];
    unpack_block(p.bins + first, n, p.block_weight[block], weights);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (own + k < n) p.weights[first + own + k] = weights[k];
    }
    block_barrier();
  }
}

Tensor weights(Tensor table, Tensor block_weight) {
  const Table t(table, block_weight);
  const DeviceContext context(table);
  Tensor out = context.empty({t.items}, ScalarType::Long);
  const WeightsParams params{t.bins, t.block_weight, t.items, t.blocks, static_cast<uint64_t*>(out.mutable_data_ptr())};
  const unsigned most = 3 * context.limits().multiprocessors;
  context.launch("alias_weights", weights_kernel, {grid_size(t.blocks, 1, most, 1), kPackThreads, 1, kPackBytes}, params);
  return out;
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("alias_sample", TORCH_BOX(&sample));
  m.impl("alias_weights", TORCH_BOX(&weights));
}

}  // namespace fastkd::alias
