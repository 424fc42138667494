// The row kernel of sparse teachers on the GPU as the launcher sees it, and its geometry.
#pragma once

#include <algorithm>

#include "common/geometry.h"
#include "divergence/cuda.h"
#include "sparse/kernel.h"

namespace fastkd::sparse {

struct DeviceParams : ::fastkd::divergence::DeviceParams {
  Teacher given;
  unsigned map_at;  // byte of the shared memory where the map of entries begins
};

constexpr unsigned kMaxRowThreads = 256;            // with 128 registers each: entries are worked on in double
constexpr unsigned kReducedNumbers = 9;             // of a row at once, by common/reduce.cuh
constexpr int64_t kTileClasses = int64_t{1} << 17;  // a tile of the map of a row's entries, a bit a class: 16 KiB

// Bytes before the map.
constexpr std::size_t reduction_bytes(unsigned threads) { return cluster_shared_bytes(threads, 1, 2 * kReducedNumbers); }

// A block for each row.
inline Geometry plan_rows(int64_t rows, int64_t classes, int element_size) {
  const int64_t pack = 16 / element_size, longest = classes + pack - 1;  // with what lies before the row
  const int64_t warps = std::clamp<int64_t>((longest + 128 * pack - 1) / (128 * pack), 1, kMaxRowThreads / 32);  // of 4 packs
  const unsigned threads = static_cast<unsigned>(warps) * 32;
  const std::size_t map = static_cast<std::size_t>((std::min(longest, kTileClasses) + 31) / 32) * 4;
  return {one_cluster_each("rows", rows, 1), threads, 1, reduction_bytes(threads) + map};
}

using RowKernel = void (*)(DeviceParams);

}  // namespace fastkd::sparse
