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

// What the formulas need of the CPU.
template <typename Register>
struct Registers {
  using V = Register;
  using S = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr double kUnit = 1, kLogUnit = 1;
  static constexpr bool kAddsTiniest = false;
  FASTKD_INLINE static V number(double x) { return broadcast<V>(x); }
  FASTKD_INLINE static double divide(double x, double y) { return x / y; }
  template <typename Mask>
  FASTKD_INLINE static bool all(Mask mask) {
    return all_of(mask);
  }
  FASTKD_INLINE static V reciprocal(V x) { return S(1) / x; }
  FASTKD_INLINE static V floored(V x) { return maximum(broadcast<V>(kTiny<S>), x); }
  FASTKD_INLINE static V log(V x) { return fastkd::FASTKD_ISA::log<true>(x); }  // has a floor of its own
  FASTKD_INLINE static V exact_log(V x) { return log(x); }
};

// One row: student s, teacher t, gradients gs and gt (null where not wanted; they may be s and t themselves).
template <typename T>
struct Row {
  using V = Vector<T>;
  using S = Scalar<T>;
  using P = Registers<V>;

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
    const T* const y;
    const T* const x;
    const T* const ahead[3];
    const V top_y, top_x;
    FASTKD_INLINE Inputs(const Row& row, bool swap)
        : y(swap ? row.t : row.s),
          x(swap ? row.s : row.t),
          ahead{row.ahead[0], row.ahead[1], row.ahead[2]},
          top_y(swap ? row.max_t : row.max_s),
          top_x(swap ? row.max_s : row.max_t) {}
    FASTKD_INLINE void fetch_ahead(int64_t i) const {
      for (const T* row : ahead) __builtin_prefetch(row + i, 0, 2);
    }
    FASTKD_INLINE V at_y(int64_t i, int lanes) const { return load_up_to(y + i, lanes, S(kLowest)); }
    FASTKD_INLINE V at_x(int64_t i, int lanes) const { return load_up_to(x + i, lanes, S(kLowest)); }
  };

  void run(double* kd_loss, double* task_loss) {
    inverse_temperature = inverse_of<V>(temperature);
    max_s = row_max(s, params.classes);
    max_t = row_max(t, params.classes);
    // streaming stores need 64-byte aligned rows
    const bool stream = params.stream && reinterpret_cast<uintptr_t>(gs) % 64 == 0 && reinterpret_cast<uintptr_t>(gt) % 64 == 0;
    const S label_logit = params.task && target >= 0 ? load_first(s + target, 1, S(0))[0] : S(0);
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
      *task_loss = weight * cross_entropy(task.log_z, label_logit, max_s[0]);
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

  // KL or cross-entropy, from side x to side y; Swap: from the student to the teacher
  template <bool Swap>
  FASTKD_INLINE double linear(double c, Task& task, bool stream) {
    if (params.task && !shared_task()) return linear_sweeps<Swap, true>(c, task, stream);
    return linear_sweeps<Swap, false>(c, task, stream);
  }

  template <bool Swap, bool OwnTask>
  double linear_sweeps(double c, Task& task, bool stream) {
    const Inputs in(*this, Swap);
    const Linear<P> of{{inverse_temperature, in.top_y, in.top_x}, broadcast<V>(c)};
    const auto below_top = [&](int64_t i, int lanes) __attribute__((always_inline)) {  // the student's logits
      return Swap ? in.at_x(i, lanes) - in.top_x : in.at_y(i, lanes) - in.top_y;
    };
    const bool keep = gs != nullptr || gt != nullptr;
    S* const kept_y = buffer[0];
    S* const kept_x = buffer[1];
    const auto sums =
        sweep_sum<V, OwnTask ? 4 : 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
          in.fetch_ahead(i);
          const V y = in.at_y(i, lanes), x = in.at_x(i, lanes);
          const V a = of.a(y), b = of.b(x), e_y = exp(a), e_x = exp(b);
          sum[0] += e_y;
          sum[1] += e_x;
          sum[2] += weigh(e_x, linear_term(of.c, a, b));
          if constexpr (OwnTask) sum[3] += exp(below_top(i, lanes));
          if (keep) {
            store(kept_y + i, e_y);
            store(kept_x + i, e_x);
          }
        });
    const double z_y = sums.value[0], z_x = sums.value[1], log_y = log_of(z_y), log_x = c * log_of(z_x);
    const Differences<P> differences(inverse_temperature, in.top_y, in.top_x,
                                     c == 1 && Differences<P>::are_near(in.top_y[0], in.top_x[0]));
    double value = divergence_value(sums.value[2] / z_x, log_x, log_y);
    if (c == 1 && params.kd_scale != 0 && value < kSmallDivergence<S>) {
      value = small_divergence(in, of, differences, keep, z_y, z_x, log_y - log_x);
    }
    if (params.task) finish_task(task, OwnTask ? sums.value[3] : Swap ? z_x : z_y);
    if (!keep) return value;

    Linear<P> linear = of;
    linear.finish(weight * params.kd_scale * temperature, z_y, z_x, log_y - log_x, value);
    const V f_task = broadcast<V>(weight * params.task_scale * task.inverse_z);
    const auto gradient = [&](bool of_y, int64_t i, int lanes) __attribute__((always_inline)) {
      return of_y ? linear.y_gradient(load(kept_y + i), load(kept_x + i))
                  : linear.x_gradient(load(kept_x + i), differences(in.at_y(i, lanes), in.at_x(i, lanes), linear.c));
    };
    const auto student = [&] {
      if (gs == nullptr) return;
      T* const out = gs;
      const bool task_too = params.task;
      const int64_t label = target;
      S label_gradient = 0;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        V g = gradient(!Swap, i, lanes);
        if (task_too) {
          g += f_task * (OwnTask ? exp(below_top(i, lanes)) : load((Swap ? kept_x : kept_y) + i));
          if (uint64_t(label - i) < uint64_t(lanes)) label_gradient = g[label - i];
        }
        write(out + i, g, lanes, stream);
      });
      task.label_gradient = label_gradient;
    };
    const auto teacher = [&] {
      if (gt == nullptr) return;
      T* const out = gt;
      sweep<V>(params.classes, [&](int64_t i, int lanes)
                                   __attribute__((always_inline)) { write(out + i, gradient(Swap, i, lanes), lanes, stream); });
    };
    // side x first: its gradient reads the logits of both, and gradients may take the place of logits
    if constexpr (Swap) {
      student();
      teacher();
    } else {
      teacher();
      student();
    }
    return value;
  }

  // KL of rows that are alike, as a sum of terms that are not negative.
  double small_divergence(const Inputs& in, const Linear<P>& of, const Differences<P>& differences, bool kept, double z_y,
                          double z_x, double log_ratio) const {
    const V inverse_zy = broadcast<V>(1.0 / z_y), inverse_zx = broadcast<V>(1.0 / z_x), one = broadcast<V>(1);
    const V rest = broadcast<V>(log_ratio);
    const S* const kept_y = buffer[0];
    const S* const kept_x = buffer[1];
    const auto sum = sweep_sum<V, 1>(params.classes, [&](int64_t i, int lanes, V* total) __attribute__((always_inline)) {
      const V y = in.at_y(i, lanes), x = in.at_x(i, lanes);
      const V p_y = (kept ? load(kept_y + i) : exp(of.a(y))) * inverse_zy;
      const V p_x = (kept ? load(kept_x + i) : exp(of.b(x))) * inverse_zx;
      total[0] += kl_term<S>(p_x, p_y, -(differences(y, x, one) + rest));
    });
    return sum.value[0];
  }

  double jensen_shannon(Task& task, bool stream) {
    const Inputs in(*this, false);
    JensenShannon<P> js{{inverse_temperature, max_s, max_t}, broadcast<V>(params.beta), broadcast<V>(1.0 - params.beta)};
    const bool own_task = params.task && !shared_task();
    S* const e_s = buffer[0];
    S* const e_t = buffer[1];
    const auto z = sweep_sum<V, 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      in.fetch_ahead(i);
      const V s_i = in.at_y(i, lanes), es = exp(js.a(s_i)), et = exp(js.b(in.at_x(i, lanes)));
      sum[0] += es;
      sum[1] += et;
      if (own_task) sum[2] += exp(s_i - js.top_y);
      store(e_s + i, es);
      store(e_t + i, et);
    });
    const double zs = z.value[0], zt = z.value[1];
    if (params.task) finish_task(task, own_task ? z.value[2] : zs);

    // log-ratios to the mixture; kept for the gradients in the two other buffers
    S* const r_q = gs != nullptr ? buffer[2] : nullptr;
    S* const r_p = gt != nullptr ? buffer[3] : nullptr;
    const V inverse_zs = broadcast<V>(1.0 / zs), inverse_zt = broadcast<V>(1.0 / zt), ratio = broadcast<V>(zs / zt);
    const auto keep = [&](int64_t i, V q, V p) __attribute__((always_inline)) {
      if (r_q != nullptr) store(r_q + i, q);
      if (r_p != nullptr) store(r_p + i, p);
    };
    auto kl = sweep_sum<V, 2>(params.classes, [&](int64_t i, int, V* sum) __attribute__((always_inline)) {
      const auto of = js.terms(load(e_s + i) * inverse_zs, load(e_t + i) * inverse_zt);
      sum[0] += of.q;
      sum[1] += of.p;
      keep(i, of.q, of.p);
    });
    const auto divergence = [&] { return jensen_shannon_value(params.beta, kl.value[0], kl.value[1]); };
    if (params.kd_scale != 0 && divergence() < kSmallDivergence<S>) {
      kl = sweep_sum<V, 2>(params.classes, [&](int64_t i, int, V* sum) __attribute__((always_inline)) {
        const V es = load(e_s + i), et = load(e_t + i);
        // q - p, exactly 0 for equal rows, contracted or not
        const auto of = js.exact_terms(es * inverse_zs, et * inverse_zt, (es - et * ratio) * inverse_zs);
        sum[0] += of.q.divergence;
        sum[1] += of.p.divergence;
        keep(i, of.q.gradient, of.p.gradient);
      });
    }

    js.finish(weight * params.kd_scale * temperature, params.beta, kl.value[0] / zs, kl.value[1] / zt);
    const V f_task = broadcast<V>(weight * params.task_scale * task.inverse_z);
    if (gs != nullptr) {
      T* const out = gs;
      const bool task_too = params.task;
      const int64_t label = target;
      S label_gradient = 0;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V es = load(e_s + i);
        V g = js.q_gradient(es, load(r_q + i));
        if (task_too) {
          g += own_task ? f_task * exp(in.at_y(i, lanes) - js.top_y) : f_task * es;
          if (uint64_t(label - i) < uint64_t(lanes)) label_gradient = g[label - i];
        }
        write(out + i, g, lanes, stream);
      });
      task.label_gradient = label_gradient;
    }
    if (gt != nullptr) {
      T* const out = gt;
      sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        write(out + i, js.p_gradient(load(e_t + i), load(r_p + i)), lanes, stream);
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
  for_dtype(params.dtype, [&]<typename T>() { rows_of<T>(params, begin, end, scratch); });
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
  for_dtype(dtype, [&]<typename T>() { scale_of(static_cast<T*>(data), count, factor); });
}

}  // namespace

// cpu_kernel_stats.cpp
void stats(const StatsParams& params, int64_t begin, int64_t end);
void stats_backward(const StatsBackwardParams& params, int64_t begin, int64_t end);

extern const Kernels kernels = {rows, stats, stats_backward, scale};

}  // namespace fastkd::FASTKD_ISA::divergence
