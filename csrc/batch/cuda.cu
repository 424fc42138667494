// From an alias table to a batch on the GPU: the launch. The kernel and its mapping are in draw.cuh.
#include "batch/draw.cuh"
#include "common/tuning.h"

namespace fastkd::batch {
namespace {

std::tuple<Tensor, Tensor> draw_batch(Tensor table, Tensor block_weight, Tensor top, Tensor table_scale, Tensor stream,
                                      Tensor crop_seed, Tensor images, int64_t count, int64_t height, int64_t width,
                                      int64_t padding, double flip_probability, std::vector<double> center,
                                      std::vector<double> scale, ScalarType dtype, std::optional<Tensor> numbers) {
  take_numbers(numbers, flip_probability, center, scale);
  const DeviceContext context(table);
  const DrawBatchCall call = make_draw_batch(context, table, block_weight, top, table_scale, stream, crop_seed, images, count,
                                             height, width, padding, flip_probability, center, scale, dtype);
  ForwardLimits limits{context.limits().multiprocessors};
  limits.rounds = static_cast<unsigned>(tuned(Knob::kBatchRounds));
  launch_draw_batch(context, call, center, scale, limits);
  return {call.patches.out, call.indices};
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("draw_batch", TORCH_BOX(&draw_batch)); }

}  // namespace fastkd::batch
