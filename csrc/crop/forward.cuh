// Crops on the GPU, forward.
//
//   out[b k + j, c, r, s] = (image[b, c, y + r, x + s] - center[c]) * scale[c], image = 0 outside its borders.
//
// Bytes that must move: the covered pixels in, the patches out; for one patch of each image as large as the image, 2 x 16
// for a vector of 16 bytes of the output. An H200 copies about 4.3 TB/s: 19 bytes a clock and multiprocessor, so a warp has
// 55 clocks, 220 instructions, for the 1 KiB of 32 vectors. Where a vector comes from takes 160 of them, so a thread works
// that out once for up to four vectors that differ in nothing but the plane, or the row. Counted in the machine code for
// sm_90a: 125 a vector for four float32 planes or rows, 150 for three; for uint8 and three planes 150 to float32 and 200 to
// bfloat16. In flight for each multiprocessor: 32 warps (24 of conversions to 16 bits), up to four vectors of two loads each: 64
// KB and more of float32, an eighth of that of bytes, which wait. What is expected of the copy bandwidth:
// benchmarks/machine_code.md. Short rows cost more than it says: of a row of 8 float32 at any column, memory gives two sectors or
// three vectors for two.
//
// Mapping: a thread makes whole 16-byte vectors of the output, counted through it without regard to rows, so every store is
// an aligned one and a warp writes 512 bytes in a row, or as many as a plane has. A block divides the index of its first
// vector once, in 64 bits; its threads count on from there with 32-bit multiplications (radix.h). What a vector takes from
// one row of the image is one run of bytes at any alignment: it is read as the one or two aligned vectors that hold it and
// shifted in registers (segment.cuh), all loads of a thread before the first use, and where its next vector comes from is
// asked for before them. Borders are masks. A vector that holds the
// end of a row takes another turn for the next one. Element by element go mirrored pixels of several channels side by side,
// the few runs at the very ends of the tensor, where aligned vectors reach out, and images of more than 2^29 elements each.
//
// Normalisation runs in fp64 as on the CPU, subtract, then multiply: the compiler cannot fuse that, so the bits are the same.
//
// Where a patch comes from is the business of a Places: given by the caller (forward_kernels.cuh), or drawn (batch/). Its
// origin(image, patch) says which image, y and x of the top left corner in it, flip, and is_missing: no such image, the patch
// is NaN; kInMemory: origin() loads it.
#pragma once

#include "common/radix.h"
#include "crop/constants.cuh"

namespace fastkd::crop {
namespace {

constexpr int kAxes = 5;        // of a patch: channels of a unit, width, height, planes; and patches of an image
constexpr int kVectorAxes = 4;  // of what threads begin with: elements of a row, rows, planes; and patches of an image

struct ForwardParams {
  CropParams call;
  Radix<kAxes> all;           // of the output
  Radix<kVectorAxes> radix;   // of the first of each `repeats` parts of the output
  Divisor<uint32_t> unit_of;  // by channels of a unit
  int64_t total;              // elements of these first parts
  int64_t part;               // elements from one part to the next
  int64_t source_step;        // the same in the images
  int64_t planes;             // of these first parts
  int repeats;
  int plane_step, row_step;  // from one part to the next; one of them is 0
  unsigned rounds;           // of vectors for each thread
  bool is_narrow;            // else everything goes element by element
  int unit, image_row, row;  // elements
  int image_height, height, image_width, width;
  Memory memory;  // of the images
  Constants constants;
};

// What a vector of the output, and the same one of every further part, takes from one row: elements [begin, end).
struct Piece {
  int begin, end;
  int first, last;  // of the run: elements that lie inside the image, if the row does
  unsigned part;    // first parts between that of the block's first vector and this one
  int row;          // of the image
  int plane, channel;
  bool flip;
  bool gather;  // element by element
  bool is_missing;
  int64_t offset;  // of the run of the first part, bytes
};

// Of the patch that holds an element of the output.
template <typename Places>
FASTKD_DEVICE typename Places::Origin origin_of(const ForwardParams& p, const Places& places, const Digits<kVectorAxes>& base,
                                                const NarrowDigits<kVectorAxes>& at) {
  const int64_t image = base.at[4] + at.over[3];
  return places.origin(image, image * p.call.geometry.patches + at.at[3]);
}

// From element `begin` of the vector on, which is at these coordinates, up to the end of the row.
template <typename In, int kVector, typename Origin>
FASTKD_DEVICE Piece piece_of(const ForwardParams& p, const Digits<kVectorAxes>& base, const NarrowDigits<kVectorAxes>& at,
                             const Origin& origin, int begin) {
  constexpr int kSize = sizeof(In);
  const int y = static_cast<int>(clamp(origin.y(), -p.height, p.image_height));
  const int x = static_cast<int>(clamp(origin.x(), -p.width, p.image_width));
  const int column = static_cast<int>(at.at[0]) - begin;  // of element 0: before the row where begin > 0
  Piece piece;
  piece.flip = origin.flip();
  piece.is_missing = origin.is_missing();
  piece.begin = begin;
  piece.end = smaller(kVector, p.row - column);
  piece.part = p.row_step > 0 ? at.over[1] : at.over[2];
  piece.row = y + static_cast<int>(at.at[1]);
  piece.plane = static_cast<int>(at.at[2]);
  piece.channel = 0;
  if (p.unit > 1) piece.channel = static_cast<int>(p.unit_of.remainder(at.at[0], p.unit_of.quotient(at.at[0])));
  // element 0 of the run in the image row; a mirrored run is reversed later
  const int start = x * p.unit + (piece.flip ? p.row - kVector - column : column);
  piece.first = larger(piece.flip ? kVector - piece.end : begin, -start);
  piece.last = smaller(piece.flip ? kVector - begin : piece.end, p.image_row - start);
  piece.offset = (origin.image(base.at[4] + at.over[3]) * p.call.image_stride + piece.plane * p.call.plane_stride +
                  piece.row * p.call.row_stride + start) *
                 kSize;
  piece.gather = piece.first < piece.last &&
                 ((piece.flip && p.unit > 1) ||
                  !holds(p.memory, piece.offset, piece.offset + (p.repeats - 1) * p.source_step * kSize, kVector * kSize));
  return piece;
}

// Elements [begin, end) of the vector at `index` of the output, one by one; they lie in one row.
template <typename In, int kBytes, typename Places>
FASTKD_DEVICE Bytes<kBytes> gather(const ForwardParams& p, const Places& places, int64_t index, int begin, int end) {
  const Geometry& g = p.call.geometry;
  const Digits<kAxes> at = p.all.split(index + begin);
  const auto origin = places.origin(at.at[5], at.at[5] * g.patches + at.at[4]);
  const int64_t x = clamp(origin.x(), -g.width, g.image_width) * g.unit;
  // in unsigned arithmetic, y may be anything: a sum that wraps is never a row of the image
  const uint64_t row = static_cast<uint64_t>(origin.y()) + static_cast<uint64_t>(at.at[2]);
  const bool inside = row < static_cast<uint64_t>(g.image_height), flip = origin.flip();
  const In* const source = static_cast<const In*>(p.call.images) + origin.image(at.at[5]) * p.call.image_stride +
                           at.at[3] * p.call.plane_stride + (inside ? static_cast<int64_t>(row) : 0) * p.call.row_stride;
  int64_t column = at.at[1] * g.unit + at.at[0], channel = at.at[0];
  Bytes<kBytes> result{};
#pragma unroll 1
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(In)); ++i) {
    In value{};
    if (i >= begin && i < end) {
      const int64_t from = x + (flip ? (g.width - 1) * g.unit - column + 2 * channel : column);
      if (inside && from >= 0 && from < g.image_width * g.unit) value = source[from];
      ++column;
      if (++channel == g.unit) channel = 0;
    }
    push(result, value);
  }
  return result;
}

// The elements of the run in their places, zeros around them.
template <typename In, int kBytes>
FASTKD_DEVICE Bytes<kBytes> place_run(const Piece& piece, const Run<kBytes>& run, unsigned shift) {
  constexpr int kSize = sizeof(In), kVector = kBytes / kSize;
  Bytes<kBytes> bytes = shifted<kSize>(run.low, run.high, shift);
  if (piece.first > 0 || piece.last < kVector) keep(bytes, piece.first * kSize, piece.last * kSize);
  return piece.flip ? reversed<kSize>(bytes) : bytes;
}

// Vectors of a thread: what 16-bit floats are converted in takes twice their registers.
FASTKD_HOST_DEVICE constexpr int most_repeats(bool converts, int64_t in_size) { return converts && in_size == 2 ? 3 : kRepeats; }

template <typename In, typename Out>
constexpr bool kConverts = !std::is_same_v<In, Out> || !std::is_integral_v<Out>;

// Elements [begin, end) as those of the output.
template <typename In, typename Out, int kBytes>
FASTKD_DEVICE Pack<Out> convert(const Bytes<kBytes>& bytes, int begin, int end, int unit, int channel, bool is_missing,
                                const ConstantsOnDevice& constants) {
  if constexpr (!kConverts<In, Out>) {
    return bit_cast<Pack<Out>>(bytes);
  } else {
    double center = 0, scale = 1;
    if (constants.any()) center = constants.center(channel), scale = constants.scale(channel);
    if (is_missing) center = bit_cast<double>(UINT64_C(0x7ff8000000000000));
    Compute<Out> values[kPack<Out>];
    // without a branch between them, elements are computed side by side; 16-bit floats have no registers for that twice
    const bool alike = unit == 1 || !constants.any() || is_missing;
    const auto value = [&](int i) {
      values[i] = static_cast<Compute<Out>>(crop_math::normalise(widen(element<In>(bytes, i)), center, scale));
    };
    if (sizeof(In) != 2 && alike) {
#pragma unroll
      for (int i = 0; i < kPack<Out>; ++i) value(i);
      return pack_of<Out>(values);
    }
#pragma unroll
    for (int i = 0; i < kPack<Out>; ++i) {
      value(i);
      if (alike || i < begin || i >= end) continue;
      if (++channel == unit) channel = 0;
      center = constants.center(channel), scale = constants.scale(channel);
    }
    return pack_of<Out>(values);
  }
}

// A vector of the output, element by element, in 64 bits.
template <typename In, typename Out, typename Places>
FASTKD_DEVICE void crop_wide(const ForwardParams& p, const Places& places, int64_t index, int count,
                             const ConstantsOnDevice& constants) {
  constexpr int kBytes = kPack<Out> * sizeof(In);
  const Geometry& g = p.call.geometry;
  for (int begin = 0; begin < count;) {
    const Digits<kAxes> at = p.all.split(index + begin);
    const int64_t left = g.width * g.unit - (at.at[1] * g.unit + at.at[0]);
    const int end = left < count - begin ? begin + static_cast<int>(left) : count;
    const Bytes<kBytes> bytes = gather<In, kBytes>(p, places, index, begin, end);
    const bool is_missing = places.origin(at.at[5], at.at[5] * g.patches + at.at[4]).is_missing();
    store(static_cast<Out*>(p.call.patches) + index, begin, end,
          convert<In, Out>(bytes, begin, end, static_cast<int>(g.unit), static_cast<int>(g.unit > 1 ? at.at[0] : at.at[3]),
                           is_missing, constants));
    begin = end;
  }
}

FASTKD_DEVICE Block<kVectorAxes> block_of(const ForwardParams& p, int64_t block, int vector) {
  return block_of<kVectorAxes>(p, block, vector, [&](const Digits<kVectorAxes>& base) {
    const int64_t patch = base.at[4] * p.call.geometry.patches + base.at[3];
    return p.row_step > 0 ? patch * p.planes + base.at[2] : patch;
  });
}

// Blocks on a multiprocessor at least: four leave a thread 64 registers, which is enough for copies, and for the few bytes that
// become a vector of wide floats.
template <typename In, typename Out>
constexpr unsigned kForwardBlocks = std::is_integral_v<Out> || (sizeof(In) == 1 && sizeof(Out) >= 4) ? 4 : 3;

// The vectors of a block. In and Out: element types, or, where bytes are copied, an unsigned integer of their size, twice.
template <typename In, typename Out, typename Places>
FASTKD_DEVICE void crop_block(const ForwardParams& p, const Block<kVectorAxes>& block, const Places& places,
                              const ConstantsOnDevice& constants) {
  constexpr int kVector = kPack<Out>, kBytes = kVector * sizeof(In), kMost = most_repeats(kConverts<In, Out>, sizeof(In));
  const auto local_of = [&](unsigned round) { return (round * kThreads + thread_index()) * kVector; };
  if (!p.is_narrow) {
#pragma unroll 1
    for (unsigned round = 0; round < p.rounds; ++round) {
      const int64_t index = block.first + local_of(round), left = p.total - index;
      if (left <= 0) break;
      crop_wide<In, Out>(p, places, index, left < kVector ? static_cast<int>(left) : kVector, constants);
    }
    return;
  }
  int64_t left = p.total - block.first - local_of(0);
  if (left <= 0) return;
  using Origin = typename Places::Origin;
  // where the next vector comes from is on its way while the pixels of this one are, but where registers are short
  constexpr bool kAhead = Places::kInMemory && (!kConverts<In, Out> || sizeof(In) != 2);
  Origin next;
  if constexpr (kAhead) next = origin_of(p, places, block.base, p.radix.advance(block.base, local_of(0)));
#pragma unroll 1
  for (unsigned round = 0; round < p.rounds && left > 0; ++round, left -= kThreads * kVector) {
    const unsigned local = local_of(round);
    const int count = left < kVector ? static_cast<int>(left) : kVector;
    Origin origin;
    if constexpr (kAhead) {
      origin = next;
      if (round + 1 < p.rounds && left > kThreads * kVector) {
        next = origin_of(p, places, block.base, p.radix.advance(block.base, local_of(round + 1)));
      }
    }
    for (int begin = 0; begin < count;) {
      const NarrowDigits<kVectorAxes> at = p.radix.advance(block.base, local + begin);
      if (!kAhead || begin > 0) origin = origin_of(p, places, block.base, at);
      const Piece piece = piece_of<In, kVector>(p, block.base, at, origin, begin);
      const int64_t index = block.index(local, piece.part);
      const auto offset = [&](int i) { return piece.offset + i * p.source_step * static_cast<int>(sizeof(In)); };
      const auto put = [&](int i, const Bytes<kBytes>& bytes) {
        store(static_cast<Out*>(p.call.patches) + index + i * p.part, piece.begin, piece.end,
              convert<In, Out>(bytes, piece.begin, piece.end, p.unit, p.unit > 1 ? piece.channel : piece.plane + i * p.plane_step,
                               piece.is_missing, constants));
      };
      if (piece.gather) {
#pragma unroll 1
        for (int i = 0; i < p.repeats; ++i) put(i, gather<In, kBytes>(p, places, index + i * p.part, piece.begin, piece.end));
      } else {
        Run<kBytes> runs[kMost];
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          const bool inside = static_cast<unsigned>(piece.row + i * p.row_step) < static_cast<unsigned>(p.image_height);
          if (i < p.repeats && inside && piece.first < piece.last) load_run(p.memory, offset(i), runs[i]);
        }
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          if (i < p.repeats) put(i, place_run<In>(piece, runs[i], shift_of<kBytes>(p.memory, offset(i))));
        }
      }
      begin = piece.end;
    }
  }
}

struct ForwardLayout {
  ForwardParams params;
  ::fastkd::Geometry launch;
};

struct ForwardLimits {
  unsigned multiprocessors;
  int64_t narrow = kNarrow;  // what the fast path takes; a larger image or patch goes element by element, in 64 bits
  unsigned rounds = kRounds;
};

// Of a call with at least one element: `batch` images are cropped, of `images` in memory; `vector`: elements of the kernel's.
inline ForwardLayout lay_out_forward(CropParams call, int64_t batch, int64_t images, const Constants& constants, int64_t vector,
                                     const ForwardLimits& limits) {
  const Geometry& g = call.geometry;
  // strides that are never taken may be anything
  if (images == 1) call.image_stride = 0;
  if (g.planes == 1) call.plane_stride = 0;
  if (g.image_height == 1) call.row_stride = 0;
  const int64_t row = g.width * g.unit, all = batch * g.patches * g.planes * g.height * row;
  const int64_t narrow = limits.narrow;
  const bool seen = g.image_height > 0 && g.image_width > 0;
  const int64_t image = !seen ? 0
                              : (g.planes - 1) * call.plane_stride + (g.image_height - 1) * call.row_stride +
                                    g.image_width * g.unit;  // elements from its first to its last
  ForwardParams params{};
  params.call = call;
  params.constants = constants;
  params.memory = {call.images, seen ? ((images - 1) * call.image_stride + image) * call.in_size : 0};
  params.all = Radix<kAxes>({g.unit, g.width, g.height, g.planes, g.patches});
  params.is_narrow = image <= narrow && g.image_height <= narrow && g.image_width <= narrow / g.unit &&
                     g.width <= narrow / g.unit && g.height <= narrow && g.planes <= narrow && g.patches <= narrow;
  params.repeats = 1;
  int64_t rows = g.height, planes = g.planes;
  if (params.is_narrow) {
    const int64_t most = most_repeats(call.convert, call.in_size);
    const int64_t by_planes = even_parts(most, planes, rows * row, vector), by_rows = even_parts(most, rows, row, vector);
    if (by_planes >= by_rows) {
      params.repeats = static_cast<int>(by_planes);
      planes /= by_planes;
      params.plane_step = static_cast<int>(planes);
      params.source_step = planes * call.plane_stride;
      params.part = planes * rows * row;
    } else {
      params.repeats = static_cast<int>(by_rows);
      rows /= by_rows;
      params.row_step = static_cast<int>(rows);
      params.source_step = rows * call.row_stride;
      params.part = rows * row;
    }
    const auto small = [](int64_t x) { return static_cast<int>(x); };
    params.unit = small(g.unit), params.image_row = small(g.image_width * g.unit), params.row = small(row);
    params.image_height = small(g.image_height), params.height = small(g.height);
    params.image_width = small(g.image_width), params.width = small(g.width);
    params.unit_of = Divisor<uint32_t>(static_cast<uint32_t>(g.unit));
  }
  params.total = all / params.repeats;
  params.planes = planes;
  params.radix = Radix<kVectorAxes>({row, rows, planes, g.patches});
  const int64_t vectors = params.total / vector + (params.total % vector != 0);
  // longer runs once there are enough of them to keep every multiprocessor busy
  params.rounds = vectors >= int64_t{64} * kThreads * limits.multiprocessors ? limits.rounds : 1;
  const int64_t run = params.rounds * int64_t{kThreads}, blocks = vectors / run + (vectors % run != 0);
  FASTKD_CHECK(blocks <= kMaxBlocks, "patches would have ", all, " elements, more than a launch can make");
  return {params, {static_cast<unsigned>(blocks), kThreads, 1, call.convert ? kConstantsShared : 0}};
}

}  // namespace
}  // namespace fastkd::crop
