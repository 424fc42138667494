// Numbers of a launch that may be one or another, and by which it is only slower or faster.
//
// FASTKD_TUNING in the environment sets them for a process, as "divergence.resident_blocks=1,crop.rounds=2"; it is read once.
// `python -m benchmarks.tuning` compares the values on a GPU. Every value keeps all launches correct: what sums numbers may
// sum them in another order.
#pragma once

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <string_view>

#include "common/check.h"

namespace fastkd {

enum class Knob {
  kDivergenceResidentBlocks,
  kDivergenceForwardClasses,
  kDivergenceStreamingCluster,
  kDivergenceStreamingBlocks,
  kDivergenceOneLaunchPasses,
  kDivergenceLaneBlocks,
  kCropRounds,
  kCropBackwardRounds,
  kBatchRounds,
  kAliasDrawsPerThread,
  kAliasBuildBlocks,
  kAliasUpdateBlocks,
  kAliasQuartileBlocks,
  kGmmClusterValues,
  kGmmLargestCluster,
  kRelationSplits,
  kMomentsBlocks,
  kCount,
};

constexpr std::size_t kKnobs = static_cast<std::size_t>(Knob::kCount);
constexpr std::size_t kMostKnobValues = 6;

struct KnobInfo {
  Knob knob;
  std::string_view name;
  int64_t usual;
  int64_t values[kMostKnobValues];  // that are allowed, 0 behind the last
};

// The usual value of a knob beside which no results file is named was chosen by thought: nobody has measured the others.
constexpr std::array<KnobInfo, kKnobs> kKnobTable{{
    // blocks of a multiprocessor among which resident rows share it, one loads while another computes: the same file
    {Knob::kDivergenceResidentBlocks, "divergence.resident_blocks", 2, {1, 2, 3, 4}},
    // rows that want no gradient are resident up to so many classes: benchmarks/results/nvidia-h100-80gb-hbm3.json
    {Knob::kDivergenceForwardClasses, "divergence.forward_classes", 8192, {1, 8192, 32768, 65536, 131072}},
    // blocks that share a streamed row at most, and how many a multiprocessor should have before rows are no longer shared
    {Knob::kDivergenceStreamingCluster, "divergence.streaming_cluster", 8, {1, 2, 4, 8, 16}},
    {Knob::kDivergenceStreamingBlocks, "divergence.streaming_blocks", 2, {1, 2, 4, 8}},
    // passes over the rows of a single launch, whose one cluster also sums their losses
    {Knob::kDivergenceOneLaunchPasses, "divergence.one_launch_passes", 8, {1, 4, 8, 16, 32}},
    // blocks of short rows, more of which are taken in turns
    {Knob::kDivergenceLaneBlocks, "divergence.lane_blocks", 1 << 16, {1 << 12, 1 << 14, 1 << 16, 1 << 20}},
    // vectors that a thread makes one after the other, of patches and of drawn batches; tiles of their images' gradient of a warp
    {Knob::kCropRounds, "crop.rounds", 4, {1, 2, 4, 8}},
    {Knob::kCropBackwardRounds, "crop.backward_rounds", 8, {1, 2, 4, 8, 16}},
    {Knob::kBatchRounds, "batch.rounds", 4, {1, 2, 4, 8}},
    {Knob::kAliasDrawsPerThread, "alias.draws_per_thread", 4, {1, 2, 4, 8, 16}},
    // blocks of threads for each multiprocessor: by their registers two of a build fit at once, and one of an update
    {Knob::kAliasBuildBlocks, "alias.build_blocks", 2, {1, 2, 3, 4}},
    {Knob::kAliasUpdateBlocks, "alias.update_blocks", 1, {1, 2, 4}},
    {Knob::kAliasQuartileBlocks, "alias.quartile_blocks", 4, {2, 4, 8, 16}},
    // values of a thread above which a problem is shared by more blocks, and how many of them there are at most
    {Knob::kGmmClusterValues, "gmm.cluster_values", 8, {2, 4, 8, 16, 32}},
    {Knob::kGmmLargestCluster, "gmm.largest_cluster", 16, {1, 2, 4, 8, 16}},
    // parts of the features that are summed by different blocks, at most
    {Knob::kRelationSplits, "relation.splits", 16, {1, 4, 8, 16, 32}},
    // blocks of threads for each multiprocessor up to which few channels are cut into parts, which a second launch merges
    {Knob::kMomentsBlocks, "moments.blocks", 8, {2, 4, 8, 16, 32}},
}};

constexpr bool knobs_are_in_order() {
  for (std::size_t i = 0; i < kKnobs; ++i) {
    if (kKnobTable[i].knob != static_cast<Knob>(i)) return false;
  }
  return true;
}
static_assert(knobs_are_in_order());

class Tuning {
 public:
  // The usual values but for those that `settings` names; null: none.
  explicit Tuning(const char* settings) {
    for (std::size_t i = 0; i < kKnobs; ++i) values_[i] = kKnobTable[i].usual;
    std::istringstream parts(settings == nullptr ? "" : settings);
    for (std::string part; std::getline(parts, part, ',');) set(part);
  }
  int64_t operator[](Knob knob) const { return values_[static_cast<std::size_t>(knob)]; }

 private:
  void set(std::string_view part) {
    const std::size_t equals = part.find('=');
    const std::string_view name = part.substr(0, equals);
    const std::string_view number = equals == part.npos ? std::string_view() : part.substr(equals + 1);
    for (const KnobInfo& info : kKnobTable) {
      if (info.name != name) continue;
      int64_t value = 0;
      const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
      bool allowed = false;
      for (const int64_t one : info.values) allowed = allowed || (one != 0 && one == value);
      FASTKD_CHECK(error == std::errc() && end == number.data() + number.size() && allowed, "FASTKD_TUNING sets ", name, " to '",
                   number, "', must be one of", listed(info));
      values_[static_cast<std::size_t>(info.knob)] = value;
      return;
    }
    std::string names;
    for (const KnobInfo& info : kKnobTable) names += (names.empty() ? "" : ", ") + std::string(info.name);
    fail("FASTKD_TUNING has '", part, "', must be name=value, more of them behind commas, with one of the names ", names);
  }
  static std::string listed(const KnobInfo& info) {
    std::string list;
    for (const int64_t value : info.values) {
      if (value != 0) list += (list.empty() ? " " : ", ") + std::to_string(value);
    }
    return list;
  }

  int64_t values_[kKnobs];
};

// Of this process. Tests of emulated launches assign others.
inline Tuning& tuning() {
  static Tuning of_environment(std::getenv("FASTKD_TUNING"));
  return of_environment;
}

inline int64_t tuned(Knob knob) { return tuning()[knob]; }

}  // namespace fastkd
