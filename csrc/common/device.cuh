// What a kernel may use of the GPU: indices, barriers, shuffles, shared memory of its block and of its cluster, 16-byte
// accesses, element conversions. All CUDA built-ins and inline PTX of the project are behind these functions.
//
// tests/emulated/common/device.cuh has the same interface for the host, where every CUDA thread is a fiber: the tests
// compile the same .cu files against it with g++, and find it first on their include path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/pack.h"

#define FASTKD_DEVICE __device__ __forceinline__
// A kernel of at most `threads` threads a block; with a second argument, so few registers that as many blocks share a
// multiprocessor. Blocks are one-dimensional and whole warps.
#define FASTKD_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)

namespace fastkd::FASTKD_ISA::device {

#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// ---- where this thread is ------------------------------------------------------------------------

FASTKD_DEVICE unsigned thread_index() { return threadIdx.x; }
FASTKD_DEVICE unsigned thread_count() { return blockDim.x; }
FASTKD_DEVICE unsigned lane_index() { return threadIdx.x % kWarp; }
FASTKD_DEVICE unsigned warp_index() { return threadIdx.x / kWarp; }
FASTKD_DEVICE unsigned block_index() { return blockIdx.x; }
FASTKD_DEVICE unsigned block_count() { return gridDim.x; }

// Blocks of a cluster are neighbours in the grid: block_index() / cluster_size() is the cluster.
FASTKD_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
FASTKD_DEVICE unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// ---- barriers and shuffles: every thread of the block, the cluster or the warp must come ------------

FASTKD_DEVICE void warp_barrier() { __syncwarp(); }
FASTKD_DEVICE void block_barrier() { __syncthreads(); }
FASTKD_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// A cluster barrier in two: what lies between does not wait, and nothing is published. For knowing that all blocks run.
FASTKD_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FASTKD_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <typename T>
FASTKD_DEVICE T shuffle_xor(T value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask));
}
template <typename T>
FASTKD_DEVICE T shuffle(T value, unsigned lane) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
}
FASTKD_DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }
// Bit i: the condition of lane i.
FASTKD_DEVICE unsigned ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }
FASTKD_DEVICE unsigned bit_count(unsigned bits) { return static_cast<unsigned>(__popc(bits)); }
FASTKD_DEVICE unsigned lowest_bit(unsigned bits) { return static_cast<unsigned>(__ffs(static_cast<int>(bits)) - 1); }

// ---- shared memory ---------------------------------------------------------------------------------

// `count` elements of the block's dynamic shared memory, from byte `offset` on.
template <typename T>
class Shared {
 public:
  FASTKD_DEVICE Shared(unsigned offset, unsigned /*count*/) : data_(reinterpret_cast<T*>(memory() + offset)) {}
  FASTKD_DEVICE T load(unsigned i) const { return data_[i]; }
  FASTKD_DEVICE void store(unsigned i, T value) const { data_[i] = value; }

  // Of any threads of the block at once, in any order: integers, so that the order does not show.
  FASTKD_DEVICE void atomic_add(unsigned i, T value) const { atomicAdd(word(i), static_cast<Word>(value)); }
  FASTKD_DEVICE void atomic_max(unsigned i, T value) const { atomicMax(word(i), static_cast<Word>(value)); }
  // What was there before.
  FASTKD_DEVICE T atomic_or(unsigned i, T value) const { return static_cast<T>(atomicOr(word(i), static_cast<Word>(value))); }

  // Stores into the same place of another block of the cluster; between cluster barriers only.
  FASTKD_DEVICE void store_remote(unsigned rank, unsigned i, T value) const {
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(data_ + i));
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
    if constexpr (sizeof(T) == 8) {
      asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(bits<unsigned long long>(value)) : "memory");
    } else {
      asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(bits<unsigned>(value)) : "memory");
    }
#else
    (void)rank;
    data_[i] = value;
#endif
  }

 private:
  using Word = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  FASTKD_DEVICE Word* word(unsigned i) const {
    static_assert(std::is_unsigned_v<T> && sizeof(T) == sizeof(Word));
    return reinterpret_cast<Word*>(data_ + i);
  }
  FASTKD_DEVICE static char* memory() {
    extern __shared__ __align__(16) char fastkd_shared[];
    return fastkd_shared;
  }
  template <typename Bits>
  FASTKD_DEVICE static Bits bits(T value) {
    static_assert(sizeof(Bits) == sizeof(T));
    Bits result;
    memcpy(&result, &value, sizeof result);
    return result;
  }
  T* data_;
};

// ---- global memory ---------------------------------------------------------------------------------

// Of any threads of the grid at once; gives what was there before. Integers, so that the order does not show in sums.
FASTKD_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) { return atomicAdd(p, value); }
FASTKD_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}

// ---- 16 bytes at a time ------------------------------------------------------------------------------

// Of 16-byte aligned addresses. What is read or written once leaves the caches first (evict-first).
template <typename T>
FASTKD_DEVICE Pack<T> load_pack(const T* p) {
  const uint4 raw = __ldca(reinterpret_cast<const uint4*>(p));
  return reinterpret_cast<const Pack<T>&>(raw);
}
template <typename T>
FASTKD_DEVICE Pack<T> load_pack_once(const T* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  return reinterpret_cast<const Pack<T>&>(raw);
}
template <typename T>
FASTKD_DEVICE void store_pack(T* p, const Pack<T>& pack) {
  __stwb(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(pack));
}
template <typename T>
FASTKD_DEVICE void store_pack_once(T* p, const Pack<T>& pack) {
  __stcs(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(pack));
}

// ---- elements and what is computed in ------------------------------------------------------------------

FASTKD_DEVICE float to_compute(float x) { return x; }
FASTKD_DEVICE double to_compute(double x) { return x; }
FASTKD_DEVICE float to_compute(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
FASTKD_DEVICE float to_compute(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// All of a pack; 16-bit ones take one instruction each.
template <typename T>
FASTKD_DEVICE void unpack(const Words<T>& words, Compute<T> (&values)[kPack<T>]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      values[2 * w] = __uint_as_float(words.value[w] << 16);
      values[2 * w + 1] = __uint_as_float(words.value[w] & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<T, Float16>) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      __half2 halves;
      memcpy(&halves, &words.value[w], sizeof halves);
      const float2 two = __half22float2(halves);
      values[2 * w] = two.x;
      values[2 * w + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) values[k] = to_compute(words.value[k]);
  }
}
template <typename T>
FASTKD_DEVICE void unpack(const Pack<T>& pack, Compute<T> (&values)[kPack<T>]) {
  Words<T> words;
  memcpy(&words, &pack, sizeof words);
  unpack(words, values);
}

// Rounded to nearest even.
template <typename T>
FASTKD_DEVICE T from_compute(Compute<T> x);
template <>
FASTKD_DEVICE float from_compute<float>(float x) {
  return x;
}
template <>
FASTKD_DEVICE double from_compute<double>(double x) {
  return x;
}
template <>
FASTKD_DEVICE BFloat16 from_compute<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
FASTKD_DEVICE Float16 from_compute<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

template <typename T>
FASTKD_DEVICE Pack<T> pack_of(const Compute<T> (&values)[kPack<T>]) {
  Pack<T> pack;
  if constexpr (sizeof(T) == 2) {  // two at a time: one instruction, already in place
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[2 * w], values[2 * w + 1]);
        memcpy(&words[w], &two, sizeof two);
      } else {
        const __half2 two = __floats2half2_rn(values[2 * w], values[2 * w + 1]);
        memcpy(&words[w], &two, sizeof two);
      }
    }
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) pack.value[k] = from_compute<T>(values[k]);
  }
  return pack;
}

// ---- maths ---------------------------------------------------------------------------------------------

FASTKD_DEVICE float exp(float x) { return ::expf(x); }
FASTKD_DEVICE double exp(double x) { return ::exp(x); }
// e^(x kUnit<T>) for what is stored in T: 2^x for 16 bits, which is one instruction.
template <typename T>
FASTKD_DEVICE Compute<T> exp_units(Compute<T> x) {
  if constexpr (sizeof(T) == 2) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  } else {
    return exp(x);
  }
}
// log2 x for normal x > 0: absolute error 2^-22 between 1/2 and 2, relative beyond.
FASTKD_DEVICE float log2_roughly(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
FASTKD_DEVICE float log(float x) { return ::logf(x); }
FASTKD_DEVICE double log(double x) { return ::log(x); }
FASTKD_DEVICE float maximum(float a, float b) { return ::fmaxf(a, b); }  // the other one where one is NaN
FASTKD_DEVICE double maximum(double a, double b) { return ::fmax(a, b); }
// Of each two elements; 16-bit ones as they are, two at a time.
template <typename T>
FASTKD_DEVICE Words<T> maximum(const Words<T>& a, const Words<T>& b) {
  Words<T> result;
  if constexpr (sizeof(T) == 2) {
    using Two = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      Two two_a, two_b;
      memcpy(&two_a, &a.value[w], sizeof two_a);
      memcpy(&two_b, &b.value[w], sizeof two_b);
      two_a = __hmax2(two_a, two_b);
      memcpy(&result.value[w], &two_a, sizeof two_a);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) result.value[k] = maximum(a.value[k], b.value[k]);
  }
  return result;
}
template <typename T>
FASTKD_DEVICE Pack<T> maximum(const Pack<T>& a, const Pack<T>& b) {
  Words<T> words_a, words_b;
  memcpy(&words_a, &a, sizeof a);
  memcpy(&words_b, &b, sizeof b);
  words_a = maximum(words_a, words_b);
  Pack<T> result;
  memcpy(&result, &words_a, sizeof result);
  return result;
}
// a * b, rounded: never part of a fused multiply-add, which would tell equal products from each other
FASTKD_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
FASTKD_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
// 1 / x for normal x > 0, within an ulp
FASTKD_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
FASTKD_DEVICE double reciprocal(double x) { return 1.0 / x; }

}  // namespace fastkd::FASTKD_ISA::device
