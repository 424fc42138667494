// Moments of channels on the CPU, compiled once for each instruction set. The maths: math.h.
//
// Mapping: a task is a part of the maps and a block of channels (Plan). It has one pass, in double: sums of x - shift and of its
// square for each channel, where the shift is the channel's first number. Double has 29 bits more than float, and the shift, be
// it an outlier, is beside the mean by less than the deviation times the root of the count: no bit of a result is lost. Doubles
// have a second pass, beside the mean that the first one found. Parts are merged by their means.
//   rows     pixels side by side: lanes are pixels
//   columns  channels side by side: lanes are channels, kChunkPixels pixels at a time, which stay in the cache; a few pixels of
//   few
//            channels are taken for one of more channels, so that they fill registers
//   turned   short rows: several samples' rows of a block of channels, copied so that channels lie side by side
// Bytes: maps read once; backward, read once and written once. Forward, for 64 bytes of floats: 2 conversions, 6 operations.
#include "moments/kernel.h"

#include "common/simd.h"
#include "moments/math.h"

namespace fastkd::FASTKD_ISA::moments {
namespace {

using ::fastkd::moments::BackwardParams;
using ::fastkd::moments::kChunkPixels;
using ::fastkd::moments::Kernels;
using ::fastkd::moments::kPanel;
using ::fastkd::moments::kScratchBytes;
using ::fastkd::moments::kShortPanel;
using ::fastkd::moments::kShortRow;
using ::fastkd::moments::Maps;
using ::fastkd::moments::Params;
using ::fastkd::moments::Part;
using ::fastkd::moments::Plan;
using moments_math::from_sums;
using moments_math::gradient_of;
using moments_math::merge;

constexpr int64_t kPad = 16;  // a register of any set and type
constexpr int64_t kTurned = kChunkPixels * kShortPanel;
constexpr int D = kLanes<F64>;

FASTKD_INLINE void widen_to(F32 v, F64 (&out)[2]) {
  F32Half half[2];
  std::memcpy(half, &v, sizeof v);
  for (int h = 0; h < 2; ++h) out[h] = __builtin_convertvector(half[h], F64);
}
FASTKD_INLINE void widen_to(F64 v, F64 (&out)[1]) { out[0] = v; }
FASTKD_INLINE F32 narrow(const F64 (&wide)[2]) {
  const F32Half half[2] = {__builtin_convertvector(wide[0], F32Half), __builtin_convertvector(wide[1], F32Half)};
  F32 v;
  std::memcpy(&v, half, sizeof v);
  return v;
}
FASTKD_INLINE F64 narrow(const F64 (&wide)[1]) { return wide[0]; }

// Lane numbers.
template <typename V>
FASTKD_INLINE auto lanes() {
  decltype(V{} < V{}) lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  return lane;
}

// Sums of the numbers in registers of V, each relative to the shift of its lane.
template <typename V>
struct Sums {
  static constexpr int kWide = kLanes<V> / D;  // registers of doubles for each of V
  F64 shift[kWide], sum[2][kWide] = {}, square[2][kWide] = {};

  FASTKD_INLINE void add(int k, V v) {  // k: 0 or 1, in turn
    F64 wide[kWide];
    widen_to(v, wide);
    for (int h = 0; h < kWide; ++h) {
      const F64 difference = wide[h] - shift[h];
      sum[k][h] += difference;
      square[k][h] += difference * difference;
    }
  }
  // load_at(i) for all i < count
  template <typename LoadAt>
  FASTKD_INLINE void add_all(int64_t count, const LoadAt& load_at) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int k = 0; k < 4; ++k) add(k % 2, load_at(i + k));
    }
    for (; i < count; ++i) add(0, load_at(i));
  }
};

// What is known of channels, one after the other: sums relative to a shift, and the moments that follow.
struct Columns {
  double *shift, *sum, *square, *mean, *m2;
};

// ---- rows: pixels side by side ------------------------------------------------------------------

// Adds a row of a register or more.
template <typename T>
FASTKD_INLINE void add_row(const T* x, int64_t pixels, double shift, double& sum, double& square) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>, kWide = Sums<V>::kWide;
  Sums<V> sums;
  for (F64& s : sums.shift) s = broadcast<F64>(shift);
  const int64_t whole = pixels / L, left = pixels % L;
  sums.add_all(whole, [&](int64_t i) __attribute__((always_inline)) { return load(x + i * L); });
  // the last register, without the pixels that were there before: those are where the shift is
  if (left > 0) sums.add(1, lanes<V>() >= L - static_cast<int>(left) ? load(x + pixels - L) : narrow(sums.shift));
  const auto total = [](const F64(&of)[2][kWide]) __attribute__((always_inline)) {
    const F64 all = of[0][0] + of[1][0];
    return reduce_sum(kWide == 1 ? all : all + (of[0][kWide - 1] + of[1][kWide - 1]));
  };
  sum += total(sums.sum);
  square += total(sums.square);
}

// ---- columns: channels side by side -------------------------------------------------------------

// Adds pixels, `stride` numbers apart, of some channels.
template <typename T>
FASTKD_INLINE void add_columns(const T* x, int64_t stride, int64_t pixels, int64_t channels, const Columns& columns) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>, kWide = Sums<V>::kWide;
  // load_pixel(p, fill): lanes that are not to be added hold the fill
  const auto one_register = [&](int64_t c, const auto& load_pixel) __attribute__((always_inline)) {
    Sums<V> sums;
    for (int h = 0; h < kWide; ++h) {
      sums.shift[h] = load(columns.shift + c + h * D);
      sums.sum[0][h] = load(columns.sum + c + h * D);
      sums.square[0][h] = load(columns.square + c + h * D);
    }
    const V fill = narrow(sums.shift);
    sums.add_all(pixels, [&](int64_t i) __attribute__((always_inline)) { return load_pixel(x + c + i * stride, fill); });
    for (int h = 0; h < kWide; ++h) {
      store(columns.sum + c + h * D, sums.sum[0][h] + sums.sum[1][h]);
      store(columns.square + c + h * D, sums.square[0][h] + sums.square[1][h]);
    }
  };
  int64_t c = 0;
  for (; c + L <= channels; c += L) one_register(c, [](const T* p, V) __attribute__((always_inline)) { return load(p); });
  const int left = static_cast<int>(channels - c);
  if (left == 0) return;
  if (c > 0) {
    one_register(channels - L,
                 [&](const T* p, V fill) __attribute__((always_inline)) { return lanes<V>() >= L - left ? load(p) : fill; });
  } else {
    one_register(0, [&](const T* p, V fill)
                        __attribute__((always_inline)) { return lanes<V>() < left ? load_first(p, left, Scalar<T>(0)) : fill; });
  }
}

// The numbers at x as doubles, up to a register more.
template <typename T>
FASTKD_INLINE void widen_row(const T* x, int64_t count, double* out) {
  constexpr int L = kLanes<Vector<T>>;
  for (int64_t i = 0; i < count; i += L) {
    F64 wide[L / D];
    widen_to(load_up_to(x + i, count - i, Scalar<T>(0)), wide);
    for (int h = 0; h < L / D; ++h) store(out + i + h * D, wide[h]);
  }
}

// Pixels that are taken for one of more channels, which then fill registers.
template <typename T>
FASTKD_INLINE int64_t folded(int64_t channels, int64_t pixels) {
  constexpr int64_t kEnough = 4 * kPad;
  int64_t fold = 1;
  while (fold < kPad && fold * channels % kLanes<Vector<T>> != 0) fold *= 2;
  while (fold * channels < kEnough) fold *= 2;
  return fold * channels <= kPanel && fold * 8 <= pixels ? fold : 1;
}

// ---- a part of the maps -------------------------------------------------------------------------

// A task's channels.
struct Block {
  Part part;
  int64_t index, first, count;
  Block(const Maps& maps, const Plan& plan, int64_t task)
      : part(maps, plan, task / plan.blocks),
        index(task / plan.blocks),
        first(task % plan.blocks * plan.block),
        count(maps.channels - first < plan.block ? maps.channels - first : plan.block) {}
  // Where a sample of the part begins, at a pixel of the part.
  FASTKD_INLINE int64_t at(const Maps& maps, int64_t sample, int64_t pixel) const {
    const int64_t outer = part.first + sample, inner = part.begin + pixel;
    return maps.channels_last ? (outer * maps.pixels + inner) * maps.channels + first
                              : (outer * maps.channels + first) * maps.pixels + inner;
  }
};

// Memory of a task.
struct Scratch {
  static constexpr int64_t kRoom = kPanel + kPad;
  Columns columns;
  char* rest;
  explicit Scratch(char* memory) {
    double* const numbers = reinterpret_cast<double*>(memory);
    columns = {numbers, numbers + kRoom, numbers + 2 * kRoom, numbers + 3 * kRoom, numbers + 4 * kRoom};
    rest = memory + 5 * kRoom * sizeof(double);
  }
};
constexpr int64_t kRestBytes = kScratchBytes - 5 * Scratch::kRoom * static_cast<int64_t>(sizeof(double));

// Each of the following adds the numbers of a block; where `begin`, it first finds the shifts.

template <typename T>
FASTKD_INLINE void add_rows(const Maps& maps, const Block& block, const Scratch& scratch, bool begin) {
  const Columns& columns = scratch.columns;
  for (int64_t s = 0; s < block.part.samples; ++s) {
    const T* const x = static_cast<const T*>(maps.data) + block.at(maps, s, 0);
    for (int64_t c = 0; c < block.count; ++c) {
      const T* const row = x + c * maps.pixels;
      if (begin && s == 0) columns.shift[c] = load(row)[0];
      add_row(row, block.part.pixels, columns.shift[c], columns.sum[c], columns.square[c]);
    }
  }
}

// The rows of a sample, channels brought side by side: [pixels, stride].
template <typename T, typename S>
FASTKD_INLINE void turn(const T* x, int64_t channels, int64_t pixels, int64_t stride, S* out, S* buffer) {
  const S* from;
  if constexpr (std::is_same_v<T, S>) {
    from = x;
  } else {
    const int64_t count = channels * pixels;
    for (int64_t i = 0; i < count; i += kLanes<F32>) store(buffer + i, load_up_to(x + i, count - i, S(0)));
    from = buffer;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) out[p * stride + c] = from[c * pixels + p];
  }
}

template <typename T>
FASTKD_INLINE void add_turned(const Maps& maps, const Block& block, const Scratch& scratch, bool begin) {
  using S = Scalar<T>;
  static_assert((kTurned + kShortPanel * kShortRow + kPad) * sizeof(S) <= kRestBytes);
  S *const turned = reinterpret_cast<S*>(scratch.rest), *const buffer = turned + kTurned;
  const int64_t pixels = maps.pixels, stride = (block.count + kPad - 1) / kPad * kPad, together = kChunkPixels / pixels;
  if (block.count < stride) std::memset(turned, 0, kTurned * sizeof(S));
  for (int64_t s = 0; s < block.part.samples; s += together) {
    const int64_t samples = block.part.samples - s < together ? block.part.samples - s : together;
    for (int64_t i = 0; i < samples; ++i) {
      const T* const x = static_cast<const T*>(maps.data) + block.at(maps, s + i, 0);
      turn(x, block.count, pixels, stride, turned + i * pixels * stride, buffer);
    }
    if (begin && s == 0) widen_row(turned, stride, scratch.columns.shift);
    add_columns(turned, stride, samples * pixels, stride, scratch.columns);
  }
}

template <typename T>
FASTKD_INLINE void add_pixels(const Maps& maps, const Block& block, const Scratch& scratch, bool begin) {
  const Columns& columns = scratch.columns;
  const T* const x = static_cast<const T*>(maps.data) + block.at(maps, 0, 0);
  const int64_t pixels = block.part.pixels, fold = block.count == maps.channels ? folded<T>(block.count, pixels) : 1;
  const int64_t stride = maps.channels * fold, rows = pixels / fold, done = rows * fold, count = block.count;
  if (begin) widen_row(x, count, columns.shift);
  for (int64_t f = 1; f < fold; ++f) std::memcpy(columns.shift + f * count, columns.shift, count * sizeof(double));
  for (int64_t row = 0; row < rows; row += kChunkPixels) {
    add_columns(x + row * stride, stride, rows - row < kChunkPixels ? rows - row : kChunkPixels, count * fold, columns);
  }
  for (int64_t i = count; i < count * fold; ++i) {
    columns.sum[i % count] += columns.sum[i];
    columns.square[i % count] += columns.square[i];
  }
  if (done < pixels) add_columns(x + done * maps.channels, maps.channels, pixels - done, count, columns);
}

// Results from what the columns have become.
template <typename S>
FASTKD_INLINE void write_as(const Params& params, int64_t at, int64_t channels, const Columns& columns) {
  const double inverse = 1.0 / static_cast<double>(params.maps.count());
  S *const mean = static_cast<S*>(params.mean) + at, *const var = static_cast<S*>(params.var) + at;
  for (int64_t c = 0; c < channels; ++c) mean[c] = static_cast<S>(columns.mean[c]);
  for (int64_t c = 0; c < channels; ++c) var[c] = static_cast<S>(columns.m2[c] * inverse);
}
void write(const Params& params, int64_t at, int64_t channels, const Columns& columns) {
  if (params.maps.dtype == Dtype::kFloat64) {
    write_as<double>(params, at, channels, columns);
  } else {
    write_as<float>(params, at, channels, columns);
  }
}

template <typename T>
void part_of(const Params& params, int64_t task, char* memory) {
  const Maps& maps = params.maps;
  const Block block(maps, params.plan, task);
  const Scratch scratch(memory);
  const Columns& columns = scratch.columns;
  const double inverse = 1.0 / static_cast<double>(block.part.samples * block.part.pixels);
  constexpr int kPasses = sizeof(T) == 8 ? 2 : 1;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::memset(columns.sum, 0, 2 * Scratch::kRoom * sizeof(double));  // and square
    if (maps.channels_last) {
      add_pixels<T>(maps, block, scratch, pass == 0);
    } else if (maps.pixels < kShortRow) {
      add_turned<T>(maps, block, scratch, pass == 0);
    } else {
      add_rows<T>(maps, block, scratch, pass == 0);
    }
    for (int64_t c = 0; c < block.count; c += D) {
      F64 mean, m2;
      from_sums(load(columns.shift + c), load(columns.sum + c), load(columns.square + c), inverse, mean, m2);
      store(columns.mean + c, mean);
      store(columns.m2 + c, m2);
      if (pass + 1 < kPasses) store(columns.shift + c, mean);
    }
  }
  const int64_t at = block.index * maps.channels + block.first;
  if (params.plan.merged == 1) return write(params, at, block.count, columns);
  std::memcpy(params.part_mean + at, columns.mean, block.count * sizeof(double));
  std::memcpy(params.part_m2 + at, columns.m2, block.count * sizeof(double));
}

void merge_parts(const Params& params, int64_t task, char* memory) {
  const Maps& maps = params.maps;
  const Plan& plan = params.plan;
  const Block block(maps, plan, task);
  const Columns columns = Scratch(memory).columns;
  const int64_t outer = block.index;
  double before = 0;
  std::memset(columns.mean, 0, 2 * Scratch::kRoom * sizeof(double));  // and m2
  for (int64_t i = outer * plan.merged; i < (outer + 1) * plan.merged; ++i) {
    const Part part(maps, plan, i);
    const double count = static_cast<double>(part.samples * part.pixels), share = count / (before + count);
    const double *const mean = params.part_mean + i * maps.channels + block.first, *const m2 = params.part_m2 +
                                                                                               i * maps.channels + block.first;
    for (int64_t c = 0; c < block.count; ++c) merge(columns.mean[c], columns.m2[c], mean[c], m2[c], share, share * before);
    before += count;
  }
  write(params, outer * maps.channels + block.first, block.count, columns);
}

// ---- backward -----------------------------------------------------------------------------------

// What the gradients of a channel's results say of its elements.
template <typename S>
struct Slope {
  S mean, slope, flat;
};
template <typename S>
FASTKD_INLINE Slope<S> slope_at(const BackwardParams& params, int64_t i) {
  const auto at = [&](const void* p) { return p == nullptr ? 0.0 : static_cast<double>(static_cast<const S*>(p)[i]); };
  const double inverse = 1.0 / static_cast<double>(params.maps.count());
  return {static_cast<const S*>(params.mean)[i], static_cast<S>(2 * at(params.grad_var) * inverse),
          static_cast<S>(at(params.grad_mean) * inverse)};
}

// load_slope(i): that of the register at i; `count` numbers.
template <typename T, typename LoadSlope>
FASTKD_INLINE void write_gradient(const T* x, T* out, int64_t count, const LoadSlope& load_slope) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    const Slope<V> s = load_slope(i);
    store(out + i, gradient_of(load(x + i), s.mean, s.slope, s.flat));
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) at(i);
  if (i == count) return;
  if (count >= L) return at(count - L);  // some numbers again
  const Slope<V> s = load_slope(0);
  const V few = load_first(x, static_cast<int>(count), Scalar<T>(0));
  store_first(out, gradient_of(few, s.mean, s.slope, s.flat), static_cast<int>(count));
}

// The slopes of a row of numbers.
template <typename S>
struct Table {
  S *mean, *slope, *flat;
  FASTKD_INLINE void set(int64_t i, int64_t count, const Slope<S>& s) const {
    for (int64_t k = i; k < i + count; ++k) mean[k] = s.mean, slope[k] = s.slope, flat[k] = s.flat;
  }
};
constexpr int64_t kTable = kShortPanel * kShortRow;  // numbers
static_assert(kPanel <= kTable && 3 * (kTable + kPad) * sizeof(double) <= kScratchBytes);

template <typename T>
void backward_of(const BackwardParams& params, int64_t task, char* memory) {
  using S = Scalar<T>;
  using V = Vector<T>;
  const Maps& maps = params.maps;
  const Block block(maps, params.plan, task);
  const T* const x = static_cast<const T*>(maps.data);
  T* const out = static_cast<T*>(params.gradient);
  const int64_t result = (maps.channels_last ? block.part.first * maps.channels : 0) + block.first;
  if (!maps.channels_last && maps.pixels >= kShortRow) {
    for (int64_t s = 0; s < block.part.samples; ++s) {
      for (int64_t c = 0; c < block.count; ++c) {
        const Slope<S> own = slope_at<S>(params, result + c);
        const Slope<V> all = {broadcast<V>(own.mean), broadcast<V>(own.slope), broadcast<V>(own.flat)};
        const int64_t at = block.at(maps, s, 0) + c * maps.pixels;
        write_gradient(x + at, out + at, block.part.pixels, [&](int64_t) __attribute__((always_inline)) { return all; });
      }
    }
    return;
  }
  S* const numbers = reinterpret_cast<S*>(memory);
  const Table<S> table = {numbers, numbers + kTable + kPad, numbers + 2 * (kTable + kPad)};
  const auto load_slope = [&](int64_t i) __attribute__((always_inline)) {
    return Slope<V>{load(table.mean + i), load(table.slope + i), load(table.flat + i)};
  };
  const int64_t pixels = block.part.pixels, each = maps.channels_last ? 1 : pixels;
  const int64_t fold = maps.channels_last && block.count == maps.channels ? folded<T>(block.count, pixels) : 1;
  for (int64_t f = 0; f < fold; ++f) {
    for (int64_t c = 0; c < block.count; ++c) {
      table.set((f * block.count + c) * each, each, slope_at<S>(params, result + c));
    }
  }
  const int64_t rows = maps.channels_last ? pixels : block.part.samples;
  for (int64_t row = 0; row < rows; row += fold) {
    const int64_t at = maps.channels_last ? block.at(maps, 0, row) : block.at(maps, row, 0);
    const int64_t together = rows - row < fold ? rows - row : fold;
    write_gradient(x + at, out + at, together * block.count * each, load_slope);
  }
}

void part(const Params& params, int64_t task, char* memory) {
  for_dtype(params.maps.dtype, [&]<typename T>() { part_of<T>(params, task, memory); });
}
void backward(const BackwardParams& params, int64_t task, char* memory) {
  for_dtype(params.maps.dtype, [&]<typename T>() { backward_of<T>(params, task, memory); });
}

}  // namespace

extern const Kernels kernels{part, merge_parts, backward};

}  // namespace fastkd::FASTKD_ISA::moments
