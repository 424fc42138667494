// Crops on the CPU: constants of the channels, and threads.
#include <algorithm>

#include "crop/operator.h"

namespace fastkd::crop {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // of output: work worth a thread
constexpr int64_t kGrainPlaces = 2048;
constexpr int64_t kPatternLanes = 16;  // a multiple of every instruction set's registers

struct CpuContext {
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) const {
    return empty_cpu(shape, type, strides);
  }
};

// Constants of the channels as the kernels read them.
class ChannelConstants {
 public:
  ChannelConstants(const std::vector<double>& center, const std::vector<double>& scale, int64_t channels, int64_t unit) {
    if (center.empty() && scale.empty()) return;
    // side by side: as many units as make whole registers, as long as that is short; and room for one more register
    period_ = unit > 1 && channels <= 256 ? channels * kPatternLanes : channels;
    for (int64_t i = 0; i < period_ + kPatternLanes; ++i) {
      center_.push_back(center.empty() ? 0.0 : center[i % channels]);
      scale_.push_back(scale.empty() ? 1.0 : scale[i % channels]);
    }
  }
  Normalise view() const { return {period_ > 0 ? center_.data() : nullptr, period_ > 0 ? scale_.data() : nullptr, period_}; }

 private:
  int64_t period_ = 0;
  std::vector<double> center_, scale_;
};

Tensor crop(Tensor images, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width, std::vector<double> center,
            std::vector<double> scale, ScalarType dtype) {
  CropCall call = make_crop(CpuContext(), images, offsets, flip, height, width, center, scale, dtype);
  CropParams& params = call.params;
  const Geometry& g = params.geometry;
  const int64_t channels = g.planes * g.unit;
  const ChannelConstants constants(center, scale, channels, g.unit);
  params.normalise = constants.view();
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (width * g.unit * params.out_size));
  parallel(call.offsets.size(0) * g.patches * (channels > 0 ? g.planes : 0) * height, grain,
           [&](int64_t begin, int64_t end) { k.crop(params, begin, end, scratch<char>(crop_scratch(params))); });
  return call.out;
}

Tensor crop_backward(Tensor grad_patches, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width,
                     std::vector<double> scale) {
  CropBackwardCall call = make_crop_backward(CpuContext(), grad_patches, offsets, flip, height, width, scale);
  CropBackwardParams& params = call.params;
  const Geometry& g = params.geometry;
  const ChannelConstants constants({}, scale, g.planes * g.unit, g.unit);
  params.normalise = constants.view();
  if (width * g.unit == 0) return call.out;
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (width * g.unit * params.size));
  parallel(call.offsets.size(0) * g.planes * height, grain, [&](int64_t begin, int64_t end) {
    k.crop_backward(params, begin, end, scratch<char>(backward_scratch(params).bytes));
  });
  return call.out;
}

std::tuple<Tensor, Tensor> crop_offsets(Tensor seed, int64_t batch, int64_t patches, int64_t y_low, int64_t y_count,
                                        int64_t x_low, int64_t x_count, double flip_probability) {
  PlacesCall call = make_places(CpuContext(), seed, batch, patches, y_low, y_count, x_low, x_count, flip_probability);
  call.params.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const PlacesParams& params = call.params;
  const Kernels& k = kernels();
  parallel(batch * patches, kGrainPlaces, [&](int64_t begin, int64_t end) { k.places(params, begin, end); });
  return {call.offsets, call.flip};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("crop", TORCH_BOX(&crop));
  m.impl("crop_backward", TORCH_BOX(&crop_backward));
  m.impl("crop_offsets", TORCH_BOX(&crop_offsets));
}

}  // namespace fastkd::crop
