// Divergence rows of any length, read again in each phase: what does not fit the registers, and what needs one phase only.
//
// Mapping: a row belongs to 8 lanes (doubles: 32), a block or a cluster of blocks. The lanes of a warp take chunks of whole packs
// (common/chunks.cuh); sums are in float within a chunk, in double across chunks. First sweep, online: each thread keeps its own
// maxima and the sums relative to them, rescaled where a maximum rises; then all are rescaled to the row's maxima and added up.
// A chunk whose sum is not finite is summed again one by one, where a product of 0 and infinity is 0. For Jensen-Shannon a second
// sweep sums the log-ratios. The last sweep writes the gradients.
// Bytes that must move: rows * classes * (student + teacher) for each sweep (one without gradients, two with, one more for
// Jensen-Shannon), and the gradients.
#pragma once

#include <type_traits>

#include "divergence/cuda_chunks.cuh"
#include "divergence/cuda_rows.cuh"

namespace fastkd::FASTKD_ISA::divergence {

using ::fastkd::divergence::kLaneThreads;
using ::fastkd::divergence::kMaxRowThreads;

// Packs of each side that a thread has on their way at once. Jensen-Shannon computes so long that fewer do.
template <typename T, bool kJensenShannon>
constexpr int kPairsAhead = (sizeof(T) == 8 ? 2 : 4) / (kJensenShannon ? 2 : 1);

template <typename T>
struct OnlineSums {
  using S = Compute<T>;

  const S scale, c;  // of differences of logits, to units of kUnit<T>
  const bool swap, own_task;
  Peak<S> y, x;
  double z_y = 0, z_x = 0, d = 0, z_task = 0;  // d in units

  template <typename Index>
  FASTKD_DEVICE OnlineSums(const Row<T, Index>& row, const typename Row<T, Index>::Numbers& numbers)
      : scale(row.inverse_temperature(numbers) * kPerUnit<T>), c(row.c()), swap(row.swap()), own_task(numbers.own_task) {}

  FASTKD_DEVICE void raise(S top_y, S top_x) {
    const S rise_y = y.rise(top_y), rise_x = x.rise(top_x), steps_y = rise_y * scale, steps_x = rise_x * scale;
    if (rise_y > 0) {
      z_y *= static_cast<double>(exp_units<T>(-steps_y));
      if (z_x != 0) d += static_cast<double>(steps_y) * z_x;  // every log q falls
    }
    if (rise_x > 0) {
      const double factor = static_cast<double>(exp_units<T>(-steps_x));
      d = factor != 0 ? factor * (d - static_cast<double>(c) * static_cast<double>(steps_x) * z_x) : 0;
      z_x *= factor;
    }
    if (own_task) z_task *= static_cast<double>(exp_of<T>(-(swap ? rise_x : rise_y)));
  }

  // A chunk, of which this lane has what is `inside`. False where there is an infinity, or a NaN, that the divergence cannot take
  // as it is: the chunk is then to be added one by one.
  template <bool kDivergence, int kLanes, int kPacks>
  FASTKD_DEVICE bool add(const Words<T> (&to)[kPacks], const Words<T> (&from)[kPacks], int inside) {
    Words<T> high_y = to[0], high_x = from[0];
#pragma unroll
    for (int v = 1; v < kPacks; ++v) {
      high_y = maximum(high_y, to[v]);
      high_x = maximum(high_x, from[v]);
    }
    const S top_y = highest(high_y), top_x = highest(high_x);
    if (top_y > y.top || top_x > x.top) raise(top_y, top_x);
    const S reference_y = y.reference(), reference_x = x.reference();
    S sum_y = 0, sum_x = 0, sum_d = 0;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      S pack_y = 0, pack_x = 0, pack_d = 0, logit_y[kPack<T>], logit_x[kPack<T>];
      unpack(to[v], logit_y);
      unpack(from[v], logit_x);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const S a = (logit_y[k] - reference_y) * scale, b = (logit_x[k] - reference_x) * scale;
        const S e_y = exp_units<T>(a), e_x = exp_units<T>(b), term = e_x * linear_term(c, a, b);
        pack_y = k == 0 ? e_y : pack_y + e_y;
        pack_x = k == 0 ? e_x : pack_x + e_x;
        pack_d = k == 0 ? term : pack_d + term;
      }
      if (v * kLanes < inside) {
        sum_y += pack_y;
        sum_x += pack_x;
        sum_d += pack_d;
      }
    }
    if (kDivergence && !(sum_d - sum_d == 0)) return false;
    z_y += static_cast<double>(sum_y);
    z_x += static_cast<double>(sum_x);
    if (kDivergence) d += static_cast<double>(sum_d);
    if (own_task) {
      S sum_task = 0;
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        S pack_task = 0, logits[kPack<T>];
        if (swap) {
          unpack(from[v], logits);
        } else {
          unpack(to[v], logits);
        }
#pragma unroll
        for (int k = 0; k < kPack<T>; ++k) pack_task += exp_of<T>(logits[k] - (swap ? reference_x : reference_y));
        if (v * kLanes < inside) sum_task += pack_task;
      }
      z_task += static_cast<double>(sum_task);
    }
    return true;
  }
  // One element, whatever it is.
  FASTKD_DEVICE void add(S logit_y, S logit_x) {
    if (logit_y > y.top || logit_x > x.top) raise(logit_y, logit_x);
    const S below_y = logit_y - y.reference(), below_x = logit_x - x.reference(), a = below_y * scale, b = below_x * scale;
    const S e_x = exp_units<T>(b);
    z_y += static_cast<double>(exp_units<T>(a));
    z_x += static_cast<double>(e_x);
    d += static_cast<double>(weigh(e_x, linear_term(c, a, b)));
    if (own_task) z_task += static_cast<double>(exp_of<T>(swap ? below_x : below_y));
  }
};

// A row and the team that it belongs to: sweeps, which the kernel below makes one after another.
template <typename T, bool kJensenShannon, class Group>
struct StreamingRow {
  using S = Compute<T>;
  using Dense = Row<T, int64_t>;
  using View = typename Dense::View;
  static constexpr int N = kPack<T>, kPacks = kPairsAhead<T, kJensenShannon>;
  using Parts = Chunks<T, int64_t, Group, kPacks>;
  static constexpr int kLanes = Parts::kLanes;

  const Dense& row;
  Group& group;
  const View y, x;
  const Parts chunks;
  const int64_t first_loose, loose_step;

  FASTKD_DEVICE StreamingRow(const Dense& of, Group& team)
      : row(of),
        group(team),
        y(row.y()),
        x(row.x()),
        chunks(y, row.present(), all_packs(), group),
        first_loose(static_cast<int64_t>(group.index())),
        loose_step(static_cast<int64_t>(group.size())) {}

  // body(to, from, part, left) for this lane's chunks
  template <bool kLast, typename Body>
  FASTKD_DEVICE void each_chunk(bool wanted, const Body& body) const {
    for (int64_t part = chunks.first; wanted && chunks.has(part); part += chunks.step) {
      const int left = chunks.left(part);
      Words<T> to[kPacks], from[kPacks];
      chunks.template load<kLast>(y.data, part, left, to);
      chunks.template load<kLast>(x.data, part, left, from);
      body(to, from, part, left);
    }
  }
  // body(logit_y, logit_x, i) for the loose elements
  template <typename Body>
  FASTKD_DEVICE void each_loose(bool wanted, const Body& body) const {
#pragma unroll 1
    for (int64_t n = wanted ? first_loose : chunks.loose; n < chunks.loose; n += loose_step) {
      const int64_t i = chunks.loose_element(n);
      body(to_compute(y.data[i]), to_compute(x.data[i]), i);
    }
  }

  // Maxima of y and x; relative to them the sums of their exponentials, of the divergence's terms, and of the student's
  // exponentials at T = 1, if it has a task of its own.
  struct Sums {
    S top[2];
    double z_y, z_x, d, z_task;
  };
  FASTKD_DEVICE Sums sum(const typename Dense::Numbers& numbers) const {
    group.arrive();
    OnlineSums<T> online(row, numbers);
    each_chunk<false>(numbers.active, [&](const auto& to, const auto& from, int64_t part, int left) {
      if (online.template add<!kJensenShannon, kLanes>(to, from, left)) return;
#pragma unroll 1
      for (int n = 0; n < kPacks * N; ++n) {
        const int64_t i = y.first(part + n / N * kLanes) + n % N;
        if (n / N * kLanes < left) online.add(to_compute(y.data[i]), to_compute(x.data[i]));
      }
    });
    each_loose(numbers.active, [&](S logit_y, S logit_x, int64_t) { online.add(logit_y, logit_x); });
    group.start();
    S top[2] = {online.y.top, online.x.top};
    group.reduce(top, Max{});
    online.raise(top[0], top[1]);
    double sums[4] = {online.z_y, online.z_x, online.d * kUnit<T>, online.z_task};
    if (group.index() == 0) row.keep_label_logit();
    group.reduce(sums, Sum{});
    return {{top[0], top[1]}, sums[0], sums[1], sums[2], sums[3]};
  }

  // Adds up q log(q / m) and p log(p / m); q - p too, where there is room for it.
  template <int kWanted>
  FASTKD_DEVICE void sum_mixture(const Mixture<T>& js, bool active, double (&sums)[kWanted]) const {
    constexpr bool kMass = kWanted > 2;
    each_chunk<false>(active, [&](const auto& to, const auto& from, int64_t, int left) {
      S sum_q = 0, sum_p = 0, sum_mass = 0;
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        S logit_y[N], logit_x[N], pack_q = 0, pack_p = 0, pack_mass = 0;
        unpack(to[v], logit_y);
        unpack(from[v], logit_x);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const S q = js.q(logit_y[k]), p = js.p(logit_x[k]);
          const auto terms = js.terms(q, p);
          pack_q += terms.q;
          pack_p += terms.p;
          if constexpr (kMass) pack_mass += q - p;
        }
        if (v * kLanes < left) {
          sum_q += pack_q;
          sum_p += pack_p;
          if constexpr (kMass) sum_mass += pack_mass;
        }
      }
      sums[0] += static_cast<double>(sum_q);
      sums[1] += static_cast<double>(sum_p);
      if constexpr (kMass) sums[2] += static_cast<double>(sum_mass);
    });
    each_loose(active, [&](S logit_y, S logit_x, int64_t) {
      const S q = js.q(logit_y), p = js.p(logit_x);
      const auto terms = js.terms(q, p);
      sums[0] += static_cast<double>(terms.q);
      sums[1] += static_cast<double>(terms.p);
      if constexpr (kMass) sums[2] += static_cast<double>(q - p);
    });
    sums[0] *= Scalars<T>::kLogUnit, sums[1] *= Scalars<T>::kLogUnit;
    group.reduce(sums, Sum{});
  }

  // The gradients of both sides.
  FASTKD_DEVICE void store_linear(const typename Dense::Numbers& numbers, const Linear<Scalars<T>>& linear,
                                  const TaskGradient<T, int64_t>& task) const {
    const bool swap = row.swap(), kd = row.p.kd_scale != 0;
    store(
        numbers.active && (!swap || kd),
        [&](const auto& logits_y, const auto& logits_x, int64_t i, auto& values) {
          constexpr int n = sizeof(values) / sizeof(S);
          S e_y[n];
#pragma unroll
          for (int k = 0; k < n; ++k) {
            e_y[k] = exp_units<T>(linear.a(logits_y[k]));
            values[k] = linear.y_gradient(e_y[k], exp_units<T>(linear.b(logits_x[k])));
          }
          if (!swap) task.add_to(values, e_y, logits_y, i);
        },
        numbers.active && (swap || kd),
        [&](const auto& logits_y, const auto& logits_x, int64_t i, auto& values) {
          constexpr int n = sizeof(values) / sizeof(S);
          S e_x[n];
#pragma unroll
          for (int k = 0; k < n; ++k) {
            const S b = linear.b(logits_x[k]);
            e_x[k] = exp_units<T>(b);
            values[k] = linear.x_gradient(e_x[k], linear_term(linear.c, linear.a(logits_y[k]), b));
          }
          if (swap) task.add_to(values, e_x, logits_x, i);
        });
  }
  FASTKD_DEVICE void store_mixture(const typename Dense::Numbers& numbers, const Mixture<T>& js,
                                   const TaskGradient<T, int64_t>& task) const {
    store(
        numbers.active,
        [&](const auto& logits_y, const auto& logits_x, int64_t i, auto& values) {
          constexpr int n = sizeof(values) / sizeof(S);
          S q[n];
#pragma unroll
          for (int k = 0; k < n; ++k) {
            q[k] = js.q(logits_y[k]);
            values[k] = js.q_gradient(q[k], js.terms(q[k], js.p(logits_x[k])).q);
          }
          task.add_to(values, q, logits_y, i);
        },
        numbers.active && row.p.kd_scale != 0,
        [&](const auto& logits_y, const auto& logits_x, int64_t, auto& values) {
#pragma unroll
          for (int k = 0; k < static_cast<int>(sizeof(values) / sizeof(S)); ++k) {
            const S p = js.p(logits_x[k]);
            values[k] = js.p_gradient(p, js.terms(js.q(logits_y[k]), p).p);
          }
        });
  }

 private:
  FASTKD_DEVICE bool all_packs() const {
    return y.packs && x.packs && (!row.wants_y() || row.y_gradient().packs) && (!row.wants_x() || row.x_gradient().packs);
  }

  // of_y(logits_y, logits_x, i, values), for element i and its neighbours after it. Zeros where the row takes no part.
  template <typename OfY, typename OfX>
  FASTKD_DEVICE void store(bool active_y, const OfY& of_y, bool active_x, const OfX& of_x) const {
    const auto y_gradient = row.y_gradient(), x_gradient = row.x_gradient();
    const bool to_y = row.wants_y() && active_y, to_x = row.wants_x() && active_x;
    each_chunk<true>(to_y || to_x, [&](const auto& to, const auto& from, int64_t part, int left) {
      const int64_t begin = y.first(part);
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        constexpr int kApart = kLanes * N;
        S logits_y[N], logits_x[N], values[N];
        unpack(to[v], logits_y);
        unpack(from[v], logits_x);
        if (to_y) {
          of_y(logits_y, logits_x, begin + v * kApart, values);
          if (v * kLanes < left) store_pack_once(y_gradient.data + begin + v * kApart, pack_of<T>(values));
        }
        if (to_x) {
          of_x(logits_y, logits_x, begin + v * kApart, values);
          if (v * kLanes < left) store_pack_once(x_gradient.data + begin + v * kApart, pack_of<T>(values));
        }
      }
    });
    each_loose(to_y || to_x, [&](S logit_y, S logit_x, int64_t i) {
      const S logits_y[1] = {logit_y}, logits_x[1] = {logit_x};
      S value[1];
      if (to_y) {
        of_y(logits_y, logits_x, i, value);
        y_gradient.data[i] = from_compute<T>(value[0]);
      }
      if (to_x) {
        of_x(logits_y, logits_x, i, value);
        x_gradient.data[i] = from_compute<T>(value[0]);
      }
    });
    const auto clear = [&](const auto& gradient) {
#pragma unroll 1
      for (int64_t i = first_loose; i < gradient.count; i += loose_step) gradient.data[i] = from_compute<T>(S(0));
    };
    if (!row.present()) return;
    if (row.wants_y() && !active_y) clear(y_gradient);
    if (row.wants_x() && !active_x) clear(x_gradient);
  }
};

template <typename T, bool kJensenShannon, class Group>
FASTKD_DEVICE void streaming_row(const Row<T, int64_t>& row, Group& group) {
  using S = Compute<T>;
  const StreamingRow<T, kJensenShannon, Group> sweeps(row, group);
  const auto numbers = row.numbers();
  auto sums = sweeps.sum(numbers);
  if (!(sums.top[0] > -kInfinity<S>)) sums.z_y = static_cast<double>(__builtin_nan(""));  // all -inf: no softmax
  if (!(sums.top[1] > -kInfinity<S>)) sums.z_x = static_cast<double>(__builtin_nan(""));
  if (!numbers.own_task) sums.z_task = row.swap() ? sums.z_x : sums.z_y;
  const S student_top = row.swap() ? sums.top[1] : sums.top[0];
  if (group.index() == 0) row.write_task(log_sum<S>(sums.z_task), student_top);
  if constexpr (!kJensenShannon) {
    const LinearSums linear_sums{sums.z_y, sums.z_x, sums.d, sums.z_task};
    const double log_ratio = log_ratio_of(linear_sums, row.c());
    const double value = exact_divergence_of(row, numbers, sums.top, linear_sums, log_ratio, group);
    if (group.index() == 0) row.write_divergence(value);
    const TaskGradient<T, int64_t> task(row, numbers, student_top, sums.z_task);
    sweeps.store_linear(numbers, linear_of(row, numbers, sums.top, linear_sums, log_ratio, value), task);
  } else {
    auto js = mixture_of(row, numbers, sums.top, sums.z_y, sums.z_x);
    double k_sums[2] = {0, 0};
    sweeps.sum_mixture(js, numbers.active, k_sums);
    make_exact(row, js, k_sums, group);
    if (group.index() == 0) row.write_divergence(jensen_shannon_value(row.p.beta, k_sums[0], k_sums[1]));
    js.finish(row.kd_scale(numbers), row.p.beta, k_sums[0], k_sums[1]);
    const TaskGradient<T, int64_t> task(row, numbers, student_top,
                                        numbers.own_task ? sums.z_task : 1.0);  // probabilities, not exponentials
    sweeps.store_mixture(numbers, js, task);
  }
}

// Of lanes, 4 blocks on a multiprocessor; 3 where the code for an older one would spill.
// inspect: streaming streaming_rows<*> loads=128 stores=128
template <typename T, bool kJensenShannon, class Group>
FASTKD_KERNEL(Group::kWholeCluster ? kMaxRowThreads : kLaneThreads, Group::kWholeCluster ? 1
                                                                    : kHasClusters       ? 4
                                                                                         : 3)
streaming_rows(const DeviceParams p) {
  for_rows<Row<T, int64_t>, Group>(
      p, [&](const Row<T, int64_t>& row, Group& group) { streaming_row<T, kJensenShannon>(row, group); });
}

}  // namespace fastkd::FASTKD_ISA::divergence
