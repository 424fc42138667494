// The values of one problem on the GPU, spread over the threads that share it: thread t takes t, t + size, ... of them.
//
// Each is read from global memory once and kept in shared memory, as fp64, by the thread that read it: its j-th at slot
// j * threads + thread, so that a warp meets every bank equally and nobody waits for anybody. What takes no part (NaN, infinite,
// of weight 0) is squeezed out. Values for which there is no room are read again, and tested again, in every sweep.
#pragma once

#include <cstring>

#include "common/device.cuh"
#include "common/reduce.cuh"
#include "gmm/cuda.h"
#include "gmm/fit.h"

namespace fastkd::FASTKD_ISA::gmm {

using namespace device;
using namespace gmm_math;
using ::fastkd::gmm::DeviceFitParams;
using ::fastkd::gmm::Layout;

// Where a problem lies; nothing, and not valid, where offsets or lengths are not what the CPU would take.
struct Extent {
  int64_t begin = 0;         // in the values
  int64_t packed_begin = 0;  // in packed tensors
  int64_t size = 0;
  bool valid = false;
};

FASTKD_DEVICE Extent extent_of(const Layout& layout, int64_t b) {
  if (layout.offsets == nullptr) {
    const int64_t size = layout.lengths != nullptr ? layout.lengths[b] : layout.columns;
    if (size < 0 || size > layout.columns) return {};
    return {b * layout.stride, b * layout.columns, size, true};
  }
  const int64_t begin = layout.offsets[b], end = layout.offsets[b + 1];
  if (begin < 0 || begin > end || end > layout.elements) return {};
  if ((b == 0 && begin != 0) || (b == layout.problems - 1 && end != layout.elements)) return {};
  return {begin, begin, end - begin, true};
}

FASTKD_DEVICE bool is_finite(double x) { return x - x == 0.0; }

// Elements `first`, `first + step`, ... before `end` of a tensor of any dtype; NaN beyond.
template <typename T, int N>
FASTKD_DEVICE void read_as(const void* data, int64_t first, int64_t step, int64_t end, double (&x)[N]) {
  T raw[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t i = first + k * step;
    raw[k] = static_cast<const T*>(data)[i < end ? i : first];
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = first + k * step < end ? static_cast<double>(to_compute(raw[k])) : static_cast<double>(__builtin_nan(""));
  }
}
template <int N>
FASTKD_DEVICE void read(Dtype dtype, const void* data, int64_t first, int64_t step, int64_t end, double (&x)[N]) {
  switch (dtype) {
    case Dtype::kFloat64: return read_as<double>(data, first, step, end, x);
    case Dtype::kBFloat16: return read_as<BFloat16>(data, first, step, end, x);
    case Dtype::kFloat16: return read_as<Float16>(data, first, step, end, x);
    default: return read_as<float>(data, first, step, end, x);
  }
}

template <class Group>
FASTKD_DEVICE unsigned block_threads() {
  return Group::kWholeCluster ? kThreads : ::fastkd::gmm::kLaneThreads;
}

template <class Group, bool kWeighted>
class Values {
 public:
  FASTKD_DEVICE Values(const DeviceFitParams& params, const Extent& extent, const Group& group)
      : p_(params),
        end_(extent.begin + extent.size),
        first_(extent.begin + group.index()),
        to_weight_(extent.packed_begin - extent.begin),
        step_(group.size()),
        rest_(end_),
        u_(params.values_offset, params.capacity * block_threads<Group>()),
        w_(params.values_offset + params.capacity * block_threads<Group>() * 8, params.capacity * block_threads<Group>()) {}

  // Keeps what takes part, and looks at it all.
  FASTKD_DEVICE Survey gather(Group& group) {
    constexpr int kAhead = 4;
    const unsigned capacity = p_.capacity * block_threads<Group>() + thread_index();
    Survey survey;
    int64_t finite = 0, heavy = 0;
    double bad = 0;
    unsigned slot = thread_index();
    group.arrive();
    for (int64_t first = first_; first < end_; first += kAhead * step_) {
      double x[kAhead], w[kAhead];
      load(first, x, w);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = first + k * step_;
        if (i >= end_) break;
        if (kWeighted && !(w[k] >= 0 && w[k] <= kLargest)) bad = 1;
        if (!is_finite(x[k])) continue;
        ++finite;
        if (!(w[k] > 0)) continue;
        ++heavy;
        survey.low = x[k] < survey.low ? x[k] : survey.low;
        survey.high = larger(x[k], survey.high);
        survey.largest_weight = larger(w[k], survey.largest_weight);
        if (slot < capacity) {
          u_.store(slot, x[k]);
          if constexpr (kWeighted) w_.store(slot, w[k]);
          slot += block_threads<Group>();
        } else if (i < rest_) {
          rest_ = i;
        }
      }
    }
    slots_ = slot;
    group.start();
    double extremes[3] = {-survey.low, survey.high, survey.largest_weight};
    group.reduce(extremes, Max{});
    double sums[3] = {static_cast<double>(finite), static_cast<double>(heavy), bad};
    group.reduce(sums, Sum{});
    return {-extremes[0], extremes[1], extremes[2], sums[0], sums[1], sums[2] > 0};
  }

  // Nothing takes part any more.
  FASTKD_DEVICE void clear() {
    slots_ = 0;
    rest_ = end_;
  }

  // Into the frame, weights to at most 1. total: the sum of weights and of w u.
  FASTKD_DEVICE void enter(const Frame& frame, double largest_weight, double (&total)[2], Group& group) {
    frame_ = frame;
    largest_weight_ = largest_weight;
    total[0] = total[1] = 0;
    for (unsigned slot = thread_index(); slot < slots_; slot += block_threads<Group>()) {
      const double u = frame.enter(u_.load(slot)), w = kWeighted ? w_.load(slot) / largest_weight : 1.0;
      u_.store(slot, u);
      if constexpr (kWeighted) w_.store(slot, w);
      total[0] += w;
      total[1] += w * u;
    }
    each_again([&](double u, double w) {
      total[0] += w;
      total[1] += w * u;
    });
    group.reduce(total, Sum{});
  }

  // body(u, w) for each value of this thread; for none where not wanted
  template <typename Body>
  FASTKD_DEVICE void each(bool wanted, const Body& body) const {
    if (!wanted) return;
#pragma unroll 2
    for (unsigned slot = thread_index(); slot < slots_; slot += block_threads<Group>()) {
      body(u_.load(slot), kWeighted ? w_.load(slot) : 1.0);
    }
    each_again(body);
  }

 private:
  template <int N>
  FASTKD_DEVICE void load(int64_t first, double (&x)[N], double (&w)[N]) const {
    read(p_.dtype, p_.values, first, step_, end_, x);
    if constexpr (kWeighted) {
      read(p_.weight_dtype, p_.sample_weight, first + to_weight_, step_, end_ + to_weight_, w);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) w[k] = 1.0;
    }
  }

  // the same for those that found no room
  template <typename Body>
  FASTKD_DEVICE void each_again(const Body& body) const {
#pragma unroll 1
    for (int64_t i = rest_; i < end_; i += step_) {
      double x[1], w[1];
      load(i, x, w);
      if (is_finite(x[0]) && w[0] > 0) body(frame_.enter(x[0]), kWeighted ? w[0] / largest_weight_ : 1.0);
    }
  }

  const DeviceFitParams& p_;
  int64_t end_, first_;
  int64_t to_weight_;  // from a value's index to its weight's
  int64_t step_;
  int64_t rest_;        // the first value for which there was no room
  unsigned slots_ = 0;  // where this thread's slots end
  Shared<double> u_, w_;
  Frame frame_{};
  double largest_weight_ = 1;
};

}  // namespace fastkd::FASTKD_ISA::gmm
