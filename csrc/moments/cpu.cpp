// Moments of channels on the CPU: workspaces and threads.
#include "moments/operator.h"

namespace fastkd::moments {
namespace {

struct CpuContext {
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    return empty_cpu(shape, type, strides);
  }
};

// body(task, scratch) for each task, of `elements` in all.
template <typename Body>
void each(int64_t tasks, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements / tasks));
  parallel(tasks, grain, [&](int64_t begin, int64_t end) {
    char* const memory = scratch<char>(kScratchBytes);
    for (int64_t task = begin; task < end; ++task) body(task, memory);
  });
}

std::tuple<Tensor, Tensor> channel_moments(Tensor x, bool per_sample) {
  check_maps(x);
  x = packed(x);
  const CpuContext context;
  Tensor mean = empty_result(context, x, per_sample), var = empty_result(context, x, per_sample);
  const Maps maps = maps_of(x, per_sample);
  const Plan plan(maps);
  Params params{maps, plan, nullptr, nullptr, mean.mutable_data_ptr(), var.mutable_data_ptr()};
  const Kernels& k = kernels();
  const Tensor parts = empty_cpu({plan.merged > 1 ? 2 * plan.parts * maps.channels : 0}, ScalarType::Double);
  params.part_mean = static_cast<double*>(parts.mutable_data_ptr());
  params.part_m2 = params.part_mean + plan.parts * maps.channels;
  each(plan.parts * plan.blocks, x.numel(), [&](int64_t task, char* memory) { k.part(params, task, memory); });
  if (plan.merged > 1) {
    each(plan.parts / plan.merged * plan.blocks, plan.parts * maps.channels,
         [&](int64_t task, char* memory) { k.merge(params, task, memory); });
  }
  return {mean, var};
}

Tensor channel_moments_backward(Tensor x, Tensor mean, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var) {
  const Gradients in(x, mean, grad_mean, grad_var);
  Tensor gradient = empty_gradient(CpuContext(), in.x);
  const Maps maps = maps_of(in.x, in.per_sample);
  const Plan plan(maps);
  const BackwardParams params{maps,
                              plan,
                              in.mean.const_data_ptr(),
                              data_or_null<void>(in.grad_mean),
                              data_or_null<void>(in.grad_var),
                              gradient.mutable_data_ptr()};
  const Kernels& k = kernels();
  each(plan.parts * plan.blocks, x.numel(), [&](int64_t task, char* memory) { k.backward(params, task, memory); });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("channel_moments", FASTKD_CPU_BOX(channel_moments));
  m.impl("channel_moments_backward", FASTKD_CPU_BOX(channel_moments_backward));
}

}  // namespace fastkd::moments
