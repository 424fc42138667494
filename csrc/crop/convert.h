// Runs of pixels converted and normalised, for cpu_kernel.cpp.
//
// Normalisation runs in fp64, subtract then multiply: right to half an ulp of the float that comes out, exactly x / 255
// for bytes, and the same bits on every instruction set. It costs little: these passes wait for stores.
#pragma once

#include "common/simd.h"
#include "crop/kernel.h"
#include "crop/math.h"

namespace fastkd::FASTKD_ISA::crop {
namespace {

using crop_math::normalise;
using ::fastkd::crop::Normalise;

FASTKD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kStep = kLanes<F32>;  // elements at a time

// A register of floats as two of doubles, and back. The compiler's own forms take detours through the stack.
struct Wide {
  F64 low, high;
};
FASTKD_INLINE Wide widen_both(F32 v) {
#if defined(__AVX512F__)
  const __m512 x = reinterpret_cast<__m512>(v);
  return {reinterpret_cast<F64>(_mm512_cvtps_pd(_mm512_castps512_ps256(x))),
          reinterpret_cast<F64>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
#elif defined(__AVX2__)
  const __m256 x = reinterpret_cast<__m256>(v);
  return {reinterpret_cast<F64>(_mm256_cvtps_pd(_mm256_castps256_ps128(x))),
          reinterpret_cast<F64>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))};
#else
  F32Half half[2];
  std::memcpy(half, &v, sizeof v);
  return {__builtin_convertvector(half[0], F64), __builtin_convertvector(half[1], F64)};
#endif
}
FASTKD_INLINE F32 narrow_both(Wide v) {
#if defined(__AVX512F__)
  const __m256 low = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(v.low)), high = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(v.high));
  return reinterpret_cast<F32>(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#elif defined(__AVX2__)
  const __m128 low = _mm256_cvtpd_ps(reinterpret_cast<__m256d>(v.low)), high = _mm256_cvtpd_ps(reinterpret_cast<__m256d>(v.high));
  return reinterpret_cast<F32>(_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1));
#else
  const F32Half half[2] = {__builtin_convertvector(v.low, F32Half), __builtin_convertvector(v.high, F32Half)};
  F32 joined;
  std::memcpy(&joined, half, sizeof joined);
  return joined;
#endif
}

FASTKD_INLINE F32 load_narrow(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kStep)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, U16Half), I32), F32);
#endif
}
template <typename T>
FASTKD_INLINE F32 load_narrow(const T* p) {
  return load(p);
}
template <typename T>
FASTKD_INLINE Wide load_wide(const T* p) {
  if constexpr (sizeof(T) == 8) {
    return {load(p), load(p + kStep / 2)};
  } else {
    return widen_both(load_narrow(p));
  }
}
template <typename T>
FASTKD_INLINE void store_wide(T* p, Wide v) {
  if constexpr (sizeof(T) == 8) {
    store(p, v.low);
    store(p + kStep / 2, v.high);
  } else {
    store(p, narrow_both(v));
  }
}

// One value of center and scale for all elements, or one for each.
enum class Mode { kPlain, kConstant, kEach };

template <typename In, typename Out, Mode mode>
void convert(const void* from, void* to, int64_t n, const double* center, const double* scale) {
  const In* const in = static_cast<const In*>(from);
  Out* const out = static_cast<Out*>(to);
  const Wide all_center = {broadcast<F64>(mode == Mode::kConstant ? *center : 0.0), all_center.low};
  const Wide all_scale = {broadcast<F64>(mode == Mode::kConstant ? *scale : 1.0), all_scale.low};
  const auto step = [&](const In* source, Out* target, int64_t i) __attribute__((always_inline)) {
    if constexpr (mode == Mode::kPlain && sizeof(Out) != 8) {
      store(target, load_narrow(source));
    } else {
      const Wide v = load_wide(source);
      const Wide c = mode == Mode::kEach ? load_wide(center + i) : all_center;
      const Wide s = mode == Mode::kEach ? load_wide(scale + i) : all_scale;
      store_wide(target, {normalise(v.low, c.low, s.low), normalise(v.high, c.high, s.high)});
    }
  };
  int64_t i = 0;
  for (; i <= n - kStep; i += kStep) step(in + i, out + i, i);
  if (i < n) {
    In source[kStep] = {};
    Out target[kStep];
    std::memcpy(source, in + i, (n - i) * sizeof(In));
    step(source, target, i);
    std::memcpy(out + i, target, (n - i) * sizeof(Out));
  }
}

using Convert = void (*)(const void* from, void* to, int64_t n, const double* center, const double* scale);

template <typename In, typename Out>
Convert convert_of(Mode mode) {
  if (mode == Mode::kConstant) return convert<In, Out, Mode::kConstant>;
  return mode == Mode::kEach ? convert<In, Out, Mode::kEach> : convert<In, Out, Mode::kPlain>;
}
template <typename In>
Convert convert_to(Dtype out, Mode mode) {
  return for_dtype(out, [&]<typename Out>() { return convert_of<In, Out>(mode); });
}
// Any conversion from uint8 and float32; from 16-bit floats to themselves and to float32.
Convert convert_of(Dtype in, Dtype out, Mode mode) {
  switch (in) {
    case Dtype::kUInt8: return convert_to<uint8_t>(out, mode);
    case Dtype::kFloat32: return convert_to<float>(out, mode);
    case Dtype::kFloat64: return convert_of<double, double>(mode);
    case Dtype::kBFloat16: return out == in ? convert_of<BFloat16, BFloat16>(mode) : convert_of<BFloat16, float>(mode);
    default: return out == in ? convert_of<Float16, Float16>(mode) : convert_of<Float16, float>(mode);
  }
}

// Converts runs of elements of a plane, normalised as its channels ask.
class Converter {
 public:
  Converter(Dtype in, int64_t in_size, Dtype out, int64_t out_size, const Normalise& normalise, int64_t unit)
      : mode_(normalise.scale == nullptr ? Mode::kPlain
              : unit > 1                 ? Mode::kEach
                                         : Mode::kConstant),
        run_(convert_of(in, out, mode_)),
        in_size_(in_size),
        out_size_(out_size),
        normalise_(normalise) {}

  // n elements that begin with a whole unit
  void operator()(const char* from, char* to, int64_t n, int64_t plane) const {
    if (mode_ == Mode::kPlain) return run_(from, to, n, nullptr, nullptr);
    if (mode_ == Mode::kConstant) return run_(from, to, n, normalise_.center + plane, normalise_.scale + plane);
    for (int64_t i = 0; i < n; i += normalise_.period) {
      run_(from + i * in_size_, to + i * out_size_, smaller(n - i, normalise_.period), normalise_.center, normalise_.scale);
    }
  }

 private:
  Mode mode_;
  Convert run_;
  int64_t in_size_, out_size_;
  Normalise normalise_;
};

}  // namespace
}  // namespace fastkd::FASTKD_ISA::crop
