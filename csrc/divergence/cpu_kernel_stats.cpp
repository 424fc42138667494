// logit_stats on the CPU, compiled once for each instruction set: per row of z = logits / T the maximum, argmax, mean,
// logsumexp and softmax entropy.
//
// Mapping: a thread takes whole rows. Two sweeps, the second over a row that the first brought into the cache: the maximum,
// then sum e^a, sum a e^a and sum x with a = z - max z, so that logsumexp = max + log sum e^a and
// entropy = log sum e^a - (sum a e^a) / sum e^a. Argmax: the first place of the maximum.
// Backward: d max = [j = argmax], d mean = 1 / K, d logsumexp = p, d entropy = -p (log p + H), each over T, in one sweep.
// Bytes that must move: the logits once, and in the backward the gradient once.
#include "common/rows.h"
#include "divergence/kernel.h"
#include "divergence/math.h"

namespace fastkd::FASTKD_ISA::divergence {
namespace {

using namespace divergence_math;
using ::fastkd::divergence::StatsBackwardParams;
using ::fastkd::divergence::StatsParams;

// The first index where `found` holds, or at least n.
template <typename T, typename Found>
FASTKD_INLINE int64_t first_index(const T* row, int64_t n, const Found& found) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  constexpr int64_t kBlock = 8 * L;  // looked through as one
  int64_t i = 0;
  for (; i <= n - kBlock; i += kBlock) {
    auto any = found(load(row + i));
    for (int k = 1; k < 8; ++k) any |= found(load(row + i + k * L));
    if (reduce_min(any) != 0) break;
  }
  for (; i < n; i += L) {
    const auto hits = found(load_up_to(row + i, n - i, Scalar<T>(kLowest)));
    if (reduce_min(hits) == 0) continue;
    while (hits[i % L] == 0) ++i;
    return i;
  }
  return n;
}

template <typename T>
void stats_of(const StatsParams& params, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using S = Scalar<T>;
  const V inverse_temperature = inverse_of<V>(params.temperature);
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(params.logits) + r * params.stride;
    const V max = row_max(row, params.classes);
    const auto sums = sweep_sum<V, 3>(params.classes, [&](int64_t i, int lanes, V* sum) __attribute__((always_inline)) {
      const V x = load_up_to(row + i, lanes, S(kLowest));
      const V a = (x - max) * inverse_temperature;
      const V e = exp(a);
      sum[0] += e;
      sum[1] += weigh(e, a);
      sum[2] += lanes == kLanes<V> ? x : load_up_to(row + i, lanes, S(0));
    });
    const double total = sums.value[0], log_z = log_of(total);
    S largest = max[0];
    int64_t argmax = first_index<T>(row, params.classes, [&](V x) __attribute__((always_inline)) { return x == max; });
    const bool broken = total != total;  // there is a NaN, or the maximum is infinite
    if (broken) {
      const int64_t nan = first_index<T>(row, params.classes, [](V x) __attribute__((always_inline)) { return x != x; });
      if (nan < params.classes) {
        argmax = nan;
        largest = S(__builtin_nanf(""));
      }
    }
    static_cast<S*>(params.max)[r] = S(largest / params.temperature);
    params.argmax[r] = argmax;
    static_cast<S*>(params.mean)[r] = S(sums.value[2] / (double(params.classes) * params.temperature));
    static_cast<S*>(params.logsumexp)[r] = S(double(largest) / params.temperature + (broken ? 0 : log_z));
    static_cast<S*>(params.entropy)[r] = S(log_z - sums.value[1] / total);
  }
}

// d max = [j = argmax], d mean = 1/K, d logsumexp = p, d entropy = -p (log p + H); all over T.
// log Z is summed anew: taken from the rounded logsumexp, it would lose what the maximum has in digits before it.
template <typename T>
void stats_backward_of(const StatsBackwardParams& params, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using S = Scalar<T>;
  const auto at = [](const void* data, int64_t r) { return data == nullptr ? 0.0 : double(static_cast<const S*>(data)[r]); };
  const V inverse_temperature = inverse_of<V>(params.temperature);
  const bool softmax = params.grad_logsumexp != nullptr || params.grad_entropy != nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(params.logits) + r * params.stride;
    T* gradient = static_cast<T*>(params.gradient) + r * params.classes;
    const V max = row_max(row, params.classes);
    const auto below_max = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      return (load_up_to(row + i, lanes, S(kLowest)) - max) * inverse_temperature;
    };
    V log_z{};
    if (softmax) {
      const auto z = sweep_sum<V, 1>(params.classes, [&](int64_t i, int lanes, V* sum)
                                                         __attribute__((always_inline)) { sum[0] += exp(below_max(i, lanes)); });
      log_z = broadcast<V>(log_of(z.value[0]));
    }
    const V entropy = broadcast<V>(at(params.entropy, r));
    const V g_entropy = broadcast<V>(finite<S>(at(params.grad_entropy, r) / params.temperature));
    const V g_logsumexp = broadcast<V>(finite<S>(at(params.grad_logsumexp, r) / params.temperature));
    const V g_mean = broadcast<V>(finite<S>(at(params.grad_mean, r) / (params.temperature * double(params.classes))));
    const S g_max = finite<S>(at(params.grad_max, r) / params.temperature);
    const uint64_t argmax = params.argmax[r];
    sweep<V>(params.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      V g = g_mean;
      if (softmax) {
        const V log_p = below_max(i, lanes) - log_z;
        const V p = exp(log_p);
        g += p * g_logsumexp - weigh(p, log_p + entropy) * g_entropy;
      }
      if (argmax - i < uint64_t(lanes)) g[argmax - i] += g_max;
      store_up_to(gradient + i, g, lanes);
    });
  }
}

}  // namespace

void stats(const StatsParams& params, int64_t begin, int64_t end) {
  for_dtype(params.dtype, [&]<typename T>() { stats_of<T>(params, begin, end); });
}

void stats_backward(const StatsBackwardParams& params, int64_t begin, int64_t end) {
  for_dtype(params.dtype, [&]<typename T>() { stats_backward_of<T>(params, begin, end); });
}

}  // namespace fastkd::FASTKD_ISA::divergence
