// Crops and random places on the GPU: launches. The kernels are in forward_kernels.cuh, their mapping in forward.cuh.
#include "crop/forward_kernels.cuh"
#include "crop/operator.h"

namespace fastkd::crop {
namespace {

Tensor crop(Tensor images, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width, std::vector<double> center,
            std::vector<double> scale, ScalarType dtype, std::optional<Tensor> numbers) {
  take_numbers(numbers, center, scale);
  const DeviceContext context(images);
  const CropCall call = make_crop(context, images, offsets, flip, height, width, center, scale, dtype);
  if (call.out.numel() == 0) return call.out;
  const Geometry& g = call.params.geometry;
  const PlacedConstants placed = place_constants(context, center, scale, g.planes * g.unit);
  const ForwardPlan plan = plan_forward(call.params, call.images.size(0), placed.constants, context.limits().multiprocessors);
  context.launch("crop", plan.kernel, plan.launch, plan.params);
  return call.out;
}

struct PlacesOnDevice {
  PlacesParams places;  // but for the seed
  const int64_t* seed;
  int64_t count;
};

// A place is a function of (seed, index) in integers (math.h): one thread each, whatever the grid.
// inspect: anywhere places_kernel loads=64 stores=128
FASTKD_KERNEL(kThreads) places_kernel(const PlacesOnDevice p) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < p.count; i += step) {
    const crop_math::Place place =
        crop_math::place(philox(seed, Stream::kCrop, static_cast<uint64_t>(i)), {p.places.y_low, p.places.y_count},
                         {p.places.x_low, p.places.x_count}, p.places.flip_below);
    store_pack(p.places.offsets + 2 * i, Pack<int64_t>{{place.y, place.x}});
    p.places.flip[i] = place.flip;
  }
}

std::tuple<Tensor, Tensor> crop_offsets(Tensor seed, int64_t batch, int64_t patches, int64_t y_low, int64_t y_count,
                                        int64_t x_low, int64_t x_count, double flip_probability, std::optional<Tensor> numbers) {
  take_numbers(numbers, flip_probability);
  const DeviceContext context(seed);
  const PlacesCall call = make_places(context, seed, batch, patches, y_low, y_count, x_low, x_count, flip_probability);
  const PlacesOnDevice params{call.params, static_cast<const int64_t*>(seed.const_data_ptr()), batch * patches};
  if (params.count > 0) context.launch("crop_offsets", places_kernel, {grid_size(params.count, 4), kThreads}, params);
  return {call.offsets, call.flip};
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("crop", TORCH_BOX(&crop));
  m.impl("crop_offsets", TORCH_BOX(&crop_offsets));
}

}  // namespace fastkd::crop
