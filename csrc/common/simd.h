// Vectors of float and double as wide as the instruction set, on the compiler's vector extension.
//
// One text serves every set: the width follows from the flags of the compilation. Arithmetic,
// comparison and `mask ? a : b` are the compiler's own; here are loads, stores, conversions from 16-bit
// floats, reductions, exp and log. The maths headers are written against these names, so the same
// formula compiles for a register of 16 floats, and for one float on the GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/log.h"
#include "common/dtype.h"
#include "common/isa.h"

#define FASTKD_INLINE inline __attribute__((always_inline))

namespace fastkd::FASTKD_ISA {

#if defined(__AVX512F__)
constexpr bool kHasScalef = true;
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr bool kHasScalef = false;
constexpr int kVectorBytes = 32;
#else
constexpr bool kHasScalef = false;
constexpr int kVectorBytes = 16;
#endif

using F32 = float __attribute__((vector_size(kVectorBytes)));
using I32 = int32_t __attribute__((vector_size(kVectorBytes)));
using U32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using F64 = double __attribute__((vector_size(kVectorBytes)));
using I64 = int64_t __attribute__((vector_size(kVectorBytes)));
using U64 = uint64_t __attribute__((vector_size(kVectorBytes)));
using U16Half = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using F32Half = float __attribute__((vector_size(kVectorBytes / 2)));

// Vector<T>: the register that computes on elements stored as T (16-bit floats compute in fp32).
template <typename T>
struct VectorOf {
  using type = F32;
  using scalar = float;
};
template <>
struct VectorOf<double> {
  using type = F64;
  using scalar = double;
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Scalar = typename VectorOf<T>::scalar;

template <typename V>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(V{}[0]));

template <typename V, typename S>
FASTKD_INLINE V broadcast(S value) {
  return V{} + static_cast<decltype(V{}[0] + 0)>(value);
}

FASTKD_INLINE F32 as_float(I32 x) { return reinterpret_cast<F32>(x); }
FASTKD_INLINE F64 as_float(I64 x) { return reinterpret_cast<F64>(x); }
FASTKD_INLINE I32 as_int(F32 x) { return reinterpret_cast<I32>(x); }
FASTKD_INLINE I64 as_int(F64 x) { return reinterpret_cast<I64>(x); }

// b where either is NaN
template <typename V>
FASTKD_INLINE V maximum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, F32>)
    return reinterpret_cast<F32>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  if constexpr (std::is_same_v<V, F64>)  // with all lanes: gcc 12 warns of what _mm512_max_pd is made of
    return reinterpret_cast<F64>(_mm512_maskz_max_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#endif
  return a > b ? a : b;
}
template <typename V>
FASTKD_INLINE V minimum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, F64>)
    return reinterpret_cast<F64>(_mm512_maskz_min_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#endif
  return a < b ? a : b;
}

FASTKD_INLINE F64 square_root(F64 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<F64>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<F64>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#else
  F64 root;
  for (int i = 0; i < kLanes<F64>; ++i) root[i] = __builtin_sqrt(x[i]);
  return root;
#endif
}

// Products of the low 32 bits of each 64-bit lane.
FASTKD_INLINE U64 multiply_low(U64 a, U64 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<U64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Whether all lanes of a comparison hold.
template <typename Mask>
FASTKD_INLINE bool all_of(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) == -1;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(reinterpret_cast<__m128i>(mask)) == 0xffff;
#else
  bool all = true;
  for (int i = 0; i < static_cast<int>(sizeof(mask) / sizeof(mask[0])); ++i) all = all && mask[i] != 0;
  return all;
#endif
}

// ---- loads and stores -------------------------------------------------------------------------

FASTKD_INLINE F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTKD_INLINE F64 load(const double* p) {
  F64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTKD_INLINE F32 load(const BFloat16* p) {
  U16Half half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<F32>(__builtin_convertvector(half, U32) << 16);
}
FASTKD_INLINE F32 load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  // sign | exponent and mantissa shifted into place, then rebased by 2^112; inf and NaN put right after
  U16Half half;
  std::memcpy(&half, p, sizeof half);
  const I32 bits = __builtin_convertvector(half, I32);
  const I32 magnitude = (bits & 0x7fff) << 13;
  const F32 rebased = as_float(magnitude) * 0x1p112f;
  const I32 special = as_int(rebased) | 0x7f800000;
  const I32 value = magnitude >= 0x0f800000 ? special : as_int(rebased);
  return as_float(value | ((bits & 0x8000) << 16));
#endif
}

FASTKD_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
FASTKD_INLINE void store(double* p, F64 v) { std::memcpy(p, &v, sizeof v); }
FASTKD_INLINE void store(BFloat16* p, F32 v) {
  const I32 bits = as_int(v);
  const I32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const I32 result = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  const U16Half half = __builtin_convertvector(reinterpret_cast<U32>(result), U16Half);
  std::memcpy(p, &half, sizeof half);
}
FASTKD_INLINE void store(Float16* p, F32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const I32 bits = as_int(v);
  const I32 sign = (bits >> 16) & 0x8000;
  const I32 magnitude = bits & 0x7fffffff;
  // normal results: rebase the exponent by 112 and round the 13 dropped bits to nearest even
  const I32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // subnormal results: adding 0.5 puts the last kept bit at the last place of the float's mantissa
  const I32 subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  I32 result = magnitude < (113 << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? I32{} + 0x7c00 : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000 ? I32{} + 0x7e00 : result;
  const U16Half half = __builtin_convertvector(reinterpret_cast<U32>(result | sign), U16Half);
  std::memcpy(p, &half, sizeof half);
#endif
}

// The first `count` elements (0 < count <= lanes); the other lanes hold `fill`.
template <typename T>
FASTKD_INLINE Vector<T> load_first(const T* p, int count, Scalar<T> fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<F32>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1), p));
  }
#endif
  Vector<T> v = broadcast<Vector<T>>(fill);
  T buffer[kLanes<Vector<T>>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  const Vector<T> loaded = load(buffer);
  for (int i = 0; i < count; ++i) v[i] = loaded[i];
  return v;
}

template <typename T>
FASTKD_INLINE void store_first(T* p, Vector<T> v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
    return;
  }
#endif
  T buffer[kLanes<Vector<T>>];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// load and store of `count` lanes where count may be a whole register
template <typename T>
FASTKD_INLINE Vector<T> load_up_to(const T* p, int64_t count, Scalar<T> fill) {
  return count >= kLanes<Vector<T>> ? load(p) : load_first(p, static_cast<int>(count), fill);
}
template <typename T>
FASTKD_INLINE void store_up_to(T* p, Vector<T> v, int64_t count) {
  if (count >= kLanes<Vector<T>>) {
    store(p, v);
  } else {
    store_first(p, v, static_cast<int>(count));
  }
}

// ---- reductions (fixed order: the same bits on every call) --------------------------------------

template <typename S, int Bytes, typename Combine>
FASTKD_INLINE S reduce_halves(const void* data, Combine combine) {
  if constexpr (Bytes == sizeof(S)) {
    return *static_cast<const S*>(data);
  } else {
    typedef S Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, data, sizeof low);
    std::memcpy(&high, static_cast<const char*>(data) + sizeof low, sizeof high);
    const Half folded = combine(low, high);
    return reduce_halves<S, Bytes / 2>(&folded, combine);
  }
}
template <typename V>
FASTKD_INLINE auto reduce_max(V v) {
  return reduce_halves<std::remove_cvref_t<decltype(v[0])>, kVectorBytes>(&v, [](auto a, auto b) { return a > b ? a : b; });
}
template <typename V>
FASTKD_INLINE auto reduce_min(V v) {
  return reduce_halves<std::remove_cvref_t<decltype(v[0])>, kVectorBytes>(&v, [](auto a, auto b) { return a < b ? a : b; });
}
FASTKD_INLINE double reduce_sum(F64 v) {
  return reduce_halves<double, kVectorBytes>(&v, [](auto a, auto b) { return a + b; });
}
// fp32 lanes widened to fp64 and folded to one register
FASTKD_INLINE F64 widen(F32 v) {
  F32Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return __builtin_convertvector(low, F64) + __builtin_convertvector(high, F64);
}
FASTKD_INLINE F64 widen(F64 v) { return v; }

// ---- exp and log -------------------------------------------------------------------------------

// e^x for x <= 88 (here x is a logit minus the maximum: never positive), relative error < 1.5 ulp; 0 for x = -inf
// and, on every instruction set alike, where the result would be subnormal; NaN for NaN.
// x = n ln 2 + r; n comes out of the low bits after adding 1.5 * 2^23.
FASTKD_INLINE F32 exp(F32 x) {
  constexpr float kSmallest = -87.33f;
  constexpr float kMagic = kHasScalef ? 12582912.0f : 12582912.0f + 127.0f;    // without scalef, n carries its bias
  const F32 clamped = kHasScalef ? x : maximum(x, broadcast<F32>(kSmallest));  // NaN becomes kSmallest, and stays NaN in r
  const F32 shifted = clamped * 1.44269504088896341f + kMagic;
  const F32 n = shifted - kMagic;
  F32 r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723212e-6f;
  // minimax polynomial of (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2], relative error of e^r 3e-9
  F32 poly = r * 0.00138143294224f + 0.00836885123927f;
  poly = poly * r + 0.04166840091f;
  poly = poly * r + 0.166665195223f;
  poly = poly * r + 0.499999933739f;
  const F32 mantissa = r * r * poly + (r + 1.0f);
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return reinterpret_cast<F32>(_mm512_maskz_scalef_ps(keep, reinterpret_cast<__m512>(mantissa), reinterpret_cast<__m512>(n)));
#else
  const F32 result = mantissa * as_float(as_int(shifted) << 23);
  return x < kSmallest ? F32{} : result;
#endif
}

// The same in fp64 for x <= 709: relative error < 2 ulp.
FASTKD_INLINE F64 exp(F64 x) {
  constexpr double kSmallest = -708.0;
  constexpr double kMagic = 6755399441055744.0 + 1023.0;
  const F64 clamped = maximum(x, broadcast<F64>(kSmallest));
  const F64 shifted = clamped * 1.44269504088896340736 + kMagic;
  const F64 n = shifted - kMagic;
  F64 r = x - n * 6.93147180369123816490e-1;
  r = r - n * 1.90821492927058770002e-10;
  // Taylor to r^13, the remainder is below 2^-57; in pairs, since twelve steps one after the other take longer than the rest
  const F64 r2 = r * r, r4 = r2 * r2;
  const F64 p0 = (r * (1.0 / 120.0) + 1.0 / 24.0) * r2 + (r * (1.0 / 6.0) + 0.5);
  const F64 p4 = (r * (1.0 / 362880.0) + 1.0 / 40320.0) * r2 + (r * (1.0 / 5040.0) + 1.0 / 720.0);
  const F64 p8 = (r * (1.0 / 6227020800.0) + 1.0 / 479001600.0) * r2 + (r * (1.0 / 39916800.0) + 1.0 / 3628800.0);
  const F64 poly = p8 * (r4 * r4) + (p4 * r4 + p0);
  const F64 result = (r2 * poly + (r + 1.0)) * as_float(as_int(shifted) << 52);
  return x < kSmallest ? F64{} : result;
}

// ln x for normal x > 0, relative error about 1 ulp; -inf at 0 and for subnormal x (Floor: a finite number below all
// others, about ln 2^-127 or ln 2^-1023); inf and NaN pass through.
// x = 2^n m with m in [sqrt(1/2), sqrt(2)). No division: minimax polynomial of (ln(1+f) - f + f^2/2) / f^3.
template <bool Floor = false>
FASTKD_INLINE F32 log(F32 x) {
  const I32 bits = as_int(x);
  const I32 n = (bits - 0x3f3504f3) >> 23;
  const F32 f = as_float(bits - (n << 23)) - 1.0f;
  const F32 result = log_of_parts(__builtin_convertvector(n, F32), f);
  const F32 value = x < __builtin_inff() ? result : x;
  if constexpr (Floor) return value;
  return x < 0x1p-126f ? broadcast<F32>(-__builtin_inff()) : value;
}

// The same in fp64 by ln m = 2 atanh(z), z = (m - 1) / (m + 1), z^2 < 0.0295.
template <bool Floor = false>
FASTKD_INLINE F64 log(F64 x) {
  const I64 bits = as_int(x);
  const I64 n = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const F64 m = as_float(bits - (n << 52));
  const F64 z = (m - 1.0) / (m + 1.0);
  const F64 z2 = z * z;
  F64 poly = broadcast<F64>(2.0 / 21.0);
  poly = poly * z2 + 2.0 / 19.0;
  poly = poly * z2 + 2.0 / 17.0;
  poly = poly * z2 + 2.0 / 15.0;
  poly = poly * z2 + 2.0 / 13.0;
  poly = poly * z2 + 2.0 / 11.0;
  poly = poly * z2 + 2.0 / 9.0;
  poly = poly * z2 + 2.0 / 7.0;
  poly = poly * z2 + 2.0 / 5.0;
  poly = poly * z2 + 2.0 / 3.0;
  const F64 exponent = __builtin_convertvector(n, F64);
  const F64 result = exponent * 6.93147180369123816490e-1 + (z * z2 * poly + exponent * 1.90821492927058770002e-10 + 2.0 * z);
  const F64 value = x < __builtin_inf() ? result : x;
  if constexpr (Floor) return value;
  return x < 0x1p-1022 ? broadcast<F64>(-__builtin_inf()) : value;
}

}  // namespace fastkd::FASTKD_ISA
