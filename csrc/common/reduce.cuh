// Reductions over the threads that share a row: lanes of a warp, or all threads of a cluster of blocks.
//
// Both groups have the same interface, so that a row kernel is written once. All threads of a group get the result, the
// same bits each: a butterfly of shuffles within a warp, then, for clusters, one value of each warp through the shared
// memory of every block (remote stores, one cluster barrier), combined by each warp in the same order. No atomics.
#pragma once

#include "common/device.cuh"

namespace fastkd::FASTKD_ISA::device {

template <typename S>
constexpr S kInfinity = static_cast<S>(__builtin_inf());

struct Sum {
  template <typename V>
  static FASTKD_DEVICE V identity() {
    return V(0);
  }
  template <typename V>
  FASTKD_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {  // of numbers; a NaN gives way to any
  template <typename V>
  static FASTKD_DEVICE V identity() {
    return -kInfinity<V>;
  }
  template <typename V>
  FASTKD_DEVICE V operator()(V a, V b) const {
    return maximum(a, b);
  }
};
struct MinIndex {
  template <typename V>
  static FASTKD_DEVICE V identity() {
    return sizeof(V) == 8 ? V(INT64_MAX) : V(INT32_MAX);
  }
  template <typename V>
  FASTKD_DEVICE V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

template <unsigned kLanes, typename Op, typename V, int N>
FASTKD_DEVICE void reduce_lanes(V (&values)[N], Op op) {
#pragma unroll
  for (unsigned mask = kLanes / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = op(values[n], shuffle_xor(values[n], mask));
  }
}

// kLanes neighbouring lanes: several rows a warp, many a block. No shared memory, no barriers.
template <unsigned kLanes>
class LaneGroup {
 public:
  static constexpr bool kWholeCluster = false;
  static constexpr unsigned kNeighbours = kLanes;  // of the group, in a warp
  FASTKD_DEVICE unsigned index() const { return thread_index() % kLanes; }
  FASTKD_DEVICE unsigned size() const { return kLanes; }
  FASTKD_DEVICE void arrive() const {}
  FASTKD_DEVICE void start() const {}
  FASTKD_DEVICE bool any(bool condition) const { return device::any(condition); }  // other groups of the warp come along
  template <typename Op, typename V, int N>
  FASTKD_DEVICE void reduce(V (&values)[N], Op op) const {
    reduce_lanes<kLanes>(values, op);
  }
  // Two reductions at once, whose results the first thread has at least.
  template <typename Op, typename V, int N, typename OtherOp, typename U, int M>
  FASTKD_DEVICE void reduce_to_first(V (&values)[N], Op op, U (&others)[M], OtherOp other_op) const {
    reduce_lanes<kLanes>(values, op);
    reduce_lanes<kLanes>(others, other_op);
  }
};

// All threads of a cluster (of one block, where there are no others).
class ClusterTeam {
 public:
  static constexpr bool kWholeCluster = true;
  static constexpr unsigned kNeighbours = kWarp;
  FASTKD_DEVICE unsigned index() const { return cluster_rank() * thread_count() + thread_index(); }
  FASTKD_DEVICE unsigned size() const { return cluster_size() * thread_count(); }

  // Both before the first reduction, with loads issued between them: no block may store into one that has not started.
  FASTKD_DEVICE void arrive() const {
    if (cluster_size() > 1) cluster_arrive();
  }
  FASTKD_DEVICE void start() const {
    if (cluster_size() > 1) cluster_wait();
  }

  // Whether the condition holds for anybody that must come along: all of a cluster have the same bits.
  FASTKD_DEVICE bool any(bool condition) const { return condition; }

  // All that was stored before, in global memory too, is there for all threads after it.
  FASTKD_DEVICE void barrier() const {
    if (cluster_size() > 1) {
      cluster_barrier();
    } else {
      block_barrier();
    }
  }

 protected:
  static constexpr unsigned kSlotBytes = 8;
  static FASTKD_DEVICE unsigned warps() { return thread_count() / kWarp * cluster_size(); }

  // Through shared memory from byte `offset` on, a slot for each number of each warp of the cluster.
  template <typename Op, typename V, int N>
  FASTKD_DEVICE void reduce_through(unsigned offset, V (&values)[N], Op op) const {
    publish(offset, values, cluster_size());
    barrier();
    collect(offset, values, op);
  }
  // What this warp has of each number, into its slots of the first `blocks` blocks.
  template <typename V, int N>
  FASTKD_DEVICE void publish(unsigned offset, const V (&values)[N], unsigned blocks) const {
    const unsigned total = warps();
    const Shared<V> slots(offset, N * total);
    const unsigned slot = cluster_rank() * (thread_count() / kWarp) + warp_index(), lane = lane_index();
    if (cluster_size() == 1) {
      if (lane == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) slots.store(n * total + slot, values[n]);
      }
    } else if (lane < blocks) {  // a lane for each block
#pragma unroll
      for (int n = 0; n < N; ++n) slots.store_remote(lane, n * total + slot, values[n]);
    }
  }
  template <typename Op, typename V, int N>
  FASTKD_DEVICE void collect(unsigned offset, V (&values)[N], Op op) const {
    const unsigned total = warps();
    const Shared<V> slots(offset, N * total);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = Op::template identity<V>();
      for (unsigned i = lane_index(); i < total; i += kWarp) values[n] = op(values[n], slots.load(n * total + i));
    }
    reduce_lanes<kWarp>(values, op);
  }
};

// Each reduction takes a part of shared memory of its own, so that one cluster barrier is enough; `cluster_shared_bytes`
// says how much that is.
class ClusterGroup : public ClusterTeam {
 public:
  // numbers_before: of another group of these threads, whose part of shared memory is not taken again
  FASTKD_DEVICE explicit ClusterGroup(unsigned numbers_before = 0) : used_(numbers_before * kSlotBytes * warps()) {}

  template <typename Op, typename V, int N>
  FASTKD_DEVICE void reduce(V (&values)[N], Op op) {
    reduce_lanes<kWarp>(values, op);
    if (warps() == 1) return;
    reduce_through(used_, values, op);
    used_ += N * warps() * kSlotBytes;
  }
  // Two reductions at one barrier, whose results the first warp has: others are spared the second half.
  template <typename Op, typename V, int N, typename OtherOp, typename U, int M>
  FASTKD_DEVICE void reduce_to_first(V (&values)[N], Op op, U (&others)[M], OtherOp other_op) {
    reduce_lanes<kWarp>(values, op);
    reduce_lanes<kWarp>(others, other_op);
    if (warps() == 1) return;
    const unsigned values_at = used_, others_at = used_ + N * warps() * kSlotBytes;
    publish(values_at, values, 1);
    publish(others_at, others, 1);
    barrier();
    used_ += (N + M) * warps() * kSlotBytes;
    if (cluster_rank() != 0 || warp_index() != 0) return;
    collect(values_at, values, op);
    collect(others_at, others, other_op);
  }

 private:
  unsigned used_;
};

// For reductions in a loop, of up to kNumbers numbers each: two parts of shared memory take turns. One barrier each is enough,
// too: who stores into a part again has met everybody at the barrier of the reduction between, and they had read it by then.
template <unsigned kNumbers>
class LoopClusterGroup : public ClusterTeam {
 public:
  static constexpr unsigned kSharedNumbers = 2 * kNumbers;

  template <typename Op, typename V, int N>
  FASTKD_DEVICE void reduce(V (&values)[N], Op op) {
    static_assert(N <= kNumbers);
    reduce_lanes<kWarp>(values, op);
    if (warps() == 1) return;
    reduce_through(turn_ * kNumbers * kSlotBytes * warps(), values, op);
    turn_ ^= 1;
  }

 private:
  unsigned turn_ = 0;
};

// Adds load(i, n) for all i < count to sums[n], in the same order each time; several loads at a time are on their way.
template <class Group, typename Load, int N>
FASTKD_DEVICE void sum_strided(int64_t count, const Group& group, double (&sums)[N], const Load& load) {
  constexpr int kAhead = 8;
  for (int64_t i = group.index(); i < count; i += static_cast<int64_t>(kAhead) * group.size()) {
    double values[kAhead][N];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = i + static_cast<int64_t>(j) * group.size();
#pragma unroll
      for (int n = 0; n < N; ++n) values[j][n] = at < count ? load(at, n) : 0;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] += values[j][n];
    }
  }
}

// body(index, group) for each row with the teams that the grid has. All threads come along: the last index may be beyond
// the rows where several share a block.
template <class Group, typename Body>
FASTKD_DEVICE void each_row(int64_t rows, const Body& body) {
  Group group;
  if constexpr (Group::kWholeCluster) {
    body(static_cast<int64_t>(block_index() / cluster_size()), group);
  } else {
    const unsigned per_block = thread_count() / group.size();
    for (unsigned i = block_index(); static_cast<int64_t>(i) * per_block < rows; i += block_count()) {
      body(static_cast<int64_t>(i) * per_block + thread_index() / group.size(), group);
    }
  }
}

}  // namespace fastkd::FASTKD_ISA::device
