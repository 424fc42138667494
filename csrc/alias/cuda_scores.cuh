// Sweeps over scores on the GPU: their extent, and what reads each of them once.
#pragma once

#include "alias/kernel.h"
#include "alias/math.h"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/row.cuh"

namespace fastkd::alias {
namespace {

using namespace alias_math;
using namespace device;

constexpr unsigned kMostPartials = 1024;  // blocks of a sweep that hand back a partial result each
constexpr int kAhead = 4;                 // loads of 16 bytes under way in each thread

inline Geometry sweep_geometry(int64_t count, int element_size, unsigned numbers) {
  const unsigned blocks = grid_size(count, kAhead * 16 / element_size, kMostPartials);
  return {blocks, kThreads, 1, cluster_shared_bytes(kThreads, 1, numbers)};
}

// body(element) for each score, and for -inf beyond ragged ends: all threads of a block come equally often.
template <typename T, typename Body>
FASTKD_DEVICE void each_element(const T* data, int64_t count, const Body& body) {
  const RowView<T, int64_t> row(data, count, shift_of(data));
  const int64_t parts = row.parts(), step = static_cast<int64_t>(block_count()) * thread_count();
  for (int64_t base = static_cast<int64_t>(block_index()) * thread_count(); base < parts; base += kAhead * step) {
    Pack<T> packs[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) packs[j] = row.load(base + thread_index() + j * step);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) body(packs[j].value[k]);
    }
  }
}
// body(score in fp64)
template <typename T, typename Body>
FASTKD_DEVICE void each_score(const T* data, int64_t count, const Body& body) {
  each_element(data, count, [&](T element) { body(static_cast<double>(to_compute(element))); });
}

// The partial extents of the blocks of a sweep: of each the largest score, and 1 where a NaN or +inf is among them.
struct Extents {
  const double* partial;  // [count, 2]
  unsigned count;
};

// The same for each thread of the block.
FASTKD_DEVICE Extent joined(const Extents& extents, ClusterGroup& group) {
  double both[2] = {-kInfinity<double>, 0};
  for (unsigned i = thread_index(); i < extents.count; i += thread_count()) {
    both[0] = maximum(both[0], extents.partial[2 * i]);
    both[1] = maximum(both[1], extents.partial[2 * i + 1]);
  }
  group.reduce(both, Max{});
  return {both[0], both[1] > 0};
}
FASTKD_DEVICE LongSum joined(const uint64_t* sums, unsigned count, ClusterGroup& group) {
  uint64_t both[2] = {0, 0};
  for (unsigned i = thread_index(); i < count; i += thread_count()) {
    both[0] += sums[2 * i];
    both[1] += sums[2 * i + 1];
  }
  group.reduce(both, Sum{});
  return {both[0], both[1]};
}

// The block's sum goes to sums[2 * block].
FASTKD_DEVICE void store_sum(const LongSum& sum, uint64_t* sums, ClusterGroup& group) {
  uint64_t both[2] = {sum.low, sum.high};
  group.reduce(both, Sum{});
  if (thread_index() == 0) {
    sums[2 * block_index()] = both[0];
    sums[2 * block_index() + 1] = both[1];
  }
}

struct ExtentParams {
  const void* scores;
  int64_t count;
  double* partial;
};

// inspect: streaming extent_kernel<*> loads=128
template <typename T>
FASTKD_KERNEL(kThreads)
extent_kernel(const ExtentParams p) {
  double both[2] = {-kInfinity<double>, 0};
  each_score(static_cast<const T*>(p.scores), p.count, [&](double u) {
    both[0] = maximum(both[0], u);
    both[1] = u < kInfinity<double> ? both[1] : 1;
  });
  ClusterGroup group;
  group.reduce(both, Max{});
  if (thread_index() == 0) {
    p.partial[2 * block_index()] = both[0];
    p.partial[2 * block_index() + 1] = both[1];
  }
}

// Launches it; the tensor holds the partial extents.
struct ExtentSweep {
  Tensor partial;
  Extents extents;

  ExtentSweep(const DeviceContext& context, const Tensor& scores)
      : partial(context.empty({kMostPartials, 2}, ScalarType::Double)) {
    const Geometry geometry = sweep_geometry(scores.size(0), static_cast<int>(scores.element_size()), 2);
    double* const data = static_cast<double*>(partial.mutable_data_ptr());
    extents = {data, geometry.blocks};
    const auto kernel = for_dtype(kernel_dtype(scores), []<typename T>() { return &extent_kernel<T>; });
    context.launch("alias extent", kernel, geometry, ExtentParams{scores.const_data_ptr(), scores.size(0), data});
  }
};

}  // namespace
}  // namespace fastkd::alias
