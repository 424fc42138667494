// What the row kernels of divergence share: a row's numbers, what follows from its sums, the loop over rows, their losses.
#pragma once

#include "common/reduce.cuh"
#include "common/row.cuh"
#include "divergence/cuda.h"
#include "divergence/cuda_math.cuh"

namespace fastkd::FASTKD_ISA::divergence {

using namespace device;
using namespace divergence_math;
using ::fastkd::divergence::DeviceParams;
using ::fastkd::divergence::Kind;
using ::fastkd::divergence::RowNumbers;

FASTKD_DEVICE double number_of(const RowNumbers& numbers, int64_t row) {
  const int64_t i = row * numbers.stride;
  return numbers.wide ? static_cast<const double*>(numbers.data)[i] : static_cast<const float*>(numbers.data)[i];
}

// A running maximum. Sums are relative to it; to 0 while all was -inf.
template <typename S>
struct Peak {
  S top = -kInfinity<S>;
  FASTKD_DEVICE S reference() const { return top == -kInfinity<S> ? S(0) : top; }
  // How far it rises to `higher`: 0 where nothing was there to be rescaled.
  FASTKD_DEVICE S rise(S higher) {
    const S delta = top == -kInfinity<S> || !(higher > top) ? S(0) : higher - top;
    top = maximum(top, higher);
    return delta;
  }
};

FASTKD_DEVICE void write_loss(const DeviceParams& p, void* out, int64_t i, double value) {
  if (p.wide_loss) {
    static_cast<double*>(out)[i] = value;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(value);
  }
}
FASTKD_DEVICE double read_loss(const DeviceParams& p, const void* losses, int64_t i) {
  return p.wide_loss ? static_cast<const double*>(losses)[i] : static_cast<const float*>(losses)[i];
}
FASTKD_DEVICE double total_loss(const DeviceParams& p, double task, double kd) {
  return (p.kd_scale != 0 ? p.kd_scale * kd : 0) + p.task_scale * task;
}

// 1 / denominator of the reduction
FASTKD_DEVICE double inverse_denominator(const DeviceParams& p) {
  const double valid = p.valid != nullptr ? p.valid[p.one_launch ? cluster_rank() : 0] : 1;
  return inverse(p.denominator * (valid > 1 ? valid : 1));
}

// What a team needs to know of its row. y is the side that the divergence goes to, x the one it comes from; for
// Jensen-Shannon y is the student. Registers are what bounds these kernels: what is needed late is read late.
// kPlain: no labels, no weights, one temperature. Then the numbers of all rows are those of the launch, made on the host: with
// a warp for a row of 1000 classes they would take as many instructions as its elements.
template <typename T, typename Index, bool kPlainRows = false>
struct Row {
  using S = Compute<T>;
  using View = RowView<T, Index>;
  static constexpr bool kPlain = kPlainRows;

  // What the CPU refuses cannot be refused here, as values are not read on the host: a label or a temperature out of range
  // makes the row's loss and gradients NaN.
  struct Numbers {
    double weight, temperature;
    int64_t label;  // class of the cross-entropy, or -1
    bool active;    // takes part: neither ignored nor of weight 0
    bool own_task;  // its cross-entropy has a softmax of its own: T is not 1
    FASTKD_DEVICE Numbers(const DeviceParams& p, int64_t index)
        : weight(!kPlain && p.weight.data != nullptr ? number_of(p.weight, index) : 1.0),
          temperature(!kPlain && p.temperature.data != nullptr ? number_of(p.temperature, index) : p.temperature_all),
          label(!kPlain && p.target != nullptr ? p.target[index] : -1),
          active(weight != 0 && (kPlain || p.target == nullptr || label != p.ignore_index)),
          own_task(false) {
      if constexpr (kPlain) return;
      const bool bad_label = p.target != nullptr && (label < 0 || label >= p.classes);
      const bool bad_temperature = !(temperature > 0 && temperature < static_cast<double>(__builtin_inf()));
      if (active && (bad_label || bad_temperature)) weight = static_cast<double>(__builtin_nan(""));
      if (bad_label) label = -1;
      if (bad_temperature) temperature = 1;
      own_task = p.task && temperature != 1.0;
    }
  };

  const DeviceParams& p;
  int64_t index;

  FASTKD_DEVICE bool present() const { return index < p.rows; }  // the last teams of a block may have none
  FASTKD_DEVICE Numbers numbers() const {
    Numbers result(p, present() ? index : 0);
    result.active = result.active && present();
    return result;
  }
  FASTKD_DEVICE bool swap() const { return p.kind == Kind::kReverse; }  // y is the teacher
  FASTKD_DEVICE S c() const { return p.kind == Kind::kSoftCrossEntropy ? S(0) : S(1); }
  FASTKD_DEVICE S inverse_temperature(const Numbers& numbers) const {
    return kPlain ? static_cast<S>(p.inverse_temperature_all) : inverse_of<S>(numbers.temperature);
  }
  // of gradients: weight and reduction included
  FASTKD_DEVICE double kd_scale(const Numbers& numbers) const {
    return kPlain ? p.gradient_scale_all : numbers.weight * (p.kd_scale * inverse_denominator(p)) * numbers.temperature;
  }
  FASTKD_DEVICE double task_scale(const Numbers& numbers) const {
    return numbers.weight * (p.task_scale * inverse_denominator(p));
  }

  FASTKD_DEVICE View student() const { return view(static_cast<const T*>(p.student) + index * p.student_stride); }
  FASTKD_DEVICE View teacher() const { return view(static_cast<const T*>(p.teacher) + index * p.teacher_stride); }
  FASTKD_DEVICE View y() const { return swap() ? teacher() : student(); }
  FASTKD_DEVICE View x() const { return swap() ? student() : teacher(); }
  FASTKD_DEVICE bool wants_y() const { return (swap() ? p.teacher_gradient : p.student_gradient) != nullptr; }
  FASTKD_DEVICE bool wants_x() const { return (swap() ? p.student_gradient : p.teacher_gradient) != nullptr; }
  FASTKD_DEVICE View student_gradient() const { return view(gradient(p.student_gradient)); }
  FASTKD_DEVICE View y_gradient() const { return view(gradient(swap() ? p.teacher_gradient : p.student_gradient)); }
  FASTKD_DEVICE View x_gradient() const { return view(gradient(swap() ? p.student_gradient : p.teacher_gradient)); }
  FASTKD_DEVICE Index parts() const { return present() ? student().parts() : 0; }
  // Nothing of it is ragged, or not aligned.
  FASTKD_DEVICE bool whole() const { return student().all_packs() && teacher().all_packs(); }

  // By one thread of the team, before the row's last reduction, after which others may write gradients over the logits: the
  // student's logit of the label lies where the loss will be until that is known. A register would be spilled.
  FASTKD_DEVICE void keep_label_logit() const {
    if (kPlain || !present() || !p.task) return;
    const Numbers of = numbers();
    const S logit = of.active && of.label >= 0 ? to_compute(student().data[of.label]) : S(0);  // the weight is NaN where not
    if (p.row_losses != nullptr) p.row_losses[index] = logit;
    if (p.each_row) write_loss(p, p.terms, index, logit);
  }
  // The losses, weighted, by that thread as soon as they are known.
  FASTKD_DEVICE void write_task(double task_log_z, S student_top) const {
    if (!present()) return;
    const Numbers of = numbers();
    double value = 0;
    if (!kPlain && of.active && p.task) {
      const S logit = static_cast<S>(p.row_losses != nullptr ? p.row_losses[index] : read_loss(p, p.terms, index));
      value = of.weight * cross_entropy(task_log_z, logit, student_top);
    }
    if (p.row_losses != nullptr) p.row_losses[index] = value;
    if (p.each_row) write_loss(p, p.terms, index, value);
  }
  FASTKD_DEVICE void write_divergence(double divergence) const {
    if (!present()) return;
    const Numbers of = numbers();
    const bool counts = of.active && p.kd_scale != 0 && divergence != 0;  // T^2 may be infinite
    const double value = counts ? of.weight * of.temperature * of.temperature * divergence : 0;
    if (p.row_losses != nullptr) p.row_losses[p.rows + index] = value;
    if (!p.each_row) return;
    write_loss(p, p.terms, p.rows + index, value);
    write_loss(p, p.loss, index, total_loss(p, read_loss(p, p.terms, index), value));
  }

 private:
  FASTKD_DEVICE T* gradient(void* all) const { return all != nullptr ? static_cast<T*>(all) + index * p.classes : nullptr; }
  FASTKD_DEVICE View view(const T* row) const {
    const T* const written = gradient(p.student_gradient != nullptr ? p.student_gradient : p.teacher_gradient);
    const T* const aligned = written != nullptr ? written : static_cast<const T*>(p.student) + index * p.student_stride;
    return View(row, static_cast<Index>(p.classes), shift_of(aligned));
  }
};

// Softmax of the student at T = 1, for the gradient of the hard cross-entropy.
template <typename T, typename Index>
struct TaskGradient {
  using S = Compute<T>;
  bool wanted, own;
  Index label;
  S top, factor, scale;

  // z: of exponentials that the divergence has, too, or of its own
  FASTKD_DEVICE TaskGradient(const Row<T, Index>& row, const typename Row<T, Index>::Numbers& numbers, S student_top, double z)
      : wanted(row.p.task),
        own(numbers.own_task),
        label(static_cast<Index>(numbers.label)),
        top(student_top),
        factor(static_cast<S>(row.task_scale(numbers) * inverse_sum<S>(z))),
        scale(static_cast<S>(row.task_scale(numbers))) {}

  // gradient + that of element i; the exponential is the one of the divergence, or of the student's logit
  FASTKD_DEVICE S with(S gradient, S exponential, Index i) const {
    return gradient + (factor * exponential - (i == label ? scale : S(0)));
  }
  FASTKD_DEVICE S own_exponential(T logit) const { return exp_of<T>(to_compute(logit) - top); }
  FASTKD_DEVICE S add(S gradient, S exponential, T logit, Index i) const {
    if (!wanted) return gradient;
    return with(gradient, own ? own_exponential(logit) : exponential, i);
  }
  // The same for element i and its neighbours after it.
  template <int N>
  FASTKD_DEVICE void add_to(S (&gradients)[N], S (&exponentials)[N], const S (&logits)[N], Index i) const {
    if (!wanted) return;
    if (own) {
#pragma unroll
      for (int k = 0; k < N; ++k) exponentials[k] = exp_of<T>(logits[k] - top);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) gradients[k] += factor * exponentials[k];
    const Index behind = label - i;
    if (behind < 0 || behind >= N) return;
#pragma unroll
    for (int k = 0; k < N; ++k) gradients[k] -= k == behind ? scale : S(0);
  }
};

// Jensen-Shannon with the probabilities that it is about: q of the student (y), p of the teacher (x).
template <typename T>
struct Mixture : JensenShannon<Scalars<T>> {
  using S = Compute<T>;
  S inverse_zy, inverse_zx;
  FASTKD_DEVICE S q(S y) const { return product(exp_units<T>(this->a(y)), inverse_zy); }
  FASTKD_DEVICE S p(S x) const { return product(exp_units<T>(this->b(x)), inverse_zx); }
};

// Sums of a row, in double, and what follows from them.
struct LinearSums {
  double z_y, z_x, d, z_task;
};
// log Zy - c log Zx: for KL one logarithm, of the ratio; exactly 0 for equal sums
template <typename S>
FASTKD_DEVICE double log_ratio_of(const LinearSums& sums, S c) {
  const double log_ratio = log_sum<S>(c != 0 ? sums.z_y * inverse_sum<S>(sums.z_x) : sums.z_y);
  return c != 0 && sums.z_y == sums.z_x ? 0.0 : log_ratio;
}
// Where a divergence is small it is summed anew, from terms that are not negative: term(y, x, n) of each element of the row,
// added to sums[n]. All of the group's threads get the sums, and must come. The row is read again, most likely from the L2
// cache, an element at a time: registers are full of the row.
template <typename T, typename Index, bool kPlain, class Group, int N, typename Term>
FASTKD_DEVICE void sum_again(const Row<T, Index, kPlain>& row, Group& group, bool small, double (&sums)[N], const Term& term) {
  if (!group.any(small)) return;
  const auto y = row.y(), x = row.x();
  double total[N] = {};
  const Index count = small && row.present() ? y.count : 0;
#pragma unroll 1
  for (Index i = static_cast<Index>(group.index()); i < count; i += static_cast<Index>(group.size())) {
    Compute<T> values[N];
    term(to_compute(y.data[i]), to_compute(x.data[i]), values);
#pragma unroll
    for (int n = 0; n < N; ++n) total[n] += static_cast<double>(values[n]);
  }
  group.reduce(total, Sum{});
#pragma unroll
  for (int n = 0; n < N; ++n) sums[n] = small ? total[n] : sums[n];
}

// D from the sums. Where that is small it is not to be relied on.
template <typename T>
FASTKD_DEVICE double rough_divergence_of(const LinearSums& sums, double log_ratio) {
  return divergence_value(Scalars<T>::divide(sums.d, sums.z_x), 0.0, log_ratio);
}
template <typename T, typename Index, bool kPlain>
FASTKD_DEVICE bool is_small(const Row<T, Index, kPlain>& row, double rough) {
  return row.p.kind != Kind::kSoftCrossEntropy && row.p.kd_scale != 0 && rough < kSmallDivergence<Compute<T>>;
}

template <typename T, typename Index, bool kPlain, class Group>
FASTKD_DEVICE double exact_divergence_of(const Row<T, Index, kPlain>& row, const typename Row<T, Index, kPlain>::Numbers& numbers,
                                         const Compute<T> (&top)[2], const LinearSums& sums, double log_ratio, Group& group) {
  using S = Compute<T>;
  double value[1] = {rough_divergence_of<T>(sums, log_ratio)};
  const bool small = is_small(row, value[0]);
  const S inverse_temperature = row.inverse_temperature(numbers);
  const S inverse_zy = static_cast<S>(inverse_sum<S>(sums.z_y)), inverse_zx = static_cast<S>(inverse_sum<S>(sums.z_x));
  const S rest = static_cast<S>(log_ratio);
  const Differences<Scalars<T>> differences(inverse_temperature, top[0], top[1],
                                            Differences<Scalars<T>>::are_near(top[0], top[1]));
  sum_again(row, group, small, value, [&](S y, S x, S(&term)[1]) {
    const S p_y = exp_of<T>((y - top[0]) * inverse_temperature) * inverse_zy;
    const S p_x = exp_of<T>((x - top[1]) * inverse_temperature) * inverse_zx;
    term[0] = kl_term<S>(p_x, p_y, -(differences(y, x, S(1)) + rest));
  });
  return value[0];
}
// k: KL(q || m) and KL(p || m)
template <typename T, typename Index, bool kPlain, class Group>
FASTKD_DEVICE void make_exact(const Row<T, Index, kPlain>& row, const Mixture<T>& js, double (&k)[2], Group& group) {
  using S = Compute<T>;
  const bool small = row.p.kd_scale != 0 && jensen_shannon_value(row.p.beta, k[0], k[1]) < kSmallDivergence<S>;
  sum_again(row, group, small, k, [&](S y, S x, S(&term)[2]) {
    const S q = js.q(y), p = js.p(x);
    const auto terms = js.exact_terms(q, p, q - p);
    term[0] = terms.q.divergence;
    term[1] = terms.p.divergence;
  });
}

template <typename T, typename Index, bool kPlain>
FASTKD_DEVICE Exponents<Scalars<T>> exponents_of(const Row<T, Index, kPlain>& row,
                                                 const typename Row<T, Index, kPlain>::Numbers& numbers,
                                                 const Compute<T> (&top)[2]) {
  return {row.inverse_temperature(numbers) * kPerUnit<T>, top[0], top[1]};
}
template <typename T, typename Index, bool kPlain>
FASTKD_DEVICE Linear<Scalars<T>> linear_of(const Row<T, Index, kPlain>& row,
                                           const typename Row<T, Index, kPlain>::Numbers& numbers, const Compute<T> (&top)[2],
                                           const LinearSums& sums, double log_ratio, double value) {
  Linear<Scalars<T>> linear{exponents_of(row, numbers, top), row.c()};
  linear.finish(row.kd_scale(numbers), sums.z_y, sums.z_x, log_ratio, value);
  return linear;
}

template <typename T, typename Index, bool kPlain>
FASTKD_DEVICE Mixture<T> mixture_of(const Row<T, Index, kPlain>& row, const typename Row<T, Index, kPlain>::Numbers& numbers,
                                    const Compute<T> (&top)[2], double z_y, double z_x) {
  using S = Compute<T>;
  return {{exponents_of(row, numbers, top), static_cast<S>(row.p.beta), static_cast<S>(1.0 - row.p.beta)},
          static_cast<S>(inverse_sum<S>(z_y)),
          static_cast<S>(inverse_sum<S>(z_x))};
}

// gradient(k, i) for element k of the part, i of the row; zeros in rows that take no part.
template <typename T, typename Index, typename Gradient>
FASTKD_DEVICE void store_part(bool active, const RowView<T, Index>& out, Index part, const Gradient& gradient) {
  Compute<T> values[kPack<T>];
#pragma unroll
  for (int k = 0; k < kPack<T>; ++k) values[k] = active ? gradient(k, out.first(part) + k) : Compute<T>(0);
  out.store(part, pack_of<T>(values));
}

// ---- all rows -----------------------------------------------------------------------------------------

// The grid is one cluster, which sums up what is known of each row, in the same order each time.
FASTKD_DEVICE double count_valid(const int64_t* target, int64_t rows, int64_t ignore_index, ClusterGroup& all) {
  double count[1] = {0};
  sum_strided(rows, all, count, [&](int64_t r, int) { return target[r] != ignore_index ? 1.0 : 0.0; });
  all.reduce(count, Sum{});
  return count[0];
}
FASTKD_DEVICE void write_reduced(const DeviceParams& p, ClusterGroup& all) {
  double sums[2] = {0, 0};
  sum_strided(p.rows, all, sums, [&](int64_t r, int n) { return p.row_losses[n * p.rows + r]; });
  all.reduce(sums, Sum{});
  if (all.index() != 0) return;
  const double scale = inverse_denominator(p);
  write_loss(p, p.terms, 0, sums[0] * scale);
  write_loss(p, p.terms, 1, sums[1] * scale);
  write_loss(p, p.loss, 0, total_loss(p, sums[0], sums[1]) * scale);
}

// body(row, group) for every row with the teams that the grid has; where it is one cluster, the reduction too.
template <class RowType, class Group, typename Body>
FASTKD_DEVICE void for_rows(const DeviceParams& p, const Body& body) {
  if (!Group::kWholeCluster && p.one_launch) {
    ClusterGroup all;
    all.arrive();
    all.start();
    if (p.valid != nullptr) {
      const double count = count_valid(p.target, p.rows, p.ignore_index, all);
      if (thread_index() == 0) p.valid[cluster_rank()] = count;  // each block has a copy: no wait for the others
      block_barrier();
    }
  }
  each_row<Group>(p.rows, [&](int64_t index, Group& group) { body(RowType{p, index}, group); });
  if (!Group::kWholeCluster && p.one_launch) {
    ClusterGroup all(1);
    all.barrier();
    write_reduced(p, all);
  }
}

}  // namespace fastkd::FASTKD_ISA::divergence
