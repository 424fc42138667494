// Rows of which a rank has some classes, on the CPU, compiled once for each instruction set.
//
// Mapping: a thread takes whole rows of this rank. Sums: a sweep for the maxima, and one for exponentials and sums over data that
// the first one brought into the cache. Terms and gradients: one sweep each, with exponentials computed anew, as nothing of the
// size of the logits is kept between exchanges. Sums are fp32 lanes folded into fp64 every 64 registers, in a fixed order.
// Bytes that must move: rows * classes * (student + teacher) for each of sums, gradients and, for Jensen-Shannon, terms; and the
// gradients.
#include "divergence_shard/kernel.h"

#include "common/rows.h"
#include "divergence/cpu_math.h"

namespace fastkd::FASTKD_ISA::divergence_shard {
namespace {

using namespace divergence_math;
using ::fastkd::divergence_shard::Exchanged;
using ::fastkd::divergence_shard::kD;
using ::fastkd::divergence_shard::Kernels;
using ::fastkd::divergence_shard::Kind;
using ::fastkd::divergence_shard::kSums;
using ::fastkd::divergence_shard::kTopX;
using ::fastkd::divergence_shard::kTopY;
using ::fastkd::divergence_shard::kZTask;
using ::fastkd::divergence_shard::kZX;
using ::fastkd::divergence_shard::kZY;
using ::fastkd::divergence_shard::RowParams;

FASTKD_INLINE bool is_finite(double x) { return x - x == 0; }

template <typename T>
struct Row {
  using V = Vector<T>;
  using S = Scalar<T>;
  using P = Registers<V>;

  const RowParams& params;
  const int64_t index;
  const Exchanged& all = params.exchanged;
  const bool swap = params.kind == Kind::kReverse;  // y is the teacher
  const T* const student = static_cast<const T*>(params.student) + index * params.student_stride;
  const T* const teacher = static_cast<const T*>(params.teacher) + index * params.teacher_stride;
  const T* const y = swap ? teacher : student;
  const T* const x = swap ? student : teacher;
  const double weight = params.weight[index], temperature = params.temperature[index];
  const double c = params.kind == Kind::kSoftCrossEntropy ? 0 : 1;
  const V inverse_temperature = inverse_of<V>(temperature);

  FASTKD_INLINE static V at(const T* row, int64_t i, int lanes) { return load_up_to(row + i, lanes, S(kLowest)); }

  // ---- sums: this rank's --------------------------------------------------------------------------------

  void write_sums() const {
    if (weight == 0) {
      for (int64_t k = 0; k < kSums; ++k) all.sums[k * all.rows + index] = 0;
      return;
    }
    const bool own_task = params.task && temperature != 1.0;
    if (params.kind == Kind::kJensenShannon) {
      own_task ? sum<false, true>() : sum<false, false>();
    } else {
      own_task ? sum<true, true>() : sum<true, false>();
    }
  }
  template <bool kDivergence, bool kOwnTask>
  void sum() const {
    const V top_y = row_max(y, params.classes), top_x = row_max(x, params.classes);
    // of a part that is all -inf exponentials are 0
    const Exponents<P> of{inverse_temperature, top_y[0] == S(kLowest) ? V{} : top_y, top_x[0] == S(kLowest) ? V{} : top_x};
    const V wide_c = broadcast<V>(c);
    const bool student_is_x = swap;
    const auto sums = sweep_sum<V, 4>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      const V in_y = at(y, i, lanes), in_x = at(x, i, lanes), a = of.a(in_y), b = of.b(in_x), e_x = exp(b);
      sum[0] += exp(a);
      sum[1] += e_x;
      if constexpr (kDivergence) sum[2] += weigh(e_x, linear_term(wide_c, a, b));
      if constexpr (kOwnTask) sum[3] += exp(student_is_x ? in_x - of.top_x : in_y - of.top_y);
    });
    all.sum_at(kTopY, index) = top_y[0];
    all.sum_at(kTopX, index) = top_x[0];
    all.sum_at(kZY, index) = sums.value[0];
    all.sum_at(kZX, index) = sums.value[1];
    all.sum_at(kD, index) = sums.value[2];
    all.sum_at(kZTask, index) = kOwnTask ? sums.value[3] : sums.value[student_is_x ? 1 : 0];
  }

  // ---- what follows from those of all -------------------------------------------------------------------

  const V top_y = all_top(kTopY), top_x = all_top(kTopX);

  V all_top(::fastkd::divergence_shard::Sum which) const {
    return broadcast<V>(all.sums != nullptr ? all.sum(which, index) : 0.0);
  }
  double log_ratio() const { return log_of(all.sum(kZY, index)) - c * log_of(all.sum(kZX, index)); }
  double rough_divergence() const { return divergence_value(all.sum(kD, index) / all.sum(kZX, index), 0, log_ratio()); }
  Differences<P> differences() const {
    return {inverse_temperature, top_y, top_x, c == 1 && Differences<P>::are_near(top_y[0], top_x[0])};
  }

  void write_terms() const {
    double terms[2] = {0, 0};
    if (weight != 0) {
      if (params.kind == Kind::kJensenShannon) {
        sum_mixture(terms);
      } else if (c == 1 && rough_divergence() < kSmallDivergence<S>) {
        terms[0] = small_divergence();
        terms[1] = 1;
      } else if (!is_finite(all.sum(kD, index))) {
        terms[0] = careful_divergence();
        terms[1] = 1;
      }
    }
    for (int64_t k = 0; k < 2; ++k) all.terms[k * all.rows + index] = terms[k];
  }

  // This rank's part of a KL of rows that are alike, from terms that are not negative.
  double small_divergence() const {
    const Exponents<P> of{inverse_temperature, top_y, top_x};
    const Differences<P> apart = differences();
    const V inverse_zy = broadcast<V>(1.0 / all.sum(kZY, index)), inverse_zx = broadcast<V>(1.0 / all.sum(kZX, index));
    const V rest = broadcast<V>(log_ratio()), one = broadcast<V>(1);
    return sweep_sum<V, 1>(params.classes,
                           [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
                             const V in_y = at(y, i, lanes), in_x = at(x, i, lanes);
                             sum[0] += kl_term<S>(exp(of.b(in_x)) * inverse_zx, exp(of.a(in_y)) * inverse_zy,
                                                  -(apart(in_y, in_x, one) + rest));
                           })
        .value[0];
  }

  // This rank's part of a divergence that has come out infinite, or as NaN. A class that is masked on side y makes it so where
  // e^b is not 0, relative to this rank's maximum; relative to that of all it may well be, and then counts for nothing.
  double careful_divergence() const {
    const Exponents<P> of{inverse_temperature, top_y, top_x};
    const V inverse_zx = broadcast<V>(1.0 / all.sum(kZX, index)), rest = broadcast<V>(log_ratio()), wide_c = broadcast<V>(c);
    return sweep_sum<V, 1>(params.classes,
                           [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
                             const V a = of.a(at(y, i, lanes)), b = of.b(at(x, i, lanes));
                             sum[0] += weigh(exp(b) * inverse_zx, linear_term(wide_c, a, b) + rest);
                           })
        .value[0];
  }

  // Jensen-Shannon: y is the student, with probability q, x the teacher, with p.
  struct Mixture : JensenShannon<P> {
    V inverse_zs, inverse_zt, ratio;
  };
  Mixture mixture() const {
    const double zs = all.sum(kZY, index), zt = all.sum(kZX, index);
    return {{{inverse_temperature, top_y, top_x}, broadcast<V>(params.beta), broadcast<V>(1.0 - params.beta)},
            broadcast<V>(1.0 / zs),
            broadcast<V>(1.0 / zt),
            broadcast<V>(zs / zt)};
  }
  // Parts of KL(q || m) and KL(p || m). A sum of q log(q / m) over some classes may have either sign; less that of q - m it is a
  // sum of terms that are not negative. So a rank knows by itself whether its part has lost its digits.
  void sum_mixture(double (&terms)[2]) const {
    const Mixture js = mixture();
    const auto sums = sweep_sum<V, 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      const V es = exp(js.a(at(y, i, lanes))), et = exp(js.b(at(x, i, lanes)));
      const auto of = js.terms(es * js.inverse_zs, et * js.inverse_zt);
      sum[0] += of.q;
      sum[1] += of.p;
      sum[2] += (es - et * js.ratio) * js.inverse_zs;  // q - p, exactly 0 for equal rows
    });
    terms[0] = sums.value[0] - params.beta * sums.value[2];
    terms[1] = sums.value[1] + (1.0 - params.beta) * sums.value[2];
    if (!(jensen_shannon_value(params.beta, terms[0], terms[1]) < kSmallDivergence<S>)) return;
    const auto exact = sweep_sum<V, 2>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      const V es = exp(js.a(at(y, i, lanes))), et = exp(js.b(at(x, i, lanes)));
      const auto of = js.exact_terms(es * js.inverse_zs, et * js.inverse_zt, (es - et * js.ratio) * js.inverse_zs);
      sum[0] += of.q.divergence;
      sum[1] += of.p.divergence;
    });
    terms[0] = exact.value[0];
    terms[1] = exact.value[1];
  }

  // ---- gradients ----------------------------------------------------------------------------------------

  T* gradient(void* out) const { return out != nullptr ? static_cast<T*>(out) + index * params.classes : nullptr; }

  void write_gradients() const {
    T* const gs = gradient(params.student_gradient);
    T* const gt = gradient(params.teacher_gradient);
    if (weight == 0) {
      if (gs != nullptr) std::memset(static_cast<void*>(gs), 0, sizeof(T) * params.classes);
      if (gt != nullptr) std::memset(static_cast<void*>(gt), 0, sizeof(T) * params.classes);
      return;
    }
    const double scale = weight * params.kd_scale * temperature;
    if (params.kind == Kind::kJensenShannon) {
      Mixture js = mixture();
      const double kq = all.term(0, index), kp = all.term(1, index);
      const bool small = jensen_shannon_value(params.beta, kq, kp) < kSmallDivergence<S>;
      js.finish(scale, params.beta, kq / all.sum(kZY, index), kp / all.sum(kZX, index));
      store_gradients(gs, gt, [&](V in_y, V in_x, V& of_y, V& of_x) __attribute__((always_inline)) {
        const V es = exp(js.a(in_y)), et = exp(js.b(in_x)), q = es * js.inverse_zs, p = et * js.inverse_zt;
        if (small) {
          const auto of = js.exact_terms(q, p, (es - et * js.ratio) * js.inverse_zs);
          of_y = js.q_gradient(es, of.q.gradient);
          of_x = js.p_gradient(et, of.p.gradient);
        } else {
          const auto of = js.terms(q, p);
          of_y = js.q_gradient(es, of.q);
          of_x = js.p_gradient(et, of.p);
        }
      });
    } else {
      const Differences<P> apart = differences();
      Linear<P> linear{{inverse_temperature, top_y, top_x}, broadcast<V>(c)};
      linear.finish(scale, all.sum(kZY, index), all.sum(kZX, index), log_ratio(), all.term(0, index));
      store_gradients(gs, gt, [&](V in_y, V in_x, V& of_y, V& of_x) __attribute__((always_inline)) {
        const V e_y = exp(linear.a(in_y)), e_x = exp(linear.b(in_x));
        of_y = linear.y_gradient(e_y, e_x);
        of_x = linear.x_gradient(e_x, apart(in_y, in_x, linear.c));
      });
    }
  }

  // of(y, x, gradient of y, gradient of x) for each register; beside it the cross-entropy's of the student. A register of both
  // sides is read before either is written: gradients may take the place of logits.
  template <typename Of>
  FASTKD_INLINE void store_gradients(T* gs, T* gt, const Of& of) const {
    T* const gy = swap ? gt : gs;
    T* const gx = swap ? gs : gt;
    const bool task = params.task && gs != nullptr, student_is_x = swap;
    const V factor = broadcast<V>(task ? weight * params.task_scale / all.sum(kZTask, index) : 0.0), top = swap ? top_x : top_y;
    const int64_t label = task ? all.label[index] : -1;
    const S whole = static_cast<S>(weight * params.task_scale);
    sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const V in_y = at(y, i, lanes), in_x = at(x, i, lanes);
      V of_y, of_x;
      of(in_y, in_x, of_y, of_x);
      if (task) {
        V& own = student_is_x ? of_x : of_y;
        own += factor * exp((student_is_x ? in_x : in_y) - top);
        if (uint64_t(label - i) < uint64_t(lanes)) own[label - i] -= whole;
      }
      if (gy != nullptr) write(gy + i, of_y, lanes, false);
      if (gx != nullptr) write(gx + i, of_x, lanes, false);
    });
  }
};

template <typename Of>
void each_row(const RowParams& params, int64_t begin, int64_t end, const Of& of) {
  for_dtype(params.dtype, [&]<typename T>() {
    for (int64_t r = begin; r < end; ++r) of(Row<T>{params, r});
  });
}

void sums(const RowParams& params, int64_t begin, int64_t end) {
  each_row(params, begin, end, [](const auto& row) { row.write_sums(); });
}
void terms(const RowParams& params, int64_t begin, int64_t end) {
  each_row(params, begin, end, [](const auto& row) { row.write_terms(); });
}
void gradients(const RowParams& params, int64_t begin, int64_t end) {
  each_row(params, begin, end, [](const auto& row) { row.write_gradients(); });
}

}  // namespace

extern const Kernels kernels = {sums, terms, gradients};

}  // namespace fastkd::FASTKD_ISA::divergence_shard
