// The transpose of crop on the GPU.
//
//   grad_image[b, c, p, q] = scale[c] * sum over j = k-1 ... 0 of grad_out[b k + j, c, p - y, q - x], where that exists:
// no atomics, and the order of the sum is the CPU's.
//
// Bytes that must move: the covered parts of the patches in, the image out: for k = 8 patches of 8 x 8 on 32 x 32, 6 bytes a
// pixel of float32 and 3 of bfloat16. At the copy bandwidth of an H200 (forward.cuh) a multiprocessor has 17.9 bytes a clock,
// which leaves 28 and 14 instructions of a lane for each pixel.
//
// Mapping: a warp owns a tile of the gradient, as sums in shared memory, in fp32 for 16-bit floats: where they fit all planes
// of an image, else some rows of one, else a part of some rows. It zeroes them, adds the patches that meet the tile one after
// the other, the last one first, and writes the tile in vectors of 16 bytes. Warps have nothing to do with each other.
// A patch is added in boxes of up to 256 elements that lie side by side in memory, eight for each lane, 32 apart: all planes
// of a small patch, some rows of a larger one, a piece of a row of a wide one. Where an element of a box belongs depends on
// nothing but its number, so it is worked out once for all tiles of the warp; what is left is load, add the box's place, and
// load, add, store in shared memory. Reads are runs of whole sectors at any alignment, no element is read that is not there. A
// row of the tile is as long, modulo the 32 banks, as a row of the box: lanes next to each other in a box never meet in a bank.
// The loads of a box are on their way while the one before is added: fourteen warps of a multiprocessor, as many as its shared
// memory holds, have 10 to 20 KB of float32 in flight, half of that of 16 bits. Boxes that reach beyond the tile, that are
// mirrored or not full look where each element lies.
// What places a patch is looked at by one lane for each patch, for some images at once where they have few; only that counts
// in 64 bits.
// Counted in the machine code for sm_90a, for the case above: 84 instructions a box of 192 pixels, 90 for 16 bits, 45 for four
// vectors that are written, 300 to 370 a tile for all else: 13 to 14 a pixel, where boxes that are not full or not inside take
// twice as many. Expected of the copy bandwidth: three quarters for float32, half to two thirds for 16-bit floats.
#pragma once

#include <algorithm>

#include "common/tuning.h"
#include "crop/backward_boxes.cuh"

namespace fastkd::crop {
namespace {

// A box on its way: the patch's elements, lane by lane.
template <typename T, int kSteps>
struct Box {
  T terms[kSteps];
  uint32_t place;
  int limit;
  unsigned special;  // 0: all of its elements exist, and belong where they would in the tile's first corner
};

// The sums of a warp's tile.
template <typename T, int kSteps>
class TileSums {
 public:
  using Sum = Compute<T>;
  static constexpr int kLanes = static_cast<int>(kWarp), kAll = kSteps * kLanes;

  FASTKD_DEVICE explicit TileSums(const BackwardParams& p)
      : sums_(kConstantsShared + warp_index() * kTileBytes, kTileBytes / sizeof(Sum)),
        groups_(kConstantsShared + warp_index() * kTileBytes, kTileBytes / sizeof(Group)) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const unsigned element = s * kWarp + lane_index();
      const unsigned line = p.by_box_columns.quotient(element), column = p.by_box_columns.remainder(element, line);
      const unsigned plane = p.by_box_rows.quotient(line), row = p.by_box_rows.remainder(line, plane);
      where_[s] = ((plane * p.rows + row) * p.pitch + column) << 20 | (row & 255) << 8 | (column & 255);
    }
  }

  FASTKD_DEVICE void clear(const BackwardParams& p, const Tile& tile) const {
    constexpr unsigned kOnce = kClearBytes / 16 / kWarp;
    static_assert(kTileBytes / sizeof(Sum) <= 1 << 12 && kAll <= 1 << 8);
    static_assert(kTileBytes % kClearBytes == 0 && kClearBytes % (16 * kWarp) == 0);
    const unsigned end = static_cast<unsigned>(tile.planes * p.rows * p.pitch / kGroup<T>) + lane_index();
#pragma unroll 1
    for (unsigned i = lane_index(); i < end; i += kOnce * kWarp) {
#pragma unroll
      for (unsigned j = 0; j < kOnce; ++j) groups_.store(i + j * kWarp, {});
    }
  }

  FASTKD_DEVICE void load(const BackwardParams& p, const Boxes& boxes, const Visit& visit, Box<T, kSteps>& box) const {
    const T* const source = static_cast<const T*>(p.call.grad_patches) + visit.source + lane_index();
    box.place = visit.place;
    box.limit = boxes.limit(p, visit);
    box.special = (visit.amount & Visit::kSpecial) | static_cast<unsigned>(box.limit ^ kAll);
    if (box.limit == kAll) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) box.terms[s] = source[s * kLanes];
    } else {
      const int left = box.limit - static_cast<int>(lane_index());
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s * kLanes < left) box.terms[s] = source[s * kLanes];
      }
    }
  }

  FASTKD_DEVICE void add(const BackwardParams& p, const Tile& tile, const Box<T, kSteps>& box) const {
    const int top = static_cast<int32_t>(box.place) >> 16, begin = static_cast<int16_t>(box.place);
    const int first = top * p.pitch + begin;
    Sum sums[kSteps];
    if (box.special == 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sums[s] = sums_.load((where_[s] >> 20) + first) + to_compute(box.terms[s]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sums_.store((where_[s] >> 20) + first, sums[s]);
      return;
    }
    const bool mirrored = (box.special & Visit::kMirrored) != 0;
    const int left = box.limit - static_cast<int>(lane_index());
    int at[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int from = where_[s] & 255, row = top + static_cast<int>(where_[s] >> 8 & 255);
      int column = begin + from;
      at[s] = first + static_cast<int>(where_[s] >> 20);
      if (mirrored) {
        const int on = 2 * (static_cast<int>(p.by_unit.remainder(from, p.by_unit.quotient(from))) - from);
        column += on, at[s] += on;
      }
      if (s * kLanes >= left || static_cast<unsigned>(row) >= static_cast<unsigned>(tile.rows) ||
          static_cast<unsigned>(column) >= static_cast<unsigned>(tile.columns)) {
        at[s] = -1;
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (at[s] >= 0) sums[s] = sums_.load(at[s]) + to_compute(box.terms[s]);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (at[s] >= 0) sums_.store(at[s], sums[s]);
    }
  }

  // `count` elements of the tile's rows from `row` on, which lie side by side in the gradient from element `out` on.
  FASTKD_DEVICE void write(const BackwardParams& p, const Tile& tile, int row, int count, int64_t out,
                           const ConstantsOnDevice& constants) const {
    constexpr int kVector = kPack<T>, kGroups = kVector / kGroup<T>, kBatch = 4;
    T* const to = static_cast<T*>(p.call.grad_images) + out;
    const unsigned first = row * p.pitch;
    if (!constants.any() && p.columns % kGroup<T> == 0 && out % kVector == 0 && count % kVector == 0) {
      const int vectors = count / kVector;
      const unsigned gap = (p.pitch - p.columns) / kGroup<T>;
      const auto group = [&](unsigned i) { return groups_.load(first / kGroup<T> + i + p.by_groups.quotient(i) * gap); };
      const auto vector = [&](int i) {
        Sum sums[kVector];
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          const Group some = group(i * kGroups + j);
#pragma unroll
          for (int e = 0; e < kGroup<T>; ++e) sums[j * kGroup<T> + e] = some.value[e];
        }
        return pack_of<T>(sums);
      };
      int i = static_cast<int>(lane_index());
#pragma unroll 1
      for (; i + (kBatch - 1) * kLanes < vectors; i += kBatch * kLanes) {
        Pack<T> packs[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) packs[j] = vector(i + j * kLanes);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) store_pack_once(to + (i + j * kLanes) * kVector, packs[j]);
      }
#pragma unroll 1
      for (; i < vectors; i += kLanes) store_pack_once(to + i * kVector, vector(i));
      return;
    }
#pragma unroll 2
    for (int i = static_cast<int>(lane_index()); i < count; i += kLanes) {
      const unsigned line = p.by_columns.quotient(i), column = p.by_columns.remainder(i, line);
      Sum sum = sums_.load(first + line * p.pitch + column);
      if (constants.any()) {
        const unsigned at = tile.channel + column;
        const unsigned channel = p.call.geometry.unit > 1 ? p.by_unit.remainder(at, p.by_unit.quotient(at))
                                                          : tile.plane + p.by_rows.quotient(row + line);
        sum = static_cast<Sum>(crop_math::normalise<double>(sum, 0.0, constants.scale(static_cast<int>(channel))));
      }
      to[i] = from_compute<T>(sum);
    }
  }

 private:
  struct alignas(16) Group {
    Sum value[kGroup<T>];
  };
  Shared<Sum> sums_;
  Shared<Group> groups_;
  // where a box's element lies: in the tile, were its first one 0, 12 bits; row and column in a plane of the box, 8 bits each
  uint32_t where_[kSteps];
};

// inspect: streaming crop_backward_kernel<[BF]*> loads=16
// inspect: streaming crop_backward_kernel<float,*> loads=32
// inspect: streaming crop_backward_kernel<double,*> loads=64
// inspect: streaming crop_backward_kernel<*> stores=128
template <typename T, int kSteps>
FASTKD_KERNEL(kTileThreads, 7)
crop_backward_kernel(const BackwardParams p) {
  const Geometry& g = p.call.geometry;
  const ConstantsOnDevice constants(p.constants);
  const int64_t warp = int64_t{block_index()} * kTileWarps + warp_index();
  const unsigned lane = lane_index(), most = static_cast<unsigned>(p.together * p.visits);
  const Shared<Visit> visits(kConstantsShared + kTileWarps * kTileBytes + warp_index() * most * sizeof(Visit), most);
  const TileSums<T, kSteps> sums(p);
  const unsigned turn_of_lane = p.by_visits.quotient(lane), patch_of_lane = p.by_visits.remainder(lane, turn_of_lane);
  int64_t left = least(p.rounds, p.tiles - warp * p.rounds);
  Digits<kTileAxes> at = p.radix.split(warp * p.rounds);
  unsigned turn = 0, votes = 0;  // of the tiles that were looked at together
#pragma unroll 1
  for (; left > 0; --left) {
    const Tile tile = tile_of(p, at);
    sums.clear(p, tile);
#pragma unroll 1
    for (int64_t top = g.patches - 1; top >= 0; top -= p.visits) {
      if (turn == 0) {
        Visit visit{};
        if (turn_of_lane < least<int64_t>(p.together, left) && patch_of_lane <= top) {
          const int64_t patch = (tile.image + turn_of_lane) * g.patches + top - patch_of_lane;
          const Origin origin = origin_of(g, patch);
          visit = p.is_narrow ? visit_of<int>(p, tile, patch, origin) : visit_of<int64_t>(p, tile, patch, origin);
        }
        votes = ballot(visit.amount != 0);
        if (visit.amount != 0) visits.store(bit_count(votes & ((1u << lane) - 1)), visit);
      }
      warp_barrier();
      const unsigned before = turn * p.visits;
      const unsigned first = bit_count(votes & ((1u << before) - 1));
      const unsigned count = bit_count(votes >> before & (~0u >> (kWarp - p.visits)));
      Boxes boxes(visits, first, first + count);
      Visit now{};
      Box<T, kSteps> box, other;
      if (boxes.next(p, now)) {
        sums.load(p, boxes, now, box);
        while (true) {
          bool more = boxes.next(p, now);
          if (more) sums.load(p, boxes, now, other);
          sums.add(p, tile, box);
          warp_barrier();
          if (!more) break;
          more = boxes.next(p, now);
          if (more) sums.load(p, boxes, now, box);
          sums.add(p, tile, other);
          warp_barrier();
          if (!more) break;
        }
      }
    }
    warp_barrier();
    const int runs = p.is_split ? tile.rows : 1, run = (p.is_split ? 1 : tile.planes * tile.rows) * tile.columns;
    const int64_t out = out_of(p, tile);
#pragma unroll 1
    for (int row = 0; row < runs; ++row) sums.write(p, tile, row, run, out + row * p.image_row, constants);
    warp_barrier();
    if (++turn == static_cast<unsigned>(p.together)) turn = 0;
    for (int axis = 0; axis < kTileAxes; ++axis) {
      if (++at.at[axis] < p.count[axis]) break;
      at.at[axis] = 0;
      if (axis == kTileAxes - 1) ++at.at[kTileAxes];
    }
  }
}

using BackwardKernel = void (*)(BackwardParams);

// Of boxes of so many elements.
template <typename T>
BackwardKernel backward_of(int box) {
  const int steps = (box + static_cast<int>(kWarp) - 1) / static_cast<int>(kWarp);
  if constexpr (kMostSteps<T> > 4) {
    if (steps > 6) return crop_backward_kernel<T, 8>;
    if (steps > 4) return crop_backward_kernel<T, 6>;
  }
  return steps > 2 ? crop_backward_kernel<T, 4> : crop_backward_kernel<T, 2>;
}
inline BackwardKernel backward_of(Dtype dtype, int box) {
  return for_dtype(dtype, [&]<typename T>() { return backward_of<T>(box); });
}

struct BackwardPlan {
  BackwardParams params;
  BackwardKernel kernel;
  ::fastkd::Geometry launch;
};

struct BackwardLimits {
  unsigned multiprocessors;
  int64_t tile_bytes = kTileBytes;          // no less than a row of 16 pixels in fp64
  int64_t box = kMostSteps<float> * kWarp;  // elements, at most
  int64_t rounds = 0;                       // tiles of a warp; 0: as many as there are enough of
};

// Of a call with at least one element.
inline BackwardPlan plan_backward(const CropBackwardParams& call, int64_t images, const Constants& constants,
                                  const BackwardLimits& limits) {
  const Geometry& g = call.geometry;
  const auto parts = [](int64_t whole, int64_t part) { return whole / part + (whole % part != 0); };
  // the largest part up to `most`, where all are as equal as can be
  const auto even = [&](int64_t whole, int64_t most) { return parts(whole, parts(whole, std::max<int64_t>(most, 1))); };
  const int64_t box = std::min<int64_t>(limits.box, kWarp * (call.size == 8 ? kMostSteps<double> : kMostSteps<float>));
  const int64_t most = limits.tile_bytes / (call.size < 4 ? 4 : call.size);
  BackwardParams p{};
  p.call = call;
  p.constants = constants;
  p.row = g.width * g.unit;
  p.image_row = g.image_width * g.unit;
  p.is_wide = p.row > box;
  p.span = g.unit > box ? g.unit : p.image_row;
  if (p.is_wide) {
    p.columns = static_cast<int>(g.unit > box ? even(g.unit, box) : std::min(p.image_row, box / g.unit * g.unit));
  } else {
    p.columns = static_cast<int>(p.image_row <= most / 2 ? p.image_row : most / 4);
  }
  p.is_split = p.columns < p.image_row;
  p.box_columns = static_cast<int>(p.is_wide ? p.columns : p.row);
  // as a row of the box modulo the banks, where steps of a warp go beyond a row; whole groups
  p.pitch = (p.columns + 3) / 4 * 4;
  if (p.box_columns < 32 && g.height > 1) {
    const int wide = p.pitch + ((p.box_columns + 3) / 4 * 4 - p.pitch % 32 + 32) % 32;
    if (wide <= p.pitch + p.pitch / 2 && wide <= most) p.pitch = wide;
  }
  const int64_t plane = g.image_height * p.pitch;
  p.plane_size = g.height * p.row;
  p.patch_size = g.planes * p.plane_size;
  p.is_narrow = g.image_height <= kNarrow && g.height <= kNarrow && p.image_row <= kNarrow && p.row <= kNarrow;
  p.rows = static_cast<int>(even(g.image_height, most / p.pitch));
  p.planes = 1;
  p.is_tall = !p.is_wide && p.plane_size <= box;
  if (p.is_tall) {
    p.box_rows = static_cast<int>(g.height);
    if (!p.is_split && p.rows == g.image_height) {
      p.planes = static_cast<int>(even(g.planes, std::min(box / p.plane_size, most / plane)));
    }
  } else {
    p.box_rows = static_cast<int>(p.is_wide ? 1 : box / p.row);
  }
  p.box = p.planes * p.box_rows * p.box_columns;
  p.box_step = p.box_rows * p.row;
  p.count[0] = parts(p.span, p.columns);
  p.count[1] = parts(p.image_row, p.span);
  p.count[2] = parts(g.image_height, p.rows);
  p.count[3] = parts(g.planes, p.planes);
  p.radix = Radix<kTileAxes>(p.count);
  p.by_columns = Divisor<uint32_t>(p.columns), p.by_rows = Divisor<uint32_t>(p.rows);
  p.by_groups = Divisor<uint32_t>(std::max(1, p.columns / (call.size == 8 ? kGroup<double> : kGroup<float>)));
  p.by_box_columns = Divisor<uint32_t>(p.box_columns), p.by_box_rows = Divisor<uint32_t>(p.box_rows);
  p.by_unit = Divisor<uint32_t>(g.unit > box ? INT32_MAX : static_cast<uint32_t>(g.unit));
  p.tiles = images * p.count[0] * p.count[1] * p.count[2] * p.count[3];
  // several tiles a warp, to work out but once what lies where in a box, as long as there are many for every multiprocessor
  const int64_t rounds =
      std::clamp<int64_t>(p.tiles / (int64_t{128} * limits.multiprocessors), 1, tuned(Knob::kCropBackwardRounds));
  p.rounds = limits.rounds > 0 ? limits.rounds : std::max(rounds, parts(p.tiles, int64_t{kMaxBlocks} * kTileWarps));
  const int64_t blocks = parts(p.tiles, p.rounds * kTileWarps);
  p.visits = static_cast<int>(std::clamp<int64_t>(g.patches, 1, kWarp));
  p.together = static_cast<int>(p.tiles == images ? std::clamp<int64_t>(kTogether / p.visits, 1, p.rounds) : 1);
  p.by_visits = Divisor<uint32_t>(p.visits);
  const std::size_t shared_bytes = kConstantsShared + kTileWarps * (kTileBytes + p.together * p.visits * sizeof(Visit));
  return {p, backward_of(call.dtype, p.box), {static_cast<unsigned>(blocks), kTileThreads, 1, shared_bytes}};
}

}  // namespace
}  // namespace fastkd::crop
