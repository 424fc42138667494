// Tiles of a crop's gradient, and the boxes in which patches are added to them: where everything lies. What is done with them
// is in backward.cuh.
#pragma once

#include "common/radix.h"
#include "crop/constants.cuh"
#include "crop/segment.cuh"

namespace fastkd::crop {
namespace {

constexpr int kTileThreads = 64;  // of a block: two warps, so that many blocks fill shared memory
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kTileBytes = 15 << 10;  // of a warp's sums
constexpr int kClearBytes = 3 << 10;  // of them that are zeroed in a row
constexpr int kTogether = 28;         // patches of several tiles: what seven blocks leave of a multiprocessor's shared memory
constexpr int kTileAxes = 4;          // parts of a run of columns, runs, tiles of rows, tiles of planes; and images

template <typename T>
constexpr int kMostSteps = sizeof(T) == 8 ? 4 : 8;  // elements of a box that a lane adds
template <typename T>
constexpr int kGroup = 16 / static_cast<int>(sizeof(Compute<T>));  // sums of 16 bytes

struct BackwardParams {
  CropBackwardParams call;
  int64_t tiles;                                     // in all
  int64_t rounds;                                    // tiles of a warp
  int64_t count[kTileAxes];                          // of tiles along each axis
  Radix<kTileAxes> radix;                            // of the tiles
  int64_t row, image_row;                            // of patches and images, elements
  int64_t plane_size, patch_size, box_step;          // of a patch's planes, a patch, from a box to the next: elements
  int64_t span;                                      // of a run of columns that are split: whole units or one, elements
  int planes, rows, columns;                         // of a tile
  int pitch;                                         // of its rows, elements
  int box_rows, box_columns;                         // of a box; its planes are those of the tile
  int box;                                           // its elements
  int visits;                                        // patches that a warp takes at a time
  int together;                                      // tiles, whole images, whose patches it looks at at once
  bool is_narrow;                                    // images and patches are no longer than kNarrow
  bool is_tall;                                      // boxes hold all rows of a patch
  bool is_wide;                                      // boxes are pieces of a row
  bool is_split;                                     // rows of a tile are not whole rows of the image
  Divisor<uint32_t> by_columns, by_groups, by_rows;  // of a tile; groups of columns, where it has whole ones
  Divisor<uint32_t> by_box_columns, by_box_rows;     // of a box
  Divisor<uint32_t> by_unit;                         // one longer than a box: takes no number apart
  Divisor<uint32_t> by_visits;
  Constants constants;
};

// A part of an image's gradient. The same for the whole warp.
struct Tile {
  int64_t image, row, column;  // of its first element; the column in elements
  unsigned plane, channel;     // of that element, the channel within its unit
  int planes, rows, columns;
};

template <typename Int>
FASTKD_DEVICE Int least(Int a, Int b) {
  return a < b ? a : b;
}
template <typename Int>
FASTKD_DEVICE Int most(Int a, Int b) {
  return a > b ? a : b;
}

FASTKD_DEVICE Tile tile_of(const BackwardParams& p, const Digits<kTileAxes>& at) {
  const Geometry& g = p.call.geometry;
  const int64_t part = at.at[0] * p.columns;
  Tile tile;
  tile.image = at.at[4];
  tile.plane = static_cast<unsigned>(at.at[3]) * p.planes;
  tile.row = at.at[2] * p.rows;
  tile.column = at.at[1] * p.span + part;
  tile.channel = static_cast<unsigned>(part);
  if (p.span == p.image_row) tile.channel = p.by_unit.remainder(tile.channel, p.by_unit.quotient(tile.channel));
  tile.planes = static_cast<int>(least<int64_t>(p.planes, g.planes - tile.plane));
  tile.rows = static_cast<int>(least<int64_t>(p.rows, g.image_height - tile.row));
  tile.columns = static_cast<int>(least<int64_t>(p.columns, p.span - part));
  return tile;
}
// Its first element in the gradient.
FASTKD_DEVICE int64_t out_of(const BackwardParams& p, const Tile& tile) {
  const Geometry& g = p.call.geometry;
  return ((tile.image * g.planes + tile.plane) * g.image_height + tile.row) * p.image_row + tile.column;
}

// Where a patch lies, as given.
struct Origin {
  int64_t y, x;
  bool flip;
};
FASTKD_DEVICE Origin origin_of(const Geometry& g, int64_t patch) {
  return {g.offsets[2 * patch], g.offsets[2 * patch + 1], g.flip != nullptr && g.flip[patch]};
}

// What a patch adds to a tile: boxes, one below the other. None: amount = 0.
struct alignas(16) Visit {
  int64_t source;   // the first element of the first box in the patches
  uint32_t place;   // of that element in the tile, or beyond it: row, 16 bits, and column; where mirrored, of the unit
  uint32_t amount;  // elements, 18 bits, where boxes are wide of as many whole ones; of a wide box, 9 bits; and what is special

  static constexpr unsigned kElements = 1u << 18, kWide = 1u << 9;
  static constexpr unsigned kMirrored = 1u << 30, kClipped = 1u << 31, kSpecial = kMirrored | kClipped;

  FASTKD_DEVICE int row() const { return static_cast<int32_t>(place) >> 16; }
  FASTKD_DEVICE int column() const { return static_cast<int16_t>(place); }
  FASTKD_DEVICE int elements() const { return static_cast<int>(amount % kElements); }
  FASTKD_DEVICE int wide() const { return static_cast<int>(amount / kElements % kWide); }
};

// Of the patch of that number. Int holds every coordinate of images and patches.
template <typename Int>
FASTKD_DEVICE Visit visit_of(const BackwardParams& p, const Tile& tile, int64_t patch, const Origin& origin) {
  const Geometry& g = p.call.geometry;
  const Int height = static_cast<Int>(g.height), length = static_cast<Int>(p.row), unit = static_cast<Int>(g.unit);
  // relative to the tile, and clamped to where it makes a difference
  Int y, x;
  if constexpr (sizeof(Int) == 4) {
    y = static_cast<int>(origin.y), x = static_cast<int>(origin.x);
    if (y != origin.y || x != origin.x) return {};
    y = most(least(y, static_cast<int>(kNarrow)), -static_cast<int>(kNarrow)) - static_cast<int>(tile.row);
    x = most(least(x, static_cast<int>(g.image_width)), -static_cast<int>(g.width)) * unit - static_cast<int>(tile.column);
  } else {
    y = clamp(origin.y, -g.height, g.image_height) - tile.row;
    x = clamp(origin.x, -g.width, g.image_width) * unit - tile.column;
  }
  const Int top = most<Int>(y, 0), bottom = least<Int>(y + height, tile.rows);
  const Int left = most<Int>(x, 0), right = least<Int>(x + length, tile.columns);
  if (top >= bottom || left >= right) return {};
  bool mirrored = origin.flip, clipped = x < 0 || x + length > tile.columns;
  Int row = top, begin = 0, column = mirrored ? x + length - unit : x;
  int elements, wide = 0;
  if (p.is_wide) {
    // what lies in the tile: whole units, or a part of one
    clipped = false;
    if (mirrored && p.span != g.unit) {
      begin = x + length - right, column = right - unit;
    } else if (mirrored) {
      begin = length - unit + x + 2 * static_cast<Int>(tile.channel), column = left, mirrored = false;
    } else {
      begin = left - x, column = left;
    }
    wide = static_cast<int>(right - left);
    elements = static_cast<int>(bottom - top) * p.box;
  } else if (p.is_tall) {
    row = y;
    clipped = clipped || y < 0 || y + height > tile.rows;
    elements = tile.planes * p.box_rows * p.box_columns;
  } else {
    elements = static_cast<int>(bottom - top) * p.box_columns;
  }
  Visit visit;
  visit.source = patch * p.patch_size + tile.plane * p.plane_size + int64_t{row - y} * length + begin;
  visit.place = static_cast<uint32_t>(row) << 16 | (static_cast<uint32_t>(column) & 0xffff);
  visit.amount = static_cast<unsigned>(elements) | static_cast<unsigned>(wide) * Visit::kElements |
                 (mirrored ? Visit::kMirrored : 0) | (clipped ? Visit::kClipped : 0);
  return visit;
}

// The boxes of visits [next, end), one after the other. The same for the whole warp.
class Boxes {
 public:
  FASTKD_DEVICE Boxes(const Shared<Visit>& visits, unsigned next, unsigned end) : visits_(visits), next_(next), end_(end) {}

  // Goes on to the next box, if there is one: of its visit what is left from there on.
  FASTKD_DEVICE bool next(const BackwardParams& p, Visit& visit) {
    left_ -= p.box;
    if (left_ > 0) {
      visit.source += p.box_step;
      visit.place += static_cast<unsigned>(p.box_rows) << 16;
      return true;
    }
    if (next_ == end_) return false;
    visit = visits_.load(next_++);
    left_ = visit.elements();
    return true;
  }
  // Elements of this box.
  FASTKD_DEVICE int limit(const BackwardParams& p, const Visit& visit) const {
    return p.is_wide ? visit.wide() : least(left_, p.box);
  }

 private:
  Shared<Visit> visits_;
  unsigned next_, end_;
  int left_ = 0;
};

}  // namespace
}  // namespace fastkd::crop
