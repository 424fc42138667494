// Divergence rows of any length, read again in each phase: what does not fit the registers, and what needs one phase only.
//
// Mapping: a row belongs to a warp, a block or a cluster of blocks. First sweep, online: each thread keeps its own maxima and
// the sums relative to them, rescaled where a maximum rises; then all are rescaled to the row's maxima and added up. For
// Jensen-Shannon a second sweep sums the log-ratios. The last sweep writes the gradients.
// Bytes that must move: rows * classes * (student + teacher) for each sweep (one without gradients, two with, one more for
// Jensen-Shannon), and the gradients.
#pragma once

#include "divergence/cuda_rows.cuh"

namespace fastkd::FASTKD_ISA::divergence {

using ::fastkd::divergence::kLaneThreads;
using ::fastkd::divergence::kMaxRowThreads;

template <typename T, typename Index>
struct OnlineSums {
  using S = Compute<T>;

  const S inverse_temperature, c;
  const bool swap, own_task;
  Peak<S> y, x;
  double z_y = 0, z_x = 0, d = 0, z_task = 0;

  FASTKD_DEVICE OnlineSums(const Row<T, Index>& row, const typename Row<T, Index>::Numbers& numbers)
      : inverse_temperature(inverse_of<S>(numbers.temperature)), c(row.c()), swap(row.swap()), own_task(numbers.own_task) {}

  FASTKD_DEVICE void raise(S top_y, S top_x) {
    const S rise_y = y.rise(top_y), rise_x = x.rise(top_x);
    const double steps_y = static_cast<double>(rise_y * inverse_temperature);
    const double steps_x = static_cast<double>(rise_x * inverse_temperature);
    if (rise_y > 0) {
      z_y *= static_cast<double>(device::exp(-rise_y * inverse_temperature));
      if (z_x != 0) d += steps_y * z_x;  // every log q falls
    }
    if (rise_x > 0) {
      const double factor = static_cast<double>(device::exp(-rise_x * inverse_temperature));
      d = factor != 0 ? factor * (d - static_cast<double>(c) * steps_x * z_x) : 0;
      z_x *= factor;
    }
    if (own_task) z_task *= static_cast<double>(exp_of<T>(-(swap ? rise_x : rise_y)));
  }

  template <bool kDivergence>
  FASTKD_DEVICE void add(const Pack<T>& to, const Pack<T>& from) {
    S top_y = y.top, top_x = x.top;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      top_y = maximum(top_y, to_compute(to.value[k]));
      top_x = maximum(top_x, to_compute(from.value[k]));
    }
    if (top_y > y.top || top_x > x.top) raise(top_y, top_x);
    const S reference_y = y.reference(), reference_x = x.reference();
    S sum_y = 0, sum_x = 0, sum_d = 0, sum_task = 0;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const S below_y = to_compute(to.value[k]) - reference_y, below_x = to_compute(from.value[k]) - reference_x;
      const S a = below_y * inverse_temperature, b = below_x * inverse_temperature;
      const S e_x = exp_of<T>(b);
      sum_y += exp_of<T>(a);
      sum_x += e_x;
      if constexpr (kDivergence) sum_d += weigh(e_x, c * b - a);
      if (own_task) sum_task += exp_of<T>(swap ? below_x : below_y);
    }
    z_y += static_cast<double>(sum_y);
    z_x += static_cast<double>(sum_x);
    d += static_cast<double>(sum_d);
    z_task += static_cast<double>(sum_task);
  }
};

template <typename T, bool kJensenShannon, class Group>
FASTKD_DEVICE void streaming_row(const Row<T, int64_t>& row, Group& group) {
  using S = Compute<T>;
  const auto y = row.y(), x = row.x(), y_gradient = row.y_gradient(), x_gradient = row.x_gradient();
  const auto each_part = [&](bool wanted, const auto& body) {
    const int64_t parts = wanted ? row.parts() : 0;
    for (int64_t part = group.index(); part < parts; part += group.size()) body(part);
  };
  group.arrive();
  const auto numbers = row.numbers();
  OnlineSums<T, int64_t> online(row, numbers);
  each_part(numbers.active, [&](int64_t part) { online.template add<!kJensenShannon>(y.load(part), x.load(part)); });
  group.start();
  S top[2] = {online.y.top, online.x.top};
  group.reduce(top, Max{});
  online.raise(top[0], top[1]);
  double sums[4] = {online.z_y, online.z_x, online.d, online.z_task};
  group.reduce(sums, Sum{});
  if (!(top[0] > -kInfinity<S>)) sums[0] = static_cast<double>(__builtin_nan(""));  // all -inf: no softmax
  if (!(top[1] > -kInfinity<S>)) sums[1] = static_cast<double>(__builtin_nan(""));
  const S student_top = row.swap() ? top[1] : top[0];
  const double z_task = numbers.own_task ? sums[3] : row.swap() ? sums[1] : sums[0];
  if (group.index() == 0) row.write_task(log_sum<S>(z_task), student_top);
  const bool gradients = row.wants_y() || row.wants_x();

  if constexpr (!kJensenShannon) {
    const LinearSums linear_sums{sums[0], sums[1], sums[2], z_task};
    const double log_ratio = log_ratio_of(linear_sums, row.c());
    const double value = exact_divergence_of(row, numbers, top, linear_sums, log_ratio, group);
    if (group.index() == 0) row.write_divergence(value);
    const TaskGradient<T, int64_t> task(row, numbers, student_top, z_task);
    const Linear<T> linear = linear_of(row, numbers, top[0], top[1], linear_sums, log_ratio, value);
    each_part(gradients, [&](int64_t part) {
      const Pack<T> to = y.template load<true>(part), from = x.template load<true>(part);
      if (row.wants_y()) {
        store_part(numbers.active && (!row.swap() || row.p.kd_scale != 0), y_gradient, part, [&](int k, int64_t i) {
          const S e_y = exp_units<T>(linear.a(to_compute(to.value[k])));
          const S g = linear.y_gradient(e_y, exp_units<T>(linear.b(to_compute(from.value[k]))));
          return row.swap() ? g : task.add(g, e_y, to.value[k], i);
        });
      }
      if (row.wants_x()) {
        store_part(numbers.active && (row.swap() || row.p.kd_scale != 0), x_gradient, part, [&](int k, int64_t i) {
          const S b = linear.b(to_compute(from.value[k])), e_x = exp_units<T>(b);
          const S g = linear.x_gradient(e_x, linear.c * b - linear.a(to_compute(to.value[k])));
          return row.swap() ? task.add(g, e_x, from.value[k], i) : g;
        });
      }
    });
  } else {
    auto js = jensen_shannon_of(row, numbers, top[0], top[1], sums[0], sums[1]);
    double k_sums[2] = {0, 0};
    each_part(numbers.active, [&](int64_t part) {
      const Pack<T> to = y.load(part), from = x.load(part);
      S sum_q = 0, sum_p = 0;
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const auto terms = js.terms(js.q(to_compute(to.value[k])), js.p(to_compute(from.value[k])));
        sum_q += terms.q;
        sum_p += terms.p;
      }
      k_sums[0] += static_cast<double>(sum_q) * js.kLogUnit;
      k_sums[1] += static_cast<double>(sum_p) * js.kLogUnit;
    });
    group.reduce(k_sums, Sum{});
    make_exact(row, js, k_sums, group);
    if (group.index() == 0) row.write_divergence(row.p.beta * k_sums[1] + (1.0 - row.p.beta) * k_sums[0]);
    finish(js, row.p.beta, row.kd_scale(numbers), k_sums[0], k_sums[1]);
    const TaskGradient<T, int64_t> task(row, numbers, student_top,
                                        numbers.own_task ? z_task : 1.0);  // probabilities, not exponentials
    each_part(gradients, [&](int64_t part) {
      const Pack<T> to = y.template load<true>(part), from = x.template load<true>(part);
      if (row.wants_y()) {
        store_part(numbers.active, y_gradient, part, [&](int k, int64_t i) {
          const S q = js.q(to_compute(to.value[k]));
          const S g = js.y_gradient(q, js.terms(q, js.p(to_compute(from.value[k]))).q);
          return task.add(g, q, to.value[k], i);
        });
      }
      if (row.wants_x()) {
        store_part(numbers.active && row.p.kd_scale != 0, x_gradient, part, [&](int k, int64_t) {
          const S p = js.p(to_compute(from.value[k]));
          return js.x_gradient(p, js.terms(js.q(to_compute(to.value[k])), p).p);
        });
      }
    });
  }
}

// inspect: streaming streaming_rows<*> loads=128 stores=128
template <typename T, bool kJensenShannon, class Group>
FASTKD_KERNEL(Group::kWholeCluster ? kMaxRowThreads : kLaneThreads, Group::kWholeCluster ? 1 : 3)
streaming_rows(const DeviceParams p) {
  for_rows<Row<T, int64_t>, Group>(
      p, [&](const Row<T, int64_t>& row, Group& group) { streaming_row<T, kJensenShannon>(row, group); });
}

}  // namespace fastkd::FASTKD_ISA::divergence
