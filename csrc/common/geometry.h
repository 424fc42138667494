// Launch geometry as plain numbers, so that it can be tested on the CPU for sizes that no machine holds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/check.h"

namespace fastkd {

constexpr unsigned kMaxBlocks = 0x7fffffffu;            // of a grid's first dimension
constexpr unsigned kMaxCluster = 16;                    // blocks; Hopper and newer
constexpr unsigned kPortableCluster = 8;                // more needs the kernel's consent
constexpr std::size_t kPortableSharedBytes = 48 << 10;  // more needs the kernel's consent
constexpr unsigned kThreads = 256;                      // of a block where nothing speaks for another number

struct Geometry {
  unsigned blocks;   // a multiple of cluster
  unsigned threads;  // of a block, whole warps
  unsigned cluster = 1;
  std::size_t shared_bytes = 0;
};

// What the planning of a launch needs to know of a device.
struct DeviceLimits {
  unsigned max_cluster;  // blocks; 1 where there are no clusters
  unsigned multiprocessors;
  unsigned shared_bytes = 96 << 10;  // that a block can have, or less
};

// Blocks of a grid-stride loop over `items`, each thread taking `items_per_thread` at a time: no more than `most`.
inline unsigned grid_size(int64_t items, int64_t items_per_thread = 1, unsigned most = 1u << 16, unsigned threads = kThreads) {
  const int64_t per_block = items_per_thread * threads;
  const int64_t blocks = items / per_block + (items % per_block != 0);
  return blocks < 1 ? 1 : blocks < most ? static_cast<unsigned>(blocks) : most;
}

// One cluster of blocks for each item.
inline unsigned one_cluster_each(const char* what, int64_t items, unsigned cluster) {
  FASTKD_CHECK(items <= kMaxBlocks / cluster, what, " are ", items, ", must be at most ", kMaxBlocks / cluster,
               " for clusters of ", cluster, " blocks");
  return static_cast<unsigned>(items) * cluster;
}

// For reductions of so many numbers (of 8 bytes) over the threads of a cluster, see reduce.cuh.
constexpr std::size_t cluster_shared_bytes(unsigned threads, unsigned cluster, unsigned numbers) {
  return std::size_t{threads} / 32 * cluster * numbers * 8;
}

}  // namespace fastkd
