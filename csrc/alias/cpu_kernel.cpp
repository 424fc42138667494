// The alias table on the CPU, compiled once for each instruction set. Maths: math.h.
//
// Build: three streams over the scores (maximum, partition function, weights), each as wide as the registers, and one
// pass that packs a block of 4096 in the first-level cache. Bytes that must move: 3 * N * sizeof(score) + 8 N.
// Packing closes exactly one bin a step, by selects instead of branches: which of two queues (lights, heavies) feeds the
// next step is a coin toss that no predictor learns. The heads of both queues are held in registers, so that a step
// waits for an add and a compare, not for memory.
// Draw: batches of 128 in stages (random words, top bin, block bin, result) with prefetches between them, so that about
// a hundred cache misses are under way at a time; a draw costs two misses at most.
#include "alias/kernel.h"

#include "alias/math.h"
#include "common/simd.h"

namespace fastkd::FASTKD_ISA::alias {
namespace {

using namespace alias_math;
using ::fastkd::alias::Extent;
using ::fastkd::alias::Kernels;
using ::fastkd::alias::Scores;
using ::fastkd::alias::TableView;

constexpr int kWords = kLanes<U64>;
constexpr double kInfinity = __builtin_inf();

// A register of scores as fp64 (exact for every dtype).
template <typename T>
FASTKD_INLINE F64 load_wide(const T* p, int count) {
  F64 v = broadcast<F64>(-kInfinity);
  for (int i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == 2) {
      v[i] = load_first(p + i, 1, 0.0f)[0];
    } else {
      v[i] = p[i];
    }
  }
  return v;
}
FASTKD_INLINE F64 load_full(const double* p) { return load(p); }
FASTKD_INLINE F64 load_full(const float* p) {
  F32Half v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, F64);
}
template <typename T>
FASTKD_INLINE F64 load_full(const T* p) {  // 16-bit floats: rare as scores
  return load_wide(p, kWords);
}

// body(i, scores as fp64, lanes that count)
template <typename T, typename Body>
FASTKD_INLINE void for_each(const T* data, int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kWords <= end; i += kWords) body(i, load_full(data + i), kWords);
  if (i < end) body(i, load_wide(data + i, static_cast<int>(end - i)), static_cast<int>(end - i));
}

template <typename Function>
FASTKD_INLINE auto dispatch(Dtype dtype, const void* data, const Function& function) {
  return for_dtype(dtype, [&]<typename T>() { return function(static_cast<const T*>(data)); });
}

Extent extent(Dtype dtype, const void* data, int64_t begin, int64_t end) {
  return dispatch(dtype, data, [&](auto* scores) {
    F64 best[2] = {broadcast<F64>(-kInfinity), broadcast<F64>(-kInfinity)};
    I64 invalid = {};
    for_each(scores, begin, end, [&](int64_t i, F64 u, int) __attribute__((always_inline)) {
      invalid |= !(u < kInfinity);  // NaN and +inf
      F64& chain = best[(i / kWords) & 1];
      chain = maximum(chain, u);
    });
    const F64 both = maximum(best[0], best[1]);
    bool any = false;
    for (int k = 0; k < kWords; ++k) any = any || invalid[k] != 0;
    return Extent{reduce_max(both), any};
  });
}

// 2^t as a mantissa in units of 2^-32 and a biased exponent
struct Exp2 {
  U64 mantissa;  // in [2^32, 2^33)
  U64 exponent;  // floor(t) + 64
  I64 positive;  // mask: t >= -64 and the score is not -inf
};
FASTKD_INLINE Exp2 exp2_fixed(F64 u, F64 reference, F64 kappa) {
  const F64 difference = maximum(u - reference, broadcast<F64>(-1.7e308));  // -inf * 0 would be NaN
  const F64 t = difference * kappa;
  const F64 clamped = maximum(minimum(t, broadcast<F64>(kLargestT)), broadcast<F64>(-64.0));
  const F64 shifted = clamped * kFractionScale + kMagic;
  const U64 fixed = reinterpret_cast<U64>(shifted) - (kMagicBits - (uint64_t{kExponentBias} << kFractionBits));
  const U64 f = (fixed >> (kFractionBits - 32)) & 0xffffffffu;
  U64 r = U64{} + exp2_coefficient(6);
  for (int k = 5; k >= 0; --k) r = (multiply_low(r, f) >> 32) + exp2_coefficient(k);
  return {(multiply_low(r, f) >> 32) + (uint64_t{1} << 32), fixed >> kFractionBits,
          (t >= broadcast<F64>(-64.0)) & (u > broadcast<F64>(-kInfinity))};
}

// values below 2^63; a shift by 64 or more is undefined in the vector extension
FASTKD_INLINE U64 shift_right(U64 value, U64 shift) { return value >> (shift < 63 ? shift : U64{} + 63); }

uint64_t partition(const Scores& scores, int64_t begin, int64_t end) {
  return dispatch(scores.dtype, scores.data, [&](auto* data) {
    const F64 reference = broadcast<F64>(scores.reference), kappa = broadcast<F64>(scores.kappa);
    U64 sum = {};
    uint64_t tail = 0;
    for_each(data, begin, end, [&](int64_t, F64 u, int lanes) __attribute__((always_inline)) {
      const Exp2 e = exp2_fixed(u, reference, kappa);
      const U64 term = (shift_right(e.mantissa, kExponentBias - e.exponent) + 1) & reinterpret_cast<U64>(e.positive);
      if (lanes == kWords) {
        sum += term;
      } else {
        for (int k = 0; k < lanes; ++k) tail += term[k];
      }
    });
    for (int k = 0; k < kWords; ++k) tail += sum[k];
    return tail;
  });
}

uint64_t quantise(const Scores& scores, int64_t begin, int64_t end, uint64_t* out) {
  return dispatch(scores.dtype, scores.data, [&](auto* data) {
    const F64 reference = broadcast<F64>(scores.reference), kappa = broadcast<F64>(scores.kappa);
    // weight = mantissa * 2^(exponent - bias + E - 32), rounded; shifted left first so that one right shift of at least
    // one bit remains. The largest weight is below 2^(E + largest_t + 1) <= 2^52, so nothing is lost on the left.
    const int left = scores.exponent + scores.largest_t > 31 ? scores.exponent + scores.largest_t - 31 : 0;
    const uint64_t right = static_cast<uint64_t>(32 + kExponentBias - scores.exponent + left);
    U64 sum = {};
    uint64_t tail = 0;
    for_each(data, begin, end, [&](int64_t i, F64 u, int lanes) __attribute__((always_inline)) {
      const Exp2 e = exp2_fixed(u, reference, kappa);
      const U64 half_units = shift_right(e.mantissa << left, right - 1 - e.exponent);
      const U64 weight = ((half_units + 1) >> 1) & reinterpret_cast<U64>(e.positive);  // rounded half up
      if (lanes == kWords) {
        std::memcpy(out + i - begin, &weight, sizeof weight);
        sum += weight;
      } else {
        for (int k = 0; k < lanes; ++k) {
          out[i - begin + k] = weight[k];
          tail += weight[k];
        }
      }
    });
    for (int k = 0; k < kWords; ++k) tail += sum[k];
    return tail;
  });
}

void pack_block(const uint64_t* weights, int64_t count, uint64_t capacity, uint64_t* lists, uint64_t* bins) {
  // light items from the front of one queue, heavy ones in another; entries are (item index), values in a parallel array
  uint64_t* const light = lists;
  uint64_t* const heavy = lists + count + 2;
  const uint64_t n = static_cast<uint64_t>(count);
  int64_t lights = 0, heavies = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_heavy = weights[i] * n > capacity;
    light[lights] = static_cast<uint64_t>(i);
    heavy[heavies] = static_cast<uint64_t>(i);
    lights += !is_heavy;
    heavies += is_heavy;
  }
  if (heavies == 0) {  // all equal (or all zero): every item fills its own bin
    for (int64_t i = 0; i < count; ++i) bins[i] = pack(capacity, static_cast<uint64_t>(i));
    return;
  }
  // sentinels: beyond the end, an item whose scaled weight leaves the state as it is
  const uint64_t self = heavy[heavies - 1];
  int64_t l = 0, h = 0;
  uint64_t current = heavy[0];
  uint64_t rest = weights[current] * n;  // what the current heavy still owns
  light[lights] = light[lights + 1] = heavy[heavies] = heavy[heavies + 1] = self;
  while (l < lights && h < heavies) {
    const bool fill_light = rest > capacity;
    const uint64_t light_item = light[l], next = heavy[h + 1];
    const uint64_t light_value = weights[light_item] * n, next_value = weights[next] * n;
    const uint64_t bin = fill_light ? light_item : current;
    const uint64_t threshold = fill_light ? light_value : rest;
    const uint64_t alias = fill_light ? current : next;
    bins[bin] = pack(threshold, alias);
    rest = rest - capacity + (fill_light ? light_value : next_value);
    l += fill_light;
    h += !fill_light;
    current = fill_light ? current : next;
  }
  // one queue is empty: sums being exact, lights that are left are full, and heavies hand on until the last is full
  for (; l < lights; ++l) bins[light[l]] = pack(weights[light[l]] * n, light[l]);
  for (; h < heavies; ++h) {
    const uint64_t next = heavy[h + 1];
    bins[heavy[h]] = pack(rest, h + 1 < heavies ? next : heavy[h]);
    rest = rest - capacity + weights[next] * n;
  }
}

// ---- drawing -----------------------------------------------------------------------------------

constexpr int kBatch = 128;

// The random words of draws first + i stride, a register of indices at a time (philox.h, lane by lane in 64 bits).
FASTKD_INLINE void random_words(uint64_t seed, uint64_t first, uint64_t stride, uint64_t* top, uint64_t* block) {
  U64 lane;
  for (int k = 0; k < kWords; ++k) lane[k] = k;
  for (int i = 0; i < kBatch; i += kWords) {
    const U64 index = first + (lane + i) * stride;
    U64 c0 = index & 0xffffffffu, c1 = index >> 32, c2 = U64{} + static_cast<uint64_t>(Stream::kAlias), c3 = {};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const U64 product0 = multiply_low(c0, U64{} + 0xD2511F53u), product1 = multiply_low(c2, U64{} + 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ k0;
      c1 = product1 & 0xffffffffu;
      c2 = (product0 >> 32) ^ c3 ^ k1;
      c3 = product0 & 0xffffffffu;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const U64 high = c0 | c1 << 32, low = c2 | c3 << 32;
    std::memcpy(top + i, &high, sizeof high);
    std::memcpy(block + i, &low, sizeof low);
  }
}

void sample(const TableView& view, uint64_t seed, uint64_t first, uint64_t stride, int64_t count, int64_t* out) {
  uint64_t top_random[kBatch], block_random[kBatch], entry[kBatch];
  for (int64_t done = 0; done < count; done += kBatch) {
    const int batch = count - done < kBatch ? static_cast<int>(count - done) : kBatch;
    random_words(seed, first + static_cast<uint64_t>(done) * stride, stride, top_random, block_random);
    for (int i = 0; i < batch; ++i) {
      __builtin_prefetch(view.top + 2 * multiply_high(top_random[i], static_cast<uint64_t>(view.blocks)));
    }
    for (int i = 0; i < batch; ++i) {
      const Bin bin = uniform_bin(top_random[i], static_cast<uint64_t>(view.blocks));
      const uint64_t alias = view.top[2 * bin.index + 1];
      const uint64_t other = alias < static_cast<uint64_t>(view.blocks) ? alias : 0;  // a broken table must not crash
      const uint64_t block = multiply_high(bin.fraction, view.total) < view.top[2 * bin.index] ? bin.index : other;
      const Bin inner = uniform_bin(block_random[i], static_cast<uint64_t>(block_items(view.items, static_cast<int64_t>(block))));
      entry[i] = block * kBlockSize + inner.index;
      __builtin_prefetch(view.table + entry[i]);
      __builtin_prefetch(view.block_weight + block);
      block_random[i] = inner.fraction;
    }
    for (int i = 0; i < batch; ++i) {
      const uint64_t bin = view.table[entry[i]], block = entry[i] >> kBlockBits;
      const bool own = multiply_high(block_random[i], view.block_weight[block]) < threshold_of(bin);
      // a mask: of a branch on a coin toss, every other one is mispredicted
      const uint64_t other = block << kBlockBits | alias_of(bin), mask = uint64_t{0} - own;
      out[done + i] = static_cast<int64_t>(other ^ ((other ^ entry[i]) & mask));
    }
  }
}

}  // namespace

extern const Kernels kernels = {extent, partition, quantise, pack_block, sample};

}  // namespace fastkd::FASTKD_ISA::alias
