// gmm on the CPU: checks, outputs, and which threads take what.
#include <algorithm>

#include "gmm/kernel.h"
#include "gmm/operator.h"

namespace fastkd::gmm {
namespace {

constexpr int64_t kGrainValues = 2048;              // of a fit: some 25 us of work
constexpr int64_t kTeamValues = 8 * kChunk;         // from here on a problem may be worth several threads
constexpr int64_t kPosteriorGrain = 32768;          // one sweep only
constexpr int64_t kKeptScratch = int64_t{1} << 20;  // doubles that a thread keeps from call to call

void check_values(const Layout& layout) {
  for (int64_t b = 0; layout.lengths != nullptr && b < layout.problems; ++b) {
    FASTKD_CHECK(layout.lengths[b] >= 0 && layout.lengths[b] <= layout.columns, "lengths[", b, "] is ", layout.lengths[b],
                 ", must be in [0, ", layout.columns, "]");
  }
  if (layout.offsets == nullptr) return;
  FASTKD_CHECK(layout.offsets[0] == 0, "offsets[0] is ", layout.offsets[0], ", must be 0");
  for (int64_t b = 0; b < layout.problems; ++b) {
    FASTKD_CHECK(layout.offsets[b] <= layout.offsets[b + 1], "offsets[", b + 1, "] is ", layout.offsets[b + 1],
                 ", must be at least offsets[", b, "], ", layout.offsets[b]);
  }
  FASTKD_CHECK(layout.offsets[layout.problems] == layout.elements, "offsets[", layout.problems, "] is ",
               layout.offsets[layout.problems], ", must be the number of values, ", layout.elements);
}

// NaN passes: in the initial parameters it asks for a fresh start.
void check_not_negative(const char* name, const Tensor& t) {
  const double* data = static_cast<const double*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) {
    FASTKD_CHECK(!(data[i] < 0), name, "[", i / 2, ", ", i % 2, "] is ", data[i], ", must not be negative");
  }
}

void check_finite(const char* name, const Tensor& t) {
  const double* data = static_cast<const double*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) {
    FASTKD_CHECK(data[i] - data[i] == 0, name, "[", i / 2, ", ", i % 2, "] is ", data[i], ", must be finite");
  }
}

const Team kAlone{[](int64_t count, void (*task)(void*, int64_t), void* argument) {
  for (int64_t i = 0; i < count; ++i) task(argument, i);
}};
const Team kThreads{[](int64_t count, void (*task)(void*, int64_t), void* argument) {
  parallel(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(argument, i);
  });
}};

void fit_one(const FitParams& params, int64_t b, const Team& team) {
  const int64_t doubles = scratch_doubles(params.layout.size(b), params.sample_weight != nullptr);
  if (doubles <= kKeptScratch) return kernels().fit(params, b, team, scratch<double>(doubles));
  Tensor memory = empty_cpu({doubles + 8}, ScalarType::Double);
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  kernels().fit(params, b, team, reinterpret_cast<double*>((data + 63) / 64 * 64));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gmm_fit(
    Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths, std::optional<Tensor> sample_weight,
    std::optional<Tensor> init_weights, std::optional<Tensor> init_means, std::optional<Tensor> init_deviations, bool normalize,
    int64_t max_iter, double tol, double reg_covar, std::optional<Tensor> numbers) {
  take_numbers(numbers, tol, reg_covar);
  Fit in{values, offsets, lengths, sample_weight, init_weights, init_means, init_deviations};
  in.check(normalize, max_iter, tol, reg_covar);
  check_values(in.params.layout);
  if (in.init_means.has_value()) {
    check_not_negative("init_weights", *in.init_weights);
    check_not_negative("init_deviations", *in.init_deviations);
  }
  in.make_outputs([](std::initializer_list<int64_t> shape, ScalarType type) { return empty_cpu(shape, type); });

  // a problem beyond a thread's share gets all threads, one such problem after the other; the rest a thread each
  const FitParams& params = in.params;
  const Layout& layout = params.layout;
  const int64_t problems = layout.problems;
  int64_t total = 0;
  for (int64_t b = 0; b < problems; ++b) total += layout.size(b);
  const int64_t threads = total >= kTeamValues ? torch::stable::get_num_threads() : 1;
  const auto is_large = [&](int64_t b) { return layout.size(b) >= kTeamValues && layout.size(b) > total / threads; };
  for (int64_t b = 0; b < problems && threads > 1; ++b) {
    if (is_large(b)) fit_one(params, b, kThreads);
  }
  const int64_t mean_size = total / std::max<int64_t>(problems, 1);
  parallel(problems, std::max<int64_t>(1, kGrainValues / (mean_size + 16)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (threads == 1 || !is_large(b)) fit_one(params, b, kAlone);
    }
  });
  for (int64_t b = 0; b < problems; ++b) {
    FASTKD_CHECK(params.status[b] != kInvalid, "sample_weight of problem ", b,
                 " has a negative, infinite or NaN element, must be finite and not negative");
  }
  return in.outputs();
}

std::tuple<Tensor, Tensor> gmm_posterior(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                                         Tensor weights, Tensor means, Tensor deviations, bool monotone, double threshold,
                                         std::optional<Tensor> numbers) {
  take_numbers(numbers, threshold);
  Posterior in{values, offsets, lengths, weights, means, deviations};
  in.check(monotone, threshold);
  const Layout& layout = in.params.layout;
  check_values(layout);
  check_not_negative("weights", in.weights);
  check_not_negative("deviations", in.deviations);
  check_finite("weights", in.weights);
  check_finite("means", in.means);
  check_finite("deviations", in.deviations);
  in.make_outputs([](std::initializer_list<int64_t> shape, ScalarType type) { return empty_cpu(shape, type); });

  const bool flat = layout.offsets != nullptr;
  const int64_t problems = layout.problems, columns = layout.columns;
  // elements are independent: a thread takes a range of them, from whichever problems they are
  const Kernels& k = kernels();
  parallel(layout.elements, kPosteriorGrain, [&](int64_t begin, int64_t end) {
    int64_t b = flat ? std::upper_bound(layout.offsets, layout.offsets + problems, begin) - layout.offsets - 1 : begin / columns;
    while (begin < end) {
      const int64_t start = layout.packed_begin(b), stop = flat ? layout.offsets[b + 1] : start + columns;
      const int64_t last = std::min(end, stop);
      if (begin < last) k.posterior(in.params, b, begin - start, last - start);
      begin = last;
      ++b;
    }
  });
  return {in.posterior, in.mask};
}

std::tuple<Tensor, Tensor> gmm_select(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                                      std::optional<Tensor> sample_weight, bool normalize, int64_t max_iter, double tol,
                                      double reg_covar, bool monotone, double threshold, std::optional<Tensor> numbers) {
  take_numbers(numbers, tol, reg_covar, threshold);
  check_threshold(threshold);
  const auto fit = gmm_fit(values, offsets, lengths, sample_weight, std::nullopt, std::nullopt, std::nullopt, normalize, max_iter,
                           tol, reg_covar, std::nullopt);
  return gmm_posterior(values, offsets, lengths, std::get<0>(fit), std::get<1>(fit), std::get<2>(fit), monotone, threshold,
                       std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("gmm_fit", FASTKD_CPU_BOX(gmm_fit));
  m.impl("gmm_posterior", FASTKD_CPU_BOX(gmm_posterior));
  m.impl("gmm_select", FASTKD_CPU_BOX(gmm_select));
}

}  // namespace fastkd::gmm
