// The transpose of crop on the GPU.
//
//   grad_image[b, c, p, q] = scale[c] * sum over j = k-1 ... 0 of grad_out[b k + j, c, p - y, q - x], where that exists:
// a gather, so no atomics, no zeroing, and the order of the sum is the CPU's.
//
// Bytes that must move: the covered parts of the patches in, the image out. For k patches that cover the image once, 2 x 16
// for a vector of 16 bytes: 220 instructions for the 32 vectors of a warp at the copy bandwidth of an H200 (forward.cuh);
// for k = 8 patches of 8 x 8 on 32 x 32, 1.5 x 16 and 165 instructions.
//
// Mapping: vectors, blocks and indices are those of forward.cuh; a thread makes up to four vectors that differ in nothing
// but the plane, so what covers them is worked out once. The 32 vectors of a warp lie in few rows of one image: its lanes
// look at 32 patches at a time, one each, last first, and vote, and only patches that meet these rows cost anything further,
// in their order. What a patch adds to a vector is a run of a row of the patch: wide elements are loaded one by one, under a
// mask, or as a whole vector where that is aligned; 16-bit ones as the vectors that hold them, shifted. Sums stay in
// registers, in fp32 for 16-bit floats, and are scaled in fp64 as on the CPU.
// Expected of the copy bandwidth: 85 % for large patches; two thirds to three quarters for the small ones above, where a
// warp waits for two or three patches one after the other.
#pragma once

#include "common/radix.h"
#include "common/tuning.h"
#include "crop/constants.cuh"
#include "crop/segment.cuh"

namespace fastkd::crop {
namespace {

constexpr int kGradientAxes = 3;  // of an image: elements of a row, rows, planes

template <typename T>
constexpr int kMost = sizeof(T) == 2 ? 3 : kRepeats;  // vectors of a thread: sums take twice the registers of 16-bit floats

struct BackwardParams {
  CropBackwardParams call;
  Radix<kGradientAxes> radix;  // of the first of each `repeats` parts of the image gradients
  Divisor<uint32_t> unit_of;   // by channels of a unit
  int64_t total;               // elements of these first parts
  int64_t part;                // elements from one part to the next
  int64_t patch_part;          // the same in the patches
  int repeats;
  int plane_step;                              // planes of a part
  bool is_aligned;                             // a vector of a patch is as well aligned in the next part
  unsigned rounds;                             // of vectors for each thread
  int64_t image_row, row;                      // of images and patches, elements
  int64_t plane_size, patch_size, image_size;  // of a patch's planes, a patch, an image's patches, elements
  Memory memory;                               // of the gradients of the patches
  Constants constants;
};

// A vector's elements [begin, end) that lie in one row of an image. Int holds every coordinate of images and patches.
template <typename Int>
struct Target {
  int begin, end;
  unsigned part;  // first parts between that of the block's first vector and this one
  int64_t image;
  int64_t origin;          // of its plane in its image's first patch, in elements
  Int plane, row, column;  // the column of element 0, in elements: before the row where begin > 0
  Int channel;             // within its unit, of element `begin`
};

// A patch of the image, in elements and clamped to where it makes a difference. The same for the whole warp.
template <typename Int>
struct Place {
  Int y, x;
  bool flip;
};

// The elements of a vector from `begin` on, up to the end of their row. The vector is `local` elements into its block.
template <typename T, typename Int>
FASTKD_DEVICE Target<Int> target_of(const BackwardParams& p, int64_t block, const Digits<kGradientAxes>& base, unsigned local,
                                    int begin) {
  constexpr int kVector = kPack<T>;
  Target<Int> target;
  target.begin = begin;
  target.part = 0;
  target.channel = 0;
  if constexpr (sizeof(Int) == 4) {
    const NarrowDigits<kGradientAxes> at = p.radix.advance(base, local + begin);
    target.column = static_cast<Int>(at.at[0]), target.row = static_cast<Int>(at.at[1]);
    target.plane = static_cast<Int>(at.at[2]);
    target.image = base.at[3] + at.over[2];
    target.part = at.over[2];
    if (p.call.geometry.unit > 1) {
      target.channel = static_cast<Int>(p.unit_of.remainder(at.at[0], p.unit_of.quotient(at.at[0])));
    }
  } else {  // one plane at a time
    const Digits<kGradientAxes> at = p.radix.split(block + local + begin);
    target.column = at.at[0], target.row = at.at[1], target.plane = at.at[2], target.image = at.at[3];
    target.channel = at.at[0] % p.call.geometry.unit;
  }
  const Int left = static_cast<Int>(p.image_row) - target.column;
  target.end = left < kVector - begin ? begin + static_cast<int>(left) : kVector;
  target.column -= begin;
  target.origin = target.image * p.image_size + int64_t{target.plane} * p.plane_size;
  return target;
}

// Elements [first, last) of the vector are covered by the patch; element 0 is at `at` of its row, before mirroring.
template <typename Int>
struct Cover {
  Int row, at;
  int first, last;
};
template <typename Int>
FASTKD_DEVICE Cover<Int> cover_of(const BackwardParams& p, const Target<Int>& target, const Place<Int>& place, int vector) {
  const Int row = target.row - place.y, at = target.column - place.x;
  const Int first = -at, last = static_cast<Int>(p.row) - at;  // of what the patch's row covers
  const bool inside = row >= 0 && row < static_cast<Int>(p.call.geometry.height);
  return {row, at,
          !inside                ? vector
          : first > target.begin ? first < vector ? static_cast<int>(first) : vector
                                 : target.begin,
          last < target.end ? last > 0 ? static_cast<int>(last) : 0 : target.end};
}

// Adds patch `index` of the image to the vectors, all loads before the first sum. + 0 where it does not cover them.
template <typename T, typename Int>
FASTKD_DEVICE void add_patch(const BackwardParams& p, const Target<Int>& target, int64_t index, const Place<Int>& place,
                             Compute<T> (&sums)[kMost<T>][kPack<T>]) {
  constexpr int kVector = kPack<T>, kSize = sizeof(T);
  const Cover<Int> cover = cover_of(p, target, place, kVector);
  if (cover.first >= cover.last) return;
  const bool whole = cover.first == 0 && cover.last == kVector;
  const int64_t row = target.origin + index * p.patch_size + int64_t{cover.row} * static_cast<Int>(p.row);
  const T* const source = static_cast<const T*>(p.memory.data) + row;
  const auto add = [&](int i, const Pack<T>& term) {
    for (int e = 0; e < kVector; ++e) sums[i][e] += to_compute(term.value[e]);
  };
  if constexpr (kSize == 2) {
    const int64_t offset = (row + cover.at) * kSize;
    if (!place.flip && holds(p.memory, offset, offset + (p.repeats - 1) * p.patch_part * kSize, 16)) {
      Run<16> runs[kMost<T>];
#pragma unroll
      for (int i = 0; i < kMost<T>; ++i) {
        if (i < p.repeats) load_run(p.memory, offset + i * p.patch_part * kSize, runs[i]);
      }
#pragma unroll
      for (int i = 0; i < kMost<T>; ++i) {
        if (i >= p.repeats) break;
        Bytes<16> bytes = shifted<kSize>(runs[i].low, runs[i].high, shift_of<16>(p.memory, offset + i * p.patch_part * kSize));
        if (!whole) keep(bytes, cover.first * kSize, cover.last * kSize);
        add(i, bit_cast<Pack<T>>(bytes));
      }
      return;
    }
  }
  Pack<T> terms[kMost<T>]{};
  const T* const start = source + cover.at;
  if (kSize > 2 && !place.flip && whole && p.is_aligned && reinterpret_cast<uintptr_t>(start) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kMost<T>; ++i) {
      if (i < p.repeats) terms[i] = load_pack(start + i * p.patch_part);
    }
  } else {
    const Int unit = static_cast<Int>(p.call.geometry.unit), mirror = static_cast<Int>(p.row) - unit;
#pragma unroll
    for (int i = 0; i < kMost<T>; ++i) {
      if (i >= p.repeats) break;
      const T* const plane = source + i * p.patch_part;
      Int channel = target.channel;
      for (int e = 0; e < kVector; ++e) {
        const Int at = cover.at + e;
        if (e >= cover.first && e < cover.last) terms[i].value[e] = plane[place.flip ? mirror - at + 2 * channel : at];
        if (e >= target.begin && ++channel == unit) channel = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMost<T>; ++i) {
    if (i < p.repeats) add(i, terms[i]);
  }
}

// Adds every patch to sums. All lanes of a warp come, with targets in the order of the lanes.
template <typename T, typename Int>
FASTKD_DEVICE void sum_patches(const BackwardParams& p, const Target<Int>& target, bool wanted,
                               Compute<T> (&sums)[kMost<T>][kPack<T>]) {
  const Geometry& g = p.call.geometry;
  // what the warp covers: within one plane its rows are those from the first lane's to the last one's
  const int64_t first_image = shuffle(target.image, 0), last_image = shuffle(target.image, kWarp - 1);
  const Int first_plane = shuffle(target.plane, 0), last_plane = shuffle(target.plane, kWarp - 1);
  const bool one_plane = first_image == last_image && first_plane == last_plane;
  const Int top_row = shuffle(target.row, 0), bottom_row = shuffle(target.row, kWarp - 1);
  const Int first_row = one_plane ? top_row : 0, last_row = one_plane ? bottom_row : static_cast<Int>(g.image_height - 1);
  for (int64_t image = first_image; image <= last_image; ++image) {
    for (int64_t top = g.patches - 1; top >= 0; top -= kWarp) {
      const int64_t own = top - lane_index();
      Place<Int> place{0, 0, false};
      bool meets = false;
      if (own >= 0) {
        const int64_t patch = image * g.patches + own;
        const int64_t y = clamp(g.offsets[2 * patch], -g.height, g.image_height);
        const int64_t x = clamp(g.offsets[2 * patch + 1], -g.width, g.image_width);
        place = {static_cast<Int>(y), static_cast<Int>(x * g.unit), g.flip != nullptr && g.flip[patch]};
        meets = y <= last_row && y + g.height > first_row && x > -g.width && x < g.image_width;
      }
      for (unsigned votes = ballot(meets); votes != 0; votes &= votes - 1) {
        const unsigned lane = lowest_bit(votes);
        const Place<Int> at{shuffle(place.y, lane), shuffle(place.x, lane), shuffle(place.flip, lane)};
        if (wanted && target.image == image) add_patch<T, Int>(p, target, top - lane, at, sums);
      }
    }
  }
}

FASTKD_DEVICE Block<kGradientAxes> block_of(const BackwardParams& p, int64_t block, int vector) {
  return block_of<kGradientAxes>(p, block, vector, [](const Digits<kGradientAxes>& base) { return base.at[3]; });
}

// inspect: streaming crop_backward_kernel<*> loads=128 stores=128
template <typename T, typename Int>
FASTKD_KERNEL(kThreads, 2)
crop_backward_kernel(const BackwardParams p) {
  constexpr int kVector = kPack<T>;
  const ConstantsOnDevice constants(p.constants);
  const auto block = block_of(p, block_index(), kVector);
  const int unit = static_cast<int>(p.call.geometry.unit);
#pragma unroll 1
  for (unsigned round = 0; round < p.rounds; ++round) {
    const unsigned local = (round * kThreads + thread_index()) * kVector;
    const int64_t left = p.total - block.first - local;
    const int count = left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
    if (!any(count > 0)) break;
    // a vector beyond the end has nothing to do, but its lane votes with the others: as if it were the last element
    const unsigned at = count > 0 ? local : static_cast<unsigned>(p.total - block.first - 1);
    Target<Int> target = target_of<T, Int>(p, block.first, block.base, at, 0);
    const int64_t index = block.index(local, target.part);
    int done = 0;
    while (true) {
      const bool wanted = done < count;
      Compute<T> sums[kMost<T>][kVector] = {};
      sum_patches<T, Int>(p, target, wanted, sums);
      if (wanted) {
#pragma unroll
        for (int i = 0; i < kMost<T>; ++i) {
          if (i >= p.repeats) break;
          Pack<T> pack;
          int channel = static_cast<int>(unit > 1 ? target.channel : target.plane + i * p.plane_step);
          for (int e = 0; e < kVector; ++e) {
            pack.value[e] = constants.any() ? narrow<T>(crop_math::normalise<double>(sums[i][e], 0.0, constants.scale(channel)))
                                            : from_compute<T>(sums[i][e]);
            if (unit > 1 && e >= target.begin && e < target.end && ++channel == unit) channel = 0;
          }
          store(static_cast<T*>(p.call.grad_images) + index + i * p.part, target.begin, target.end, pack);
        }
        done = target.end;
      }
      if (!any(done < count)) break;
      if (done < count) target = target_of<T, Int>(p, block.first, block.base, at, done);
    }
  }
}

using BackwardKernel = void (*)(BackwardParams);

template <typename Int>
BackwardKernel backward_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return crop_backward_kernel<double, Int>;
    case Dtype::kBFloat16: return crop_backward_kernel<BFloat16, Int>;
    case Dtype::kFloat16: return crop_backward_kernel<Float16, Int>;
    default: return crop_backward_kernel<float, Int>;
  }
}

struct BackwardPlan {
  BackwardParams params;
  BackwardKernel kernel;
  ::fastkd::Geometry launch;
};

// Of a call with at least one element. Images or patches longer than `narrow` are counted in 64 bits.
inline BackwardPlan plan_backward(const CropBackwardParams& call, int64_t images, const Constants& constants,
                                  unsigned multiprocessors, int64_t narrow = kNarrow) {
  const Geometry& g = call.geometry;
  BackwardParams params{};
  params.image_row = g.image_width * g.unit;
  const int64_t plane = g.image_height * params.image_row, all = images * g.planes * plane, vector = 16 / call.size;
  params.call = call;
  params.constants = constants;
  params.row = g.width * g.unit;
  params.plane_size = g.height * params.row;
  params.patch_size = g.planes * params.plane_size;
  params.image_size = g.patches * params.patch_size;
  params.memory = {call.grad_patches, images * params.image_size * call.size};
  const bool is_narrow =
      g.image_height <= narrow && g.height <= narrow && params.image_row <= narrow && params.row <= narrow && g.planes <= narrow;
  const int64_t most = call.size == 2 ? kMost<BFloat16> : kMost<float>;
  params.repeats = is_narrow ? static_cast<int>(even_parts(most, g.planes, plane, vector)) : 1;
  const int64_t planes = g.planes / params.repeats;
  params.part = planes * plane;
  params.patch_part = planes * params.plane_size;
  params.plane_step = static_cast<int>(planes);
  params.is_aligned = params.patch_part % vector == 0;
  params.total = all / params.repeats;
  params.radix = Radix<kGradientAxes>({params.image_row, g.image_height, planes});
  if (is_narrow) params.unit_of = Divisor<uint32_t>(static_cast<uint32_t>(g.unit));
  const int64_t vectors = params.total / vector + (params.total % vector != 0);
  params.rounds =
      vectors >= int64_t{64} * kThreads * multiprocessors ? static_cast<unsigned>(tuned(Knob::kCropBackwardRounds)) : 1;
  const int64_t run = params.rounds * int64_t{kThreads}, blocks = vectors / run + (vectors % run != 0);
  FASTKD_CHECK(blocks <= kMaxBlocks, "grad_images would have ", all, " elements, more than a launch can make");
  const BackwardKernel kernel = is_narrow ? backward_of<int32_t>(call.dtype) : backward_of<int64_t>(call.dtype);
  return {params, kernel, {static_cast<unsigned>(blocks), kThreads, 1, kConstantsShared}};
}

}  // namespace
}  // namespace fastkd::crop
