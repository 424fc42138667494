// The table over blocks on the GPU: the packing of cuda_pack.cuh one level up, for any number of blocks.
//
// A block may hold all of 2^52, so deficits and surpluses take more than 64 bits; the lists keep sums of weights instead:
// with W_l the lights before l, V_j the heavies up to j, n blocks and total T, light l is filled by heavy j while
//   D_l < S_j  <=>  (l + j + 1) T < n (V_j + W_l),
// and heavy j closes its bin with n (V_j + W_l) - (l + j) T, which fits a word.
// Mapping: one block of threads makes the lists in tiles of 4096 (a table of 1e9 items has 244,141 blocks: 2 MB, in L2);
// then each thread of a grid takes 8 steps of the merge. Workspace: 12 bytes a block of items.
#include "alias/cuda_top.cuh"

#include "alias/math.h"
#include "common/scan.cuh"

namespace fastkd::alias {
namespace {

using namespace alias_math;
using namespace device;

constexpr unsigned kListThreads = 1024, kMergeThreads = 128;
constexpr int kTile = 4, kSteps = 8;  // of a thread

struct TopParams {
  const uint64_t* block_weight;  // [blocks]
  int64_t blocks;
  uint64_t* prefix;  // [blocks]: W_l of the lights from the front, V_j of the heavies from the back
  uint32_t* index;   // [blocks]: which block that is
  uint64_t* totals;  // [3]: lights, their weight, total weight
  uint64_t* top;     // [blocks, 2]
  double* scale;
};

FASTKD_KERNEL(kListThreads) top_lists_kernel(const TopParams p) {
  uint64_t sum[1] = {0}, total[1];
  for (int64_t b = thread_index(); b < p.blocks; b += kListThreads) sum[0] += p.block_weight[b];
  block_scan(sum, total, 0);
  const uint128 n = static_cast<uint64_t>(p.blocks);
  uint64_t carry[3] = {0, 0, 0};  // lights, their weight, that of heavies
  unsigned tile = 0;
  for (int64_t base = 0; base < p.blocks; base += kListThreads * kTile, ++tile) {
    const int64_t first = base + thread_index() * kTile;
    uint64_t weight[kTile], before[3] = {0, 0, 0}, sums[3];
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      weight[k] = first + k < p.blocks ? p.block_weight[first + k] : 0;
      const bool light = weight[k] * n <= total[0];
      before[0] += light && first + k < p.blocks;
      before[1] += light ? weight[k] : 0;
      before[2] += light ? 0 : weight[k];
    }
    // two places in turn: all have read the one before the last when the last scan's barrier opens
    block_scan(before, sums, scan_bytes(kListThreads, 1) + tile % 2 * scan_bytes(kListThreads, 3));
    uint64_t l = carry[0] + before[0], light_weight = carry[1] + before[1], heavy_weight = carry[2] + before[2];
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int64_t b = first + k;
      if (b >= p.blocks) break;
      const bool light = weight[k] * n <= total[0];
      const int64_t place = light ? static_cast<int64_t>(l) : p.blocks - 1 - (b - static_cast<int64_t>(l));
      heavy_weight += light ? 0 : weight[k];
      p.prefix[place] = light ? light_weight : heavy_weight;
      p.index[place] = static_cast<uint32_t>(b);
      light_weight += light ? weight[k] : 0;
      l += light;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) carry[i] += sums[i];
  }
  if (thread_index() == 0) {
    p.totals[0] = carry[0];
    p.totals[1] = carry[1];
    p.totals[2] = total[0];
    const bool valid = p.scale[2] == p.scale[2] && total[0] > 0;
    p.scale[3] = valid ? static_cast<double>(total[0]) : static_cast<double>(__builtin_nan(""));
  }
}

FASTKD_KERNEL(kMergeThreads) top_merge_kernel(const TopParams p) {
  const int64_t first = (static_cast<int64_t>(block_index()) * kMergeThreads + thread_index()) * kSteps;
  if (first >= p.blocks) return;
  const int64_t lights = static_cast<int64_t>(p.totals[0]), heavies = p.blocks - lights;
  const uint64_t all_lights = p.totals[1], total = p.totals[2], n = static_cast<uint64_t>(p.blocks);
  const auto light_weight = [&](int64_t l) { return l < lights ? p.prefix[l] : all_lights; };
  const auto heavy_weight = [&](int64_t h) { return h < heavies ? p.prefix[p.blocks - 1 - h] : 0; };
  const auto fills = [&](int64_t step, uint64_t weight) {
    return static_cast<uint128>(step + 1) * total < static_cast<uint128>(n) * weight;
  };
  int64_t low = first > heavies ? first - heavies : 0, high = first < lights ? first : lights;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (fills(first - 1, light_weight(middle) + heavy_weight(first - 1 - middle))) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int64_t l = low, h = first - low;
  uint64_t light = light_weight(l), heavy = heavy_weight(h);
  for (int64_t step = first; step < first + kSteps && step < p.blocks; ++step) {
    const bool fill = l < lights && (h == heavies || fills(step, light + heavy));
    const int64_t own = p.index[fill ? l : p.blocks - 1 - h], giver = fill ? h : h + 1;
    l += fill;
    h += !fill;
    uint64_t threshold;
    if (fill) {
      const uint64_t next = light_weight(l);
      threshold = (next - light) * n;
      light = next;
    } else {
      threshold = (light + heavy) * n - static_cast<uint64_t>(step) * total;
      heavy = heavy_weight(h);
    }
    p.top[2 * own] = threshold;
    p.top[2 * own + 1] = giver < heavies ? p.index[p.blocks - 1 - giver] : static_cast<uint64_t>(own);
  }
}

}  // namespace

void pack_top(const DeviceContext& context, const uint64_t* block_weight, int64_t blocks, uint64_t* top, double* scale) {
  FASTKD_CHECK(blocks < int64_t{1} << 32, "table has ", blocks, " blocks of 4096 items, must have fewer than 2^32");
  Tensor words = context.empty({blocks + 3}, ScalarType::Long), index = context.empty({blocks}, ScalarType::Int);
  uint64_t* const prefix = static_cast<uint64_t*>(words.mutable_data_ptr());
  const TopParams params{block_weight,    blocks, prefix, static_cast<uint32_t*>(index.mutable_data_ptr()),
                         prefix + blocks, top,    scale};
  context.launch("alias top lists", top_lists_kernel,
                 {1, kListThreads, 1, scan_bytes(kListThreads, 1) + 2 * scan_bytes(kListThreads, 3)}, params);
  context.launch("alias top merge", top_merge_kernel, {grid_size(blocks, kSteps, kMaxBlocks, kMergeThreads), kMergeThreads},
                 params);
}

}  // namespace fastkd::alias
