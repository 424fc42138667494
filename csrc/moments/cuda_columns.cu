// Moments of columns, the channels of a pixel side by side, and their gradient.
//
// Mapping: a block has the channels of `width` threads, a pack of channels each (one, where rows of channels are no whole packs),
// and a part of the pixels, which its `height` rows of threads take in turn, some at a time, all on their way at once: two passes
// over registers, sums in float. Chunks are merged in double, then the threads of a channel, and by a second launch the parts.
// Bytes: the maps once; backward, the maps and the gradient once each.
#include "common/reduce.cuh"
#include "moments/cuda_moments.cuh"

namespace fastkd::moments {
namespace {

using namespace device;
using namespace FASTKD_ISA::moments;

// K channels of a pixel: a pack, or one.
template <typename T, int K>
struct Pixel {
  Words<T> words;
  FASTKD_DEVICE void load(const T* from) {
    const Pack<T> pack = load_pack_once(from);
    memcpy(&words, &pack, sizeof words);
  }
  FASTKD_DEVICE void read(Compute<T> (&values)[K]) const { unpack(words, values); }
  static FASTKD_DEVICE void store(T* to, const Compute<T> (&values)[K]) { store_pack_once(to, pack_of<T>(values)); }
};
template <typename T>
struct Pixel<T, 1> {
  T one;
  FASTKD_DEVICE void load(const T* from) { one = *from; }
  FASTKD_DEVICE void read(Compute<T> (&values)[1]) const { values[0] = to_compute(one); }
  static FASTKD_DEVICE void store(T* to, const Compute<T> (&values)[1]) { *to = from_compute<T>(values[0]); }
};

template <int K>
constexpr int kAhead = K == 1 ? kNumbersAhead : kPixelsAhead;

// What a thread has to do: pixels y, y + height, ... of a part, at its channels.
template <class Params, int K>
struct Place {
  int64_t channel;  // the first one
  int64_t outer, part;
  int64_t begin, pixels;  // the number of x at the first pixel and channel; pixels, 0 for threads without channels
  unsigned y;

  FASTKD_DEVICE explicit Place(const Params& p) {
    const int64_t units = p.maps.channels / K, panels = (units + p.width - 1) / p.width;
    const int64_t block = block_index(), panel = block % panels, at = block / panels;
    const int64_t unit = panel * p.width + thread_index() % p.width, piece = at % p.pieces;
    y = thread_index() / p.width;
    outer = at / p.pieces;
    part = at;
    channel = unit * K;
    const int64_t rest = p.maps.pixels - piece * p.piece, inside = rest < p.piece ? rest : p.piece;
    pixels = unit < units && y < p.height ? inside : 0;
    begin = (outer * p.maps.pixels + piece * p.piece) * p.maps.channels + channel;
  }
};

// body(i, n, chunk) for the thread's pixels: the first is i, n of them `height` apart; n is a constant where the chunk is full.
template <typename T, int K, class Params, class Body>
FASTKD_DEVICE void each_chunk(const Params& p, const Place<Params, K>& place, const Body& body) {
  const T* const x = static_cast<const T*>(p.maps.data) + place.begin;
  const int64_t step = static_cast<int64_t>(p.height) * p.maps.channels;
  const auto run = [&](int64_t i, auto count) {
    Pixel<T, K> chunk[kAhead<K>];
#pragma unroll
    for (int v = 0; v < kAhead<K>; ++v) {
      if (v < count) chunk[v].load(x + i * p.maps.channels + v * step);
    }
    body(i, count, chunk);
  };
  int64_t i = place.y;
  const int64_t height = p.height;
  for (; i + (kAhead<K> - 1) * height < place.pixels; i += kAhead<K> * height) run(i, Whole<kAhead<K>>());
  if (i < place.pixels) run(i, static_cast<int>((place.pixels - i + height - 1) / height));
}

// inspect: streaming moments_of_columns<*,[248]> loads=128
template <typename T, int K>
FASTKD_KERNEL(kThreads, 2)
moments_of_columns(const DeviceParams p) {
  using S = Compute<T>;
  const Place<DeviceParams, K> place(p);
  double all = 0, mean[K] = {}, m2[K] = {};
  each_chunk<T, K>(p, place, [&](int64_t i, auto count, const Pixel<T, K>(&chunk)[kAhead<K>]) {
    const S inverse = reciprocal(static_cast<S>(count));
    S shift[K], sum[K] = {}, square[K] = {};
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int v = 0; v < kAhead<K>; ++v) {
        S values[K];
        chunk[v].read(values);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (v < count) body(k, values[k]);
        }
      }
    };
    chunk[0].read(shift);
    each([&](int k, S x) { sum[k] += x - shift[k]; });
#pragma unroll
    for (int k = 0; k < K; ++k) {
      shift[k] += sum[k] * inverse;
      sum[k] = 0;
    }
    each([&](int k, S x) {
      const S difference = x - shift[k];
      sum[k] += difference;
      square[k] += difference * difference;
    });
    const double wide = static_cast<double>(inverse), share = count / (all + count), between = share * all;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      double first = static_cast<double>(shift[k]), sum_k = static_cast<double>(sum[k]),
             square_k = static_cast<double>(square[k]);
      if (sizeof(S) == 4 && !(square[k] < kInfinity<S>)) {  // infinite or NaN, or squares are beyond float
        const T* const x = static_cast<const T*>(p.maps.data) + place.begin + i * p.maps.channels + k;
        const int64_t step = static_cast<int64_t>(p.height) * p.maps.channels;
        first = sum_k = square_k = 0;
#pragma unroll 1
        for (int v = 0; v < count; ++v) first += static_cast<double>(to_compute(x[v * step])) * wide;
#pragma unroll 1
        for (int v = 0; v < count; ++v) {
          const double difference = static_cast<double>(to_compute(x[v * step])) - first;
          sum_k += difference;
          square_k += difference * difference;
        }
      }
      double own_mean, own_m2;
      from_sums(first, sum_k, square_k, wide, own_mean, own_m2);
      merge(mean[k], m2[k], own_mean, own_m2, share, between);
    }
    all += count;
  });
  merge_over_height(p.width, p.height, all, mean, m2);
  if (place.y != 0 || place.pixels == 0) return;
#pragma unroll
  for (int k = 0; k < K; ++k) write_result<S>(p, place.part * p.maps.channels + place.channel + k, all, mean[k], m2[k]);
}

// inspect: streaming gradient_of_columns<*,[248]> loads=128 stores=128
template <typename T, int K>
FASTKD_KERNEL(kThreads, 2)
gradient_of_columns(const DeviceBackwardParams p) {
  using S = Compute<T>;
  const Place<DeviceBackwardParams, K> place(p);
  if (place.pixels == 0) return;
  Slope<S> slope[K];
#pragma unroll
  for (int k = 0; k < K; ++k) slope[k] = Slope<S>(p, place.outer * p.maps.channels + place.channel + k);
  T* const gradient = static_cast<T*>(p.gradient) + place.begin;
  each_chunk<T, K>(p, place, [&](int64_t i, auto count, const Pixel<T, K>(&chunk)[kAhead<K>]) {
#pragma unroll
    for (int v = 0; v < kAhead<K>; ++v) {
      S values[K];
      chunk[v].read(values);
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = slope[k](values[k]);
      if (v < count) Pixel<T, K>::store(gradient + (i + static_cast<int64_t>(v) * p.height) * p.maps.channels, values);
    }
  });
}

}  // namespace

ForwardKernel columns_kernel(Dtype dtype, bool packs) {
  return for_dtype(dtype, [&]<typename T>() { return packs ? moments_of_columns<T, kPack<T>> : moments_of_columns<T, 1>; });
}
BackwardKernel columns_backward_kernel(Dtype dtype, bool packs) {
  return for_dtype(dtype, [&]<typename T>() { return packs ? gradient_of_columns<T, kPack<T>> : gradient_of_columns<T, 1>; });
}

}  // namespace fastkd::moments
