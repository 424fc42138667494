// gmm on the CPU: checks, outputs, and which threads take what.
#include <algorithm>

#include "common/tensor.h"
#include "gmm/kernel.h"

namespace fastkd::gmm {
namespace {

constexpr int64_t kGrainValues = 2048;              // of a fit: some 25 us of work
constexpr int64_t kTeamValues = 8 * kChunk;         // from here on a problem may be worth several threads
constexpr int64_t kPosteriorGrain = 32768;          // one sweep only
constexpr int64_t kKeptScratch = int64_t{1} << 20;  // doubles that a thread keeps from call to call

Tensor with_packed_rows(const Tensor& t) {
  return t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1) ? t : torch::stable::contiguous(t);
}

// Checks values, offsets and lengths (all replaced by what the kernel reads) and lays the problems out.
Layout layout_of(Tensor& values, std::optional<Tensor>& offsets, std::optional<Tensor>& lengths) {
  check_dtype("values", values, kFloats);
  FASTKD_CHECK(!offsets.has_value() || !lengths.has_value(), "lengths and offsets are both given, must be at most one of them");
  Layout layout{};
  if (offsets.has_value()) {
    check_dim("values", values, 1);
    check_dtype("offsets", *offsets, {ScalarType::Long});
    check_dim("offsets", *offsets, 1);
    check_device("offsets", *offsets, "values", values);
    FASTKD_CHECK(offsets->size(0) >= 1, "offsets has shape ", shape_of(*offsets),
                 ", must have one more element than there are problems");
    values = torch::stable::contiguous(values);
    offsets = torch::stable::contiguous(*offsets);
    layout.problems = offsets->size(0) - 1;
    layout.offsets = data_or_null<int64_t>(offsets);
    FASTKD_CHECK(layout.offsets[0] == 0, "offsets[0] is ", layout.offsets[0], ", must be 0");
    for (int64_t b = 0; b < layout.problems; ++b) {
      FASTKD_CHECK(layout.offsets[b] <= layout.offsets[b + 1], "offsets[", b + 1, "] is ", layout.offsets[b + 1],
                   ", must be at least offsets[", b, "], ", layout.offsets[b]);
    }
    FASTKD_CHECK(layout.offsets[layout.problems] == values.size(0), "offsets[", layout.problems, "] is ",
                 layout.offsets[layout.problems], ", must be the number of values, ", values.size(0));
    return layout;
  }
  check_dim("values", values, 2);
  values = with_packed_rows(values);
  layout.problems = values.size(0);
  layout.columns = values.size(1);
  layout.stride = values.stride(0);
  if (lengths.has_value()) {
    check_dtype("lengths", *lengths, {ScalarType::Long});
    check_shape("lengths", *lengths, {layout.problems});
    check_device("lengths", *lengths, "values", values);
    lengths = torch::stable::contiguous(*lengths);
    layout.lengths = data_or_null<int64_t>(lengths);
    for (int64_t b = 0; b < layout.problems; ++b) {
      FASTKD_CHECK(layout.lengths[b] >= 0 && layout.lengths[b] <= layout.columns, "lengths[", b, "] is ", layout.lengths[b],
                   ", must be in [0, ", layout.columns, "]");
    }
  }
  return layout;
}

Tensor parameter(const char* name, const Tensor& t, int64_t problems, const Tensor& values) {
  check_dtype(name, t, {ScalarType::Double});
  check_shape(name, t, {problems, 2});
  check_device(name, t, "values", values);
  return torch::stable::contiguous(t);
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

void check_scalar(const char* name, double value) {
  FASTKD_CHECK(value >= 0 && value <= std::numeric_limits<double>::max(), name, " is ", value,
               ", must be finite and not negative");
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
    int64_t max_iter, double tol, double reg_covar) {
  FitParams params{};
  params.layout = layout_of(values, offsets, lengths);
  const int64_t problems = params.layout.problems;
  FASTKD_CHECK(max_iter >= 1, "max_iter is ", max_iter, ", must be at least 1");
  check_scalar("tol", tol);
  check_scalar("reg_covar", reg_covar);
  if (sample_weight.has_value()) {
    check_dtype("sample_weight", *sample_weight, kFloats);
    bool same = sample_weight->dim() == values.dim();
    for (int64_t d = 0; same && d < values.dim(); ++d) same = sample_weight->size(d) == values.size(d);
    FASTKD_CHECK(same, "sample_weight has shape ", shape_of(*sample_weight), ", must be that of values, ", shape_of(values));
    check_device("sample_weight", *sample_weight, "values", values);
    sample_weight = torch::stable::contiguous(*sample_weight);
    params.weight_dtype = kernel_dtype(*sample_weight);
  }
  FASTKD_CHECK(init_weights.has_value() == init_means.has_value() && init_means.has_value() == init_deviations.has_value(),
               "init_weights, init_means and init_deviations are given in part, must be all or none");
  if (init_means.has_value()) {
    init_weights = parameter("init_weights", *init_weights, problems, values);
    init_means = parameter("init_means", *init_means, problems, values);
    init_deviations = parameter("init_deviations", *init_deviations, problems, values);
    check_not_negative("init_weights", *init_weights);
    check_not_negative("init_deviations", *init_deviations);
  }

  Tensor weights = empty_cpu({problems, 2}, ScalarType::Double), means = empty_cpu({problems, 2}, ScalarType::Double);
  Tensor deviations = empty_cpu({problems, 2}, ScalarType::Double), iterations = empty_cpu({problems}, ScalarType::Long);
  Tensor log_likelihood = empty_cpu({problems}, ScalarType::Double), status = empty_cpu({problems}, ScalarType::Long);
  params.dtype = kernel_dtype(values);
  params.values = values.const_data_ptr();
  params.sample_weight = data_or_null<void>(sample_weight);
  params.init_weights = data_or_null<double>(init_weights);
  params.init_means = data_or_null<double>(init_means);
  params.init_deviations = data_or_null<double>(init_deviations);
  params.normalize = normalize;
  params.max_iter = max_iter;
  params.tol = tol;
  params.reg_covar = reg_covar;
  params.weights = static_cast<double*>(weights.mutable_data_ptr());
  params.means = static_cast<double*>(means.mutable_data_ptr());
  params.deviations = static_cast<double*>(deviations.mutable_data_ptr());
  params.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  params.log_likelihood = static_cast<double*>(log_likelihood.mutable_data_ptr());
  params.status = static_cast<int64_t*>(status.mutable_data_ptr());

  // a problem beyond a thread's share gets all threads, one such problem after the other; the rest a thread each
  const Layout& layout = params.layout;
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
    FASTKD_CHECK(params.status[b] != kBadWeight, "sample_weight of problem ", b,
                 " has a negative, infinite or NaN element, must be finite and not negative");
  }
  return {weights, means, deviations, iterations, log_likelihood, status};
}

std::tuple<Tensor, Tensor> gmm_posterior(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                                         Tensor weights, Tensor means, Tensor deviations, bool monotone, double threshold) {
  PosteriorParams params{};
  params.layout = layout_of(values, offsets, lengths);
  const Layout& layout = params.layout;
  const int64_t problems = layout.problems;
  weights = parameter("weights", weights, problems, values);
  means = parameter("means", means, problems, values);
  deviations = parameter("deviations", deviations, problems, values);
  check_not_negative("weights", weights);
  check_not_negative("deviations", deviations);
  check_finite("weights", weights);
  check_finite("means", means);
  check_finite("deviations", deviations);
  FASTKD_CHECK(threshold >= 0 && threshold <= 1, "threshold is ", threshold, ", must be in [0, 1]");

  const ScalarType type = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const bool flat = layout.offsets != nullptr;
  const int64_t rows = problems, columns = layout.columns, total = flat ? values.size(0) : rows * columns;
  Tensor posterior = flat ? empty_cpu({total}, type) : empty_cpu({rows, columns}, type);
  Tensor mask = flat ? empty_cpu({total}, ScalarType::Bool) : empty_cpu({rows, columns}, ScalarType::Bool);
  params.dtype = kernel_dtype(values);
  params.values = values.const_data_ptr();
  params.weights = static_cast<const double*>(weights.const_data_ptr());
  params.means = static_cast<const double*>(means.const_data_ptr());
  params.deviations = static_cast<const double*>(deviations.const_data_ptr());
  params.monotone = monotone;
  params.threshold = threshold;
  params.posterior = posterior.mutable_data_ptr();
  params.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  // elements are independent: a thread takes a range of them, from whichever problems they are
  const Kernels& k = kernels();
  parallel(total, kPosteriorGrain, [&](int64_t begin, int64_t end) {
    int64_t b = flat ? std::upper_bound(layout.offsets, layout.offsets + problems, begin) - layout.offsets - 1 : begin / columns;
    while (begin < end) {
      const int64_t start = layout.packed_begin(b), stop = flat ? layout.offsets[b + 1] : start + columns;
      const int64_t last = std::min(end, stop);
      if (begin < last) k.posterior(params, b, begin - start, last - start);
      begin = last;
      ++b;
    }
  });
  return {posterior, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("gmm_fit", TORCH_BOX(&gmm_fit));
  m.impl("gmm_posterior", TORCH_BOX(&gmm_posterior));
}

}  // namespace fastkd::gmm
