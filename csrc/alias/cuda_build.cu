// Alias tables built on the GPU: the bits of the CPU's, without a wait for the host.
//
// Five launches: the extent of the scores, their partition function (integers, so that any order gives the same sum), the
// exponent, the blocks, and the table over blocks. Bytes that must move: the scores three times, 8 N of bins. Each score is
// turned into a weight twice, at some 40 instructions. Scores that a CPU build would refuse (NaN, +inf, all -inf; an inverse
// temperature that is negative or not finite) give a table whose scale is NaN, and whose draws are no items.
#include "alias/cuda_pack.cuh"
#include "alias/cuda_scores.cuh"
#include "alias/cuda_top.cuh"
#include "alias/operator.h"
#include "common/tuning.h"

namespace fastkd::alias {
namespace {

struct BuildParams {
  const void* scores;
  int64_t items;
  int64_t blocks;
  const double* inverse_temperature;
  Extents extents;
  uint64_t* sums;  // [sum_count, 2]: partial partition functions
  unsigned sum_count;
  double* scale;
  uint64_t* bins;
  uint64_t* block_weight;
};

// inspect: streaming partition_kernel<*> loads=128
template <typename T>
FASTKD_KERNEL(kThreads)
partition_kernel(const BuildParams p) {
  ClusterGroup group;
  const double reference = joined(p.extents, group).maximum, kappa = *p.inverse_temperature * kLog2E;
  uint64_t sum = 0;  // of fewer than 2^31 terms, each at most 2^32 + 1
  each_score(static_cast<const T*>(p.scores), p.items, [&](double u) { sum += partition_term(power_of(u, reference, kappa)); });
  LongSum halves{0, 0};
  halves.add(sum);
  store_sum(halves, p.sums, group);
}

// Reference, kappa and exponent.
FASTKD_KERNEL(kThreads) exponent_kernel(const BuildParams p) {
  ClusterGroup group;
  const Extent extent = joined(p.extents, group);
  const LongSum partition = joined(p.sums, p.sum_count, group);
  if (thread_index() != 0) return;
  const double lambda = *p.inverse_temperature, kappa = lambda * kLog2E, nan = static_cast<double>(__builtin_nan(""));
  const bool valid = !extent.invalid && extent.maximum > -kInfinity<double> && lambda >= 0 && kappa < kInfinity<double>;
  p.scale[0] = valid ? extent.maximum + 0.0 : nan;  // no -0
  p.scale[1] = valid ? kappa : nan;
  p.scale[2] = valid ? static_cast<double>(exponent_of(partition.value())) : nan;
}

// The scores of kEach items from `first` on, of which `count` exist; -inf beyond.
template <typename T>
FASTKD_DEVICE void load_scores(const T* first, int64_t count, double (&scores)[kEach]) {
  if (count >= kEach && reinterpret_cast<uintptr_t>(first) % 16 == 0) {
    Pack<T> packs[kEach / kPack<T>];
#pragma unroll
    for (int j = 0; j < kEach / kPack<T>; ++j) packs[j] = load_pack(first + j * kPack<T>);
#pragma unroll
    for (int k = 0; k < kEach; ++k) scores[k] = static_cast<double>(to_compute(packs[k / kPack<T>].value[k % kPack<T>]));
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) scores[k] = k < count ? static_cast<double>(to_compute(first[k])) : -kInfinity<double>;
  }
}

// inspect: streaming blocks_kernel<*> loads=128 stores=64
template <typename T>
FASTKD_KERNEL(kPackThreads, 2)
blocks_kernel(const BuildParams p) {
  const double reference = p.scale[0], kappa = p.scale[1];
  const bool valid = reference == reference;
  const int exponent = valid ? static_cast<int>(p.scale[2]) : 0;
  for (int64_t block = block_index(); block < p.blocks; block += block_count()) {
    const int64_t first = block * kBlockSize;
    const unsigned n = static_cast<unsigned>(block_items(p.items, block)), own = thread_index() * kEach;
    double scores[kEach];
    load_scores(static_cast<const T*>(p.scores) + first + own, static_cast<int64_t>(n) - own, scores);
    uint64_t weights[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) weights[k] = valid ? weight_of(power_of(scores[k], reference, kappa), exponent, 0) : 0;
    pack_block(weights, n, p.bins + first, p.block_weight + block);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> build(Tensor scores, Tensor inverse_temperature) {
  check_build(scores, inverse_temperature);
  const int64_t items = scores.size(0), blocks = alias_math::block_count(items);
  const Dtype dtype = kernel_dtype(scores);
  const DeviceContext context(scores);
  Tensor table = context.empty({items}, ScalarType::Long), weights = context.empty({blocks}, ScalarType::Long);
  Tensor top = context.empty({blocks, 2}, ScalarType::Long), scale = context.empty({4}, ScalarType::Double);
  const Table t(table, weights, &top, &scale);
  const ExtentSweep sweep(context, scores);
  const Geometry geometry = sweep_geometry(items, static_cast<int>(scores.element_size()), 4);
  Tensor sums = context.empty({kMostPartials, 2}, ScalarType::Long);
  const BuildParams params{scores.const_data_ptr(),
                           items,
                           blocks,
                           static_cast<const double*>(inverse_temperature.const_data_ptr()),
                           sweep.extents,
                           static_cast<uint64_t*>(sums.mutable_data_ptr()),
                           geometry.blocks,
                           t.scale,
                           t.bins,
                           t.block_weight};
  context.launch("alias partition", for_dtype(dtype, []<typename T>() { return &partition_kernel<T>; }), geometry, params);
  context.launch("alias exponent", exponent_kernel, {1, kThreads, 1, geometry.shared_bytes}, params);
  const unsigned most = static_cast<unsigned>(tuned(Knob::kAliasBuildBlocks)) * context.limits().multiprocessors;
  const Geometry pack_geometry{grid_size(blocks, 1, most, 1), kPackThreads, 1, kPackBytes};
  context.launch("alias blocks", for_dtype(dtype, []<typename T>() { return &blocks_kernel<T>; }), pack_geometry, params);
  pack_top(context, t.block_weight, blocks, t.top, t.scale);
  return {table, weights, top, scale};
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("alias_build", TORCH_BOX(&build)); }

}  // namespace fastkd::alias
