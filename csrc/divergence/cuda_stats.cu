// logit_stats on the GPU: per row of z = logits / T the maximum, argmax, mean, logsumexp and softmax entropy.
//
// Maths and semantics: cpu_kernel_stats.cpp. Mapping: a row belongs to 4 or 16 lanes, or to a block or cluster of blocks. The
// lanes of a warp take chunks of whole packs, kAhead of them each at a time, all on their way at once; ragged ends, and what is
// not aligned, go part by part.
// Forward in one online sweep: each thread has a maximum of its own and sums relative to it, in float within a chunk and in
// double across chunks. Only maxima are followed, and the chunk where one rose; in the end whoever has the row's maximum looks
// there for its place. A chunk whose sums are not finite has an infinity or a NaN: it is summed again, with care.
// Backward: log Z anew in a first sweep where softmaxes are asked for, relative to the logit at argmax; then the gradient, from
// the last chunk, which is still in registers, to the first.
// Bytes that must move: the logits once; backward, the logits and the gradient, and the logits again, from the L2 cache, where
// a thread has more than a chunk.
#include <algorithm>
#include <limits>

#include "common/launch.cuh"
#include "divergence/cuda_chunks.cuh"
#include "divergence/cuda_rows.cuh"
#include "divergence/operator.h"

namespace fastkd::divergence {
namespace {

using namespace device;
using namespace divergence_math;
using namespace FASTKD_ISA::divergence;

// Factors are made on the host: with few elements a thread, they would take as many instructions as those.
struct StatsDeviceParams {
  int64_t rows;
  double inverse_temperature;  // of differences of logits, see inverse_of
  double per_logit, per_sum;   // of statistics: 1 / T and 1 / (K T), within the range of double
  StatsParams stats;
};
struct StatsBackwardDeviceParams {
  int64_t rows;
  double inverse_temperature, per_logit, per_sum;
  StatsBackwardParams stats;
};

constexpr unsigned kBlockThreads = 256;             // where a row belongs to all of them
constexpr unsigned kFewLanes = 4, kManyLanes = 16;  // of a row
constexpr int64_t kMaxLanesStats = 2048;            // elements of a row that belongs to lanes

// Packs that a thread has on their way at once.
template <typename T>
constexpr int kAhead = sizeof(T) == 8 ? 4 : 8;

template <typename T, typename Index>
struct OnlineStats {
  using S = Compute<T>;
  static constexpr Index kNowhere = std::numeric_limits<Index>::max();

  const S scale;  // of differences of logits, to units of kUnit<T>
  Peak<S> peak;
  double z = 0, d = 0;    // sums of e^a and a e^a, a = (x - peak) / T; d in units
  double sum = 0;         // of the logits
  Index best = kNowhere;  // where the maximum was first: the loose element, or the first element of the chunk
  Index nan = kNowhere;   // the first one

  FASTKD_DEVICE void raise(S top) {
    const S rise = peak.rise(top);
    if (!(rise > 0)) return;
    const S steps = rise * scale;
    const double factor = static_cast<double>(exp_units<T>(-steps));
    d = factor != 0 ? factor * (d - static_cast<double>(steps) * z) : 0;
    z *= factor;
  }
  // The chunk that begins at element i, of which this lane has what is `inside`. False where there is an infinity, or a NaN:
  // it is then to be added with care.
  template <int kLanes, int kPacks>
  FASTKD_DEVICE bool add(const Words<T> (&packs)[kPacks], int inside, Index i) {
    Words<T> high = packs[0];
#pragma unroll
    for (int v = 1; v < kPacks; ++v) high = maximum(high, packs[v]);
    const S top = highest(high);
    if (top > peak.top) {
      raise(top);
      best = i;
    }
    const S reference = peak.reference();
    S sum_z = 0, sum_d = 0, sum_x = 0;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      S x[kPack<T>], pack_z = 0, pack_d = 0, pack_x = 0;
      unpack(packs[v], x);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const S a = (x[k] - reference) * scale, e = exp_units<T>(a);
        pack_z = k == 0 ? e : pack_z + e;
        pack_d = k == 0 ? e * a : pack_d + e * a;
        pack_x = k == 0 ? x[k] : pack_x + x[k];
      }
      if (v * kLanes < inside) {
        sum_z += pack_z;
        sum_d += pack_d;
        sum_x += pack_x;
      }
    }
    const bool finite = sum_x * S(0) + sum_d > -kInfinity<S>;
    if (finite) {
      z += static_cast<double>(sum_z);
      d += static_cast<double>(sum_d);
      sum += static_cast<double>(sum_x);
    }
    return finite;
  }
  // Element i, whatever it is. The peak is no lower.
  FASTKD_DEVICE void add_with_care(S x, Index i) {
    const S a = (x - peak.reference()) * scale, e = exp_units<T>(a);
    z += static_cast<double>(e);
    d += static_cast<double>(weigh(e, a));
    sum += static_cast<double>(x);
    if (x != x && i < nan) nan = i;
  }
  // In any order
  FASTKD_DEVICE void add_loose(S x, Index i) {
    if (x > peak.top || (x == peak.top && i < best)) best = i;
    raise(x);
    add_with_care(x, i);
  }
};

// The first place of `top` in this lane's packs of the chunk that begins at element i.
template <typename T, typename Index, class Group>
FASTKD_DEVICE Index place_of(const Chunks<T, Index, Group, kAhead<T>>& chunks, Index i, Compute<T> top) {
  using Parts = Chunks<T, Index, Group, kAhead<T>>;
  const Index part = (i + chunks.row.shift) / kPack<T>;
  Words<T> packs[kAhead<T>];
  chunks.template load<true>(chunks.row.data, part, chunks.left(part), packs);
  int found = 0;
#pragma unroll
  for (int v = kAhead<T> - 1; v > 0; --v) found = highest(packs[v]) == top ? v : found;
  if (highest(packs[0]) == top) found = 0;
  const Index from = i + found * Parts::kLanes * kPack<T>;
  Compute<T> x[kPack<T>];
  unpack(chunks.row.template load_whole<true>(chunks.row.data + from, true), x);
  int place = 0;
#pragma unroll
  for (int k = kPack<T> - 1; k >= 0; --k) place = x[k] == top ? k : place;
  return from + place;
}

// Registers for 768 threads of a multiprocessor, 384 for doubles.
template <class Group>
constexpr unsigned kThreadsOf = Group::kWholeCluster ? kBlockThreads : kLaneThreads;
template <typename T, class Group>
constexpr unsigned kBlocksOf = (sizeof(T) == 8 ? 384 : 768) / kThreadsOf<Group>;
// Indices of rows: those of lanes are short.
template <class Group>
using IndexOf = std::conditional_t<Group::kWholeCluster, int64_t, int>;

// inspect: streaming stats_rows<*> loads=128
template <typename T, class Group>
FASTKD_KERNEL(kThreadsOf<Group>, kBlocksOf<T, Group>)
stats_rows(const StatsDeviceParams p) {
  using S = Compute<T>;
  using Index = IndexOf<Group>;
  each_row<Group>(p.rows, [&](int64_t index, Group& group) {
    using Parts = Chunks<T, Index, Group, kAhead<T>>;
    const StatsParams& out = p.stats;
    const bool present = index < p.rows;
    const T* const data = static_cast<const T*>(out.logits) + (present ? index : 0) * out.stride;
    const RowView<T, Index> row(data, static_cast<Index>(out.classes), shift_of(data));
    const Parts chunks(row, present, row.packs, group);
    group.arrive();
    OnlineStats<T, Index> online{static_cast<S>(p.inverse_temperature) * kPerUnit<T>};
    for (Index part = chunks.first; chunks.has(part); part += chunks.step) {
      const int left = chunks.left(part);
      Words<T> packs[kAhead<T>];
      chunks.template load<true>(row.data, part, left, packs);
      if (online.template add<Parts::kLanes>(packs, left, row.first(part))) continue;
#pragma unroll 1
      for (int v = 0; v < left; v += Parts::kLanes) {
#pragma unroll 1
        for (Index i = row.first(part + v), k = 0; k < kPack<T>; ++k) online.add_with_care(to_compute(data[i + k]), i + k);
      }
    }
#pragma unroll 1
    for (Index n = group.index(); n < chunks.loose; n += group.size()) {
      const Index i = chunks.loose_element(n);
      online.add_loose(to_compute(data[i]), i);
    }
    group.start();
    const S own[1] = {online.peak.top};
    S top[1] = {own[0]};
    group.reduce(top, Max{});
    online.raise(top[0]);
    Index place[1] = {online.kNowhere};  // that of a NaN comes before all others
    if (online.nan != online.kNowhere) {
      place[0] = online.nan - online.kNowhere - 1;
    } else if (own[0] == top[0] && top[0] > -kInfinity<S>) {
      place[0] = chunks.is_loose(online.best) ? online.best : place_of(chunks, online.best, top[0]);
    }
    double sums[3] = {online.z, online.d, online.sum};
    group.reduce_to_first(sums, Sum{}, place, MinIndex{});
    if (!present || group.index() != 0) return;
    const bool has_nan = place[0] < 0;
    const double z = top[0] > -kInfinity<S> ? sums[0] : static_cast<double>(__builtin_nan(""));  // all -inf: no softmax
    const bool broken = z != z;  // there is a NaN, or the maximum is infinite
    const double log_z = log_sum<S>(z);
    const double largest = has_nan ? static_cast<double>(__builtin_nan("")) : static_cast<double>(top[0]);
    const auto write = [&](void* to, double value) { static_cast<S*>(to)[index] = static_cast<S>(value); };
    write(out.max, largest * p.per_logit);
    out.argmax[index] = has_nan ? place[0] + online.kNowhere + 1 : place[0] == online.kNowhere ? 0 : place[0];
    write(out.mean, sums[2] * p.per_sum);
    write(out.logsumexp, largest * p.per_logit + (broken ? 0 : log_z));
    write(out.entropy, log_z - sums[1] * kUnit<T> * inverse_sum<S>(z));
  });
}

// inspect: streaming stats_backward_rows<*> loads=128 stores=128
template <typename T, class Group>
FASTKD_KERNEL(kThreadsOf<Group>, kBlocksOf<T, Group>)
stats_backward_rows(const StatsBackwardDeviceParams p) {
  using S = Compute<T>;
  using Index = IndexOf<Group>;
  each_row<Group>(p.rows, [&](int64_t index, Group& group) {
    using Parts = Chunks<T, Index, Group, kAhead<T>>;
    constexpr int kLanes = Parts::kLanes;
    const StatsBackwardParams& in = p.stats;
    const bool present = index < p.rows;
    const int64_t r = present ? index : 0;
    T* const gradient = static_cast<T*>(in.gradient) + r * in.classes;
    const RowView<T, Index> row(static_cast<const T*>(in.logits) + r * in.stride, static_cast<Index>(in.classes),
                                shift_of(gradient));
    const Parts chunks(row, present, row.packs, group);
    const bool softmax = in.grad_logsumexp != nullptr || in.grad_entropy != nullptr;
    const int64_t given = in.argmax[r];
    const bool known = given >= 0 && given < in.classes;  // what the forward gave
    const Index argmax = known ? static_cast<Index>(given) : 0;
    const S scale = static_cast<S>(p.inverse_temperature) * kPerUnit<T>;

    Words<T> words[kAhead<T>] = {};  // without softmaxes all is as if the logits were 0
    const Index first_loose = static_cast<Index>(group.index()), loose_step = static_cast<Index>(group.size());
    Index last = chunks.first - chunks.step;  // this lane's last chunk
    double z[1] = {0};
    S top = 0;
    if (softmax) {
      group.arrive();
      top = to_compute(row.data[argmax]);
      for (Index part = chunks.first; chunks.has(part); part += chunks.step) {
        const int left = chunks.left(part);
        last = part;
        chunks.template load<false>(row.data, part, left, words);
        S sum = 0;
#pragma unroll
        for (int v = 0; v < kAhead<T>; ++v) {
          S x[kPack<T>], pack_sum = 0;
          unpack(words[v], x);
#pragma unroll
          for (int k = 0; k < kPack<T>; ++k) {
            const S e = exp_units<T>((x[k] - top) * scale);
            pack_sum = k == 0 ? e : pack_sum + e;
          }
          if (v * kLanes < left) sum += pack_sum;
        }
        z[0] += static_cast<double>(sum);
      }
#pragma unroll 4
      for (Index n = first_loose; n < chunks.loose; n += loose_step) {
        z[0] += static_cast<double>(exp_units<T>((to_compute(row.data[chunks.loose_element(n)]) - top) * scale));
      }
      group.start();
      group.reduce(z, Sum{});
    } else {
      while (chunks.has(last + chunks.step)) last += chunks.step;
    }
    const auto at = [&](const void* data) { return data == nullptr ? 0.0 : static_cast<double>(static_cast<const S*>(data)[r]); };
    const S g_entropy = finite<S>(at(in.grad_entropy) * p.per_logit);
    const S g_logsumexp = finite<S>(at(in.grad_logsumexp) * p.per_logit);
    const S g_mean = finite<S>(at(in.grad_mean) * p.per_sum), g_max = finite<S>(at(in.grad_max) * p.per_logit);
    // p (g_logsumexp - (log p + H) g_entropy) = e (flat + a slope)
    S flat = 0, slope = 0;
    if (softmax) {
      const double inverse_z = inverse_sum<S>(z[0]), wide = static_cast<double>(g_entropy);
      const S behind = static_cast<S>(at(in.entropy)) - static_cast<S>(log_sum<S>(z[0]));
      flat = finite<S>((static_cast<double>(g_logsumexp) - static_cast<double>(behind) * wide) * inverse_z);
      slope = finite<S>(-kUnit<T> * wide * inverse_z);
    }
    const auto gradient_of = [&](S x) {
      constexpr S kNothing = -10000;  // its exponential is 0, and so are products with that, as they are finite
      const S a = maximum((x - top) * scale, kNothing), e = exp_units<T>(a);
      return (e * flat + g_mean) + (e * a) * slope;
    };
    const T at_argmax = from_compute<T>(gradient_of(top) + g_max);
    const Index argmax_part = known ? (argmax + row.shift) / kPack<T> : -1;

    for (Index part = last; part >= chunks.first; part -= chunks.step) {
      const int left = chunks.left(part);
      T* const to = gradient + row.first(part);
      if (softmax && part != last) chunks.template load<true>(row.data, part, left, words);
#pragma unroll
      for (int v = 0; v < kAhead<T>; ++v) {
        S values[kPack<T>];
        unpack(words[v], values);
#pragma unroll
        for (int k = 0; k < kPack<T>; ++k) values[k] = gradient_of(values[k]);
        if (v * kLanes < left) store_pack_once(to + v * kLanes * kPack<T>, pack_of<T>(values));
      }
      const Index behind_first = argmax_part - part;
      if (behind_first >= 0 && behind_first < left && behind_first % kLanes == 0) gradient[argmax] = at_argmax;
    }
#pragma unroll 1
    for (Index begin = first_loose; begin < chunks.loose; begin += kPack<T> * loose_step) {
      S x[kPack<T>];
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const Index n = begin + k * loose_step;
        x[k] = softmax && n < chunks.loose ? to_compute(row.data[chunks.loose_element(n)]) : S(0);
      }
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const Index n = begin + k * loose_step, i = chunks.loose_element(n);
        const T value = from_compute<T>(gradient_of(x[k]));
        if (n < chunks.loose) gradient[i] = i == argmax && known ? at_argmax : value;
      }
    }
  });
}

// Calls function<T, Group>() with the type of a dtype and the group of a team.
template <typename Function>
auto for_kind(Dtype dtype, Team team, const Function& function) {
  return for_dtype(dtype, [&]<typename T>() {
    switch (team) {
      case Team::kEighthOfWarp: return function.template operator()<T, LaneGroup<kFewLanes>>();
      case Team::kWarp: return function.template operator()<T, LaneGroup<kManyLanes>>();
      default: return function.template operator()<T, ClusterGroup>();
    }
  });
}
auto stats_kernel(Dtype dtype, Team team) {
  return for_kind(dtype, team, []<typename T, class Group>() { return stats_rows<T, Group>; });
}
auto stats_backward_kernel(Dtype dtype, Team team) {
  return for_kind(dtype, team, []<typename T, class Group>() { return stats_backward_rows<T, Group>; });
}

// Few lanes where there are enough rows: what each row costs beside its elements is shared by more rows of a warp. Longer rows
// have as many warps of a block, or of a cluster where rows are few, as have some chunks each.
Plan plan_stats(const Tensor& logits, const DeviceContext& context) {
  const int64_t rows = logits.size(0), classes = logits.size(1), size = logits.element_size();
  const DeviceLimits limits = context.limits();
  if (classes <= kMaxLanesStats) {
    FASTKD_CHECK(rows < int64_t{1} << 32, "rows are ", rows, ", must be fewer than 2^32");
    const bool few = classes <= kMaxLanesStats / 8 || rows * kFewLanes >= int64_t{1024} * limits.multiprocessors;
    const unsigned per_block = kLaneThreads / (few ? kFewLanes : kManyLanes);
    return {false, false, few ? Team::kEighthOfWarp : Team::kWarp, {grid_size(rows, 1, 1u << 16, per_block), kLaneThreads}};
  }
  const int64_t chunk = 32 * 16 / size * (size == 8 ? kAhead<double> : kAhead<float>), chunks = (classes + chunk - 1) / chunk;
  constexpr int64_t kMostWarps = kBlockThreads / 32;
  unsigned cluster = 1;
  while (cluster * 2 <= limits.max_cluster && cluster < kPortableCluster && rows * cluster < 2 * limits.multiprocessors &&
         chunks > kMostWarps * cluster) {
    cluster *= 2;
  }
  // several chunks for a warp, as long as there are enough warps
  const int64_t enough = std::clamp<int64_t>(rows * chunks / (48 * int64_t{limits.multiprocessors}), 1, 4);
  const int64_t turns = std::max(enough, (chunks + kMostWarps * cluster - 1) / (kMostWarps * cluster));
  const unsigned warps = static_cast<unsigned>((chunks + turns * cluster - 1) / (turns * cluster)), threads = warps * 32;
  return {false,
          false,
          Team::kCluster,
          {one_cluster_each("rows", rows, cluster), threads, cluster, cluster_shared_bytes(threads, cluster, 5)}};
}

// What kernels need of a temperature.
template <typename Params>
Params device_params(int64_t rows, double temperature, int64_t classes, const decltype(Params::stats)& stats) {
  constexpr double kMost = 0x1p1000;
  const double wide = std::min(1 / temperature, kMost);
  const bool doubles = stats.dtype == Dtype::kFloat64;
  return {rows, doubles ? wide : 1 / std::clamp(temperature, 0x1p-100, 0x1p100), wide,
          std::min(1 / (static_cast<double>(classes) * temperature), kMost), stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_stats(Tensor logits, double temperature, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  check_logits("logits", logits);
  check_temperature(temperature);
  logits = with_packed_rows(logits);
  const int64_t rows = logits.size(0);
  const DeviceContext context(logits);
  const Stats out(logits, [&](int64_t count, ScalarType type) { return context.empty({count}, type); });
  if (rows > 0) {
    const StatsParams params = out.params(logits, temperature);
    const Plan plan = plan_stats(logits, context);
    context.launch("logit_stats", stats_kernel(params.dtype, plan.team), plan.geometry,
                   device_params<StatsDeviceParams>(rows, temperature, logits.size(1), params));
  }
  return out.outputs();
}

Tensor logit_stats_backward(Tensor logits, double temperature, Tensor argmax, Tensor logsumexp, Tensor entropy,
                            std::optional<Tensor> grad_max, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_logsumexp,
                            std::optional<Tensor> grad_entropy, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  StatsGradients in{logits, argmax, logsumexp, entropy, grad_max, grad_mean, grad_logsumexp, grad_entropy};
  in.check(temperature);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const DeviceContext context(logits);
  Tensor gradient = context.empty({rows, classes}, logits.scalar_type());
  if (rows > 0) {
    const StatsBackwardParams params = in.params(temperature, gradient);
    const Plan plan = plan_stats(in.logits, context);
    context.launch("logit_stats_backward", stats_backward_kernel(params.dtype, plan.team), plan.geometry,
                   device_params<StatsBackwardDeviceParams>(rows, temperature, classes, params));
  }
  return gradient;
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("logit_stats", TORCH_BOX(&logit_stats));
  m.impl("logit_stats_backward", TORCH_BOX(&logit_stats_backward));
}

}  // namespace fastkd::divergence
