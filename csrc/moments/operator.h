// What the launchers of both sides share: checks of the arguments, outputs, parameters.
#pragma once

#include "common/tensor.h"
#include "moments/kernel.h"

namespace fastkd::moments {

inline void check_maps(const Tensor& x) {
  check_dtype("x", x, kFloats);
  FASTKD_CHECK(x.dim() >= 2 && x.dim() <= 5 && x.numel() > 0, "x has shape ", shape_of(x),
               ", must be [samples, channels, ...] with up to 3 more dimensions, none of them 0");
}

// Packed with its channels side by side, and not with its pixels: of those with one of either it makes no difference.
inline bool is_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1);
  if (x.dim() == 2 || channels == 1 || x.stride(1) != 1) return false;
  int64_t stride = channels;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) > 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return stride > channels && (x.size(0) == 1 || x.stride(0) == stride);
}

// The tensor as the kernels take it: packed.
inline Tensor packed(const Tensor& x) { return is_channels_last(x) ? x : torch::stable::contiguous(x); }

inline Maps maps_of(const Tensor& x, bool per_sample) {
  const int64_t samples = x.size(0), channels = x.size(1), pixels = x.numel() / (samples * channels);
  const Dtype dtype = kernel_dtype(x);
  const void* const data = x.const_data_ptr();
  if (is_channels_last(x)) {
    return per_sample ? Maps{dtype, data, true, samples, channels, pixels}
                      : Maps{dtype, data, true, 1, channels, samples * pixels};
  }
  if (per_sample) return {dtype, data, pixels == 1, 1, samples * channels, pixels};
  if (pixels == 1) return {dtype, data, channels > 1, 1, channels, samples};
  return channels == 1 ? Maps{dtype, data, false, 1, 1, samples * pixels} : Maps{dtype, data, false, samples, channels, pixels};
}

inline ScalarType result_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// mean or var
template <typename Context>
Tensor empty_result(const Context& context, const Tensor& x, bool per_sample) {
  return per_sample ? context.empty({x.size(0), x.size(1)}, result_type(x)) : context.empty({x.size(1)}, result_type(x));
}

// As x, packed in its order.
template <typename Context>
Tensor empty_gradient(const Context& context, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const int64_t n = x.size(0), c = x.size(1);
  const auto size = [&](int64_t d) { return d < x.dim() ? x.size(d) : 1; };
  const int64_t a = size(2), b = size(3), e = size(4);
  const bool last = is_channels_last(x);
  switch (x.dim()) {
    case 2: return context.empty({n, c}, type);
    case 3: return last ? context.empty({n, c, a}, type, {a * c, 1, c}) : context.empty({n, c, a}, type);
    case 4: return last ? context.empty({n, c, a, b}, type, {a * b * c, 1, b * c, c}) : context.empty({n, c, a, b}, type);
    default:
      return last ? context.empty({n, c, a, b, e}, type, {a * b * e * c, 1, b * e * c, e * c, c})
                  : context.empty({n, c, a, b, e}, type);
  }
}

// The arguments of the backward operator, checked; packed.
struct Gradients {
  Tensor x, mean;
  std::optional<Tensor> grad_mean, grad_var;
  bool per_sample;

  Gradients(Tensor x_, Tensor mean_, std::optional<Tensor> grad_mean_, std::optional<Tensor> grad_var_)
      : x(x_), mean(mean_), grad_mean(grad_mean_), grad_var(grad_var_) {
    check_maps(x);
    per_sample = mean.dim() == 2;
    check_values("mean", mean);
    for (auto* gradient : {&grad_mean, &grad_var}) {
      if (gradient->has_value()) check_values(gradient == &grad_mean ? "grad_mean" : "grad_var", **gradient);
    }
    x = packed(x);
  }

 private:
  void check_values(const char* name, Tensor& t) const {
    check_dtype(name, t, {result_type(x)});
    if (per_sample) {
      check_shape(name, t, {x.size(0), x.size(1)});
    } else {
      check_shape(name, t, {x.size(1)});
    }
    check_device(name, t, "x", x);
    t = torch::stable::contiguous(t);
  }
};

}  // namespace fastkd::moments
