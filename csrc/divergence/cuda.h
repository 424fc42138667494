// The row kernels of divergence on the GPU as the launcher sees them: plain data in, plain functions; and the choice
// between them.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/tuning.h"
#include "divergence/kernel.h"

namespace fastkd::divergence {

// A number for each row, float or double, in device memory; none where data is null.
struct RowNumbers {
  const void* data;
  bool wide;
  int64_t stride;
};

struct DeviceParams : RowInputs {
  int64_t rows;
  RowNumbers weight;
  RowNumbers temperature;
  double kd_scale;
  double task_scale;
  double inverse_temperature_all;  // of temperature_all, and the factor of gradients: where no row has numbers of its own
  double gradient_scale_all;
  double denominator;      // of the reduction; of each valid row, where valid is given
  double* valid;           // [1]: how many rows are not ignored; null: the denominator is known
  bool one_launch;         // the grid is one cluster, which adds up the losses of the rows too; valid: [blocks], made here
  void* student_gradient;  // [rows, classes] packed, or null
  void* teacher_gradient;
  double* row_losses;  // [2, rows]: task, kd; null where each_row
  bool each_row;       // loss [rows] and terms [2, rows] are wanted unreduced
  bool wide_loss;      // losses are doubles
  void* loss;          // [] or [rows]
  void* terms;         // [2] or [2, rows]: task, kd
};

// Who works on a row.
enum class Team {
  kEighthOfWarp,  // 4 lanes
  kWarp,
  kCluster,        // all threads of a block, or of a cluster of blocks
  kQuarterOfWarp,  // 8 lanes
};

constexpr unsigned kMaxRowThreads = 512;  // of a block, where a row belongs to all of them
constexpr unsigned kLaneThreads = 128;    // where a row belongs to lanes

// The same where rows are resident: 168 registers for each thread, or 128 where clusters of blocks then hold 2^18 classes.
constexpr unsigned max_resident_threads(bool jensen_shannon, bool clusters) { return clusters && !jensen_shannon ? 512 : 384; }

// How a row of `classes` elements is spread. Resident: it is read once and stays in registers.
struct Plan {
  bool resident;
  bool one_launch;  // a single cluster takes all rows and reduces their losses
  Team team;
  Geometry geometry;
};

// Elements that a thread of a resident team holds of each of the two tensors: so that student and teacher take half of
// its registers.
constexpr int kResidentElements = 32;
constexpr int64_t kMaxLanesRow = 32 * kResidentElements;

// A cluster for each row, which is read again in each sweep.
inline Geometry plan_streaming(int64_t rows, int64_t classes, int element_size, DeviceLimits limits) {
  const int pack = 16 / element_size;
  unsigned cluster = 1;  // few long rows are spread over more blocks
  while (cluster * 2 <= limits.max_cluster && cluster * 2 <= tuned(Knob::kDivergenceStreamingCluster) &&
         rows * cluster < tuned(Knob::kDivergenceStreamingBlocks) * limits.multiprocessors &&
         classes > 4 * int64_t{kMaxRowThreads} * pack * cluster) {
    cluster *= 2;
  }
  const int64_t chunks = (classes + 128 * pack * cluster - 1) / (128 * pack * cluster);  // of 4 packs for each lane of a warp
  const unsigned threads = static_cast<unsigned>(chunks < kMaxRowThreads / 32 ? chunks * 32 : kMaxRowThreads);
  return {one_cluster_each("rows", rows, cluster), threads, cluster, cluster_shared_bytes(threads, cluster, 10)};
}

// aligned: parts begin at a fresh gradient's 16-byte boundaries. reduced: one loss for all rows is wanted.
inline Plan plan_rows(int64_t rows, int64_t classes, int element_size, bool jensen_shannon, bool resident, bool aligned,
                      bool reduced, DeviceLimits limits) {
  const int pack = 16 / element_size;
  const int64_t longest = aligned && classes % pack == 0 ? classes : classes + pack - 1;  // with what lies before the row
  resident = resident && element_size <= 4;
  if (longest <= kMaxLanesRow) {
    const bool short_row = resident && longest <= kMaxLanesRow / 8;
    // rows that are read again and again have few lanes: what a row costs beside its elements is shared by more rows of a
    // warp. Doubles take so long that more lanes are faster where rows are few.
    const Team team = short_row ? Team::kEighthOfWarp : resident || element_size == 8 ? Team::kWarp : Team::kQuarterOfWarp;
    const unsigned rows_per_block = kLaneThreads / (team == Team::kEighthOfWarp ? 4 : team == Team::kWarp ? 32 : 8);
    FASTKD_CHECK(rows < int64_t{1} << 32, "rows are ", rows, ", must be fewer than 2^32");
    const unsigned blocks = grid_size(rows, 1, static_cast<unsigned>(tuned(Knob::kDivergenceLaneBlocks)), rows_per_block);
    unsigned cluster = 1;
    while (cluster * 2 <= blocks && cluster * 2 <= limits.max_cluster && cluster < kPortableCluster) cluster *= 2;
    const bool one_launch = reduced && rows <= tuned(Knob::kDivergenceOneLaunchPasses) * cluster * rows_per_block;
    const Geometry geometry = one_launch
                                  ? Geometry{cluster, kLaneThreads, cluster, cluster_shared_bytes(kLaneThreads, cluster, 3)}
                                  : Geometry{blocks, kLaneThreads};
    return {resident, one_launch, team, geometry};
  }
  for (unsigned cluster = 1; resident && cluster <= limits.max_cluster; cluster *= 2) {
    const int64_t each = (longest + cluster - 1) / cluster,
                  warps = (each + 32 * kResidentElements - 1) / (32 * kResidentElements);
    // several blocks on a multiprocessor, so that one loads while the other computes; but rather one than reading twice
    const int64_t most = max_resident_threads(jensen_shannon, limits.max_cluster > 1) / 32;
    if (warps <= most / tuned(Knob::kDivergenceResidentBlocks) || (cluster == limits.max_cluster && warps <= most)) {
      const unsigned threads = static_cast<unsigned>(warps) * 32;
      return {true,
              false,
              Team::kCluster,
              {one_cluster_each("rows", rows, cluster), threads, cluster, cluster_shared_bytes(threads, cluster, 10)}};
    }
  }
  return {false, false, Team::kCluster, plan_streaming(rows, classes, element_size, limits)};
}

using RowKernel = void (*)(DeviceParams);
// plain: no labels, no weights, one temperature for all rows
RowKernel resident_forward_kernel(Dtype dtype, Team team, bool plain);  // soft cross-entropy, too; null for float64
RowKernel resident_reverse_kernel(Dtype dtype, Team team, bool plain);
RowKernel resident_jensen_shannon_kernel(Dtype dtype, Team team, bool plain);
RowKernel streaming_kernel(Dtype dtype, bool jensen_shannon, Team team);  // of 8 lanes (32 for doubles) or a cluster

}  // namespace fastkd::divergence
