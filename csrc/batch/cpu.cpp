// From an alias table to a batch on the CPU: draws and places by their own kernels, then each image is cropped where it lies
// in the collection, which spares a copy of all that were drawn.
#include <memory>

#include "batch/operator.h"
#include "crop/cpu.h"

namespace fastkd::batch {
namespace {

constexpr int64_t kGrainDraws = 4096;

template <typename T>
void fill(void* out, int64_t count, T value) {
  std::fill_n(static_cast<T*>(out), count, value);
}
void fill_nan(Dtype dtype, void* out, int64_t count) {
  switch (dtype) {
    case Dtype::kFloat64: return fill(out, count, std::numeric_limits<double>::quiet_NaN());
    case Dtype::kFloat32: return fill(out, count, std::numeric_limits<float>::quiet_NaN());
    case Dtype::kBFloat16: return fill<uint16_t>(out, count, 0x7fc0);
    default: return fill<uint16_t>(out, count, 0x7e00);
  }
}

std::tuple<Tensor, Tensor> draw_batch(Tensor table, Tensor block_weight, Tensor top, Tensor table_scale, Tensor stream,
                                      Tensor crop_seed, Tensor images, int64_t count, int64_t height, int64_t width,
                                      int64_t padding, double flip_probability, std::vector<double> center,
                                      std::vector<double> scale, ScalarType dtype, std::optional<Tensor> numbers) {
  take_numbers(numbers, flip_probability, center, scale);
  DrawBatchCall call = make_draw_batch(crop::CpuContext(), table, block_weight, top, table_scale, stream, crop_seed, images,
                                       count, height, width, padding, flip_probability, center, scale, dtype);
  int64_t* const indices = static_cast<int64_t*>(call.indices.mutable_data_ptr());
  call.table.total = alias::check_total("table_scale", static_cast<const double*>(call.table_scale.const_data_ptr())[3]);
  const int64_t* const state = static_cast<const int64_t*>(call.stream.const_data_ptr());
  const uint64_t seed = static_cast<uint64_t>(state[0]), first = static_cast<uint64_t>(state[1]);
  const alias::Kernels& draws = alias::kernels();
  parallel(count, kGrainDraws, [&](int64_t begin, int64_t end) {
    draws.sample(call.table, seed, first + static_cast<uint64_t>(begin), 1, end - begin, indices + begin);
  });

  crop::PlacesParams& places = call.places;
  const std::unique_ptr<int64_t[]> offsets(new int64_t[2 * count]);
  const std::unique_ptr<bool[]> flip(new bool[count]);
  places.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(crop_seed.const_data_ptr()));
  places.offsets = offsets.get();
  places.flip = flip.get();
  const crop::Kernels& k = crop::kernels();
  parallel(count, crop::kGrainPlaces, [&](int64_t begin, int64_t end) { k.places(places, begin, end); });

  crop::CropParams& params = call.patches.params;
  crop::Geometry& g = params.geometry;
  const crop::ChannelConstants constants(center, scale, g.planes * g.unit, g.unit);
  params.normalise = constants.view();
  g.offsets = places.offsets;
  g.flip = places.flip;
  const int64_t rows = g.planes * height, row_elements = width * g.unit, image_bytes = params.image_stride * params.in_size;
  parallel(count * rows, crop::grain_rows(row_elements, params.out_size), [&](int64_t begin, int64_t end) {
    char* const scratch_bytes = scratch<char>(crop::crop_scratch(params));
    crop::CropParams one = params;  // an image of the batch at a time, from where the collection has it
    one.image_stride = 0;
    for (int64_t row = begin; row < end;) {
      const int64_t i = row / rows, stop = std::min(end, (i + 1) * rows);
      if (indices[i] >= 0 && indices[i] < call.table.items) {
        one.images = static_cast<const char*>(params.images) + indices[i] * image_bytes;
        k.crop(one, row, stop, scratch_bytes);
      } else {  // a broken table
        char* const out = static_cast<char*>(params.patches) + row * row_elements * params.out_size;
        fill_nan(params.out_dtype, out, (stop - row) * row_elements);
      }
      row = stop;
    }
  });
  return {call.patches.out, call.indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("draw_batch", FASTKD_CPU_BOX(draw_batch)); }

}  // namespace fastkd::batch
