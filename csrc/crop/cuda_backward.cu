// Gradients of crops on the GPU: the launch. The kernel and its mapping are in backward.cuh.
#include "crop/backward.cuh"
#include "crop/operator.h"

namespace fastkd::crop {
namespace {

Tensor crop_backward(Tensor grad_patches, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width,
                     std::vector<double> scale, std::optional<Tensor> numbers) {
  take_numbers(numbers, scale);
  const DeviceContext context(grad_patches);
  const CropBackwardCall call = make_crop_backward(context, grad_patches, offsets, flip, height, width, scale);
  if (call.out.numel() == 0) return call.out;
  const Geometry& g = call.params.geometry;
  const PlacedConstants placed = place_constants(context, {}, scale, g.planes * g.unit);
  const BackwardPlan plan = plan_backward(call.params, call.out.size(0), placed.constants, {context.limits().multiprocessors});
  context.launch("crop_backward", plan.kernel, plan.launch, plan.params);
  return call.out;
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("crop_backward", TORCH_BOX(&crop_backward)); }

}  // namespace fastkd::crop
