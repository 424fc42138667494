// logit_stats on the GPU: per row of z = logits / T the maximum, argmax, mean, logsumexp and softmax entropy.
//
// Maths and semantics: cpu_kernel_stats.cpp. Mapping: a row belongs to a warp, or to a block or cluster of blocks. Forward in
// one online sweep, as cuda_streaming.cuh: each thread keeps its maximum, its first place, and sums relative to it.
// Backward: log Z anew in a first sweep where softmaxes are asked for, then the gradient.
// Bytes that must move: the logits once; backward, the logits and the gradient, and the logits again unless the L2 cache
// still has the row.
#include "common/launch.cuh"
#include "divergence/cuda_rows.cuh"
#include "divergence/operator.h"

namespace fastkd::divergence {
namespace {

using namespace device;
using namespace divergence_math;
using namespace FASTKD_ISA::divergence;

struct StatsDeviceParams {
  int64_t rows;
  StatsParams stats;
};
struct StatsBackwardDeviceParams {
  int64_t rows;
  StatsBackwardParams stats;
};

template <typename S>
struct OnlineStats {
  const S inverse_temperature;
  Peak<S> peak;
  double z = 0, d = 0;  // sums of e^a and a e^a, a = (x - peak) / T

  FASTKD_DEVICE explicit OnlineStats(double temperature) : inverse_temperature(inverse_of<S>(temperature)) {}

  FASTKD_DEVICE void raise(S top) {
    const S rise = peak.rise(top);
    if (!(rise > 0)) return;
    const double factor = static_cast<double>(device::exp(-rise * inverse_temperature));
    d = factor != 0 ? factor * (d - static_cast<double>(rise * inverse_temperature) * z) : 0;
    z *= factor;
  }
  template <typename T>
  FASTKD_DEVICE void add(const Pack<T>& pack) {
    S top = peak.top;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) top = maximum(top, to_compute(pack.value[k]));
    raise(top);
    S sum_z = 0, sum_d = 0;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const S a = (to_compute(pack.value[k]) - peak.reference()) * inverse_temperature, e = device::exp(a);
      sum_z += e;
      sum_d += weigh(e, a);
    }
    z += static_cast<double>(sum_z);
    d += static_cast<double>(sum_d);
  }
  // The same for the whole row, in every thread.
  template <class Group>
  FASTKD_DEVICE void reduce(Group& group) {
    S top[1] = {peak.top};
    group.reduce(top, Max{});
    raise(top[0]);
    double sums[2] = {z, d};
    group.reduce(sums, Sum{});
    z = top[0] > -kInfinity<S> ? sums[0] : static_cast<double>(__builtin_nan(""));  // all -inf: no softmax
    d = sums[1];
  }
};

// inspect: streaming stats_rows<*> loads=128
template <typename T, class Group>
FASTKD_KERNEL(Group::kWholeCluster ? kMaxRowThreads : kLaneThreads, Group::kWholeCluster ? 1 : 3)
stats_rows(const StatsDeviceParams p) {
  using S = Compute<T>;
  each_row<Group>(p.rows, [&](int64_t index, Group& group) {
    const StatsParams& out = p.stats;
    const bool present = index < p.rows;
    const T* const data = static_cast<const T*>(out.logits) + (present ? index : 0) * out.stride;
    const RowView<T, int64_t> row(data, out.classes, shift_of(data));
    group.arrive();
    OnlineStats<S> online(out.temperature);
    double sum = 0;
    S best = -kInfinity<S>;
    int64_t places[2] = {INT64_MAX, INT64_MAX};  // the first maximum, the first NaN
    for (int64_t part = group.index(); part < (present ? row.parts() : 0); part += group.size()) {
      const Pack<T> pack = row.template load<true>(part);
      online.add(pack);
      S part_sum = 0;
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const int64_t i = row.first(part) + k;
        if (i < 0 || i >= row.count) continue;
        const S x = to_compute(pack.value[k]);
        part_sum += x;
        if (x > best || places[0] == INT64_MAX) {
          best = x > best ? x : best;
          places[0] = i;
        }
        if (x != x && places[1] == INT64_MAX) places[1] = i;
      }
      sum += static_cast<double>(part_sum);
    }
    group.start();
    online.reduce(group);
    if (best != online.peak.top) places[0] = INT64_MAX;
    group.reduce(places, MinIndex{});
    double sums[1] = {sum};
    group.reduce(sums, Sum{});
    if (!present || group.index() != 0) return;
    const bool nan = places[1] != INT64_MAX, broken = online.z != online.z;  // there is a NaN, or the maximum is infinite
    const double log_z = log_sum<S>(online.z);
    const double largest = nan ? static_cast<double>(__builtin_nan("")) : static_cast<double>(online.peak.top);
    const auto write = [&](void* to, double value) { static_cast<S*>(to)[index] = static_cast<S>(value); };
    write(out.max, largest / out.temperature);
    out.argmax[index] = nan ? places[1] : places[0];
    write(out.mean, sums[0] / (static_cast<double>(out.classes) * out.temperature));
    write(out.logsumexp, largest / out.temperature + (broken ? 0 : log_z));
    write(out.entropy, log_z - online.d / online.z);
  });
}

// inspect: streaming stats_backward_rows<*> loads=128 stores=128
template <typename T, class Group>
FASTKD_KERNEL(Group::kWholeCluster ? kMaxRowThreads : kLaneThreads, Group::kWholeCluster ? 1 : 3)
stats_backward_rows(const StatsBackwardDeviceParams p) {
  using S = Compute<T>;
  each_row<Group>(p.rows, [&](int64_t index, Group& group) {
    const StatsBackwardParams& in = p.stats;
    const bool present = index < p.rows;
    const int64_t r = present ? index : 0;
    T* const gradient = static_cast<T*>(in.gradient) + r * in.classes;
    const RowView<T, int64_t> row(static_cast<const T*>(in.logits) + r * in.stride, in.classes, shift_of(gradient));
    const RowView<T, int64_t> out(gradient, in.classes, row.shift);
    const int64_t parts = present ? row.parts() : 0;
    const bool softmax = in.grad_logsumexp != nullptr || in.grad_entropy != nullptr;
    OnlineStats<S> online(in.temperature);
    if (softmax) {
      group.arrive();
      for (int64_t part = group.index(); part < parts; part += group.size()) online.add(row.load(part));
      group.start();
      online.reduce(group);
    }
    const auto at = [&](const void* data) { return data == nullptr ? 0.0 : static_cast<double>(static_cast<const S*>(data)[r]); };
    const S log_z = static_cast<S>(log_sum<S>(online.z)), entropy = static_cast<S>(at(in.entropy));
    const S g_entropy = finite<S>(at(in.grad_entropy) / in.temperature);
    const S g_logsumexp = finite<S>(at(in.grad_logsumexp) / in.temperature);
    const S g_mean = finite<S>(at(in.grad_mean) / (in.temperature * static_cast<double>(in.classes)));
    const S g_max = finite<S>(at(in.grad_max) / in.temperature);
    const int64_t argmax = in.argmax[r];
    for (int64_t part = group.index(); part < parts; part += group.size()) {
      const Pack<T> pack = softmax ? row.template load<true>(part) : Pack<T>{};
      store_part(true, out, part, [&](int k, int64_t i) {
        S g = g_mean;
        if (softmax) {
          const S log_p = (to_compute(pack.value[k]) - online.peak.top) * online.inverse_temperature - log_z;
          const S prob = device::exp(log_p);
          g += prob * g_logsumexp - weigh(prob, log_p + entropy) * g_entropy;
        }
        return i == argmax ? g + g_max : g;
      });
    }
  });
}

// kernel<T, Group> for a dtype and a team
#define FASTKD_OF_TEAM(kernel, T) (team == Team::kWarp ? kernel<T, LaneGroup<32>> : kernel<T, ClusterGroup>)
#define FASTKD_OF_DTYPE(kernel)                                     \
  switch (dtype) {                                                  \
    case Dtype::kFloat64: return FASTKD_OF_TEAM(kernel, double);    \
    case Dtype::kBFloat16: return FASTKD_OF_TEAM(kernel, BFloat16); \
    case Dtype::kFloat16: return FASTKD_OF_TEAM(kernel, Float16);   \
    default: return FASTKD_OF_TEAM(kernel, float);                  \
  }

auto stats_kernel(Dtype dtype, Team team) -> void (*)(StatsDeviceParams) { FASTKD_OF_DTYPE(stats_rows) }
auto stats_backward_kernel(Dtype dtype, Team team) -> void (*)(StatsBackwardDeviceParams){FASTKD_OF_DTYPE(stats_backward_rows)}

Plan plan_stats(const Tensor& logits, const DeviceContext& context) {
  return plan_rows(logits.size(0), logits.size(1), static_cast<int>(logits.element_size()), false, false, false, false,
                   context.limits());
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
    context.launch("logit_stats", stats_kernel(params.dtype, plan.team), plan.geometry, StatsDeviceParams{rows, params});
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
                   StatsBackwardDeviceParams{rows, params});
  }
  return gradient;
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("logit_stats", TORCH_BOX(&logit_stats));
  m.impl("logit_stats_backward", TORCH_BOX(&logit_stats_backward));
}

}  // namespace fastkd::divergence
