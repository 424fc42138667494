// Divergence rows that stay on chip: read once, in registers from the maxima to the student's gradient.
//
// Mapping: a row belongs to 4 lanes, a warp, a block or a cluster of blocks; each thread holds 32 elements of student and
// of teacher. Phases: loads, all at once; maxima; exponentials and sums; for Jensen-Shannon the log-ratios and their sums;
// the gradient. Two numbers an element are kept from phase to phase, in place: forward KL and soft cross-entropy e_y and
// e_x, reverse KL c b - a (in units of kUnit) and e_x, Jensen-Shannon q and q log(q / m). Each reduction (reduce.cuh) is the only
// synchronisation. A cross-entropy at another temperature needs the logits again, from the L2 cache, where the row was a few
// microseconds ago. Gradients of the teacher are left to cuda_streaming.cuh. Rows without numbers of their own (kPlain) have
// kernels of their own.
// Bytes that must move: rows * classes * (student + teacher + gradient). With half of its registers full of rows, a
// multiprocessor has some 60 kB (16 bits) to 130 kB (32 bits) in flight or in work; the latency asks for 30 kB.
#pragma once

#include "divergence/cuda_rows.cuh"

namespace fastkd::FASTKD_ISA::divergence {

using ::fastkd::divergence::kLaneThreads;
using ::fastkd::divergence::kResidentElements;
using ::fastkd::divergence::max_resident_threads;
using ::fastkd::divergence::RowKernel;
using ::fastkd::divergence::Team;

enum class Family { kForward, kReverse, kJensenShannon };  // kForward: the soft cross-entropy, too

template <typename T, int kPacks>
FASTKD_DEVICE Compute<T> largest(const Words<T> (&row)[kPacks]) {
  Words<T> high = row[0];
#pragma unroll
  for (int v = 1; v < kPacks; ++v) high = maximum(high, row[v]);
  Compute<T> result = -kInfinity<Compute<T>>, values[kPack<T>];
  unpack(high, values);
#pragma unroll
  for (int k = 0; k < kPack<T>; ++k) result = maximum(result, values[k]);
  return result;
}

template <typename T, Family kFamily, bool kPlain, class Group>
FASTKD_DEVICE void resident_row(const Row<T, int, kPlain>& row, Group& group) {
  using S = Compute<T>;
  constexpr int N = kPack<T>, kPacks = kResidentElements / N;
  constexpr bool kSwap = kFamily == Family::kReverse, kJensenShannon = kFamily == Family::kJensenShannon;
  const auto part_of = [&](int v) { return static_cast<int>(group.index() + v * group.size()); };
  S y[kPacks][N], x[kPacks][N];
  S top[2];
  double sums[kPlain ? 3 : 4];  // exponentials of y and x, terms of the divergence, exponentials of the cross-entropy
  {
    Words<T> raw_y[kPacks], raw_x[kPacks];
    group.arrive();
    const bool active = row.numbers().active;
    const auto from_y = kSwap ? row.teacher() : row.student(), from_x = kSwap ? row.student() : row.teacher();
    if (kPlain && row.whole()) {
      const T *const at_y = from_y.data + part_of(0) * N, *const at_x = from_x.data + part_of(0) * N;
      const auto load = [&](int v, bool inside) {
        raw_y[v] = from_y.load_whole(at_y + v * group.size() * N, inside);
        raw_x[v] = from_x.load_whole(at_x + v * group.size() * N, inside);
      };
      // as rows fill their teams, all packs but the last are inside: fewer instructions where that is known
      const bool filled = active && from_y.count >= (kPacks - 1) * static_cast<int>(group.size()) * N;
      if (filled) {
#pragma unroll
        for (int v = 0; v < kPacks - 1; ++v) load(v, true);
        load(kPacks - 1, part_of(kPacks - 1) * N < from_y.count);
      } else {
#pragma unroll
        for (int v = 0; v < kPacks; ++v) load(v, active && part_of(v) * N < from_y.count);
      }
    } else {
      const int behind = active ? 0 : from_y.parts();  // of rows that take no part nothing is read: all is -inf
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        raw_y[v] = from_y.load_words(part_of(v) + behind);
        raw_x[v] = from_x.load_words(part_of(v) + behind);
      }
    }
    group.start();
    top[0] = largest(raw_y);
    top[1] = largest(raw_x);
    group.reduce(top, Max{});

    const auto early = row.numbers();
    const Linear<Scalars<T>> linear{exponents_of(row, early, top), kSwap ? S(1) : row.c()};
    S sum_y = 0, sum_x = 0, sum_d = 0;
    if constexpr (!kPlain) {
      S sum_task = 0;
      if (early.own_task) {
#pragma unroll
        for (int v = 0; v < kPacks; ++v) {
          S logits[N];
          unpack(kSwap ? raw_x[v] : raw_y[v], logits);
#pragma unroll
          for (int k = 0; k < N; ++k) sum_task += exp_of<T>(logits[k] - top[kSwap]);
        }
      }
      sums[3] = sum_task;
    }
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      S logit_y[N], logit_x[N];
      unpack(raw_y[v], logit_y);
      unpack(raw_x[v], logit_x);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S a = linear.a(logit_y[k]), b = linear.b(logit_x[k]);
        const S e_y = exp_units<T>(a), e_x = exp_units<T>(b), term = linear_term(linear.c, a, b);
        sum_y += e_y;
        sum_x += e_x;
        if constexpr (!kJensenShannon) {
          if (e_x != 0) sum_d += e_x * term;  // whatever the term, which may be infinite, or NaN
        }
        y[v][k] = kSwap ? term : e_y;
        x[v][k] = e_x;
      }
    }
    sums[0] = sum_y, sums[1] = sum_x, sums[2] = static_cast<double>(sum_d) * kUnit<T>;
  }
  group.reduce(sums, Sum{});
  const S student_top = top[kSwap];
  const auto numbers = row.numbers();  // anew: kept, they would take registers
  double z_task = sums[kSwap];
  if constexpr (!kPlain) z_task = numbers.own_task ? sums[3] : z_task;
  if (group.index() == 0) row.keep_label_logit();
  if (group.index() == 0) row.write_task(kPlain || !row.p.task ? 0.0 : log_sum<S>(z_task), student_top);

  // gradient(v, k) of the divergence; exponential(v, k) in units of which z is the sum
  const auto store_gradient = [&](double z, const auto& gradient, const auto& exponential) {
    if (row.p.student_gradient == nullptr) return;
    const auto out = row.student_gradient();
    const int parts = row.parts();
    const auto each = [&](const auto& add) {
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        if (part_of(v) < parts) {
          store_part(true, out, part_of(v), [&](int k, int i) { return add(v, k, i); });
        }
      }
    };
    if constexpr (kPlain) {
      if (!row.whole()) return each([&](int v, int k, int) { return gradient(v, k); });
      T* const at = out.data + part_of(0) * N;
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        S values[N];
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = gradient(v, k);
        if (row.present() && part_of(v) * N < out.count) store_pack_once(at + v * group.size() * N, pack_of<T>(values));
      }
    } else {
      const TaskGradient<T, int> task(row, numbers, student_top, z);
      if (!numbers.active) {  // decided once, not for each element
        each([&](int, int, int) { return S(0); });
      } else if (!task.wanted) {
        each([&](int v, int k, int) { return gradient(v, k); });
      } else if (!task.own) {
        each([&](int v, int k, int i) { return task.with(gradient(v, k), exponential(v, k), i); });
      } else {
        Pack<T> logits[kPacks];
#pragma unroll
        for (int v = 0; v < kPacks; ++v) logits[v] = row.student().load(part_of(v));
        each([&](int v, int k, int i) { return task.with(gradient(v, k), task.own_exponential(logits[v].value[k]), i); });
      }
    }
  };

  if constexpr (!kJensenShannon) {
    const LinearSums linear_sums{sums[0], sums[1], sums[2], z_task};
    const double log_ratio = log_ratio_of(linear_sums, kSwap ? S(1) : row.c());
    const double value = exact_divergence_of(row, numbers, top, linear_sums, log_ratio, group);
    if (group.index() == 0) row.write_divergence(value);
    const auto linear = linear_of(row, numbers, top, linear_sums, log_ratio, value);
    store_gradient(
        z_task, [&](int v, int k) { return kSwap ? linear.x_gradient(x[v][k], y[v][k]) : linear.y_gradient(y[v][k], x[v][k]); },
        [&](int v, int k) { return kSwap ? x[v][k] : y[v][k]; });
  } else {
    auto js = mixture_of(row, numbers, top, sums[0], sums[1]);
    S sum_q = 0, sum_p = 0;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        y[v][k] = product(y[v][k], js.inverse_zy);
        const auto terms = js.terms(y[v][k], product(x[v][k], js.inverse_zx));
        sum_q += terms.q;
        sum_p += terms.p;
        x[v][k] = terms.q;
      }
    }
    double k_sums[2] = {sum_q * Scalars<T>::kLogUnit, sum_p * Scalars<T>::kLogUnit};
    group.reduce(k_sums, Sum{});
    make_exact(row, js, k_sums, group);
    if (group.index() == 0) row.write_divergence(jensen_shannon_value(row.p.beta, k_sums[0], k_sums[1]));
    js.finish(row.kd_scale(numbers), row.p.beta, k_sums[0], k_sums[1]);
    store_gradient(
        numbers.own_task ? z_task : 1.0, [&](int v, int k) { return js.q_gradient(y[v][k], x[v][k]); },
        [&](int v, int k) { return y[v][k]; });
  }
}

template <Family kFamily, bool kPlain, class Group>
constexpr unsigned kThreadsOf =
    Group::kWholeCluster ? max_resident_threads(kFamily == Family::kJensenShannon && !kPlain, kHasClusters) : kLaneThreads;

// Blocks on a multiprocessor at least: four leave a thread 128 registers, which is enough without numbers of a row's own, or
// where its elements are of 16 bits.
template <typename T, Family kFamily, bool kPlain, class Group>
constexpr unsigned kBlocksOf = Group::kWholeCluster                                              ? 1
                               : kPlain || (sizeof(T) == 2 && kFamily != Family::kJensenShannon) ? 4
                                                                                                 : 3;

// inspect: anywhere resident_rows<*> loads=128 stores=128
template <typename T, Family kFamily, bool kPlain, class Group>
FASTKD_KERNEL(kThreadsOf<kFamily, kPlain, Group>, kBlocksOf<T, kFamily, kPlain, Group>)
resident_rows(const DeviceParams p) {
  using RowType = Row<T, int, kPlain>;
  for_rows<RowType, Group>(p, [&](const RowType& row, Group& group) { resident_row<T, kFamily>(row, group); });
}

template <typename T, Family kFamily, bool kPlain>
RowKernel resident_of(Team team) {
  switch (team) {
    case Team::kEighthOfWarp: return resident_rows<T, kFamily, kPlain, LaneGroup<4>>;
    case Team::kWarp: return resident_rows<T, kFamily, kPlain, LaneGroup<32>>;
    default: return resident_rows<T, kFamily, kPlain, ClusterGroup>;
  }
}

template <typename T, Family kFamily>
RowKernel resident_of(Team team, bool plain) {
  return plain ? resident_of<T, kFamily, true>(team) : resident_of<T, kFamily, false>(team);
}

template <Family kFamily>
RowKernel resident_of(Dtype dtype, Team team, bool plain) {
  switch (dtype) {
    case Dtype::kFloat32: return resident_of<float, kFamily>(team, plain);
    case Dtype::kBFloat16: return resident_of<BFloat16, kFamily>(team, plain);
    case Dtype::kFloat16: return resident_of<Float16, kFamily>(team, plain);
    default: return nullptr;
  }
}

}  // namespace fastkd::FASTKD_ISA::divergence
