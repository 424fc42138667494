// Crops on the CPU: threads.
#include "crop/cpu.h"

namespace fastkd::crop {
namespace {

Tensor crop(Tensor images, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width, std::vector<double> center,
            std::vector<double> scale, ScalarType dtype, std::optional<Tensor> numbers) {
  take_numbers(numbers, center, scale);
  CropCall call = make_crop(CpuContext(), images, offsets, flip, height, width, center, scale, dtype);
  CropParams& params = call.params;
  const Geometry& g = params.geometry;
  const int64_t channels = g.planes * g.unit;
  const ChannelConstants constants(center, scale, channels, g.unit);
  params.normalise = constants.view();
  const Kernels& k = kernels();
  parallel(call.offsets.size(0) * g.patches * (channels > 0 ? g.planes : 0) * height, grain_rows(width * g.unit, params.out_size),
           [&](int64_t begin, int64_t end) { k.crop(params, begin, end, scratch<char>(crop_scratch(params))); });
  return call.out;
}

Tensor crop_backward(Tensor grad_patches, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width,
                     std::vector<double> scale, std::optional<Tensor> numbers) {
  take_numbers(numbers, scale);
  CropBackwardCall call = make_crop_backward(CpuContext(), grad_patches, offsets, flip, height, width, scale);
  CropBackwardParams& params = call.params;
  const Geometry& g = params.geometry;
  const ChannelConstants constants({}, scale, g.planes * g.unit, g.unit);
  params.normalise = constants.view();
  if (width * g.unit == 0) return call.out;
  const Kernels& k = kernels();
  parallel(call.offsets.size(0) * g.planes * height, grain_rows(width * g.unit, params.size), [&](int64_t begin, int64_t end) {
    k.crop_backward(params, begin, end, scratch<char>(backward_scratch(params).bytes));
  });
  return call.out;
}

std::tuple<Tensor, Tensor> crop_offsets(Tensor seed, int64_t batch, int64_t patches, int64_t y_low, int64_t y_count,
                                        int64_t x_low, int64_t x_count, double flip_probability, std::optional<Tensor> numbers) {
  take_numbers(numbers, flip_probability);
  PlacesCall call = make_places(CpuContext(), seed, batch, patches, y_low, y_count, x_low, x_count, flip_probability);
  call.params.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const PlacesParams& params = call.params;
  const Kernels& k = kernels();
  parallel(batch * patches, kGrainPlaces, [&](int64_t begin, int64_t end) { k.places(params, begin, end); });
  return {call.offsets, call.flip};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("crop", FASTKD_CPU_BOX(crop));
  m.impl("crop_backward", FASTKD_CPU_BOX(crop_backward));
  m.impl("crop_offsets", FASTKD_CPU_BOX(crop_offsets));
}

}  // namespace fastkd::crop
