// Rows with a sparse teacher on the GPU.
//
// Mapping: a block takes a row. (1) The entries, strided over the threads: what they hold, their maxima. (2) The tail, a tile of
// 2^17 classes at a time: the bits of the entries' classes are set in a map in shared memory, by which a class that comes twice
// is found, and then each thread goes through its packs of 16 bytes, four on their way at once, online: its own maximum, and sums
// relative to it, in double across packs. (3) All sums are added up; the outcomes, k + 1 at most, follow in double, and are
// computed again where they are needed again. (4) The gradient, all classes as if they were of the tail; then the entries' own.
// Bytes that must move: rows * classes * (student, twice with a gradient + gradient); the second time it comes from the L2 cache
// where the rows at work fit that. The double-precision work is some hundred operations an entry.
#pragma once

#include "common/reduce.cuh"
#include "common/row.cuh"
#include "divergence/cuda_math.cuh"
#include "divergence/cuda_rows.cuh"
#include "sparse/cuda.h"
#include "sparse/math.h"

namespace fastkd::FASTKD_ISA::sparse {

using namespace device;
using namespace sparse_math;
using divergence::exp_of;
using divergence::Peak;
using ::fastkd::sparse::DeviceParams;
using ::fastkd::sparse::Floats;
using ::fastkd::sparse::kReducedNumbers;
using ::fastkd::sparse::kTileClasses;

struct Wide : divergence::Scalars<double> {
  FASTKD_DEVICE static double exp_one(double x) { return device::exp(x); }
  FASTKD_DEVICE static double log_one(double x) { return device::log(x); }
};

constexpr double kNothing = -__builtin_inf();
template <typename T>
constexpr int kPacksAhead = sizeof(T) == 8 ? 2 : 4;  // of a thread

FASTKD_DEVICE double value_of(const Floats& floats, int64_t i) {
  return for_dtype(floats.dtype,
                   [&]<typename T>() { return static_cast<double>(to_compute(static_cast<const T*>(floats.data)[i])); });
}

// An entry as it is given; a class of -1 is none: padding, or one that cannot be.
struct Entry {
  int64_t c;
  double log_p;
  bool wrong;
};

template <typename T>
struct SparseRow {
  using S = Compute<T>;
  using Dense = divergence::Row<T, int64_t>;
  using Numbers = typename Dense::Numbers;
  using Group = LoopClusterGroup<kReducedNumbers>;
  static constexpr int N = kPack<T>, kAhead = kPacksAhead<T>;

  const DeviceParams& p;
  const Dense dense;
  const Numbers numbers;
  Group& group;
  const RowView<T, int64_t> student;
  const Tail rule;
  const bool kd, of_all, bucket;
  const double scale;  // 1 / T
  const unsigned threads, self;

  FASTKD_DEVICE SparseRow(const DeviceParams& params, int64_t index, Group& of)
      : p(params),
        dense{params, index},
        numbers(dense.numbers()),
        group(of),
        student(dense.student()),
        rule(params.given.tail),
        kd(params.kd_scale != 0),
        of_all(kd && rule != Tail::kRenormalize),
        bucket(kd && rule == Tail::kBucket),
        scale(bounded_inverse(numbers.temperature)),
        threads(thread_count()),
        self(thread_index()) {}

  static FASTKD_DEVICE double bounded_inverse(double temperature) {  // as inverse_of
    constexpr double kLargest = sizeof(S) == 8 ? 0x1p1000 : 0x1p100;
    const double inverse = 1.0 / temperature;
    return inverse > kLargest ? kLargest : inverse < 1 / kLargest ? 1 / kLargest : inverse;
  }

  FASTKD_DEVICE Entry entry(int64_t i) const {
    const double log_p = value_of(p.given.log_probs, dense.index * p.given.log_probs.stride + i);
    if (log_p == kNothing) return {-1, log_p, false};
    const int64_t at = dense.index * p.given.index_stride + i;
    const int64_t c =
        p.given.narrow ? static_cast<const int32_t*>(p.given.indices)[at] : static_cast<const int64_t*>(p.given.indices)[at];
    const bool inside = c >= 0 && c < p.classes;
    return {inside ? c : -1, log_p, !inside || !(log_p <= kLogProbTolerance)};
  }
  // body(entry, logit) for this thread's entries
  template <typename Body>
  FASTKD_DEVICE void each_entry(const Body& body) const {
#pragma unroll 1
    for (int64_t i = self; kd && i < p.given.entries; i += threads) {
      const Entry of = entry(i);
      if (of.c >= 0 || of.wrong) body(of, of.c >= 0 ? static_cast<double>(to_compute(student.data[of.c])) : 0.0);
    }
  }

  // ---- the tail ----------------------------------------------------------------------------------------

  Peak<S> peak{};
  double z = 0, z_one = 0;  // relative to it, of this thread

  FASTKD_DEVICE void raise(S top, S per_logit) {
    const S rise = peak.rise(top);
    if (!(rise > 0)) return;
    z *= static_cast<double>(exp_units<T>(-rise * per_logit));
    z_one *= static_cast<double>(exp_of<T>(-rise));
  }

  // Sets the bits of the tile's entries; whether one was set before. To be met at a barrier.
  FASTKD_DEVICE bool mark(const Shared<unsigned>& map, int64_t begin, int64_t end) const {
    bool twice = false;
    each_entry([&](const Entry& of, double) {
      const int64_t at = of.c + student.shift;
      if (of.c < 0 || at < begin || at >= end) return;
      const unsigned bit = 1u << (at % 32);
      twice = twice || (map.atomic_or(static_cast<unsigned>((at - begin) / 32), bit) & bit) != 0;
    });
    return twice;
  }

  template <bool kOne>
  FASTKD_DEVICE void add(const Words<T> (&words)[kAhead], const unsigned (&bits)[kAhead], S per_logit) {
    S logits[kAhead][N], top = -kInfinity<S>;
#pragma unroll
    for (int v = 0; v < kAhead; ++v) {
      unpack(words[v], logits[v]);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if ((bits[v] >> k & 1) != 0) logits[v][k] = -kInfinity<S>;
        top = maximum(top, logits[v][k]);
      }
    }
    raise(top, per_logit);
    const S reference = peak.reference();
    S sum = 0, one = 0;
#pragma unroll
    for (int v = 0; v < kAhead; ++v) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S below = logits[v][k] - reference;
        sum += exp_units<T>(below * per_logit);
        if constexpr (kOne) one += exp_of<T>(below);
      }
    }
    z += static_cast<double>(sum);
    if constexpr (kOne) z_one += static_cast<double>(one);
  }

  // body(packs, part of the first): this thread's, `threads` apart, from part `begin` to `end`; packs outside are -inf
  template <typename Body>
  FASTKD_DEVICE void each_packs(int64_t begin, int64_t end, const Body& body) const {
#pragma unroll 1
    for (int64_t part = begin + self; part < end; part += static_cast<int64_t>(threads) * kAhead) {
      Words<T> words[kAhead];
#pragma unroll
      for (int v = 0; v < kAhead; ++v) {
        const int64_t at = part + static_cast<int64_t>(v) * threads;
        words[v] = student.load_words(at < end ? at : student.parts());  // which lies outside
      }
      body(words, part);
    }
  }

  // Whether an entry comes twice; the tail's sums, where they are wanted.
  FASTKD_DEVICE bool sweep_tail(bool sums, bool own_one, S per_logit) {
    bool twice = false;
    const int64_t length = p.classes + student.shift;
#pragma unroll 1
    for (int64_t begin = 0; begin < length; begin += kTileClasses) {
      const int64_t end = length - begin < kTileClasses ? length : begin + kTileClasses;
      const unsigned words = static_cast<unsigned>((end - begin + 31) / 32);
      const Shared<unsigned> map(p.map_at, words);
      if (begin > 0) block_barrier();
      for (unsigned i = self; i < words; i += threads) map.store(i, 0u);
      block_barrier();
      twice = mark(map, begin, end) || twice;
      block_barrier();
      if (!sums) continue;
      const int64_t last = (end + N - 1) / N;
      each_packs(begin / N, last, [&](const auto& packs, int64_t part) {
        unsigned bits[kAhead];
#pragma unroll
        for (int v = 0; v < kAhead; ++v) {
          const int64_t at = (part + static_cast<int64_t>(v) * threads) * N - begin;
          bits[v] = at < end - begin ? map.load(static_cast<unsigned>(at / 32)) >> (at % 32) : 0u;
        }
        if (own_one) {
          add<true>(packs, bits, per_logit);
        } else {
          add<false>(packs, bits, per_logit);
        }
      });
    }
    return twice;
  }

  // ---- what follows ------------------------------------------------------------------------------------

  struct Sums {
    double tail_top, entries_top, z_tail, z_one, z_entries, z_task, log_z, reference;
    Probabilities of;
    bool any, met;  // there are entries, the label among them
    FASTKD_DEVICE double top() const { return entries_top > tail_top ? entries_top : tail_top; }
  };

  // A sum of the tail relative to another logit than its own maximum: 0, or NaN where there is no softmax.
  static FASTKD_DEVICE double in_units_of(double other, double tail_top, double z, double by) {
    return z != 0 ? z * Wide::exp_one((tail_top - other) * by) : other - other;
  }

  FASTKD_DEVICE Sums sum(const Terms<Wide>&, bool own_one) {
    const S per_logit = of_all ? static_cast<S>(scale) * kPerUnit<T> : kPerUnit<T>;
    const bool sums_wanted = of_all || p.task, twice = sweep_tail(sums_wanted, own_one, per_logit);
    double tops[3] = {static_cast<double>(peak.top), kNothing, kNothing};  // of the tail, the entries, and their log p
    each_entry([&](const Entry& of, double logit) {
      tops[1] = maximum(tops[1], logit);
      tops[2] = maximum(tops[2], of.log_p);
    });
    group.reduce(tops, Max{});
    raise(static_cast<S>(tops[0]), per_logit);
    Sums result{};
    result.tail_top = tops[0];
    result.entries_top = tops[1];
    result.reference = of_all ? result.top() : tops[1];
    const double log_p_top = tops[2] > kNothing ? tops[2] : 0.0, top = result.top();
    // the tail's sums; of the entries e^(log p), p |log p|, e^((s - reference) / T), e^(s - top); how many, wrong, labels
    double sums[9] = {z, own_one ? z_one : z, 0, 0, 0, 0, 0, twice ? 1.0 : 0.0, 0};
    each_entry([&](const Entry& of, double logit) {
      sums[2] += device::exp(of.log_p - log_p_top);
      sums[3] -= weigh(device::exp(of.log_p), of.log_p);
      sums[4] += device::exp((logit - result.reference) * scale);
      if (p.task) sums[5] += device::exp(logit - top);
      sums[6] += 1;
      if (of.wrong) sums[7] += 1;
      if (of.c == numbers.label) sums[8] += 1;
    });
    group.reduce(sums, Sum{});
    result.z_tail = sums[0];
    result.z_one = sums[1];
    result.z_entries = sums[4];
    result.any = sums[6] != 0;
    result.met = sums[8] != 0;
    if (p.task) result.z_task = sums[5] + in_units_of(top, result.tail_top, result.z_one, 1.0);
    if (!kd) return result;
    const double z_all = result.z_entries + (of_all ? in_units_of(result.reference, result.tail_top, sums[0], scale) : 0.0);
    result.log_z = device::log(z_all);
    double given_tail = static_cast<double>(__builtin_nan(""));
    bool wrong = sums[7] != 0;
    if (p.given.tail_log_prob.data != nullptr) {
      const double log_p = value_of(p.given.tail_log_prob, dense.index * p.given.tail_log_prob.stride);
      wrong = wrong || !(log_p <= kLogProbTolerance);
      given_tail = device::exp(log_p);
    }
    result.of = probabilities_of<Wide>(rule, log_p_top, sums[2], sums[3], given_tail, sums[6] == static_cast<double>(p.classes),
                                       p.given.log_probs.dtype);
    result.of.wrong = result.of.wrong || wrong;
    return result;
  }

  struct Outcome {
    double q;
    Terms<Wide>::Term term;
  };
  FASTKD_DEVICE static Outcome outcome(const Terms<Wide>& terms, double log_q, double log_p) {
    const double q = device::exp(log_q);
    return {q, terms(q, device::exp(log_p), log_q, log_p)};
  }
  FASTKD_DEVICE Outcome outcome(const Terms<Wide>& terms, const Sums& sums, const Entry& of, double logit) const {
    return outcome(terms, (logit - sums.reference) * scale - sums.log_z, of.log_p - sums.of.shift - sums.of.log_total);
  }

  FASTKD_DEVICE void clear() const {
    const auto out = dense.student_gradient();
    for (int64_t i = self; i < p.classes; i += threads) out.data[i] = from_compute<T>(S(0));
  }

  FASTKD_DEVICE void run() {
    const bool gradient = p.student_gradient != nullptr;
    if (!numbers.active) {
      if (self == 0) {
        dense.write_task(0, S(0));
        dense.write_divergence(0);
      }
      if (gradient) clear();
      return;
    }
    const bool own_one = of_all && p.task && numbers.temperature != 1.0;
    const Terms<Wide> terms(p.kind, rule, p.beta);
    const Sums sums = sum(terms, own_one);
    double totals[2] = {0, 0}, tail_slope = 0;
    if (kd) {
      each_entry([&](const Entry& of, double logit) {
        const auto one = outcome(terms, sums, of, logit);
        totals[0] += one.term.value;
        totals[1] += one.term.slope;
      });
      group.reduce(totals, Sum{});
      const double log_q = (sums.tail_top - sums.reference) * scale + device::log(sums.z_tail) - sums.log_z;
      Outcome tail{};
      if (of_all) tail = outcome(terms, log_q, bucket ? device::log(sums.of.tail) : kNothing);
      if (bucket) {
        totals[0] += tail.term.value;
        totals[1] += tail.term.slope;
      }
      totals[1] = terms.slopes(totals[1]);
      const double nothing = sums.log_z - sums.log_z;  // or NaN
      if (sums.of.wrong) totals[0] = static_cast<double>(__builtin_nan(""));
      tail_slope = of_all && sums.z_tail != 0 ? ((bucket ? tail.term.slope : 0.0) - tail.q * totals[1]) / sums.z_tail
                   : sums.any || bucket       ? nothing
                                              : 0.0;
    }
    if (self == 0) {
      dense.keep_label_logit();
      dense.write_task(device::log(sums.z_task), static_cast<S>(sums.top()));
      dense.write_divergence(totals[0]);
    }
    if (gradient) write_gradient(terms, sums, totals[1], tail_slope, sums.of.wrong);
  }

  FASTKD_DEVICE void write_gradient(const Terms<Wide>& terms, const Sums& sums, double all_slopes, double tail_slope,
                                    bool wrong) const {
    const double poison = wrong ? static_cast<double>(__builtin_nan("")) : 0.0;
    const double kd_factor = (kd ? static_cast<double>(finite<S>(dense.kd_scale(numbers))) : 0.0) + poison;
    const double task_scale = p.task ? dense.task_scale(numbers) : 0.0, task_factor = p.task ? task_scale / sums.z_task : 0.0;
    const bool any_tail = sums.tail_top > kNothing, shared = !of_all || numbers.temperature == 1.0;  // one exponential for both
    const double tail_task = any_tail ? task_factor * Wide::exp_one(sums.tail_top - sums.top()) : 0.0;
    const double tail_kd = kd_factor * tail_slope, by = of_all ? scale : 1.0, reference = any_tail ? sums.tail_top : 0.0;
    const S first = finite<S>(tail_kd + (shared ? tail_task : 0.0)), one = finite<S>(shared ? 0.0 : tail_task);
    const S per_logit = static_cast<S>(by) * kPerUnit<T>, top = static_cast<S>(reference);
    const auto out = dense.student_gradient();
    const auto store_tail = [&]<bool kOne>() {
      each_packs(0, student.parts(), [&](const auto& packs, int64_t part) {
#pragma unroll
        for (int v = 0; v < kAhead; ++v) {
          S logits[N], values[N];
          unpack(packs[v], logits);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const S below = logits[k] - top;
            values[k] = first * exp_units<T>(below * per_logit);
            if constexpr (kOne) values[k] += one * exp_of<T>(below);
            if (!kOne && first == 0) values[k] = 0;  // whatever the logit
          }
          const int64_t at = part + static_cast<int64_t>(v) * threads;
          if (at < student.parts()) out.store(at, pack_of<T>(values));
        }
      });
    };
    if (one != 0) {
      store_tail.template operator()<true>();
    } else {
      store_tail.template operator()<false>();
    }
    block_barrier();  // what follows is stored over that
    each_entry([&](const Entry& of, double logit) {
      if (of.c < 0) return;
      const auto one_of = outcome(terms, sums, of, logit);
      double value = kd_factor * (one_of.term.slope - one_of.q * all_slopes);
      if (p.task) value += task_factor * device::exp(logit - sums.top()) - (of.c == numbers.label ? task_scale : 0.0);
      out.data[of.c] = from_compute<T>(static_cast<S>(value));
    });
    if (self != 0 || !p.task || sums.met || numbers.label < 0) return;
    const double below = static_cast<double>(to_compute(student.data[numbers.label])) - reference;
    const double value = tail_kd * Wide::exp_one(below * by) + tail_task * Wide::exp_one(below) - task_scale;
    out.data[numbers.label] = from_compute<T>(static_cast<S>(value));
  }
};

// inspect: streaming sparse_rows<*> loads=128 stores=128
template <typename T>
FASTKD_KERNEL(::fastkd::sparse::kMaxRowThreads, 2)
sparse_rows(const DeviceParams p) {
  each_row<LoopClusterGroup<kReducedNumbers>>(
      p.rows, [&](int64_t index, LoopClusterGroup<kReducedNumbers>& group) { SparseRow<T>(p, index, group).run(); });
}

}  // namespace fastkd::FASTKD_ISA::sparse
