// The interface of csrc/common/device.cuh for kernels that run on the host; see emulator.h.
#pragma once

#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/pack.h"
#include "emulator.h"
#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

#define FASTKD_DEVICE inline
#define FASTKD_KERNEL(...) inline void

namespace fastkd::FASTKD_ISA::device {

using emulator::Site;

constexpr bool kHasClusters = true;

inline unsigned thread_index() { return emulator::position().thread; }
inline unsigned thread_count() { return emulator::position().geometry->threads; }
inline unsigned lane_index() { return thread_index() % kWarp; }
inline unsigned warp_index() { return thread_index() / kWarp; }
inline unsigned block_index() { return emulator::position().block; }
inline unsigned block_count() { return emulator::position().geometry->blocks; }
inline unsigned cluster_rank() { return emulator::position().rank; }
inline unsigned cluster_size() { return emulator::position().geometry->cluster; }

inline void warp_barrier(Site site = Site::current()) { emulator::meet(emulator::Meeting::kWarpBarrier, site); }
inline void block_barrier(Site site = Site::current()) { emulator::meet(emulator::Meeting::kBlockBarrier, site); }
inline void cluster_barrier(Site site = Site::current()) { emulator::meet(emulator::Meeting::kClusterBarrier, site); }

inline void cluster_arrive(Site site = Site::current()) { emulator::arrive(site); }
inline void cluster_wait(Site site = Site::current()) { emulator::wait(site); }

template <typename T>
T shuffle(T value, unsigned lane, Site site = Site::current()) {
  static_assert(sizeof(T) <= 8);
  emulator::exchange(&value, sizeof value, lane, site);
  return value;
}
template <typename T>
T shuffle_xor(T value, unsigned mask, Site site = Site::current()) {
  return device::shuffle(value, lane_index() ^ mask, site);  // std::shuffle is a candidate of an unqualified call
}
inline bool any(bool condition, Site site = Site::current()) {
  for (unsigned mask = 1; mask < kWarp; mask *= 2) condition |= shuffle_xor(condition, mask, site);
  return condition;
}
inline unsigned bit_count(unsigned bits) { return static_cast<unsigned>(__builtin_popcount(bits)); }
inline unsigned lowest_bit(unsigned bits) { return static_cast<unsigned>(__builtin_ffs(static_cast<int>(bits)) - 1); }
inline unsigned ballot(bool condition, Site site = Site::current()) {
  unsigned result = (condition ? 1u : 0u) << lane_index();
  for (unsigned mask = 1; mask < kWarp; mask *= 2) result |= shuffle_xor(result, mask, site);
  return result;
}

template <typename T>
class Shared {
 public:
  Shared(unsigned offset, unsigned count) : offset_(offset), count_(count) {}
  T load(unsigned i, Site site = Site::current()) const {
    T value;
    std::memcpy(&value, address(cluster_rank(), emulator::Access::kLoad, i, site), sizeof value);
    return value;
  }
  void store(unsigned i, T value, Site site = Site::current()) const {
    std::memcpy(address(cluster_rank(), emulator::Access::kStore, i, site), &value, sizeof value);
  }
  void atomic_add(unsigned i, T value, Site site = Site::current()) const {
    T* const p = static_cast<T*>(address(cluster_rank(), emulator::Access::kAtomic, i, site));
    *p += value;
  }
  void atomic_max(unsigned i, T value, Site site = Site::current()) const {
    T* const p = static_cast<T*>(address(cluster_rank(), emulator::Access::kAtomic, i, site));
    if (*p < value) *p = value;
  }
  T atomic_or(unsigned i, T value, Site site = Site::current()) const {
    T* const p = static_cast<T*>(address(cluster_rank(), emulator::Access::kAtomic, i, site));
    const T before = *p;
    *p |= value;
    return before;
  }
  void store_remote(unsigned rank, unsigned i, T value, Site site = Site::current()) const {
    std::memcpy(address(rank, emulator::Access::kStore, i, site), &value, sizeof value);
  }

 private:
  void* address(unsigned rank, emulator::Access access, unsigned i, const Site& site) const {
    return emulator::shared_address(rank, access, offset_, count_, sizeof(T), i, site);
  }
  unsigned offset_, count_;
};

template <typename T>
T atomic_add(T* p, T value) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  const T before = *p;
  *p += value;
  return before;
}

template <typename T>
Pack<T> load_pack(const T* p, Site site = Site::current()) {
  emulator::check_aligned(p, site);
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <typename T>
Pack<T> load_pack_once(const T* p, Site site = Site::current()) {
  return load_pack(p, site);
}
template <typename T>
void store_pack(T* p, const Pack<T>& pack, Site site = Site::current()) {
  emulator::check_aligned(p, site);
  *reinterpret_cast<Pack<T>*>(p) = pack;
}
template <typename T>
void store_pack_once(T* p, const Pack<T>& pack, Site site = Site::current()) {
  store_pack(p, pack, site);
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(BFloat16 x) { return static_cast<float>(c10::BFloat16(x.bits, c10::BFloat16::from_bits())); }
inline float to_compute(Float16 x) { return static_cast<float>(c10::Half(x.bits, c10::Half::from_bits())); }

template <typename T>
void unpack(const Pack<T>& pack, Compute<T> (&values)[kPack<T>]) {
  for (int k = 0; k < kPack<T>; ++k) values[k] = to_compute(pack.value[k]);
}

template <typename T>
Pack<T> pack_of_words(const Words<T>& words) {
  Pack<T> pack;
  std::memcpy(&pack, &words, sizeof pack);
  return pack;
}
template <typename T>
void unpack(const Words<T>& words, Compute<T> (&values)[kPack<T>]) {
  unpack(pack_of_words(words), values);
}

template <typename T>
T from_compute(Compute<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {c10::BFloat16(x).x};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {c10::Half(x).x};
  } else {
    return x;
  }
}

template <typename T>
Pack<T> pack_of(const Compute<T> (&values)[kPack<T>]) {
  Pack<T> pack;
  for (int k = 0; k < kPack<T>; ++k) pack.value[k] = from_compute<T>(values[k]);
  return pack;
}

template <typename T>
Compute<T> exp_units(Compute<T> x) {
  return sizeof(T) == 2 ? std::exp2(x) : std::exp(x);
}
template <typename S>
S exp(S x) {
  return std::exp(x);
}
// As far off as the instruction may be, and always to the same side.
inline float log2_roughly(float x) { return static_cast<float>(std::log2(static_cast<double>(x)) - 0x1p-22); }
template <typename S>
S log(S x) {
  return std::log(x);
}
template <typename S>
S maximum(S a, S b) {
  return std::fmax(a, b);
}
template <typename T>
Pack<T> maximum(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> result;
  for (int k = 0; k < kPack<T>; ++k) {
    result.value[k] = from_compute<T>(std::fmax(to_compute(a.value[k]), to_compute(b.value[k])));
  }
  return result;
}
template <typename T>
Words<T> maximum(const Words<T>& a, const Words<T>& b) {
  const Pack<T> pack = maximum(pack_of_words(a), pack_of_words(b));
  Words<T> result;
  std::memcpy(&result, &pack, sizeof result);
  return result;
}
template <typename S>
S product(S a, S b) {
  return a * b;
}
template <typename S>
S reciprocal(S x) {
  return S(1) / x;
}

}  // namespace fastkd::FASTKD_ISA::device
