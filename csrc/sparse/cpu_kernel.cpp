// Rows with a sparse teacher on the CPU, compiled once for each instruction set.
//
// Mapping: a thread takes whole rows. (0) The entries are read and checked, and the bits of their classes set in a map of the
// row, a bit a class, which tells the tail from them at the cost of a branch for 64 classes; no sorting, and a class that comes
// twice is found. (1) The tail: blocks that fit L1, each swept for its maximum and then for its exponentials, so that memory is
// read once; sums are fp32 lanes folded into fp64 every 64 registers, the order is fixed. (2) The outcomes, in fp64. (3) The
// gradient, all classes as if they were of the tail, from logits that are in L2 by now; then the entries' own.
// Bytes that must move: rows * classes * (student + gradient); for renormalize the gradient alone. Sweeps (1) and (3) are one
// exponential a class, less than what memory takes.
#include "sparse/kernel.h"

#include "common/rows.h"
#include "divergence/cpu_math.h"
#include "sparse/math.h"

namespace fastkd::FASTKD_ISA::sparse {
namespace {

using namespace sparse_math;
using ::fastkd::sparse::Fault;
using ::fastkd::sparse::Floats;
using ::fastkd::sparse::Kernels;
using ::fastkd::sparse::kScratchArrays;
using ::fastkd::sparse::padded;
using ::fastkd::sparse::RowParams;
using ::fastkd::sparse::scratch_words;
using ::fastkd::sparse::Teacher;

struct Wide : Registers<F64> {
  FASTKD_INLINE static double exp_one(double x) { return fastkd::FASTKD_ISA::exp(broadcast<F64>(x))[0]; }
  FASTKD_INLINE static double log_one(double x) { return log_of(x); }
};

constexpr int64_t kBlock = 4096;  // classes: 16 KiB of fp32
constexpr double kNothing = -__builtin_inf();

template <typename T>
FASTKD_INLINE double value_of(const T* p) {
  if constexpr (sizeof(T) >= 4) return static_cast<double>(*p);
  return static_cast<double>(load_first(p, 1, Scalar<T>(0))[0]);
}
FASTKD_INLINE double value_of(const Floats& floats, int64_t i) {
  return for_dtype(floats.dtype, [&]<typename T>() { return value_of(static_cast<const T*>(floats.data) + i); });
}

// The lanes whose bits are set become -inf.
FASTKD_INLINE F32 without(F32 v, uint32_t bits) {
  I32 lane;
  for (int i = 0; i < kLanes<F32>; ++i) lane[i] = 1 << i;
  return ((I32{} + static_cast<int32_t>(bits)) & lane) != 0 ? broadcast<F32>(kLowest) : v;
}
FASTKD_INLINE F64 without(F64 v, uint32_t bits) {
  I64 lane;
  for (int i = 0; i < kLanes<F64>; ++i) lane[i] = int64_t{1} << i;
  return ((I64{} + static_cast<int64_t>(bits)) & lane) != 0 ? broadcast<F64>(kNothing) : v;
}

// body(register) of the logits of a block that begins with a word of the map, those of entries as -inf; after each kFold words
// fold(), and every_word(i) at each.
template <typename T, typename Body, typename Word, typename Fold>
FASTKD_INLINE void each_of_tail(const T* s, const uint64_t* map, int64_t count, const Body& body, const Word& every_word,
                                const Fold& fold) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  int64_t i = 0, word = 0;
  for (; i <= count - 64; i += 64, ++word) {
    every_word(i);
    const uint64_t bits = map[word];
    if (bits == 0) [[likely]] {
#pragma GCC unroll 8
      for (int j = 0; j < 64; j += L) body(load(s + i + j));
    } else {
      for (int j = 0; j < 64; j += L) body(without(load(s + i + j), static_cast<uint32_t>(bits >> j)));
    }
    if ((word + 1) % L == 0) fold();  // L words are 64 registers
  }
  for (int64_t j = i; j < count; j += L) {
    body(without(load_up_to(s + j, count - j, Scalar<T>(kLowest)), static_cast<uint32_t>(map[word] >> (j - i))));
  }
  fold();
}

// Of the classes that have no entry: their maximum, and sums of e^((s - top) scale) and e^(s - top).
struct TailSums {
  double top = kNothing, z = 0, z_one = 0;

  // Sums of a block relative to its own maximum.
  void add(double block_top, double block_z, double block_one, double scale) {
    if (block_top > top) {
      if (z != 0) {
        z *= Wide::exp_one((top - block_top) * scale);
        z_one *= Wide::exp_one(top - block_top);
      }
      top = block_top;
      z += block_z, z_one += block_one;
    } else {
      const bool any = block_top > kNothing;
      z += any ? block_z * Wide::exp_one((block_top - top) * scale) : block_z;  // of nothing it is 0, or NaN
      z_one += any ? block_one * Wide::exp_one(block_top - top) : block_one;
    }
  }
};

template <bool kOne, typename T>
TailSums sum_tail(const T* s, const uint64_t* map, int64_t classes, Vector<T> scale, double wide_scale) {
  using V = Vector<T>;
  TailSums result;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const T* const block = s + begin;
    const uint64_t* const bits = map + begin / 64;
    const int64_t count = classes - begin < kBlock ? classes - begin : kBlock;
    V best = broadcast<V>(kLowest);
    each_of_tail(block, bits, count, [&](V v) __attribute__((always_inline)) { best = maximum(best, v); }, [](int64_t) {}, [] {});
    const double top = static_cast<double>(reduce_max(best));
    const V reference = broadcast<V>(top > kNothing ? top : 0.0);
    V sum = {}, one = {};
    F64 total = {}, total_one = {};
    each_of_tail(
        block, bits, count,
        [&](V v) __attribute__((always_inline)) {
          const V below = v - reference;
          sum += exp(below * scale);
          if constexpr (kOne) one += exp(below);
        },
        [&](int64_t i) __attribute__((always_inline)) {  // the next block, or the next row
          for (int line = 0; line < static_cast<int>(sizeof(T)); ++line) {
            __builtin_prefetch(reinterpret_cast<const char*>(block + kBlock + i) + 64 * line, 0, 3);
          }
        },
        [&]() __attribute__((always_inline)) {
          total += widen(sum);
          sum = V{};
          if constexpr (kOne) total_one += widen(one), one = V{};
        });
    result.add(top, reduce_sum(total), kOne ? reduce_sum(total_one) : 0.0, wide_scale);
  }
  return result;
}

// body(i) for registers at 0, L, ... of the outcomes' arrays, which are padded.
template <typename Body>
FASTKD_INLINE void each_outcome(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kLanes<F64>) body(i);
}
template <int N, typename Body>
FASTKD_INLINE Totals<F64, N> sum_outcomes(int64_t count, const Body& body) {
  return sweep_sum<F64, N>((count + kLanes<F64> - 1) / kLanes<F64> * kLanes<F64>,
                           [&](int64_t i, int, F64* sum) __attribute__((always_inline)) { body(i, sum); });
}
FASTKD_INLINE double max_outcome(int64_t count, const double* values) {
  F64 best = broadcast<F64>(kNothing);
  each_outcome(count, [&](int64_t i) __attribute__((always_inline)) { best = maximum(best, load(values + i)); });
  return reduce_max(best);
}

struct Scratch {
  uint64_t* map;   // of classes that have an entry; zeros between rows
  int64_t* index;  // of each entry
  double* logit;
  double* log_p;  // of each outcome: the entries, the tail
  double* q;      // at first log q
  double* slope;

  Scratch(void* data, int64_t classes, int64_t entries)
      : map(static_cast<uint64_t*>(data)),
        index(reinterpret_cast<int64_t*>(map + padded(scratch_words(classes)))),
        logit(reinterpret_cast<double*>(index + padded(entries + 1))),
        log_p(logit + padded(entries + 1)),
        q(log_p + padded(entries + 1)),
        slope(q + padded(entries + 1)) {
    static_assert(kScratchArrays == 5);
    std::memset(map, 0, sizeof(uint64_t) * scratch_words(classes));
  }
};

// One row: student s, gradient g, null where it is not wanted.
template <typename T>
struct Row {
  using V = Vector<T>;
  using S = Scalar<T>;

  const RowParams& params;
  const Scratch& at;
  const int64_t index;  // of the row
  const T* const s;
  T* const g;
  const int64_t target;  // class of the cross-entropy, or -1
  const double temperature, weight;
  const bool kd = params.kd_scale != 0;
  const bool of_all = kd && params.given.tail != Tail::kRenormalize;  // the divergence is of all classes
  const bool bucket = kd && params.given.tail == Tail::kBucket;
  const double scale = bounded_inverse(temperature);

  int64_t count = 0;  // entries
  TailSums tail{};
  double entries_top = kNothing, top = kNothing;  // the largest logits
  // of the divergence's gradient: sum of t, and what a class of the tail has for each e^((s - tail's top) scale)
  double all_slopes = 0, tail_slope = 0;
  double z_task = 0;  // sum of e^(s - top)

  Fault run(double* kd_loss, double* task_loss) {
    const Fault fault = kd ? read_entries() : Fault{};
    if (fault.what == Fault::kNone) {
      const double divergence = compute();
      *kd_loss = divergence != 0 ? weight * temperature * temperature * divergence : 0;  // T^2 may be infinite
      if (params.task) *task_loss = weight * cross_entropy(log_of(z_task), value_of(s + target), top);
      if (g != nullptr) write_gradient();
    }
    for (int64_t i = 0; i < count; ++i) at.map[at.index[i] / 64] = 0;
    return fault;
  }

 private:
  static double bounded_inverse(double temperature) {  // as of the registers, see inverse_of
    constexpr double kLargest = sizeof(S) == 8 ? 0x1p1000 : 0x1p100;
    const double inverse = 1.0 / temperature;
    return inverse > kLargest ? kLargest : inverse < 1 / kLargest ? 1 / kLargest : inverse;
  }

  Fault read_entries() {
    const Teacher& given = params.given;
    const int64_t first = index * given.index_stride;
    for (int64_t i = 0; i < given.entries; ++i) {
      const double log_p = value_of(given.log_probs, index * given.log_probs.stride + i);
      if (log_p == kNothing) continue;
      if (!(log_p <= kLogProbTolerance)) return {Fault::kLogProb, i};
      const int64_t c = given.narrow ? static_cast<const int32_t*>(given.indices)[first + i]
                                     : static_cast<const int64_t*>(given.indices)[first + i];
      if (c < 0 || c >= params.classes) return {Fault::kRange, i};
      const uint64_t bit = uint64_t{1} << (c % 64);
      if ((at.map[c / 64] & bit) != 0) return {Fault::kRepeated, i};
      at.map[c / 64] |= bit;
      at.index[count] = c;
      at.logit[count] = value_of(s + c);
      at.log_p[count++] = log_p;
    }
    for (int64_t i = count; i < padded(count + 1); ++i) at.log_p[i] = at.logit[i] = kNothing;
    return make_probabilities();
  }

  // log p of all outcomes
  Fault make_probabilities() {
    const Teacher& given = params.given;
    const double highest = count > 0 ? max_outcome(count, at.log_p) : 0.0;
    const F64 reference = broadcast<F64>(highest);
    const auto sums = sum_outcomes<2>(count, [&](int64_t i, F64* sum) __attribute__((always_inline)) {
      const F64 log_p = load(at.log_p + i);
      sum[0] += exp(log_p - reference);
      sum[1] -= weigh(exp(log_p), log_p);
    });
    double given_tail = __builtin_nan("");
    if (given.tail_log_prob.data != nullptr) {
      const double log_p = value_of(given.tail_log_prob, index * given.tail_log_prob.stride);
      if (!(log_p <= kLogProbTolerance)) return {Fault::kTailLogProb};
      given_tail = Wide::exp_one(log_p);
    }
    const Probabilities p = probabilities_of<Wide>(given.tail, highest, sums.value[0], sums.value[1], given_tail,
                                                   count == params.classes, given.log_probs.dtype);
    if (p.wrong) return {Fault::kSum, 0, p.sum};
    const F64 shift = broadcast<F64>(p.shift), log_total = broadcast<F64>(p.log_total);
    each_outcome(count,
                 [&](int64_t i) __attribute__((always_inline)) { store(at.log_p + i, load(at.log_p + i) - shift - log_total); });
    if (bucket) at.log_p[count] = log_of(p.tail);
    return {};
  }

  // Sums of the row; the divergence.
  double compute() {
    const bool own_task = params.task && temperature != 1.0;
    if (of_all && own_task) {
      tail = sum_tail<true>(s, at.map, params.classes, broadcast<V>(scale), scale);
    } else if (of_all || params.task) {
      tail = sum_tail<false>(s, at.map, params.classes, broadcast<V>(of_all ? scale : 1.0), of_all ? scale : 1.0);
      tail.z_one = tail.z;  // of use where T is 1, or nothing else was wanted
    }
    entries_top = count > 0 ? max_outcome(count, at.logit) : kNothing;
    top = entries_top > tail.top ? entries_top : tail.top;
    if (params.task) {
      const F64 reference = broadcast<F64>(top);
      z_task = sum_outcomes<1>(count, [&](int64_t i, F64* sum)
                                          __attribute__((always_inline)) { sum[0] += exp(load(at.logit + i) - reference); })
                   .value[0] +
               in_units_of(top, tail.z_one, 1.0);
    }
    return kd ? diverge() : 0;
  }

  // A sum of the tail relative to another logit than its own maximum.
  double in_units_of(double other, double z, double by) const {
    return z != 0 ? z * Wide::exp_one((tail.top - other) * by) : other - other;  // 0, or NaN where there is no softmax
  }

  double diverge() {
    const double reference = of_all ? top : entries_top;
    const F64 wide_reference = broadcast<F64>(reference), wide_scale = broadcast<F64>(scale);
    const double z_entries = sum_outcomes<1>(count, [&](int64_t i, F64* sum) __attribute__((always_inline)) {
                               const F64 a = (load(at.logit + i) - wide_reference) * wide_scale;
                               store(at.q + i, a);
                               sum[0] += exp(a);
                             }).value[0];
    const double log_z = log_of(of_all ? z_entries + in_units_of(reference, tail.z, scale) : z_entries);
    const F64 wide_log_z = broadcast<F64>(log_z);
    each_outcome(count, [&](int64_t i) __attribute__((always_inline)) { store(at.q + i, load(at.q + i) - wide_log_z); });
    const double log_q_tail = (tail.top - reference) * scale + log_of(tail.z) - log_z;
    if (bucket) at.q[count] = log_q_tail;
    const int64_t outcomes = count + bucket;
    for (int64_t i = outcomes; i < padded(outcomes); ++i) at.q[i] = at.log_p[i] = kNothing;

    const Terms<Wide> terms(params.kind, params.given.tail, params.beta);
    const auto sums = sum_outcomes<2>(outcomes, [&](int64_t i, F64* sum) __attribute__((always_inline)) {
      const F64 log_q = load(at.q + i), log_p = load(at.log_p + i), q = exp(log_q);
      const auto term = terms(q, exp(log_p), log_q, log_p);
      store(at.q + i, q);
      store(at.slope + i, term.slope);
      sum[0] += term.value;
      sum[1] += term.slope;
    });
    all_slopes = terms.slopes(sums.value[1]);
    if (of_all && tail.z != 0) {
      tail_slope = ((bucket ? at.slope[count] : 0.0) - Wide::exp_one(log_q_tail) * all_slopes) / tail.z;
    } else if (outcomes > 0) {
      tail_slope = log_z - log_z;  // 0, or NaN as the others
    }
    return sums.value[0];
  }

  void write_gradient() {
    const double kd_factor = kd ? static_cast<double>(finite<S>(weight * params.kd_scale * temperature)) : 0.0;
    const double task_factor = params.task ? weight * params.task_scale / z_task : 0.0;
    const double tail_task = tail.top > kNothing ? task_factor * Wide::exp_one(tail.top - top) : 0.0;
    const bool shared = !of_all || temperature == 1.0;  // one exponential is for both
    write_tail(finite<S>(kd_factor * tail_slope + (shared ? tail_task : 0.0)), finite<S>(shared ? 0.0 : tail_task),
               of_all ? scale : 1.0);

    const F64 reference = broadcast<F64>(top), to_kd = broadcast<F64>(kd_factor), slopes = broadcast<F64>(all_slopes);
    const F64 to_task = broadcast<F64>(task_factor);
    each_outcome(count, [&](int64_t i) __attribute__((always_inline)) {
      const F64 kd_part = to_kd * (load(at.slope + i) - load(at.q + i) * slopes);
      store(at.slope + i, params.task ? kd_part + to_task * exp(load(at.logit + i) - reference) : kd_part);
    });
    bool met = false;  // the label among the entries
    for (int64_t i = 0; i < count; ++i) {
      const bool label = params.task && at.index[i] == target;
      met = met || label;
      put(at.index[i], at.slope[i] - (label ? weight * params.task_scale : 0.0));
    }
    if (!params.task || met) return;
    const double below = value_of(s + target) - tail_reference(), to_tail = kd_factor * tail_slope;
    put(target,
        to_tail * Wide::exp_one(below * (of_all ? scale : 1.0)) + tail_task * Wide::exp_one(below) - weight * params.task_scale);
  }

  double tail_reference() const { return tail.top > kNothing ? tail.top : 0.0; }
  void put(int64_t c, double value) const { store_first(g + c, broadcast<V>(value), 1); }

  // first e^((s - top of the tail) by) + one e^(s - top of the tail)
  void write_tail(S first, S one, double by) const {
    if (first == 0 && one == 0) {
      std::memset(static_cast<void*>(g), 0, sizeof(T) * params.classes);
      return;
    }
    const bool stream = params.stream && reinterpret_cast<uintptr_t>(g) % 64 == 0;
    const V reference = broadcast<V>(tail_reference()), f = broadcast<V>(first), f_one = broadcast<V>(one);
    const V wide_by = broadcast<V>(by);
    const T* const in = s;
    T* const out = g;
    if (one == 0) {
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        write(out + i, f * exp((load_up_to(in + i, lanes, S(kLowest)) - reference) * wide_by), lanes, stream);
      });
    } else {
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V below = load_up_to(in + i, lanes, S(kLowest)) - reference;
        write(out + i, f * exp(below * wide_by) + f_one * exp(below), lanes, stream);
      });
    }
  }
};

template <typename T>
void rows_of(const RowParams& params, int64_t begin, int64_t end, void* memory) {
  const Scratch scratch(memory, params.classes, params.given.entries);
  for (int64_t r = begin; r < end; ++r) {
    T* const g = params.student_gradient != nullptr ? static_cast<T*>(params.student_gradient) + r * params.classes : nullptr;
    const double weight = params.weight != nullptr ? params.weight[r] : 1.0;
    const bool ignored = weight == 0.0 || (params.target != nullptr && params.target[r] == params.ignore_index);
    params.kd_loss[r] = 0;
    params.task_loss[r] = 0;
    if (ignored) {  // zeros, whatever the logits and the entries hold
      if (g != nullptr) std::memset(static_cast<void*>(g), 0, sizeof(T) * params.classes);
      continue;
    }
    const double temperature = params.temperature != nullptr ? params.temperature[r] : params.temperature_all;
    Row<T> row{params,      scratch,
               r,           static_cast<const T*>(params.student) + r * params.student_stride,
               g,           params.target != nullptr ? params.target[r] : -1,
               temperature, weight};
    params.faults[r] = row.run(params.kd_loss + r, params.task_loss + r);
  }
#if defined(__x86_64__)
  if (params.stream) _mm_sfence();
#endif
}

void rows(const RowParams& params, int64_t begin, int64_t end, void* memory) {
  for_dtype(params.dtype, [&]<typename T>() { rows_of<T>(params, begin, end, memory); });
}

}  // namespace

extern const Kernels kernels = {rows};

}  // namespace fastkd::FASTKD_ISA::sparse
