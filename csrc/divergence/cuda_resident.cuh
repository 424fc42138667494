// Divergence rows that stay on chip: read once, in registers from the maxima to the student's gradient.
//
// Mapping: a row belongs to 4 lanes, a warp, a block or a cluster of blocks; each thread holds 32 elements of student and
// of teacher. Phases: loads, all at once; maxima; exponentials and sums; for Jensen-Shannon the log-ratios and their sums;
// the gradient. Two numbers an element are kept from phase to phase, in place: forward KL and soft cross-entropy e_y and
// e_x, reverse KL c b - a and e_x, Jensen-Shannon q and q log(q / m). Each reduction (reduce.cuh) is the only
// synchronisation. A cross-entropy at another temperature needs the logits again, from the L2 cache, where the row was a few
// microseconds ago. Gradients of the teacher are left to cuda_streaming.cuh.
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

template <typename T, Family kFamily, class Group>
FASTKD_DEVICE void resident_row(const Row<T, int>& row, Group& group) {
  using S = Compute<T>;
  constexpr int N = kPack<T>, kPacks = kResidentElements / N;
  constexpr bool kSwap = kFamily == Family::kReverse, kJensenShannon = kFamily == Family::kJensenShannon;
  const auto part_of = [&](int v) { return static_cast<int>(group.index() + v * group.size()); };
  const auto early = row.numbers();
  S y[kPacks][N], x[kPacks][N];
  S top[2] = {-kInfinity<S>, -kInfinity<S>};
  {
    Pack<T> raw_y[kPacks], raw_x[kPacks];
    group.arrive();
    const auto from_y = kSwap ? row.teacher() : row.student(), from_x = kSwap ? row.student() : row.teacher();
    const int behind = early.active ? 0 : from_y.parts();  // of rows that take no part nothing is read: all is -inf
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      raw_y[v] = from_y.load(part_of(v) + behind);
      raw_x[v] = from_x.load(part_of(v) + behind);
    }
    group.start();
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        y[v][k] = to_compute(raw_y[v].value[k]);
        x[v][k] = to_compute(raw_x[v].value[k]);
        top[0] = maximum(top[0], y[v][k]);
        top[1] = maximum(top[1], x[v][k]);
      }
    }
  }
  group.reduce(top, Max{});
  const S student_top = top[kSwap];

  double sums[4];  // exponentials of y and x, terms of the divergence, exponentials of the cross-entropy
  {
    const Linear<S> linear{inverse_of<S>(early.temperature), row.c(), top[0], top[1], S(0), S(0), S(0), S(0)};
    S sum_y = 0, sum_x = 0, sum_d = 0, sum_task = 0;
    if (early.own_task) {
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
#pragma unroll
        for (int k = 0; k < N; ++k) sum_task += exp_of<T>((kSwap ? x[v][k] : y[v][k]) - student_top);
      }
    }
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const S a = linear.a(y[v][k]), b = linear.b(x[v][k]), e_y = exp_of<T>(a), e_x = exp_of<T>(b);
        sum_y += e_y;
        sum_x += e_x;
        if constexpr (!kJensenShannon) sum_d += weigh(e_x, linear.c * b - a);
        y[v][k] = kSwap ? linear.c * b - a : e_y;
        x[v][k] = e_x;
      }
    }
    sums[0] = sum_y, sums[1] = sum_x, sums[2] = sum_d, sums[3] = sum_task;
  }
  group.reduce(sums, Sum{});
  const auto numbers = row.numbers();  // anew: kept, they would take registers
  const double z_task = numbers.own_task ? sums[3] : sums[kSwap];
  if (group.index() == 0) row.write_task(log_sum<S>(z_task), student_top);

  // gradient(v, k) of the divergence; exponential(v, k) in units of which z is the sum
  const auto store_gradient = [&](double z, const auto& gradient, const auto& exponential) {
    if (row.p.student_gradient == nullptr) return;
    const TaskGradient<T, int> task(row, numbers, student_top, z);
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
  };

  if constexpr (!kJensenShannon) {
    const LinearSums linear_sums{sums[0], sums[1], sums[2], z_task};
    const double value = exact_divergence_of(row, numbers, top, linear_sums, group);
    if (group.index() == 0) row.write_divergence(value);
    const Linear<S> linear = linear_of(row, numbers, top[0], top[1], linear_sums, value);
    store_gradient(
        z_task,
        [&](int v, int k) {
          return kSwap ? weigh(x[v][k] * linear.f_x, y[v][k] + linear.shift) : linear.y_gradient(y[v][k], x[v][k]);
        },
        [&](int v, int k) { return kSwap ? x[v][k] : y[v][k]; });
  } else {
    JensenShannon<T> js = jensen_shannon_of(row, numbers, top[0], top[1], sums[0], sums[1]);
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
    double k_sums[2] = {sum_q, sum_p};
    group.reduce(k_sums, Sum{});
    make_exact(row, js, k_sums, group);
    if (group.index() == 0) row.write_divergence(row.p.beta * k_sums[1] + (1.0 - row.p.beta) * k_sums[0]);
    finish(js, row.p.beta, row.kd_scale(numbers), k_sums[0], k_sums[1]);
    store_gradient(
        numbers.own_task ? z_task : 1.0, [&](int v, int k) { return js.y_gradient(y[v][k], x[v][k]); },
        [&](int v, int k) { return y[v][k]; });
  }
}

template <Family kFamily, class Group>
constexpr unsigned kThreadsOf =
    Group::kWholeCluster ? max_resident_threads(kFamily == Family::kJensenShannon, kHasClusters) : kLaneThreads;

// inspect: anywhere resident_rows<*> loads=128 stores=128
template <typename T, Family kFamily, class Group>
FASTKD_KERNEL(kThreadsOf<kFamily, Group>, Group::kWholeCluster ? 1 : 3)
resident_rows(const DeviceParams p) {
  for_rows<T, int, Group>(p, [&](const Row<T, int>& row, Group& group) { resident_row<T, kFamily>(row, group); });
}

template <typename T, Family kFamily>
RowKernel resident_of(Team team) {
  switch (team) {
    case Team::kEighthOfWarp: return resident_rows<T, kFamily, LaneGroup<4>>;
    case Team::kWarp: return resident_rows<T, kFamily, LaneGroup<32>>;
    default: return resident_rows<T, kFamily, ClusterGroup>;
  }
}

template <Family kFamily>
RowKernel resident_of(Dtype dtype, Team team) {
  switch (dtype) {
    case Dtype::kFloat32: return resident_of<float, kFamily>(team);
    case Dtype::kBFloat16: return resident_of<BFloat16, kFamily>(team);
    case Dtype::kFloat16: return resident_of<Float16, kFamily>(team);
    default: return nullptr;
  }
}

}  // namespace fastkd::FASTKD_ISA::divergence
