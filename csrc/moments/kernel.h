// The kernels of moments as the launcher sees them: plain data in, plain functions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastkd::moments {

// Packed: [outer, channels, pixels], of which samples are merged, or [outer, pixels, channels], each sample with results of its
// own. Moments over all of the latter have one sample; those of each sample of the former have samples for channels.
struct Maps {
  Dtype dtype;
  const void* data;
  bool channels_last;
  int64_t outer;
  int64_t channels;
  int64_t pixels;

  int64_t count() const { return pixels * (channels_last ? 1 : outer); }  // of a result
};

constexpr int64_t kChunkPixels = 64;          // that are summed at a time where channels lie side by side
constexpr int64_t kPanel = 512;               // channels of a task at most
constexpr int64_t kTaskElements = 1 << 16;    // of a task, or a few times as many
constexpr int64_t kRunElements = 1 << 14;     // of one sample: neighbours in memory, where a channel has its pixels together
constexpr int64_t kSegment = 1 << 16;         // pixels of a task at most
constexpr int64_t kShortRow = 16;             // of fewer pixels channels are brought side by side
constexpr int64_t kShortPanel = 128;          // channels of a task then
constexpr int64_t kScratchBytes = 128 << 10;  // of a task

// How the maps are cut into tasks, parts times blocks of channels: by their shape alone, so that the order of all sums is.
struct Plan {
  int64_t block, blocks;    // channels of a task; tasks for all of them
  int64_t samples, pixels;  // of a part; at the end there may be fewer
  int64_t segments;         // parts that the pixels of a sample are cut into
  int64_t parts;
  int64_t merged;  // parts that make a result

  explicit Plan(const Maps& maps) {
    const auto pieces = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
    samples = 1;
    if (maps.channels_last) {
      block = std::min(maps.channels, kPanel);
      pixels = std::min(maps.pixels, pieces(kTaskElements, block * kChunkPixels) * kChunkPixels);
    } else {
      pixels = std::min(maps.pixels, kSegment);
      block = std::min(maps.channels, pixels < kShortRow ? kShortPanel : std::clamp<int64_t>(kRunElements / pixels, 1, kPanel));
      if (pixels == maps.pixels) samples = std::clamp<int64_t>(kTaskElements / (block * pixels), 1, maps.outer);
    }
    blocks = pieces(maps.channels, block);
    segments = pieces(maps.pixels, pixels);
    parts = pieces(maps.outer, samples) * segments;
    merged = maps.channels_last ? segments : parts;
  }
};

struct Part {
  int64_t first, samples;  // of maps.outer
  int64_t begin, pixels;

  Part(const Maps& maps, const Plan& plan, int64_t part)
      : first(part / plan.segments * plan.samples),
        samples(std::min(plan.samples, maps.outer - first)),
        begin(part % plan.segments * plan.pixels),
        pixels(std::min(plan.pixels, maps.pixels - begin)) {}
};

struct Params {
  Maps maps;
  Plan plan;
  double* part_mean;  // [parts, channels], unless a result has one part
  double* part_m2;
  void* mean;  // double for doubles, else float
  void* var;
};

struct BackwardParams {
  Maps maps;
  Plan plan;
  const void* mean;  // as the gradients, which may be null: double for doubles, else float
  const void* grad_mean;
  const void* grad_var;
  void* gradient;
};

struct Kernels {
  void (*part)(const Params& params, int64_t task, char* scratch);
  void (*merge)(const Params& params, int64_t task, char* scratch);  // a block of channels of an outer index with results
  void (*backward)(const BackwardParams& params, int64_t task, char* scratch);
};

}  // namespace fastkd::moments

FASTKD_DECLARE_KERNELS(moments)
