// The maths of crop, the same integers on CPU and GPU.
#pragma once

#include <cstdint>

#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/isa.h"
#include "common/philox.h"

namespace fastkd::FASTKD_ISA::crop_math {

// Where a patch meets the image along one axis: patch coordinates [begin, begin + count) lie at image
// coordinates offset + begin onward. Any offset: nothing here overflows.
struct Span {
  int64_t begin;
  int64_t count;
};
FASTKD_HOST_DEVICE Span clip(int64_t offset, int64_t size, int64_t extent) {
  if (offset <= -size || offset >= extent) return {0, 0};
  const int64_t begin = offset < 0 ? -offset : 0;
  const int64_t end = extent - offset < size ? extent - offset : size;
  return {begin, end - begin};
}

// A patch column in the mirrored patch: of a span, the column where it then begins.
FASTKD_HOST_DEVICE int64_t mirrored_begin(Span span, int64_t size) { return size - span.begin - span.count; }

// Subtract, then multiply: no compiler can fuse this, so every instruction set and the GPU round alike.
template <typename V>
FASTKD_HOST_DEVICE V normalise(V pixel, V center, V scale) {
  return (pixel - center) * scale;
}

// The random place of patch `index` (= b * k + j). Four words: y from 48 bits (w0 and the high half of w3), x from
// 48 bits (w1 and the low half of w3), so that every offset's chance is within 2^-48 of 1 / count; flip from w2.
struct Range {
  int64_t low;
  uint64_t count;
};
struct Place {
  int64_t y;
  int64_t x;
  bool flip;
};
FASTKD_HOST_DEVICE Place place(Words words, Range y, Range x, uint64_t flip_below) {
  const uint64_t random_y = uint64_t{words.w[0]} << 32 | (words.w[3] & 0xffff0000u);
  const uint64_t random_x = uint64_t{words.w[1]} << 32 | words.w[3] << 16;
  return {y.low + static_cast<int64_t>(uniform_bin(random_y, y.count).index),
          x.low + static_cast<int64_t>(uniform_bin(random_x, x.count).index), words.w[2] < flip_below};
}

}  // namespace fastkd::FASTKD_ISA::crop_math
