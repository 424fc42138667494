// Updates of alias tables on the GPU: only the blocks of changed items, and the table over blocks, are made anew.
//
// The changes are brought to their blocks by counting: how many each block has, where its part of a list begins, and the
// list (in any order; of equal items the last change wins by its number). Bytes that must move: 12 a change, 16 an item of a
// touched block, 8 a block for the counts. Where new weights need room (math.h), all blocks are divided by a power of two.
// What a CPU update would refuse (an index out of range, NaN, +inf, a score too far above those of the build, nothing left)
// makes the scale NaN, and the table's draws no items.
#include "alias/cuda_pack.cuh"
#include "alias/cuda_scores.cuh"
#include "alias/cuda_top.cuh"
#include "alias/operator.h"
#include "common/tuning.h"

namespace fastkd::alias {
namespace {

constexpr unsigned kPlanThreads = 1024;
constexpr int kPlanTile = 4;
constexpr unsigned kPlanBytes = cluster_shared_bytes(kPlanThreads, 1, 6);  // of the reductions of a plan

struct UpdateParams {
  const void* scores;
  const int64_t* indices;
  int64_t changes;
  int64_t items;
  int64_t blocks;
  Extents extents;
  uint64_t* sums;  // [sum_count, 2]: partial sums of the new weights
  unsigned sum_count;
  uint32_t* counts;  // [blocks]: changes
  uint32_t* starts;  // [blocks + 1]: of a block's part of the list
  uint32_t* list;    // [changes]
  int64_t* plan;     // [3]: shift of all weights, floor of the largest new t, 1 where an index is out of range
  double* scale;
  uint64_t* bins;
  uint64_t* block_weight;
  unsigned width;  // blocks that a block of threads looks at at a time
};

FASTKD_KERNEL(kThreads) clear_kernel(const UpdateParams p) {
  const int64_t first = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  for (int64_t b = first; b < p.blocks; b += static_cast<int64_t>(block_count()) * kThreads) p.counts[b] = 0;
  if (first < 3) p.plan[first] = 0;
}

// t of the largest new score
FASTKD_DEVICE double largest_change(const UpdateParams& p, const Extent& extent) {
  return largest_t_of(extent.maximum, p.scale[0], p.scale[1]);
}
FASTKD_DEVICE bool possible(const UpdateParams& p, const Extent& extent) {
  return is_scale(p.scale) && !extent.invalid && largest_change(p, extent) < kLargestT;
}

// Counts the changes of each block, and sums the new weights at the exponent that the largest of them allows.
template <typename T>
FASTKD_KERNEL(kThreads)
count_kernel(const UpdateParams p) {
  ClusterGroup group;
  const Extent extent = joined(p.extents, group);
  const bool valid = possible(p, extent);
  const int largest = valid ? whole_t(largest_change(p, extent)) : 0, before = valid ? static_cast<int>(p.scale[2]) : 0;
  const int exponent = before - least_shift(before, largest);
  LongSum sum{0, 0};
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < p.changes; i += step) {
    const int64_t item = p.indices[i];
    if (item < 0 || item >= p.items) {
      p.plan[2] = 1;
      continue;
    }
    atomic_add(p.counts + item / kBlockSize, 1u);
    const double score = static_cast<double>(to_compute(static_cast<const T*>(p.scores)[i]));
    if (valid) sum.add(weight_of(power_of(score, p.scale[0], p.scale[1]), exponent, largest));
  }
  store_sum(sum, p.sums, group);
}

// The shift, and where each block's part of the list begins.
FASTKD_KERNEL(kPlanThreads) plan_kernel(const UpdateParams p) {
  ClusterGroup group;
  const Extent extent = joined(p.extents, group);
  const LongSum added = joined(p.sums, p.sum_count, group);
  const bool valid = possible(p, extent) && p.plan[2] == 0;
  const double exponent = p.scale[2], total = p.scale[3];
  block_barrier();  // all have read what the first thread now changes
  if (thread_index() == 0) {
    const double nan = static_cast<double>(__builtin_nan(""));
    const int largest = valid ? whole_t(largest_change(p, extent)) : 0;
    const int least = valid ? least_shift(static_cast<int>(exponent), largest) : 0;
    const int shift = valid ? shift_for(least, added.value(), p.changes, total_weight(total), p.items) : 0;
    p.plan[0] = shift;
    p.plan[1] = largest;
    p.scale[2] = valid ? exponent - shift : nan;
  }
  // two places in turn, as in cuda_top.cu
  uint64_t carry = 0;
  unsigned tile = 0;
  for (int64_t base = 0; base < p.blocks; base += kPlanThreads * kPlanTile, ++tile) {
    const int64_t first = base + thread_index() * kPlanTile;
    uint64_t place[1] = {0}, total_of_tile[1];
#pragma unroll
    for (int k = 0; k < kPlanTile; ++k) place[0] += first + k < p.blocks ? p.counts[first + k] : 0;
    block_scan(place, total_of_tile, kPlanBytes + tile % 2 * scan_bytes(kPlanThreads, 1));
    uint64_t start = carry + place[0];
#pragma unroll
    for (int k = 0; k < kPlanTile; ++k) {
      if (first + k >= p.blocks) break;
      p.starts[first + k] = static_cast<uint32_t>(start);
      start += p.counts[first + k];
    }
    carry += total_of_tile[0];
  }
  if (thread_index() == 0) p.starts[p.blocks] = static_cast<uint32_t>(carry);
}

// The numbers of the changes, block by block.
FASTKD_KERNEL(kThreads) list_kernel(const UpdateParams p) {
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < p.changes; i += step) {
    const int64_t item = p.indices[i];
    if (item < 0 || item >= p.items) continue;
    const int64_t block = item / kBlockSize;
    p.list[p.starts[block] + atomic_add(p.counts + block, ~0u) - 1] = static_cast<uint32_t>(i);
  }
}

constexpr unsigned kTouchedOffset = kPackBytes, kUpdateBytes = kPackBytes + kPackThreads * 4;

// A block of items with its changes.
template <typename T>
FASTKD_DEVICE void rebuild(const UpdateParams& p, int64_t block, int shift, int exponent, int largest_t) {
  const int64_t first = block * kBlockSize;
  const unsigned n = static_cast<unsigned>(block_items(p.items, block));
  const Shared<uint32_t> winner(kListOffset, kBlockSize);  // the number of the last change of an item, from 1 on
  for (unsigned i = thread_index(); i < n; i += kPackThreads) winner.store(i, 0);
  uint64_t weights[kEach];
  unpack_block(p.bins + first, n, p.block_weight[block], weights);  // its barriers stand between all stores and these
  for (uint32_t c = p.starts[block] + thread_index(); c < p.starts[block + 1]; c += kPackThreads) {
    const uint32_t change = p.list[c];
    winner.atomic_max(static_cast<unsigned>(p.indices[change] % kBlockSize), change + 1);
  }
  block_barrier();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const unsigned i = thread_index() * kEach + k;
    const uint32_t change = i < n ? winner.load(i) : 0;
    weights[k] = shifted(weights[k], shift);
    if (change == 0) continue;
    const double score = static_cast<double>(to_compute(static_cast<const T*>(p.scores)[change - 1]));
    weights[k] = weight_of(power_of(score, p.scale[0], p.scale[1]), exponent, largest_t);
  }
  pack_block(weights, n, p.bins + first, p.block_weight + block);
  block_barrier();
}

template <typename T>
FASTKD_KERNEL(kPackThreads)
rebuild_kernel(const UpdateParams p) {
  if (!(p.scale[2] == p.scale[2])) return;
  const int shift = static_cast<int>(p.plan[0]), exponent = static_cast<int>(p.scale[2]);
  const int largest_t = static_cast<int>(p.plan[1]);
  const Shared<uint32_t> touched(kTouchedOffset, kPackThreads);
  // blocks of threads take blocks of items in turn, so that changes of neighbours are shared out, too
  const int64_t step = block_count();
  for (int64_t base = block_index(); base < p.blocks; base += p.width * step) {
    const int64_t candidate = base + thread_index() * step;
    const bool own =
        thread_index() < p.width && candidate < p.blocks && (shift > 0 || p.starts[candidate] < p.starts[candidate + 1]);
    uint64_t place[1] = {own}, total[1];
    block_scan(place, total, 0);
    if (own) touched.store(static_cast<unsigned>(place[0]), thread_index());
    block_barrier();
    for (unsigned i = 0; i < static_cast<unsigned>(total[0]); ++i)
      rebuild<T>(p, base + touched.load(i) * step, shift, exponent, largest_t);
    block_barrier();
  }
}

void update_(Tensor table, Tensor block_weight, Tensor top, Tensor scale, Tensor indices, Tensor scores) {
  const Table t(table, block_weight, &top, &scale);
  check_changes(table, indices, scores);
  const int64_t changes = indices.size(0);
  if (changes == 0) return;
  FASTKD_CHECK(changes < int64_t{1} << 31, "indices has ", changes, " elements, must be fewer than 2^31");
  const DeviceContext context(table);
  const Dtype dtype = kernel_dtype(scores);
  const ExtentSweep sweep(context, scores);
  const unsigned multiprocessors = context.limits().multiprocessors;
  const Geometry each_change{grid_size(changes, 4, kMostPartials), kThreads, 1, cluster_shared_bytes(kThreads, 1, 4)};
  Tensor sums = context.empty({kMostPartials, 2}, ScalarType::Long), plan = context.empty({3}, ScalarType::Long);
  Tensor lists = context.empty({2 * t.blocks + 1 + changes}, ScalarType::Int);
  uint32_t* const counts = static_cast<uint32_t*>(lists.mutable_data_ptr());
  // one fits a multiprocessor at a time, by its registers
  const unsigned most = static_cast<unsigned>(tuned(Knob::kAliasUpdateBlocks)) * multiprocessors;
  const unsigned rebuilders = grid_size(t.blocks, 1, most, 1);
  const int64_t share = (t.blocks + rebuilders - 1) / rebuilders;
  const UpdateParams params{scores.const_data_ptr(),
                            static_cast<const int64_t*>(indices.const_data_ptr()),
                            changes,
                            t.items,
                            t.blocks,
                            sweep.extents,
                            static_cast<uint64_t*>(sums.mutable_data_ptr()),
                            each_change.blocks,
                            counts,
                            counts + t.blocks,
                            counts + 2 * t.blocks + 1,
                            static_cast<int64_t*>(plan.mutable_data_ptr()),
                            t.scale,
                            t.bins,
                            t.block_weight,
                            static_cast<unsigned>(share < kPackThreads ? share : kPackThreads)};
  context.launch("alias update clear", clear_kernel, {grid_size(t.blocks, 4), kThreads}, params);
  context.launch("alias update count", for_dtype(dtype, []<typename T>() { return &count_kernel<T>; }), each_change, params);
  const unsigned plan_bytes = kPlanBytes + 2 * scan_bytes(kPlanThreads, 1);
  context.launch("alias update plan", plan_kernel, {1, kPlanThreads, 1, plan_bytes}, params);
  context.launch("alias update list", list_kernel, each_change, params);
  context.launch("alias update blocks", for_dtype(dtype, []<typename T>() { return &rebuild_kernel<T>; }),
                 {rebuilders, kPackThreads, 1, kUpdateBytes}, params);
  pack_top(context, t.block_weight, t.blocks, t.top, t.scale);
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("alias_update_", TORCH_BOX(&update_)); }

}  // namespace fastkd::alias
