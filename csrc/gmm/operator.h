// What the launchers of both sides share: checks of the arguments, outputs and parameters. What the checks do not read is
// the numbers in tensors: the CPU launcher looks at those itself, a GPU gives such a problem a status instead.
#pragma once

#include "common/numbers.h"
#include "common/tensor.h"
#include "gmm/kernel.h"

namespace fastkd::gmm {

// Values of a problem stand side by side, problems anywhere.
inline Tensor with_packed_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// Checks values, offsets and lengths (all replaced by what the kernel reads) and lays the problems out.
inline Layout layout_of(Tensor& values, std::optional<Tensor>& offsets, std::optional<Tensor>& lengths) {
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
    layout.elements = values.size(0);
    layout.offsets = data_or_null<int64_t>(offsets);
    return layout;
  }
  FASTKD_CHECK(values.dim() == 1 || values.dim() == 2, "values has shape ", shape_of(values),
               ", must be [n], a problem, or [problems, n]");
  values = with_packed_rows(values);
  const bool single = values.dim() == 1;
  layout.problems = single ? 1 : values.size(0);
  layout.columns = values.size(single ? 0 : 1);
  layout.stride = single ? layout.columns : values.stride(0);
  layout.elements = layout.problems * layout.columns;
  if (lengths.has_value()) {
    check_dtype("lengths", *lengths, {ScalarType::Long});
    check_shape("lengths", *lengths, {layout.problems});
    check_device("lengths", *lengths, "values", values);
    lengths = torch::stable::contiguous(*lengths);
    layout.lengths = data_or_null<int64_t>(lengths);
  }
  return layout;
}

inline Tensor parameter(const char* name, const Tensor& t, int64_t problems, const Tensor& values) {
  check_dtype(name, t, {ScalarType::Double});
  check_shape(name, t, {problems, 2});
  check_device(name, t, "values", values);
  return torch::stable::contiguous(t);
}

inline void check_scalar(const char* name, double value) {
  FASTKD_CHECK(value >= 0 && value <= std::numeric_limits<double>::max(), name, " is ", value,
               ", must be finite and not negative");
}

inline void check_threshold(double threshold) {
  FASTKD_CHECK(threshold >= 0 && threshold <= 1, "threshold is ", threshold, ", must be in [0, 1]");
}

// Posterior and mask, in the shape of the values.
template <typename Empty>
std::tuple<Tensor, Tensor> posterior_and_mask(const Tensor& values, const Layout& layout, const Empty& empty) {
  const ScalarType type = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto like_values = [&](ScalarType dtype) {
    return values.dim() == 1 ? empty({layout.elements}, dtype) : empty({layout.problems, layout.columns}, dtype);
  };
  return {like_values(type), like_values(ScalarType::Bool)};
}

// The arguments of gmm_fit, and its outputs; empty(shape, dtype) makes one.
struct Fit {
  Tensor values;
  std::optional<Tensor> offsets, lengths, sample_weight, init_weights, init_means, init_deviations;
  FitParams params{};
  Tensor weights{}, means{}, deviations{}, iterations{}, log_likelihood{}, status{};

  void check(bool normalize, int64_t max_iter, double tol, double reg_covar) {
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
    }
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
  }

  template <typename Empty>
  void make_outputs(const Empty& empty) {
    const int64_t problems = params.layout.problems;
    params.weights = fresh<double>(weights, empty({problems, 2}, ScalarType::Double));
    params.means = fresh<double>(means, empty({problems, 2}, ScalarType::Double));
    params.deviations = fresh<double>(deviations, empty({problems, 2}, ScalarType::Double));
    params.iterations = fresh<int64_t>(iterations, empty({problems}, ScalarType::Long));
    params.log_likelihood = fresh<double>(log_likelihood, empty({problems}, ScalarType::Double));
    params.status = fresh<int64_t>(status, empty({problems}, ScalarType::Long));
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {weights, means, deviations, iterations, log_likelihood, status};
  }

 private:
  template <typename T>
  static T* fresh(Tensor& place, Tensor made) {
    place = made;
    return static_cast<T*>(place.mutable_data_ptr());
  }
};

// The same of gmm_posterior.
struct Posterior {
  Tensor values;
  std::optional<Tensor> offsets, lengths;
  Tensor weights, means, deviations;
  PosteriorParams params{};
  Tensor posterior{}, mask{};

  void check(bool monotone, double threshold) {
    params.layout = layout_of(values, offsets, lengths);
    const int64_t problems = params.layout.problems;
    weights = parameter("weights", weights, problems, values);
    means = parameter("means", means, problems, values);
    deviations = parameter("deviations", deviations, problems, values);
    check_threshold(threshold);
    params.dtype = kernel_dtype(values);
    params.values = values.const_data_ptr();
    params.weights = static_cast<const double*>(weights.const_data_ptr());
    params.means = static_cast<const double*>(means.const_data_ptr());
    params.deviations = static_cast<const double*>(deviations.const_data_ptr());
    params.monotone = monotone;
    params.threshold = threshold;
  }

  template <typename Empty>
  void make_outputs(const Empty& empty) {
    std::tie(posterior, mask) = posterior_and_mask(values, params.layout, empty);
    params.posterior = posterior.mutable_data_ptr();
    params.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  }
};

}  // namespace fastkd::gmm
