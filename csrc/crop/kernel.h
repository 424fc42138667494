// The kernels of crop as the launcher sees them: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::crop {

// One layout for both memory formats. A plane is a grid of units that lie side by side within a row: NCHW has C planes
// of units of one element, channels-last one plane of units of C elements. Patches and image gradients are packed;
// images may have any strides from row to row, plane to plane and image to image.
struct Geometry {
  int64_t patches;       // k, of each image
  int64_t planes;        // of each image and patch
  int64_t unit;          // elements
  int64_t image_height;  // pixels
  int64_t image_width;
  int64_t height;  // of a patch, pixels
  int64_t width;
  const int64_t* offsets;  // [B, k, 2], (y, x)
  const bool* flip;        // [B, k], or null
};

// (pixel - center) * scale for each channel; null where there is nothing to do. With units of one element (NCHW) an array
// holds one value for each plane; else `period` values, one for each element of consecutive units, over and over.
struct Normalise {
  const double* center;
  const double* scale;
  int64_t period;
};

struct CropParams {
  Geometry geometry;
  Normalise normalise;
  bool convert;     // normalise, or another dtype out: else bytes are copied
  Dtype in_dtype;   // where convert is set
  Dtype out_dtype;  // where convert is set
  int64_t in_size;  // bytes of an element
  int64_t out_size;
  const void* images;
  int64_t image_stride;  // elements
  int64_t plane_stride;
  int64_t row_stride;
  void* patches;  // [B * k, planes, height, width, unit] packed
};

struct CropBackwardParams {
  Geometry geometry;
  Normalise normalise;  // scale only
  Dtype dtype;
  int64_t size;              // bytes of an element
  const void* grad_patches;  // [B * k, planes, height, width, unit] packed
  void* grad_images;         // [B, planes, image_height, image_width, unit] packed
};

struct PlacesParams {
  uint64_t seed;
  int64_t y_low;
  int64_t x_low;
  uint64_t y_count;
  uint64_t x_count;
  uint64_t flip_below;  // 2^32 times the probability
  int64_t* offsets;     // [count, 2]
  bool* flip;           // [count]
};

struct Kernels {
  // Rows [begin, end) of all patches, counted through [B * k, planes, height].
  void (*crop)(const CropParams&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of all image gradients, counted through [B, planes, image_height].
  void (*crop_backward)(const CropBackwardParams&, int64_t begin, int64_t end, void* scratch);
  void (*places)(const PlacesParams&, int64_t begin, int64_t end);
};

// A patch within its image, clipped once, used for every plane. All in pixels.
struct Window {
  int64_t patch;             // b * k + j
  int64_t image_y, image_x;  // first pixel inside the image
  int64_t patch_y, patch_x;  // where that lies in the patch as stored; of a mirrored row: where its last pixel lies
  int64_t rows, columns;     // inside
  bool flip;
};

constexpr int64_t kCropBytes = 16 << 10;      // of pixels between copy and conversion: half an L1 cache
constexpr int64_t kBackwardBytes = 64 << 10;  // of sums that a band of rows takes: well within an L2 cache

// Always inlined, as launcher and kernels of every instruction set share them.
FASTKD_HOST_DEVICE constexpr int64_t rows_within(int64_t bytes, int64_t row_bytes, int64_t rows) {
  const int64_t fit = row_bytes > 0 ? bytes / row_bytes : rows;
  return fit < 1 ? 1 : fit < rows ? fit : rows;
}
FASTKD_HOST_DEVICE constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Rows of a patch that a thread moves at once, and its bytes of scratch.
FASTKD_HOST_DEVICE constexpr int64_t crop_rows(const CropParams& p) {
  const Geometry& g = p.geometry;
  return p.convert ? rows_within(kCropBytes, g.width * g.unit * p.in_size, g.height) : g.height;
}
FASTKD_HOST_DEVICE constexpr int64_t crop_scratch(const CropParams& p) {
  return p.convert ? crop_rows(p) * p.geometry.width * p.geometry.unit * p.in_size : 0;
}

// Rows of one or more whole planes, or of a part of one, that a thread sums at once; and its scratch: where each part
// begins, and bytes in all.
FASTKD_HOST_DEVICE constexpr int64_t backward_rows(const CropBackwardParams& p) {
  const Geometry& g = p.geometry;
  return rows_within(kBackwardBytes, g.image_width * g.unit * (p.size < 4 ? 4 : p.size), g.planes * g.image_height);
}
struct BackwardScratch {
  int64_t sums, mirrored, widened, bytes;  // the windows come first
};
FASTKD_HOST_DEVICE constexpr BackwardScratch backward_scratch(const CropBackwardParams& p) {
  const Geometry& g = p.geometry;
  const int64_t band = backward_rows(p), rows = band < g.height ? band : g.height;
  const int64_t patch = rows * (g.width < g.image_width ? g.width : g.image_width) * g.unit;
  const bool narrow = p.size < 4;  // summed in fp32
  BackwardScratch s{};
  s.sums = aligned(g.patches * static_cast<int64_t>(sizeof(Window)));
  s.mirrored = s.sums + (narrow ? aligned(band * g.image_width * g.unit * 4) : 0);
  s.widened = s.mirrored + (g.flip != nullptr ? aligned(patch * p.size) : 0);
  s.bytes = s.widened + (narrow ? aligned(patch * 4) : 0);
  return s;
}

}  // namespace fastkd::crop

FASTKD_DECLARE_KERNELS(crop)
