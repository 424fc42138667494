// Divergence rows on the CPU, compiled once for each instruction set.
//
// Mapping: a thread takes whole rows; a row makes two or three sweeps over data that the first one brought
// into the cache: (0) maxima, (1) exponentials and sums, kept in per-thread scratch, (2) for Jensen-Shannon
// the log-ratios, for rows that are alike terms that do not cancel, (last) gradients. Sums are fp32 lanes folded into fp64 every
// 64 registers, so that the error does not grow with the number of classes, and the order is fixed: the same bits on every run.
// Sweep (1) is bound by arithmetic, the others by memory: in (1) the caches already fetch what the others will touch.
// Bytes that must move: rows * classes * (student + teacher + gradients); the scratch stays in L2.
#include "divergence/kernel.h"

#include "common/rows.h"
#include "divergence/math.h"

namespace fastkd::FASTKD_ISA::divergence {
namespace {

using namespace divergence_math;
using ::fastkd::divergence::Kernels;
using ::fastkd::divergence::Kind;
using ::fastkd::divergence::RowParams;
using ::fastkd::divergence::StatsBackwardParams;
using ::fastkd::divergence::StatsParams;

template <typename T>
FASTKD_INLINE void write(T* p, Vector<T> v, int lanes, bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (stream && lanes == kLanes<F32>) {
      _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
      return;
    }
  }
#endif
  (void)stream;
  store_up_to(p, v, lanes);
}

// One row: student s, teacher t, gradients gs and gt (null where not wanted).
template <typename T>
struct Row {
  using V = Vector<T>;
  using S = Scalar<T>;

  const RowParams& params;
  const T* s;
  const T* t;
  T* gs;
  T* gt;
  // what the processor fetches meanwhile: the next row and where the gradient goes; s where there is nothing to fetch
  const T* ahead[3];
  int64_t target;  // class of the cross-entropy, or -1
  double temperature;
  double weight;
  S* buffer[4];

  V inverse_temperature, max_s, max_t;

  // What the sweeps read, as locals: a store of floats may alias any member, and would reload it each time.
  struct Inputs {
    const T* const s;
    const T* const t;
    const T* const ahead[3];
    const V inverse_temperature, max_s, max_t;
    // Logits near each other are subtracted as they are, which costs no digits; others relative to their maxima.
    const bool alike;
    const V zero_s, zero_t, apart;
    FASTKD_INLINE explicit Inputs(const Row& row, bool differences = false)
        : s(row.s),
          t(row.t),
          ahead{row.ahead[0], row.ahead[1], row.ahead[2]},
          inverse_temperature(row.inverse_temperature),
          max_s(row.max_s),
          max_t(row.max_t),
          alike(differences && max_s[0] - max_t[0] <= 1 && max_t[0] - max_s[0] <= 1),
          zero_s(alike ? V{} : max_s),
          zero_t(alike ? V{} : max_t),
          apart(alike ? max_s - max_t : V{}) {}
    FASTKD_INLINE void fetch_ahead(int64_t i) const {
      for (const T* row : ahead) __builtin_prefetch(row + i, 0, 2);
    }
    FASTKD_INLINE V below_max(int64_t i, int lanes) const { return load_up_to(s + i, lanes, S(kLowest)) - max_s; }
    FASTKD_INLINE V a(int64_t i, int lanes) const { return below_max(i, lanes) * inverse_temperature; }
    FASTKD_INLINE V b(int64_t i, int lanes) const { return (load_up_to(t + i, lanes, S(kLowest)) - max_t) * inverse_temperature; }
    // c_s a - c_t b; a factor other than 1 without `differences`
    FASTKD_INLINE V difference(int64_t i, int lanes, V c_s, V c_t) const {
      const V from_s = load_up_to(s + i, lanes, S(kLowest)) - zero_s, from_t = load_up_to(t + i, lanes, S(kLowest)) - zero_t;
      return (c_s * from_s - c_t * from_t - apart) * inverse_temperature;
    }
  };

  void run(double* kd_loss, double* task_loss) {
    inverse_temperature = inverse_of<V>(temperature);
    max_s = row_max(s, params.classes);
    max_t = row_max(t, params.classes);
    // streaming stores need 64-byte aligned rows
    const bool stream = params.stream && reinterpret_cast<uintptr_t>(gs) % 64 == 0 && reinterpret_cast<uintptr_t>(gt) % 64 == 0;
    double divergence = 0;
    Task task;
    switch (params.kind) {
      case Kind::kForward: divergence = linear<false>(1, task, stream); break;
      case Kind::kReverse: divergence = linear<true>(1, task, stream); break;
      case Kind::kSoftCrossEntropy: divergence = linear<false>(0, task, stream); break;
      case Kind::kJensenShannon: divergence = jensen_shannon(task, stream); break;
    }
    if (gs != nullptr && target >= 0) subtract_one_at_target(task);
    // T^2 may be infinite
    *kd_loss = params.kd_scale != 0 && divergence != 0 ? weight * temperature * temperature * divergence : 0;
    if (params.task && target >= 0) {
      const double shifted = (double(load_first(s + target, 1, S(0))[0]) - double(max_s[0]));
      *task_loss = weight * (task.log_z - shifted);
    }
  }

 private:
  // softmax of the student at T = 1 for the hard cross-entropy; shares the exponentials when T = 1
  struct Task {
    double log_z = 0;
    double inverse_z = 0;
    S label_gradient = 0;  // gradient at the target before its -1
  };

  bool shared_task() const { return temperature == 1.0; }

  FASTKD_INLINE void finish_task(Task& task, double z) const {
    task.log_z = log_of(z);
    task.inverse_z = 1.0 / z;
  }

  // KL or cross-entropy; Swap: from the student to the teacher
  template <bool Swap>
  FASTKD_INLINE double linear(double c, Task& task, bool stream) {
    if (params.task && !shared_task()) return linear_sweeps<Swap, true>(c, task, stream);
    return linear_sweeps<Swap, false>(c, task, stream);
  }

  template <bool Swap, bool OwnTask>
  double linear_sweeps(double c, Task& task, bool stream) {
    const Inputs in(*this, c == 1);
    const V c_v = broadcast<V>(c), one = broadcast<V>(1);
    const bool keep = gs != nullptr || gt != nullptr;
    S* const e_s = buffer[0];
    S* const e_t = buffer[1];
    const auto sums =
        sweep_sum<V, OwnTask ? 4 : 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
          in.fetch_ahead(i);
          const V below = in.below_max(i, lanes);
          const V ai = below * in.inverse_temperature, bi = in.b(i, lanes);
          const V es = exp(ai), et = exp(bi);
          sum[0] += es;
          sum[1] += et;
          sum[2] += Swap ? weigh(es, c_v * ai - bi) : weigh(et, c_v * bi - ai);
          if constexpr (OwnTask) sum[3] += exp(below);
          if (keep) {
            store(e_s + i, es);
            store(e_t + i, et);
          }
        });
    const double zs = sums.value[0], zt = sums.value[1];
    const double log_s = log_of(zs), log_t = log_of(zt);
    double value =
        Swap ? divergence_value(sums.value[2] / zs, log_s, log_t, c) : divergence_value(sums.value[2] / zt, log_t, log_s, c);
    if (c == 1 && params.kd_scale != 0 && value < kSmallDivergence<S>)
      value = small_divergence<Swap>(in, keep, zs, zt, log_s, log_t);
    if (params.task) finish_task(task, OwnTask ? sums.value[3] : zs);
    if (!keep) return value;

    // gradients: of the "to" side it is p_y - p_x, of the "from" side p_x (c log p_x - log p_y - D)
    const double scale = weight * params.kd_scale * temperature;
    const V f_s = broadcast<V>(finite<S>(scale / zs)), f_t = broadcast<V>(finite<S>(scale / zt));
    const V f = Swap ? f_t : f_s, ratio = broadcast<V>(Swap ? zt / zs : zs / zt);
    const V f_task = broadcast<V>(weight * params.task_scale * task.inverse_z);
    const V shift = broadcast<V>(Swap ? -c * log_s + log_t - value : -c * log_t + log_s - value);
    const auto to_side = [&](int64_t i) __attribute__((always_inline)) {
      const V es = load(e_s + i), et = load(e_t + i);
      return f * (Swap ? et - es * ratio : es - et * ratio);  // exactly 0 for equal rows, contracted or not
    };
    const auto from_side = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      return Swap ? weigh(load(e_s + i) * f_s, in.difference(i, lanes, c_v, one) + shift)
                  : weigh(load(e_t + i) * f_t, shift - in.difference(i, lanes, one, c_v));
    };
    if (gs != nullptr) {
      T* const out = gs;
      const bool task_too = params.task;
      const int64_t label = target;
      S label_gradient = 0;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        V g;
        if constexpr (Swap) {
          g = from_side(i, lanes);
        } else {
          g = to_side(i);
        }
        if (task_too) {
          g += OwnTask ? f_task * exp(in.below_max(i, lanes)) : f_task * load(e_s + i);
          if (uint64_t(label - i) < uint64_t(lanes)) label_gradient = g[label - i];
        }
        write(out + i, g, lanes, stream);
      });
      task.label_gradient = label_gradient;
    }
    if (gt != nullptr) {
      T* const out = gt;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        if constexpr (Swap) {
          write(out + i, to_side(i), lanes, stream);
        } else {
          write(out + i, from_side(i, lanes), lanes, stream);
        }
      });
    }
    return value;
  }

  // KL of rows that are alike, as a sum of terms that are not negative.
  template <bool Swap>
  double small_divergence(const Inputs& in, bool kept, double zs, double zt, double log_s, double log_t) const {
    const V inverse_zs = broadcast<V>(1.0 / zs), inverse_zt = broadcast<V>(1.0 / zt), one = broadcast<V>(1);
    const V shift = broadcast<V>(log_t - log_s);
    const S* const e_s = buffer[0];
    const S* const e_t = buffer[1];
    const auto sum = sweep_sum<V, 1>(params.classes, [&](int64_t i, int lanes, V* total) __attribute__((always_inline)) {
      const V q = (kept ? load(e_s + i) : exp(in.a(i, lanes))) * inverse_zs;
      const V p = (kept ? load(e_t + i) : exp(in.b(i, lanes))) * inverse_zt;
      const V l = in.difference(i, lanes, one, one) + shift;  // log q - log p
      total[0] += Swap ? kl_term<S>(q, p, -l) : kl_term<S>(p, q, l);
    });
    return sum.value[0];
  }

  // Both sides of a mixture, and where q log(q / m) and p log(p / m) go.
  struct Mixture {
    const V beta, one_minus_beta, inverse_zs, inverse_zt, ratio, tiny;
    const S* const e_s;
    const S* const e_t;
    S* const r_q;
    S* const r_p;
    Mixture(double of_p, double zs, double zt, const S* es, const S* et, S* to_q, S* to_p)
        : beta(broadcast<V>(of_p)),
          one_minus_beta(broadcast<V>(1.0 - of_p)),
          inverse_zs(broadcast<V>(1.0 / zs)),
          inverse_zt(broadcast<V>(1.0 / zt)),
          ratio(broadcast<V>(zs / zt)),
          tiny(broadcast<V>(kTiny<S>)),
          e_s(es),
          e_t(et),
          r_q(to_q),
          r_p(to_p) {}
    struct At {
      V q, p, m, inverse_m;
      FASTKD_INLINE V log_ratio_q() const { return weigh(q, log<true>(q * inverse_m)); }
      FASTKD_INLINE V log_ratio_p() const { return weigh(p, log<true>(p * inverse_m)); }
    };
    FASTKD_INLINE At at(int64_t i) const {
      const V q = load(e_s + i) * inverse_zs, p = load(e_t + i) * inverse_zt;
      const V m = beta * p + one_minus_beta * q;
      return {q, p, m, S(1) / maximum(tiny, m)};
    }
    // q - p, exactly 0 for equal rows, contracted or not
    FASTKD_INLINE V difference(int64_t i) const { return (load(e_s + i) - load(e_t + i) * ratio) * inverse_zs; }
    FASTKD_INLINE void add(int64_t i, MixtureTerm<V> of_q, MixtureTerm<V> of_p, V* sum) const {
      sum[0] += of_q.divergence;
      sum[1] += of_p.divergence;
      if (r_q != nullptr) store(r_q + i, of_q.gradient);
      if (r_p != nullptr) store(r_p + i, of_p.gradient);
    }
  };

  // The sums of rows that are alike, of terms that are not negative. Most registers need no logarithm.
  Totals<V, 2> small_mixture(const Mixture& mixture) const {
    return sweep_sum<V, 2>(params.classes, [&](int64_t i, int, V* sum) __attribute__((always_inline)) {
      const auto at = mixture.at(i);
      const V q_p = mixture.difference(i), to_q = mixture.beta * q_p, to_p = -mixture.one_minus_beta * q_p;
      if (all_of(is_near<S>(at.m, to_q) & is_near<S>(at.m, to_p))) {
        mixture.add(i, near_term<S>(at.inverse_m, to_q), near_term<S>(at.inverse_m, to_p), sum);
      } else {
        mixture.add(i, mixture_term<S>(at.m, at.inverse_m, to_q, at.log_ratio_q()),
                    mixture_term<S>(at.m, at.inverse_m, to_p, at.log_ratio_p()), sum);
      }
    });
  }

  double jensen_shannon(Task& task, bool stream) {
    const Inputs in(*this);
    const bool own_task = params.task && !shared_task();
    S* const e_s = buffer[0];
    S* const e_t = buffer[1];
    const auto z = sweep_sum<V, 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      in.fetch_ahead(i);
      const V below = in.below_max(i, lanes);
      const V es = exp(below * in.inverse_temperature), et = exp(in.b(i, lanes));
      sum[0] += es;
      sum[1] += et;
      if (own_task) sum[2] += exp(below);
      store(e_s + i, es);
      store(e_t + i, et);
    });
    const double zs = z.value[0], zt = z.value[1];
    if (params.task) finish_task(task, own_task ? z.value[2] : zs);

    // log-ratios to the mixture; kept for the gradients in the two other buffers. Probabilities may be subnormal, where
    // reciprocal and log overflow: both have a floor, which changes terms below 2^-126 * 100 only.
    const Mixture mixture{
        params.beta, zs, zt, e_s, e_t, gs != nullptr ? buffer[2] : nullptr, gt != nullptr ? buffer[3] : nullptr};
    auto kl = sweep_sum<V, 2>(params.classes, [&](int64_t i, int, V* sum) __attribute__((always_inline)) {
      const auto at = mixture.at(i);
      mixture.add(i, {at.log_ratio_q(), at.log_ratio_q()}, {at.log_ratio_p(), at.log_ratio_p()}, sum);
    });
    const auto divergence = [&] { return params.beta * kl.value[1] + (1.0 - params.beta) * kl.value[0]; };
    if (params.kd_scale != 0 && divergence() < kSmallDivergence<S>) kl = small_mixture(mixture);
    const double kq = kl.value[0], kp = kl.value[1];
    const S* const r_q = mixture.r_q;
    const S* const r_p = mixture.r_p;

    const double scale = weight * params.kd_scale * temperature;
    const V f_q = broadcast<V>(finite<S>(scale * (1.0 - params.beta))), f_p = broadcast<V>(finite<S>(scale * params.beta));
    const V shift_q = broadcast<V>(kq / zs), shift_p = broadcast<V>(kp / zt);
    const V f_task = broadcast<V>(weight * params.task_scale * task.inverse_z);
    if (gs != nullptr) {
      T* const out = gs;
      const bool task_too = params.task;
      const int64_t label = target;
      S label_gradient = 0;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V es = load(e_s + i);
        V g = f_q * (load(r_q + i) - es * shift_q);
        if (task_too) {
          g += own_task ? f_task * exp(in.below_max(i, lanes)) : f_task * es;
          if (uint64_t(label - i) < uint64_t(lanes)) label_gradient = g[label - i];
        }
        write(out + i, g, lanes, stream);
      });
      task.label_gradient = label_gradient;
    }
    if (gt != nullptr) {
      T* const out = gt;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        write(out + i, f_p * (load(r_p + i) - load(e_t + i) * shift_p), lanes, stream);
      });
    }
    return divergence();
  }

  FASTKD_INLINE void subtract_one_at_target(const Task& task) {
    if (params.task) store_first(gs + target, broadcast<V>(task.label_gradient - S(weight * params.task_scale)), 1);
  }
};

template <typename T>
void rows_of(const RowParams& params, int64_t begin, int64_t end, void* scratch) {
  using S = Scalar<T>;
  const int64_t padded = (params.classes + 15) / 16 * 16;
  for (int64_t r = begin; r < end; ++r) {
    T* const gs = params.student_gradient ? static_cast<T*>(params.student_gradient) + r * params.classes : nullptr;
    T* gt = params.teacher_gradient ? static_cast<T*>(params.teacher_gradient) + r * params.classes : nullptr;
    if (gt != nullptr && params.kd_scale == 0) {
      std::memset(gt, 0, sizeof(T) * params.classes);
      gt = nullptr;
    }
    const double weight = params.weight != nullptr ? params.weight[r] : 1.0;
    const bool ignored = weight == 0.0 || (params.target != nullptr && params.target[r] == params.ignore_index);
    params.kd_loss[r] = 0;
    params.task_loss[r] = 0;
    if (ignored) {  // zeros, whatever the logits hold
      if (gs != nullptr) std::memset(gs, 0, sizeof(T) * params.classes);
      if (gt != nullptr) std::memset(gt, 0, sizeof(T) * params.classes);
      continue;
    }
    S* const buffer = static_cast<S*>(scratch);
    const T* const s = static_cast<const T*>(params.student) + r * params.student_stride;
    const T* const t = static_cast<const T*>(params.teacher) + r * params.teacher_stride;
    const bool next = params.ahead && r + 1 < end;
    Row<T> row{params,
               s,
               t,
               gs,
               gt,
               {next ? s + params.student_stride : s, next ? t + params.teacher_stride : s,
                params.ahead && !params.stream && gs != nullptr ? gs : s},
               params.target != nullptr ? params.target[r] : -1,
               params.temperature != nullptr ? params.temperature[r] : params.temperature_all,
               weight,
               {buffer, buffer + padded, buffer + 2 * padded, buffer + 3 * padded},
               {},
               {},
               {}};
    row.run(params.kd_loss + r, params.task_loss + r);
  }
#if defined(__x86_64__)
  if (params.stream) _mm_sfence();
#endif
}

void rows(const RowParams& params, int64_t begin, int64_t end, void* scratch) {
  switch (params.dtype) {
    case Dtype::kFloat32: return rows_of<float>(params, begin, end, scratch);
    case Dtype::kFloat64: return rows_of<double>(params, begin, end, scratch);
    case Dtype::kBFloat16: return rows_of<BFloat16>(params, begin, end, scratch);
    case Dtype::kFloat16: return rows_of<Float16>(params, begin, end, scratch);
    default: return;
  }
}

template <typename T>
void scale_of(T* data, int64_t count, double factor) {
  using V = Vector<T>;
  const V f = broadcast<V>(factor);
  sweep<V>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    store_up_to(data + i, load_up_to(data + i, lanes, Scalar<T>(0)) * f, lanes);
  });
}

void scale(Dtype dtype, void* data, int64_t count, double factor) {
  switch (dtype) {
    case Dtype::kFloat32: return scale_of(static_cast<float*>(data), count, factor);
    case Dtype::kFloat64: return scale_of(static_cast<double*>(data), count, factor);
    case Dtype::kBFloat16: return scale_of(static_cast<BFloat16*>(data), count, factor);
    case Dtype::kFloat16: return scale_of(static_cast<Float16*>(data), count, factor);
    default: return;
  }
}

}  // namespace

// cpu_kernel_stats.cpp
void stats(const StatsParams& params, int64_t begin, int64_t end);
void stats_backward(const StatsBackwardParams& params, int64_t begin, int64_t end);

extern const Kernels kernels = {rows, stats, stats_backward, scale};

}  // namespace fastkd::FASTKD_ISA::divergence
