// The values of one problem on the GPU, spread over the threads that share it: thread t takes t, t + size, ... of them.
//
// Each is read from global memory once and kept in shared memory, as fp64, by the thread that read it: its j-th at slot
// j * threads + thread, so that a warp meets every bank equally and nobody waits for anybody. What takes no part (NaN, infinite,
// of weight 0) is squeezed out. Values for which there is no room are read again, and tested again, in every sweep.
#pragma once

#include "common/device.cuh"
#include "common/reduce.cuh"
#include "gmm/cuda_posterior.cuh"

namespace fastkd::FASTKD_ISA::gmm {

using ::fastkd::gmm::DeviceFitParams;

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

// What a thread needs of its problem once or never stays in shared memory, too, out of the registers of the sweeps.
struct Scalars {
  Frame frame;
  double low, high;  // of the values
  double largest_weight;
};

template <class Group, bool kWeighted>
class Values {
 public:
  // Of problem b, or of none.
  FASTKD_DEVICE Values(const DeviceFitParams& params, int64_t b, bool present, const Group& group)
      : p_(params),
        b_(present ? b : -1),
        index_(group.index()),
        step_(group.size()),
        scalars_(params.scalars_offset, ::fastkd::gmm::kFitScalars * block()),
        u_(params.scalars_offset + ::fastkd::gmm::kFitScalars * block() * 8, params.capacity * block()),
        w_(params.scalars_offset + (::fastkd::gmm::kFitScalars + params.capacity) * block() * 8, params.capacity * block()) {}

  // Keeps what takes part, and looks at it all.
  FASTKD_DEVICE Survey gather(Group& group, bool* all_finite) {
    constexpr int kAhead = 4;
    const Extent extent = this->extent();
    const unsigned capacity = p_.capacity * block() + thread_index();
    Survey survey;
    int64_t finite = 0, heavy = 0;
    double bad = 0;
    unsigned slot = thread_index();
    group.arrive();
    for (int64_t first = index_; first < extent.size; first += int64_t{kAhead} * step_) {
      double x[kAhead], w[kAhead];
      load(extent, first, x, w);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = first + int64_t{k} * step_;
        if (i >= extent.size) break;
        if (!is_finite(x[k])) continue;  // left out, whatever it weighs
        if (kWeighted && !(w[k] >= 0 && w[k] <= kLargest)) bad = 1;
        ++finite;
        if (!(w[k] > 0)) continue;
        ++heavy;
        survey.low = x[k] < survey.low ? x[k] : survey.low;
        survey.high = larger(x[k], survey.high);
        survey.largest_weight = larger(w[k], survey.largest_weight);
        if (slot < capacity) {
          u_.store(slot, x[k]);
          if constexpr (kWeighted) w_.store(slot, w[k]);
          slot += block();
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
    const bool invalid = !extent.valid || sums[2] > 0 || (b_ >= 0 && negative_start(p_, b_));
    *all_finite = sums[0] == static_cast<double>(extent.size);
    return {-extremes[0], extremes[1], extremes[2], sums[0], sums[1], invalid};
  }

  // Nothing takes part any more.
  FASTKD_DEVICE void clear() {
    slots_ = 0;
    rest_ = kNone;
  }

  // Into the frame, weights to at most 1. total: the sum of weights and of w u.
  FASTKD_DEVICE void enter(bool live, const Scalars& scalars, double (&total)[2], Group& group) {
    const Frame& frame = scalars.frame;
    if (live) keep({frame.scale, frame.shift, frame.gain, scalars.low, scalars.high, scalars.largest_weight});
    total[0] = total[1] = 0;
    for (unsigned slot = thread_index(); slot < slots_; slot += block()) {
      const double u = frame.enter(u_.load(slot)), w = kWeighted ? w_.load(slot) / scalars.largest_weight : 1.0;
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

  FASTKD_DEVICE Scalars scalars() const { return {{kept(0), kept(1), kept(2)}, kept(3), kept(4), kept(5)}; }

  // The parameters take the place of the scalars once the fit is done.
  FASTKD_DEVICE void finish(const Result& result) const {
    keep({result.weight[0], result.weight[1], result.mean[0], result.mean[1], result.deviation[0], result.deviation[1]});
  }

  // The posterior of each value by those parameters, 0 where the row goes on beyond the problem.
  FASTKD_DEVICE void select() const {
    if (b_ < 0) return;
    const Extent extent = this->extent();
    const double weight[] = {kept(0), kept(1)}, mean[] = {kept(2), kept(3)}, deviation[] = {kept(4), kept(5)};
    const PosteriorMixture mixture = posterior_mixture(weight, mean, deviation, p_.monotone);
    const int64_t row = b_ * p_.layout.columns;
    const auto store = [&](auto posterior, int64_t i) {
      static_cast<decltype(posterior)*>(p_.posterior)[row + i] = posterior;
      p_.mask[row + i] = posterior > static_cast<decltype(posterior)>(p_.threshold);
    };
#pragma unroll 1
    for (int64_t i = index_; i < p_.layout.columns; i += step_) {
      double x[1] = {__builtin_nan("")};
      if (i < extent.size) read(p_.dtype, p_.values, extent.begin + i, 1, extent.begin + extent.size, x);
      if (p_.dtype == Dtype::kFloat64) {
        store(posterior_of<double>(mixture, x[0]), i);
      } else {
        store(posterior_of<float>(mixture, x[0]), i);
      }
    }
  }

  // body(u, w) for each value of this thread
  template <typename Body>
  FASTKD_DEVICE void each(const Body& body) const {
#pragma unroll 2
    for (unsigned slot = thread_index(); slot < slots_; slot += block()) {
      body(u_.load(slot), kWeighted ? w_.load(slot) : 1.0);
    }
    each_again(body);
  }

 private:
  static FASTKD_DEVICE unsigned block() { return Group::kWholeCluster ? thread_count() : ::fastkd::gmm::kLaneThreads; }
  static constexpr int64_t kNone = INT64_MAX;

  FASTKD_DEVICE double kept(unsigned i) const { return scalars_.load(i * block() + thread_index()); }
  FASTKD_DEVICE void keep(const double (&numbers)[::fastkd::gmm::kFitScalars]) const {
#pragma unroll
    for (unsigned i = 0; i < ::fastkd::gmm::kFitScalars; ++i) scalars_.store(i * block() + thread_index(), numbers[i]);
  }

  FASTKD_DEVICE Extent extent() const { return b_ < 0 ? Extent{} : extent_of(p_.layout, b_); }

  template <int N>
  FASTKD_DEVICE void load(const Extent& extent, int64_t first, double (&x)[N], double (&w)[N]) const {
    const int64_t from = extent.begin + first, end = extent.begin + extent.size;
    read(p_.dtype, p_.values, from, step_, end, x);
    if constexpr (kWeighted) {
      const int64_t to_weight = extent.packed_begin - extent.begin;
      read(p_.weight_dtype, p_.sample_weight, from + to_weight, step_, end + to_weight, w);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) w[k] = 1.0;
    }
  }

  // the same for those that found no room
  template <typename Body>
  FASTKD_DEVICE void each_again(const Body& body) const {
    if (rest_ == kNone) return;
    const Extent extent = this->extent();
    const Scalars scalars = this->scalars();
#pragma unroll 1
    for (int64_t i = rest_; i < extent.size; i += step_) {
      double x[1], w[1];
      load(extent, i, x, w);
      if (is_finite(x[0]) && w[0] > 0) body(scalars.frame.enter(x[0]), kWeighted ? w[0] / scalars.largest_weight : 1.0);
    }
  }

  const DeviceFitParams& p_;
  int64_t b_;
  unsigned index_, step_;
  int64_t rest_ = kNone;  // the first value for which there was no room
  unsigned slots_ = 0;    // where this thread's slots end
  Shared<double> scalars_, u_, w_;
};

}  // namespace fastkd::FASTKD_ISA::gmm
