// Moments of channels on the CPU, compiled once for each instruction set. The maths: math.h.
//
// Mapping: a task is a part of the maps and a block of channels (Plan); it sums chunk by chunk, each in two passes, of which the
// second finds the chunk in the cache: the mean, then differences from it and their squares. Sums of a chunk are in float, of
// few numbers each, and chunks are merged in double.
//   rows     pixels side by side: chunks of kChunk pixels of a channel, lanes are pixels
//   columns  channels side by side: kChunkPixels pixels, lanes are channels; a few pixels of few channels are taken for
//            one of more channels, so that they fill registers
//   turned   short rows: several samples' rows of a block of channels, copied so that channels lie side by side
// Bytes: maps read once; backward, read once and written once.
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

constexpr int64_t kChunk = 1024;  // pixels of a row that are summed at a time
constexpr int64_t kPad = 16;      // a register of any set and type
constexpr int64_t kTurned = kChunkPixels * kShortPanel;
constexpr int D = kLanes<F64>;

FASTKD_INLINE void widen_to(F32 v, F64 (&out)[2]) {
  F32Half half[2];
  std::memcpy(half, &v, sizeof v);
  for (int h = 0; h < 2; ++h) out[h] = __builtin_convertvector(half[h], F64);
}
FASTKD_INLINE void widen_to(F64 v, F64 (&out)[1]) { out[0] = v; }

FASTKD_INLINE double number_at(const float* p) { return *p; }
FASTKD_INLINE double number_at(const double* p) { return *p; }
template <typename T>
FASTKD_INLINE double number_at(const T* p) {
  return load_first(p, 1, 0.0f)[0];
}

// The lanes from `first` on.
template <typename V>
FASTKD_INLINE auto lanes_from(int64_t first) {
  decltype(V{} < V{}) lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  return lane >= static_cast<std::remove_cvref_t<decltype(lane[0])>>(first);
}

struct Moments {
  double mean, m2;
};

// Of `count` numbers, `stride` apart: some are infinite or NaN, or their squares are beyond float.
template <typename T>
__attribute__((noinline)) Moments with_care(const T* x, int64_t count, int64_t stride) {
  const double inverse = 1.0 / static_cast<double>(count);
  double mean = 0, sum = 0, square = 0;
  for (int64_t i = 0; i < count; ++i) mean += number_at(x + i * stride) * inverse;
  for (int64_t i = 0; i < count; ++i) {
    const double difference = number_at(x + i * stride) - mean;
    sum += difference;
    square += difference * difference;
  }
  Moments result;
  from_sums(mean, sum, square, inverse, result.mean, result.m2);
  return result;
}

// Sums of a chunk. each(fill, body, done) calls body(k, v) for its registers, k = 0 to 3 in turn, and done() after every 16 of
// them at most; lanes without a number hold `fill`. fold: from sums of x - first over the count to where the mean is beside
// `first`, which any number is.
template <typename V>
struct Sums {
  static constexpr int kWide = kLanes<V> / D;  // registers of doubles
  V shift;
  F64 sum[kWide], square[kWide];
};
template <typename V, typename Each, typename Fold>
FASTKD_INLINE Sums<V> sums_of(V first, double inverse, const Each& each, const Fold& fold) {
  const V scale = broadcast<V>(inverse);  // of each number, so that no sum is beyond float
  V part[4] = {};
  each(first, [&](int k, V v) __attribute__((always_inline)) { part[k] += (v - first) * scale; }, [] {});
  Sums<V> result = {first + fold((part[0] + part[1]) + (part[2] + part[3])), {}, {}};
  V sum[4] = {}, square[4] = {};
  const auto add = [&](int k, V v) __attribute__((always_inline)) {
    const V difference = v - result.shift;
    sum[k] += difference;
    square[k] += difference * difference;
  };
  // many small squares beside a large one would all be rounded alike
  const auto done = [&]() __attribute__((always_inline)) {
    F64 wide[Sums<V>::kWide];
    const auto add_to = [&](F64* total, V(&of)[4]) __attribute__((always_inline)) {
      widen_to((of[0] + of[1]) + (of[2] + of[3]), wide);
      for (int h = 0; h < Sums<V>::kWide; ++h) total[h] += wide[h];
      for (V& one : of) one = V{};
    };
    add_to(result.sum, sum);
    add_to(result.square, square);
  };
  each(result.shift, add, done);
  return result;
}
constexpr int64_t kTogether = 16;

// ---- rows: pixels side by side ------------------------------------------------------------------

// Of `count` pixels of a row of a register or more, from x on. first: a pixel of the row, in all lanes.
template <typename T>
FASTKD_INLINE Moments moments_of_chunk(const T* x, int64_t count, Vector<T> first) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  const double inverse = 1.0 / static_cast<double>(count);
  const auto each = [&](V fill, const auto& body, const auto& done) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kTogether * L <= count; i += kTogether * L) {
      for (int k = 0; k < kTogether; ++k) body(k % 4, load(x + i + k * L));
      done();
    }
    for (int k = 0; i + L <= count; i += L) body(k++ % 4, load(x + i));
    if (i < count) body(3, lanes_from<V>(L - (count - i)) ? load(x + count - L) : fill);
    done();
  };
  const auto fold = [](V v) __attribute__((always_inline)) { return broadcast<V>(reduce_sum(widen(v))); };
  const Sums<V> sums = sums_of(first, inverse, each, fold);
  const auto total = [](const F64(&of)[Sums<V>::kWide]) __attribute__((always_inline)) {
    return reduce_sum(Sums<V>::kWide == 1 ? of[0] : of[0] + of[Sums<V>::kWide - 1]);
  };
  const double square = total(sums.square);
  if (!(square < __builtin_inf())) return with_care(x, count, 1);
  Moments result;
  from_sums(static_cast<double>(sums.shift[0]), total(sums.sum), square, inverse, result.mean, result.m2);
  return result;
}

template <typename T>
FASTKD_INLINE Moments moments_of_row(const T* x, int64_t pixels) {
  const Vector<T> first = broadcast<Vector<T>>(load(x)[0]);
  Moments row = moments_of_chunk(x, pixels < kChunk ? pixels : kChunk, first);
  for (int64_t i = kChunk; i < pixels; i += kChunk) {
    const int64_t count = pixels - i < kChunk ? pixels - i : kChunk;
    const Moments chunk = moments_of_chunk(x + i, count, first);
    const double share = static_cast<double>(count) / static_cast<double>(i + count);
    merge(row.mean, row.m2, chunk.mean, chunk.m2, share, share * static_cast<double>(i));
  }
  return row;
}

// ---- columns: channels side by side -------------------------------------------------------------

// Of channels, one after the other.
struct Columns {
  double *mean, *m2;
  FASTKD_INLINE Columns from(int64_t channel) const { return {mean + channel, m2 + channel}; }
};

// Adds sets of `count` numbers to sets of `before`, which may be 0.
FASTKD_INLINE void merge_columns(Columns own, Columns other, int64_t channels, int64_t before, int64_t count) {
  const double share = static_cast<double>(count) / static_cast<double>(before + count);
  const double between = share * static_cast<double>(before);
  int64_t c = 0;
  for (; before > 0 && c + D <= channels; c += D) {
    F64 mean = load(own.mean + c), m2 = load(own.m2 + c);
    merge(mean, m2, load(other.mean + c), load(other.m2 + c), share, between);
    store(own.mean + c, mean);
    store(own.m2 + c, m2);
  }
  for (; c < channels; ++c) {
    if (before == 0) {
      own.mean[c] = other.mean[c], own.m2[c] = other.m2[c];
    } else {
      merge(own.mean[c], own.m2[c], other.mean[c], other.m2[c], share, between);
    }
  }
}

// Of up to kChunkPixels pixels, `stride` numbers apart, of some channels.
template <typename T>
FASTKD_INLINE void moments_of_columns(const T* x, int64_t stride, int64_t pixels, int64_t channels, Columns out) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  const double inverse = 1.0 / static_cast<double>(pixels);
  const auto one_register = [&](const T* from, Columns to, const auto& load_pixel) __attribute__((always_inline)) {
    const auto each = [&](V, const auto& body, const auto& done) __attribute__((always_inline)) {
      int64_t i = 0;
      for (; i + kTogether <= pixels; i += kTogether) {
        for (int k = 0; k < kTogether; ++k) body(k % 4, load_pixel(from + (i + k) * stride));
        done();
      }
      for (int k = 0; i < pixels; ++i) body(k++ % 4, load_pixel(from + i * stride));
      done();
    };
    const Sums<V> sums = sums_of(load_pixel(from), inverse, each, [](V v) __attribute__((always_inline)) { return v; });
    F64 shift[Sums<V>::kWide];
    widen_to(sums.shift, shift);
    for (int h = 0; h < Sums<V>::kWide; ++h) {
      F64 mean, m2;
      from_sums(shift[h], sums.sum[h], sums.square[h], inverse, mean, m2);
      store(to.mean + h * D, mean);
      store(to.m2 + h * D, m2);
      if (all_of(sums.square[h] < __builtin_inf())) continue;
      for (int lane = h * D; lane < (h + 1) * D && from + lane < x + channels; ++lane) {
        if (sums.square[h][lane - h * D] < __builtin_inf()) continue;
        const Moments channel = with_care(from + lane, pixels, stride);
        to.mean[lane] = channel.mean;
        to.m2[lane] = channel.m2;
      }
    }
  };
  const auto whole = [](const T* p) __attribute__((always_inline)) { return load(p); };
  int64_t c = 0;
  for (; c + L <= channels; c += L) one_register(x + c, out.from(c), whole);
  if (c == channels) return;
  if (channels >= L) {  // some channels again
    one_register(x + channels - L, out.from(channels - L), whole);
  } else {
    one_register(x, out, [&](const T* p) __attribute__((always_inline)) {
      return load_first(p, static_cast<int>(channels), Scalar<T>(0));
    });
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

// Memory of a task.
struct Scratch {
  Columns columns, chunk;
  char* rest;
  explicit Scratch(char* memory) {
    double* const numbers = reinterpret_cast<double*>(memory);
    constexpr int64_t kRoom = kPanel + kPad;
    columns = {numbers, numbers + kRoom};
    chunk = {numbers + 2 * kRoom, numbers + 3 * kRoom};
    rest = memory + 4 * kRoom * sizeof(double);
  }
};
constexpr int64_t kRestBytes = kScratchBytes - 4 * (kPanel + kPad) * static_cast<int64_t>(sizeof(double));

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
  // The number of a sample of the part, at a pixel of the part.
  FASTKD_INLINE int64_t at(const Maps& maps, int64_t sample, int64_t pixel) const {
    const int64_t outer = part.first + sample, inner = part.begin + pixel;
    return maps.channels_last ? (outer * maps.pixels + inner) * maps.channels + first
                              : (outer * maps.channels + first) * maps.pixels + inner;
  }
};

template <typename T>
FASTKD_INLINE void sum_rows(const Maps& maps, const Block& block, const Scratch& scratch) {
  const int64_t pixels = block.part.pixels;
  for (int64_t s = 0; s < block.part.samples; ++s) {
    const T* const x = static_cast<const T*>(maps.data) + block.at(maps, s, 0);
    const double share = 1.0 / static_cast<double>(s + 1), between = share * static_cast<double>(s * pixels);
    for (int64_t c = 0; c < block.count; ++c) {
      const Moments row = moments_of_row(x + c * maps.pixels, pixels);
      double &mean = scratch.columns.mean[c], &m2 = scratch.columns.m2[c];
      if (s == 0) {
        mean = row.mean, m2 = row.m2;
      } else {
        merge(mean, m2, row.mean, row.m2, share, between);
      }
    }
  }
}

// The rows of a sample, channels brought side by side: [pixels, channels padded to kPad].
template <typename T, typename S>
FASTKD_INLINE void turn(const T* x, int64_t channels, int64_t pixels, S* out, S* buffer) {
  const S* from;
  if constexpr (std::is_same_v<T, S>) {
    from = x;
  } else {
    const int64_t count = channels * pixels;
    for (int64_t i = 0; i < count; i += kLanes<F32>) store(buffer + i, load_up_to(x + i, count - i, S(0)));
    from = buffer;
  }
  const int64_t stride = (channels + kPad - 1) / kPad * kPad;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) out[p * stride + c] = from[c * pixels + p];
  }
}

template <typename T>
FASTKD_INLINE void sum_turned(const Maps& maps, const Block& block, const Scratch& scratch) {
  using S = Scalar<T>;
  static_assert((kTurned + kShortPanel * kShortRow + kPad) * sizeof(S) <= kRestBytes);
  S *const turned = reinterpret_cast<S*>(scratch.rest), *const buffer = turned + kTurned;
  const int64_t pixels = maps.pixels, channels = (block.count + kPad - 1) / kPad * kPad, together = kChunkPixels / pixels;
  std::memset(turned, 0, kTurned * sizeof(S));  // channels that there are not
  for (int64_t s = 0; s < block.part.samples; s += together) {
    const int64_t samples = block.part.samples - s < together ? block.part.samples - s : together;
    for (int64_t i = 0; i < samples; ++i) {
      turn(static_cast<const T*>(maps.data) + block.at(maps, s + i, 0), block.count, pixels, turned + i * pixels * channels,
           buffer);
    }
    moments_of_columns(turned, channels, samples * pixels, channels, scratch.chunk);
    merge_columns(scratch.columns, scratch.chunk, channels, s * pixels, samples * pixels);
  }
}

template <typename T>
FASTKD_INLINE void sum_columns(const Maps& maps, const Block& block, const Scratch& scratch) {
  const T* const x = static_cast<const T*>(maps.data) + block.at(maps, 0, 0);
  const int64_t pixels = block.part.pixels, fold = block.count == maps.channels ? folded<T>(block.count, pixels) : 1;
  const int64_t stride = maps.channels * fold, rows = pixels / fold, done = rows * fold;
  for (int64_t row = 0; row < rows; row += kChunkPixels) {
    const int64_t count = rows - row < kChunkPixels ? rows - row : kChunkPixels;
    moments_of_columns(x + row * stride, stride, count, block.count * fold, scratch.chunk);
    merge_columns(scratch.columns, scratch.chunk, block.count * fold, row, count);
  }
  for (int64_t i = 1; i < fold; ++i) {
    merge_columns(scratch.columns, scratch.columns.from(i * block.count), block.count, i * rows, rows);
  }
  if (done == pixels) return;
  moments_of_columns(x + done * maps.channels, maps.channels, pixels - done, block.count, scratch.chunk);
  merge_columns(scratch.columns, scratch.chunk, block.count, done, pixels - done);
}

// Results from what the columns have become.
template <typename S>
FASTKD_INLINE void write(const Params& params, int64_t at, int64_t channels, Columns columns) {
  const double count = static_cast<double>(params.maps.count());
  for (int64_t c = 0; c < channels; ++c) {
    static_cast<S*>(params.mean)[at + c] = static_cast<S>(columns.mean[c]);
    static_cast<S*>(params.var)[at + c] = static_cast<S>(columns.m2[c] / count);
  }
}
void write(const Params& params, int64_t at, int64_t channels, Columns columns) {
  if (params.maps.dtype == Dtype::kFloat64) {
    write<double>(params, at, channels, columns);
  } else {
    write<float>(params, at, channels, columns);
  }
}

template <typename T>
void part_of(const Params& params, int64_t task, char* memory) {
  const Maps& maps = params.maps;
  const Block block(maps, params.plan, task);
  const Scratch scratch(memory);
  if (maps.channels_last) {
    sum_columns<T>(maps, block, scratch);
  } else if (maps.pixels < kShortRow) {
    sum_turned<T>(maps, block, scratch);
  } else {
    sum_rows<T>(maps, block, scratch);
  }
  const int64_t at = block.index * maps.channels + block.first;
  if (params.plan.merged == 1) return write(params, at, block.count, scratch.columns);
  std::memcpy(params.part_mean + at, scratch.columns.mean, block.count * sizeof(double));
  std::memcpy(params.part_m2 + at, scratch.columns.m2, block.count * sizeof(double));
}

void merge_parts(const Params& params, int64_t task, char* memory) {
  const Maps& maps = params.maps;
  const Plan& plan = params.plan;
  const int64_t outer = task / plan.blocks;
  const Scratch scratch(memory);
  const Columns parts = {params.part_mean, params.part_m2};
  int64_t before = 0;
  const Block block(maps, plan, task);
  for (int64_t i = 0; i < plan.merged; ++i) {
    const int64_t index = outer * plan.merged + i;
    const Part part(maps, plan, index);
    merge_columns(scratch.columns, parts.from(index * maps.channels + block.first), block.count, before,
                  part.samples * part.pixels);
    before += part.samples * part.pixels;
  }
  write(params, outer * maps.channels + block.first, block.count, scratch.columns);
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

// function<T> for the dtype of the maps
#define FASTKD_BY_DTYPE(function)                                           \
  switch (params.maps.dtype) {                                              \
    case Dtype::kFloat64: return function<double>(params, task, memory);    \
    case Dtype::kBFloat16: return function<BFloat16>(params, task, memory); \
    case Dtype::kFloat16: return function<Float16>(params, task, memory);   \
    default: return function<float>(params, task, memory);                  \
  }

void part(const Params& params, int64_t task, char* memory) { FASTKD_BY_DTYPE(part_of) }
void backward(const BackwardParams& params, int64_t task, char* memory) { FASTKD_BY_DTYPE(backward_of) }

}  // namespace

extern const Kernels kernels{part, merge_parts, backward};

}  // namespace fastkd::FASTKD_ISA::moments
