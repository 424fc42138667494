// Crops on the CPU, compiled once for each instruction set.
//
//   out[b k + j, c, r, s] = (image[b, c, y + r, x + s] - center[c]) * scale[c], image = 0 outside its borders,
//   grad_image[b, c, p, q] = scale[c] * sum over j = k-1 ... 0 of grad_out[b k + j, c, p - y, q - x], where that exists.
// The order is the one in which autograd sums the gradients of k slices.
//
// Mapping: the unit of work is a row of the output, of either direction, so any range of rows is a thread's share and
// every element has one owner. A patch is clipped against the image once; what is left is a rectangle without
// borders, moved in rows as wide as a register allows. Patch rows are short (8 floats), so widths are chosen outside
// the loop over rows, and a ragged end is covered by a last register that overlaps the one before.
// Mirroring and conversion are passes over a few KiB that stay in the L1 cache: mirrored bytes, then whole registers
// converted without regard to rows. Sums run in a band of rows that fits the caches, 16-bit floats in fp32.
// Bytes that must move: forward, the covered pixels in and the patches out; backward, the patches in, the image out.
#include "crop/kernel.h"

#include "common/simd.h"
#include "crop/convert.h"
#include "crop/math.h"

namespace fastkd::FASTKD_ISA::crop {
namespace {

using namespace crop_math;
using ::fastkd::crop::backward_rows;
using ::fastkd::crop::backward_scratch;
using ::fastkd::crop::BackwardScratch;
using ::fastkd::crop::crop_rows;
using ::fastkd::crop::CropBackwardParams;
using ::fastkd::crop::CropParams;
using ::fastkd::crop::Geometry;
using ::fastkd::crop::Kernels;
using ::fastkd::crop::PlacesParams;
using ::fastkd::crop::Window;

FASTKD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Written field by field: a Window assembled elsewhere and copied as a whole would wait for its own stores.
FASTKD_INLINE void window_of(const Geometry& g, int64_t patch, Window& w) {
  const int64_t y = g.offsets[2 * patch], x = g.offsets[2 * patch + 1];
  const Span rows = clip(y, g.height, g.image_height), columns = clip(x, g.width, g.image_width);
  const bool inside = rows.count > 0 && columns.count > 0;
  w.patch = patch;
  w.flip = g.flip != nullptr && g.flip[patch];
  w.rows = inside ? rows.count : 0;
  w.columns = inside ? columns.count : 0;
  w.patch_y = rows.begin;
  w.patch_x = w.flip ? mirrored_begin(columns, g.width) : columns.begin;
  w.image_y = inside ? y + rows.begin : 0;
  w.image_x = inside ? x + columns.begin : 0;
}

// ---- blocks of bytes -----------------------------------------------------------------------------

// Rows of several planes. Strides and sizes in bytes; 0 < bytes.
struct Block {
  char* to;
  const char* from;
  int64_t to_plane, from_plane;
  int64_t to_row, from_row;
  int64_t planes, rows, bytes;
};

template <typename Body>
FASTKD_INLINE void each_row(const Block& block, const Body& body) {
  const Block b = block;
  for (int64_t plane = 0; plane < b.planes; ++plane) {
    char* to = b.to + plane * b.to_plane;
    const char* from = b.from + plane * b.from_plane;
    for (int64_t r = b.rows; r > 0; --r, to += b.to_row, from += b.from_row) body(to, from);
  }
}

// In moves of V bytes, the most that a row holds; the last one overlaps the one before.
template <int V>
FASTKD_INLINE void copy(const Block& block, int64_t bytes) {
  if constexpr (V > 1) {
    if (bytes < V) return copy<V / 2>(block, bytes);
  }
  const int64_t last = bytes - V;
  each_row(block, [last](char* to, const char* from) __attribute__((always_inline)) {
    for (int64_t i = 0; i < last; i += V) std::memcpy(to + i, from + i, V);
    std::memcpy(to + last, from + last, V);
  });
}

template <typename Unit, int V>
FASTKD_INLINE void mirror_register(char* to, const char* from) {
  typedef Unit Register __attribute__((vector_size(V)));
  constexpr int L = V / static_cast<int>(sizeof(Unit));
  Register v, reversed;
  for (int i = 0; i < L; ++i) reversed[i] = static_cast<Unit>(L - 1 - i);
  std::memcpy(&v, from, V);
  v = __builtin_shuffle(v, reversed);
  std::memcpy(to, &v, V);
}

template <typename Unit, int V = kVectorBytes>
FASTKD_INLINE void mirror(const Block& block) {
  if constexpr (V > static_cast<int>(sizeof(Unit))) {
    if (block.bytes < V) return mirror<Unit, V / 2>(block);
  }
  const int64_t last = block.bytes - V;
  each_row(block, [last](char* to, const char* from) __attribute__((always_inline)) {
    for (int64_t i = 0; i < last; i += V) mirror_register<Unit, V>(to + i, from + last - i);
    mirror_register<Unit, V>(to + last, from);
  });
}

// Units of any size.
FASTKD_INLINE void mirror_units(const Block& block, int64_t unit) {
  const int64_t last = block.bytes - unit;
  each_row(block, [last, unit](char* to, const char* from) __attribute__((always_inline)) {
    for (int64_t i = 0; i <= last; i += unit) std::memcpy(to + i, from + last - i, unit);
  });
}

void move_rows(const Block& block, int64_t unit_bytes, bool flip) {
  if (!flip) {
    switch (block.bytes) {  // the widths that people use, as constants: a row is one to four moves, without a loop
      case 16: return copy<64>(block, 16);
      case 32: return copy<64>(block, 32);
      case 64: return copy<64>(block, 64);
      case 128: return copy<64>(block, 128);
      default: return copy<64>(block, block.bytes);
    }
  }
  switch (unit_bytes) {
    case 1: return mirror<uint8_t>(block);
    case 2: return mirror<uint16_t>(block);
    case 4: return mirror<uint32_t>(block);
    case 8: return mirror<uint64_t>(block);
    case 3: return mirror_units(block, 3);    // three channels side by side: uint8,
    case 6: return mirror_units(block, 6);    // 16-bit floats,
    case 12: return mirror_units(block, 12);  // float,
    case 24: return mirror_units(block, 24);  // double
    default: return mirror_units(block, unit_bytes);
  }
}

// ---- forward -------------------------------------------------------------------------------------

void crop(const CropParams& params, int64_t begin, int64_t end, void* scratch) {
  const CropParams p = params;
  const Geometry g = p.geometry;
  const int64_t unit_bytes = g.unit * p.in_size, row_bytes = g.width * unit_bytes, row_elements = g.width * g.unit;
  const Converter converter(p.in_dtype, p.in_size, p.out_dtype, p.out_size, p.normalise, g.unit);
  const int64_t chunk = crop_rows(p);
  int64_t first = begin % g.height, plane = begin / g.height % g.planes;
  Window w;
  window_of(g, begin / g.height / g.planes, w);
  const char* image = static_cast<const char*>(p.images) + w.patch / g.patches * p.image_stride * p.in_size;
  for (int64_t row = begin; row < end;) {
    int64_t planes = 1, count = smaller(smaller(g.height - first, end - row), chunk);  // what is made in this step
    if (count == g.height && !p.convert) planes = smaller(g.planes - plane, (end - row) / g.height);
    char* const out = static_cast<char*>(p.patches) + row * row_elements * p.out_size;
    char* const rows = p.convert ? static_cast<char*>(scratch) : out;
    const int64_t from = larger(first, w.patch_y), to = smaller(first + count, w.patch_y + w.rows);  // inside the image
    if (w.columns < g.width || to - from < count) std::memset(rows, 0, planes * count * row_bytes);
    if (from < to) {
      const int64_t source = plane * p.plane_stride + (w.image_y + from - w.patch_y) * p.row_stride + w.image_x * g.unit;
      move_rows({rows + (from - first) * row_bytes + w.patch_x * unit_bytes, image + source * p.in_size, g.height * row_bytes,
                 p.plane_stride * p.in_size, row_bytes, p.row_stride * p.in_size, planes, to - from, w.columns * unit_bytes},
                unit_bytes, w.flip);
    }
    if (p.convert) converter(rows, out, count * row_elements, plane);
    row += planes * count;
    first += count;
    if (first < g.height) continue;
    first = 0;
    plane += planes;
    if (plane < g.planes || row == end) continue;
    plane = 0;
    window_of(g, w.patch + 1, w);
    image = static_cast<const char*>(p.images) + w.patch / g.patches * p.image_stride * p.in_size;
  }
}

// ---- backward ------------------------------------------------------------------------------------

// sum[0, n) += from[0, n) for n < 2 * kCount: one register of each power of two that n holds
template <typename T, int kCount>
FASTKD_INLINE void add_rest(T* sum, const T* from, int64_t n) {
  typedef T Register __attribute__((vector_size(kCount * sizeof(T))));
  if (n >= kCount) {
    Register a, b;
    std::memcpy(&a, sum, sizeof a);
    std::memcpy(&b, from, sizeof b);
    a += b;
    std::memcpy(sum, &a, sizeof a);
    sum += kCount, from += kCount, n -= kCount;
  }
  if constexpr (kCount > 1) {
    if (n > 0) add_rest<T, kCount / 2>(sum, from, n);
  }
}

template <typename T>
FASTKD_INLINE void add(const Block& block, int64_t n) {
  constexpr int L = kLanes<Vector<T>>;
  each_row(block, [n](char* to, const char* from) __attribute__((always_inline)) {
    T* const sum = reinterpret_cast<T*>(to);
    const T* const term = reinterpret_cast<const T*>(from);
    int64_t i = 0;
    for (; i <= n - L; i += L) store(sum + i, load(sum + i) + load(term + i));
    if (i < n) add_rest<T, L / 2>(sum + i, term + i, n - i);
  });
}
template <typename T>
void add_rows(const Block& block) {
  switch (block.bytes / static_cast<int64_t>(sizeof(T))) {  // constants, as in move_rows
    case 4: return add<T>(block, 4);
    case 8: return add<T>(block, 8);
    case 16: return add<T>(block, 16);
    case 32: return add<T>(block, 32);
    default: return add<T>(block, block.bytes / static_cast<int64_t>(sizeof(T)));
  }
}

// The windows of an image that see any of it, last first.
int64_t windows_of(const Geometry& g, int64_t image, Window* windows) {
  int64_t count = 0;
  for (int64_t j = g.patches; j-- > 0;) {
    window_of(g, image * g.patches + j, windows[count]);
    count += windows[count].rows > 0;
  }
  return count;
}

template <typename Sum>
void crop_backward_of(const CropBackwardParams& params, int64_t begin, int64_t end, char* scratch) {
  const CropBackwardParams p = params;
  const Geometry g = p.geometry;
  constexpr Dtype kSum = sizeof(Sum) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  constexpr int64_t kSize = sizeof(Sum);
  const bool narrow = p.dtype != kSum, scaled = p.normalise.scale != nullptr;
  const BackwardScratch layout = backward_scratch(p);
  Window* const windows = reinterpret_cast<Window*>(scratch);
  char* const mirrored = scratch + layout.mirrored;
  char* const widened = scratch + layout.widened;
  const int64_t unit_bytes = g.unit * p.size, image_row = g.image_width * g.unit * kSize, patch_row = g.width * unit_bytes;
  const Converter widen_run(p.dtype, p.size, kSum, kSize, {}, g.unit);
  const Converter finish(kSum, kSize, p.dtype, p.size, p.normalise, g.unit);
  const int64_t band = backward_rows(p);
  const int64_t band_planes = narrow || scaled || g.flip != nullptr ? 1 : band / g.image_height;
  int64_t first = begin % g.image_height, plane = begin / g.image_height % g.planes;
  int64_t image = begin / g.image_height / g.planes, windows_count = windows_of(g, image, windows);
  for (int64_t row = begin; row < end;) {
    int64_t planes = 1, count = smaller(smaller(g.image_height - first, end - row), band);
    if (count == g.image_height && band_planes > 1) {
      planes = smaller(smaller(g.planes - plane, band_planes), (end - row) / g.image_height);
    }
    char* const out = static_cast<char*>(p.grad_images) + row * g.image_width * unit_bytes;
    char* const sums = narrow ? scratch + layout.sums : out;
    std::memset(sums, 0, planes * count * image_row);
    for (int64_t i = 0; i < windows_count; ++i) {
      const Window& w = windows[i];
      const int64_t from = larger(first, w.image_y), to = smaller(first + count, w.image_y + w.rows);
      if (from >= to) continue;
      const int64_t rows = to - from, n = w.columns * g.unit;
      const int64_t patch_y = (w.patch * g.planes + plane) * g.height + w.patch_y + from - w.image_y;
      const char* source = static_cast<const char*>(p.grad_patches) + patch_y * patch_row + w.patch_x * unit_bytes;
      int64_t stride = patch_row;
      if (w.flip) {
        move_rows({mirrored, source, 0, 0, n * p.size, stride, 1, rows, n * p.size}, unit_bytes, true);
        source = mirrored;
        stride = n * p.size;
      }
      if (narrow) {
        const int64_t run = stride == n * p.size ? rows : 1;  // whole rows at once where they lie side by side
        for (int64_t r = 0; r < rows; r += run) widen_run(source + r * stride, widened + r * n * kSize, run * n, plane);
        source = widened;
        stride = n * kSize;
      }
      add_rows<Sum>({sums + (from - first) * image_row + w.image_x * g.unit * kSize, source, g.image_height * image_row,
                     g.height * patch_row, image_row, stride, planes, rows, n * kSize});
    }
    if (narrow || scaled) finish(sums, out, count * g.image_width * g.unit, plane);
    row += planes * count;
    first += count;
    if (first < g.image_height) continue;
    first = 0;
    plane += planes;
    if (plane < g.planes || row == end) continue;
    plane = 0;
    windows_count = windows_of(g, ++image, windows);
  }
}

void crop_backward(const CropBackwardParams& params, int64_t begin, int64_t end, void* scratch) {
  if (params.dtype == Dtype::kFloat64) return crop_backward_of<double>(params, begin, end, static_cast<char*>(scratch));
  crop_backward_of<float>(params, begin, end, static_cast<char*>(scratch));
}

// ---- places ----------------------------------------------------------------------------------------

void places(const PlacesParams& params, int64_t begin, int64_t end) {
  const PlacesParams p = params;
  constexpr int kBlock = 16;  // independent words side by side: the compiler makes registers of them
  for (int64_t first = begin; first < end; first += kBlock) {
    Words words[kBlock];
    for (int i = 0; i < kBlock; ++i) words[i] = philox(p.seed, Stream::kCrop, first + i);
    for (int64_t i = first; i < smaller(first + kBlock, end); ++i) {
      const Place place = crop_math::place(words[i - first], {p.y_low, p.y_count}, {p.x_low, p.x_count}, p.flip_below);
      p.offsets[2 * i] = place.y;
      p.offsets[2 * i + 1] = place.x;
      p.flip[i] = place.flip;
    }
  }
}

}  // namespace

extern const Kernels kernels = {crop, crop_backward, places};

}  // namespace fastkd::FASTKD_ISA::crop
