// gmm on the GPU: checks, outputs, the choice of kernels; and the posterior.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "gmm/cuda.h"
#include "gmm/cuda_posterior.cuh"
#include "gmm/operator.h"

namespace fastkd::gmm {
namespace {

using namespace device;
using namespace gmm_math;
using FASTKD_ISA::gmm::Extent;
using FASTKD_ISA::gmm::extent_of;
using FASTKD_ISA::gmm::posterior_of;
using FASTKD_ISA::gmm::valid_parameters;

// The problem that an element of packed tensors belongs to.
struct Place {
  int64_t first = 0, last = 0;  // its elements
  int64_t live = 0;             // before this one they have a posterior
  int64_t to_value = 0;         // from an element's index to its value's
  PosteriorMixture mixture;

  FASTKD_DEVICE void find(const PosteriorParams& p, int64_t element) {
    const Layout& layout = p.layout;
    int64_t b;
    if (layout.offsets == nullptr) {
      b = element / layout.columns;
      first = b * layout.columns;
      last = first + layout.columns;
    } else {
      int64_t begin = 0, end = layout.problems;  // the last problem that begins at or before the element
      while (end - begin > 1) {
        const int64_t middle = begin + (end - begin) / 2;
        (layout.offsets[middle] <= element ? begin : end) = middle;
      }
      b = begin;
      first = element;
      last = element + 1;
    }
    const Extent extent = layout.problems > 0 ? extent_of(layout, b) : Extent{};
    const double *weight = p.weights + 2 * b, *mean = p.means + 2 * b, *deviation = p.deviations + 2 * b;
    const bool inside =
        extent.valid && (layout.offsets == nullptr || (extent.begin <= element && element < extent.begin + extent.size));
    if (!inside || !valid_parameters(weight, mean, deviation)) {
      live = 0;
      return;
    }
    if (layout.offsets != nullptr) {
      first = extent.begin;
      last = extent.begin + extent.size;
    }
    live = extent.packed_begin + extent.size;
    to_value = extent.begin - extent.packed_begin;
    mixture = posterior_mixture(weight, mean, deviation, p.monotone);
  }
};

// Mapping: a thread takes 16 bytes of values at once, those that are not of one problem or not aligned one by one; blocks take
// chunks of elements, whichever problem they are of. Bytes: values read, posterior (4 or 8) and mask (1) written.
// An element takes some 40 instructions, a mixture some 300, once for each thread that meets it.
// inspect: streaming posterior_packs<*> loads=128 stores=128
template <typename T>
FASTKD_KERNEL(kThreads, 2)
posterior_packs(const DevicePosteriorParams p) {
  using Out = Compute<T>;
  constexpr int kOuts = kPack<Out>;
  const int64_t elements = p.layout.elements;
  const T* const values = static_cast<const T*>(p.values);
  Out* const posterior = static_cast<Out*>(p.posterior);
  const Out threshold = static_cast<Out>(p.threshold);
  Place place;
  for (int64_t chunk = block_index() * p.chunk; chunk < elements; chunk += block_count() * p.chunk) {
    const int64_t end = chunk + p.chunk < elements ? chunk + p.chunk : elements;
    for (int64_t q = chunk + static_cast<int64_t>(thread_index()) * kPack<T>; q < end; q += kThreads * kPack<T>) {
      if (q >= place.last) place.find(p, q);
      const T* const from = values + q + place.to_value;
      if (q + kPack<T> <= place.live && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const Pack<T> x = load_pack_once(from);
        uint64_t selected = 0;
#pragma unroll
        for (int part = 0; part < kPack<T> / kOuts; ++part) {
          Pack<Out> out;
#pragma unroll
          for (int k = 0; k < kOuts; ++k) {
            const int i = part * kOuts + k;
            out.value[k] = posterior_of<Out>(place.mixture, static_cast<double>(to_compute(x.value[i])));
            selected |= static_cast<uint64_t>(out.value[k] > threshold) << (8 * i);
          }
          store_pack_once(posterior + q + part * kOuts, out);
        }
        memcpy(__builtin_assume_aligned(p.mask + q, kPack<T>), &selected, kPack<T>);
        continue;
      }
#pragma unroll 1
      for (int64_t i = q; i < q + kPack<T> && i < elements; ++i) {
        if (i >= place.last) place.find(p, i);
        Out out = 0;
        if (i < place.live) {
          out = posterior_of<Out>(place.mixture, static_cast<double>(to_compute(values[i + place.to_value])));
        }
        posterior[i] = out;
        p.mask[i] = out > threshold;
      }
    }
  }
}

auto posterior_kernel(Dtype dtype) {
  return for_dtype(dtype, []<typename T>() { return posterior_packs<T>; });
}

void launch_fit(const DeviceContext& context, DeviceFitParams params) {
  const Layout& layout = params.layout;
  if (layout.problems == 0) return;
  const bool weighted = params.sample_weight != nullptr;
  const FitPlan plan = plan_fit(layout.problems, layout.elements, weighted, context.limits());
  params.capacity = plan.capacity;
  params.scalars_offset = plan.scalars_offset;
  context.launch("gmm_fit", weighted ? weighted_fit_kernel(plan.team) : plain_fit_kernel(plan.team), plan.geometry, params);
}

auto fresh_on(const DeviceContext& context) {
  return [&context](std::initializer_list<int64_t> shape, ScalarType type) { return context.empty(shape, type); };
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gmm_fit(
    Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths, std::optional<Tensor> sample_weight,
    std::optional<Tensor> init_weights, std::optional<Tensor> init_means, std::optional<Tensor> init_deviations, bool normalize,
    int64_t max_iter, double tol, double reg_covar, std::optional<Tensor> numbers) {
  take_numbers(numbers, tol, reg_covar);
  Fit in{values, offsets, lengths, sample_weight, init_weights, init_means, init_deviations};
  in.check(normalize, max_iter, tol, reg_covar);
  const DeviceContext context(in.values);
  in.make_outputs(fresh_on(context));
  launch_fit(context, DeviceFitParams{in.params});
  return in.outputs();
}

std::tuple<Tensor, Tensor> gmm_posterior(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                                         Tensor weights, Tensor means, Tensor deviations, bool monotone, double threshold,
                                         std::optional<Tensor> numbers) {
  take_numbers(numbers, threshold);
  Posterior in{values, offsets, lengths, weights, means, deviations};
  in.check(monotone, threshold);
  const DeviceContext context(in.values);
  in.make_outputs(fresh_on(context));
  if (in.params.layout.elements > 0) {
    const int64_t pack = 16 / static_cast<int64_t>(in.values.element_size());
    const PosteriorPlan plan = plan_posterior(in.params.layout.elements, pack, context.limits());
    context.launch("gmm_posterior", posterior_kernel(in.params.dtype), plan.geometry,
                   DevicePosteriorParams{in.params, plan.chunk});
  }
  return {in.posterior, in.mask};
}

// Rows in one launch. Problems given by offsets in two: where offsets are wrong, an element may belong to no problem, and only
// gmm_posterior, which goes by elements, reaches it.
std::tuple<Tensor, Tensor> gmm_select(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                                      std::optional<Tensor> sample_weight, bool normalize, int64_t max_iter, double tol,
                                      double reg_covar, bool monotone, double threshold, std::optional<Tensor> numbers) {
  take_numbers(numbers, tol, reg_covar, threshold);
  check_threshold(threshold);
  Fit in{values, offsets, lengths, sample_weight, std::nullopt, std::nullopt, std::nullopt};
  in.check(normalize, max_iter, tol, reg_covar);
  const DeviceContext context(in.values);
  if (in.offsets.has_value()) {
    in.make_outputs(fresh_on(context));
    launch_fit(context, DeviceFitParams{in.params});
    return gmm_posterior(in.values, in.offsets, lengths, in.weights, in.means, in.deviations, monotone, threshold, std::nullopt);
  }
  auto [posterior, mask] = posterior_and_mask(in.values, in.params.layout, fresh_on(context));
  DeviceFitParams params{in.params};
  params.posterior = posterior.mutable_data_ptr();
  params.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  params.monotone = monotone;
  params.threshold = threshold;
  if (in.params.layout.elements > 0) launch_fit(context, params);
  return {posterior, mask};
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("gmm_fit", TORCH_BOX(&gmm_fit));
  m.impl("gmm_posterior", TORCH_BOX(&gmm_posterior));
  m.impl("gmm_select", TORCH_BOX(&gmm_select));
}

}  // namespace fastkd::gmm
