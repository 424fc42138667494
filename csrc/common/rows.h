// Sweeps over the elements of a row, a register at a time, with sums that hold at any length.
#pragma once

#include "common/simd.h"

namespace fastkd::FASTKD_ISA {

// body(i, lanes) for registers at 0, L, 2L, ...; the last may be partial.
template <typename V, typename Body>
FASTKD_INLINE void sweep(int64_t n, const Body& body) {
  constexpr int L = kLanes<V>;
  int64_t i = 0;
  for (; i <= n - L; i += L) body(i, L);
  if (i < n) body(i, static_cast<int>(n - i));
}

// The same with N running sums: body(i, lanes, sum) adds to sum[0..N). Returns the totals.
template <typename V, int N>
struct Totals {
  double value[N];
};
template <typename V, int N, typename Body>
FASTKD_INLINE Totals<V, N> sweep_sum(int64_t n, const Body& body) {
  constexpr int L = kLanes<V>;
  F64 total[N] = {};
  int64_t i = 0;
  while (i < n) {
    V sum[N] = {};  // of at most 64 registers, then folded into fp64
    const int64_t full = n - i >= 64 * L ? i + 64 * L : i + (n - i) / L * L;
    if (i == full) {
      body(i, static_cast<int>(n - i), sum);
      i = n;
    }
    for (; i < full; i += L) body(i, L, sum);
    for (int k = 0; k < N; ++k) total[k] += widen(sum[k]);
  }
  Totals<V, N> result;
  for (int k = 0; k < N; ++k) result.value[k] = reduce_sum(total[k]);
  return result;
}

FASTKD_INLINE double log_of(double x) { return log(broadcast<F64>(x))[0]; }

constexpr float kLowest = -__builtin_inff();

// The smallest normal number: the reciprocal is finite from here on.
template <typename S>
constexpr S kTiny = sizeof(S) == 8 ? S(0x1p-1022) : S(0x1p-126);

// 1 / T, but no more than what leaves differences of logits finite, however small T is, and above 0, however large.
template <typename V>
FASTKD_INLINE V inverse_of(double temperature) {
  constexpr double kLargest = sizeof(V{}[0]) == 8 ? 0x1p1000 : 0x1p100;
  const double inverse = 1.0 / temperature;
  return broadcast<V>(inverse > kLargest ? kLargest : inverse < 1 / kLargest ? 1 / kLargest : inverse);
}

template <typename T>
FASTKD_INLINE Vector<T> row_max(const T* row, int64_t n) {
  using V = Vector<T>;
  constexpr int L = kLanes<V>;
  V best = broadcast<V>(kLowest), others[3] = {best, best, best};  // four chains: a maximum takes cycles
  int64_t i = 0;
  for (; i <= n - 4 * L; i += 4 * L) {
    best = maximum(best, load(row + i));
    for (int k = 0; k < 3; ++k) others[k] = maximum(others[k], load(row + i + (k + 1) * L));
  }
  for (; i < n; i += L) best = maximum(best, load_up_to(row + i, n - i, Scalar<T>(kLowest)));
  for (const V& other : others) best = maximum(best, other);
  return broadcast<V>(reduce_max(best));
}

// Up to a register of a result; stream: around the caches, which needs 64-byte aligned registers and a fence at the end.
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

}  // namespace fastkd::FASTKD_ISA
