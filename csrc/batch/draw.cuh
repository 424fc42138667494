// From an alias table to a batch on the GPU, in one launch.
//
//   item[i] = draw first + i of the table (alias/draw.cuh),   out[i] = a random crop of images[item[i]] (crop/forward.cuh).
//
// Bytes that must move: the batch out, the covered pixels of the drawn images in, 8 for each index, and a sector of 32 for
// each draw (the bin; the table over blocks stays in L2). For 3x32x32 to float32, 12.3 kB + 3 kB + 40 an image. Two steps,
// images[indices] and then a crop, write and read the drawn images once more, and a crop of its own reads places that
// another kernel wrote.
//
// Mapping: that of crop, whose blocks count vectors of 16 bytes through the batch without regard to images. What differs is
// where a patch comes from: the first threads of a block draw the images that the block meets, one each, item and place,
// into shared memory; then all make vectors. An image that several blocks meet is drawn by each of them, to the same item;
// its index is written by the block that holds its first vector. A draw waits for memory three times (total and seed, top
// bin, bin) before the first pixel is asked for; meanwhile the other blocks of the multiprocessor, three or more, store.
// Expected of the copy bandwidth: that of crop, three quarters for uint8 to float32, for batches of some thousand images;
// for a few hundred small ones the time is the latency of a draw and of a pixel, some microseconds.
//
// An item beyond the collection, which only a broken table gives, or none, from a table without weight, makes an image of NaN.
#pragma once

#include <utility>

#include "alias/draw.cuh"
#include "batch/operator.h"
#include "common/launch.cuh"
#include "crop/forward.cuh"

namespace fastkd::batch {
namespace {

using namespace device;
using namespace crop;

struct DrawBatchParams {
  ForwardParams crop;
  alias::TableView table;     // without its total
  const double* table_scale;  // [4], the total last
  const int64_t* stream;      // [2]: seed, number of the first draw
  const int64_t* crop_seed;   // [1]
  PlacesParams places;        // without seed and outputs
  int64_t count;              // of the batch
  int64_t elements;           // of an image's first parts
  unsigned most;              // images that a block meets
  int64_t* indices;           // [count]
};

// What was drawn for an image of the batch: an origin of crop.
struct alignas(16) Drawn {
  int64_t item_flip;  // 2 * item, + 1 where it is mirrored; negative: none
  int32_t at_y, at_x;

  FASTKD_DEVICE int64_t image(int64_t /*of*/) const { return is_missing() ? 0 : item_flip >> 1; }
  FASTKD_DEVICE int64_t y() const { return at_y; }
  FASTKD_DEVICE int64_t x() const { return at_x; }
  FASTKD_DEVICE bool flip() const { return (item_flip & 1) != 0; }
  FASTKD_DEVICE bool is_missing() const { return item_flip < 0; }
};

// Of the images that a block meets.
class DrawnPlaces {
 public:
  using Origin = Drawn;
  static constexpr bool kInMemory = false;

  // All threads of the block come here; `run`: elements of its vectors.
  FASTKD_DEVICE DrawnPlaces(const DrawBatchParams& p, const Block<kVectorAxes>& block, int64_t run)
      : first_(block.base.at[kVectorAxes]), drawn_(kConstantsShared, p.most) {
    const uint64_t seed = static_cast<uint64_t>(p.stream[0]), first = static_cast<uint64_t>(p.stream[1]);
    const uint64_t crop_seed = static_cast<uint64_t>(*p.crop_seed), total = alias_math::total_weight(p.table_scale[3]);
    for (unsigned i = thread_index(); i < p.most; i += kThreads) {
      const int64_t patch = first_ + i, begin = patch * p.elements;
      if (patch >= p.count || begin >= block.first + run) break;
      const uint64_t number = static_cast<uint64_t>(patch);
      const int64_t item =
          total == 0 ? alias_math::kNoItem : alias::draw(p.table, total, alias_math::draw_words(seed, first + number));
      const crop_math::Place place =
          crop_math::place(philox(crop_seed, Stream::kCrop, number), {p.places.y_low, p.places.y_count},
                           {p.places.x_low, p.places.x_count}, p.places.flip_below);
      const bool exists = item >= 0 && item < p.table.items;
      drawn_.store(i, {exists ? 2 * item + place.flip : -1, static_cast<int32_t>(place.y), static_cast<int32_t>(place.x)});
      if (begin >= block.first) p.indices[patch] = item;
    }
    block_barrier();
  }
  FASTKD_DEVICE Drawn origin(int64_t image, int64_t /*patch*/) const {
    return drawn_.load(static_cast<unsigned>(image - first_));
  }

 private:
  int64_t first_;
  Shared<Drawn> drawn_;
};

// inspect: streaming draw_batch_kernel<*> loads=16 stores=128
// inspect: anywhere draw_batch_kernel<*> loads=128
template <typename Out>
FASTKD_KERNEL(kThreads, kForwardBlocks<uint8_t, Out>)
draw_batch_kernel(const DrawBatchParams p) {
  const ConstantsOnDevice constants(p.crop.constants);
  const Block<kVectorAxes> block = block_of(p.crop, block_index(), kPack<Out>);
  const DrawnPlaces places(p, block, int64_t{p.crop.rounds} * (kThreads * kPack<Out>));
  crop_block<uint8_t, Out>(p.crop, block, places, constants);
}

using DrawBatchKernel = void (*)(DrawBatchParams);

struct DrawBatchPlan {
  DrawBatchParams params;
  DrawBatchKernel kernel;
  ::fastkd::Geometry launch;
};

// The kernel, and elements of its vectors.
inline std::pair<DrawBatchKernel, int> draw_batch_of(Dtype dtype) {
  return for_dtype(dtype, []<typename T>() { return std::pair<DrawBatchKernel, int>(draw_batch_kernel<T>, kPack<T>); });
}

// Of `count` images, at least one, drawn from `images`: what the geometry of the crops asks for. Pointers are left to the caller.
inline DrawBatchPlan plan_draw_batch(const CropParams& call, int64_t count, int64_t images, const Constants& constants,
                                     ForwardLimits limits) {
  constexpr int64_t kMostRun = int64_t{kThreads} * kPack<BFloat16>;  // of one round
  const auto [kernel, vector] = draw_batch_of(call.out_dtype);
  ForwardLayout layout = lay_out_forward(call, count, images, constants, vector, limits);
  const int64_t elements = layout.params.total / count;
  // so many short ones that their draws would crowd shared memory: shorter runs
  if (layout.params.rounds * int64_t{kThreads} * vector > kMostRun * elements) {
    limits.rounds = 1;
    layout = lay_out_forward(call, count, images, constants, vector, limits);
  }
  const int64_t run = layout.params.rounds * int64_t{kThreads} * vector;
  DrawBatchPlan plan{{}, kernel, layout.launch};
  plan.params.crop = layout.params;
  plan.params.count = count;
  plan.params.elements = elements;
  plan.params.most = static_cast<unsigned>(std::min(count, (run - 1 + elements - 1) / elements + 1));
  plan.launch.shared_bytes = kConstantsShared + plan.params.most * sizeof(Drawn);
  return plan;
}

inline void launch_draw_batch(const DeviceContext& context, const DrawBatchCall& call, const std::vector<double>& center,
                              const std::vector<double>& scale, const ForwardLimits& limits) {
  const int64_t count = call.indices.size(0);
  if (count == 0) return;
  const crop::Geometry& g = call.patches.params.geometry;
  const PlacedConstants placed = place_constants(context, center, scale, g.planes * g.unit);
  DrawBatchPlan plan = plan_draw_batch(call.patches.params, count, call.table.items, placed.constants, limits);
  plan.params.table = call.table;
  plan.params.table_scale = static_cast<const double*>(call.table_scale.const_data_ptr());
  plan.params.stream = static_cast<const int64_t*>(call.stream.const_data_ptr());
  plan.params.crop_seed = static_cast<const int64_t*>(call.crop_seed.const_data_ptr());
  plan.params.places = call.places;
  plan.params.indices = static_cast<int64_t*>(call.indices.mutable_data_ptr());
  context.launch("draw_batch", plan.kernel, plan.launch, plan.params);
}

}  // namespace
}  // namespace fastkd::batch
