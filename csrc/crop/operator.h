// What the operators of crop check and return, on any device; how is a matter of the device. A Context is what makes fresh
// tensors: empty(shape, dtype, strides).
#pragma once

#include <torch/headeronly/core/MemoryFormat.h>

#include <algorithm>

#include "common/numbers.h"
#include "common/tensor.h"
#include "crop/kernel.h"

namespace fastkd::crop {

using torch::headeronly::MemoryFormat;

constexpr int64_t kMaxRange = INT64_C(1) << 62;  // of an offset's range: low + count stays an int64

constexpr std::initializer_list<ScalarType> kIntegers = {ScalarType::Byte, ScalarType::Char, ScalarType::Short,
                                                         ScalarType::Int,  ScalarType::Long, ScalarType::Bool};

inline bool is_one_of(ScalarType type, std::initializer_list<ScalarType> allowed) {
  return std::find(allowed.begin(), allowed.end(), type) != allowed.end();
}

// Elements of a tensor of these sizes. Throws where it would not fit an int64 of bytes, so that no size computed later wraps.
inline void check_elements(const char* what, std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (int64_t size : sizes) {
    FASTKD_CHECK(!__builtin_mul_overflow(elements, size, &elements) && elements <= std::numeric_limits<int64_t>::max() / 16, what,
                 " would have more than 2^59 elements");
    if (elements == 0) return;
  }
}

// Channels side by side within a pixel. One channel is either format: called NCHW, as ops/crop.py has it.
inline bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) == t.size(1); }

inline bool is_packed(const Tensor& t, bool channels_last) {
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  const int64_t nchw[] = {channels * height * width, height * width, width, 1};
  const int64_t nhwc[] = {channels * height * width, 1, width * channels, channels};
  for (int d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) != (channels_last ? nhwc : nchw)[d]) return false;
  }
  return true;
}

template <typename Context>
Tensor empty_images(const Context& context, int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType type,
                    bool channels_last) {
  const int64_t plane = height * width;
  return channels_last ? context.empty({batch, channels, height, width}, type, {plane * channels, 1, width * channels, channels})
                       : context.empty({batch, channels, height, width}, type);
}

// Checks of what both directions share; makes offsets and flip contiguous.
inline void check_places(Tensor& offsets, std::optional<Tensor>& flip, int64_t batch, const char* like_name, const Tensor& like) {
  check_dtype("offsets", offsets, {ScalarType::Long});
  check_dim("offsets", offsets, 3);
  check_shape("offsets", offsets, {batch, offsets.size(1), 2});
  check_device("offsets", offsets, like_name, like);
  offsets = torch::stable::contiguous(offsets);
  if (!flip.has_value()) return;
  check_dtype("flip", *flip, {ScalarType::Bool});
  check_shape("flip", *flip, {batch, offsets.size(1)});
  check_device("flip", *flip, like_name, like);
  flip = torch::stable::contiguous(*flip);
}

inline void check_channel_values(const char* name, const std::vector<double>& values, int64_t channels) {
  FASTKD_CHECK(values.empty() || static_cast<int64_t>(values.size()) == channels, name, " has ", values.size(),
               " values, must have one for each of the ", channels, " channels, or none");
}

// Without the places.
inline Geometry geometry_of(int64_t patches, int64_t channels, bool channels_last, int64_t image_height, int64_t image_width,
                            int64_t height, int64_t width) {
  return {patches,
          channels_last ? 1 : channels,
          channels_last ? channels : 1,
          image_height,
          image_width,
          height,
          width,
          /*offsets=*/nullptr,
          /*flip=*/nullptr};
}
inline void set_places(Geometry& geometry, const Tensor& offsets, const std::optional<Tensor>& flip) {
  geometry.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  geometry.flip = data_or_null<bool>(flip);
}

// What the kernels see of images and of the patches to be made of them, but for the places and the constants of the
// channels; and the tensors that have to live until they have run.
struct Patches {
  Tensor images, out;
  CropParams params;
};

// `patches` of each of `batch` images: those of the tensor, or drawn from it.
template <typename Context>
Patches make_patches(const Context& context, Tensor images, int64_t batch, int64_t patches, int64_t height, int64_t width,
                     const std::vector<double>& center, const std::vector<double>& scale, ScalarType dtype) {
  const int64_t channels = images.size(1);
  FASTKD_CHECK(height > 0 && width > 0, "size is (", height, ", ", width, "), must be positive");
  check_channel_values("center", center, channels);
  check_channel_values("scale", scale, channels);
  const bool same_dtype = dtype == images.scalar_type(), normalised = !center.empty() || !scale.empty();
  if (same_dtype) {
    FASTKD_CHECK(is_one_of(dtype, kFloats) || is_one_of(dtype, kIntegers), "images has dtype ", dtype_name(dtype),
                 ", must be float32, float64, bfloat16, float16, an integer of up to 64 bits or bool");
  } else {
    check_dtype("images", images, {ScalarType::Byte});
  }
  FASTKD_CHECK(!(normalised || !same_dtype) || is_one_of(dtype, kFloats), "dtype is ", dtype_name(dtype),
               ", must be float32, float64, bfloat16 or float16 where pixels are converted or normalised");
  check_elements("patches", {batch, patches, channels, height, width});

  const bool channels_last = is_channels_last(images);
  if (!channels_last && images.size(3) > 1 && images.stride(3) != 1) images = torch::stable::contiguous(images);
  Tensor out = empty_images(context, batch * patches, channels, height, width, dtype, channels_last);
  CropParams params{};
  params.geometry = geometry_of(patches, channels, channels_last, images.size(2), images.size(3), height, width);
  params.convert = !same_dtype || normalised;
  if (params.convert) {
    params.in_dtype = kernel_dtype(images);
    params.out_dtype = kernel_dtype(out);
  }
  params.in_size = static_cast<int64_t>(images.element_size());
  params.out_size = static_cast<int64_t>(out.element_size());
  params.images = images.const_data_ptr();
  params.image_stride = images.stride(0);
  params.plane_stride = images.stride(1);
  params.row_stride = images.stride(2);
  params.patches = out.mutable_data_ptr();
  return {images, out, params};
}

// A call of crop whose arguments are right.
struct CropCall {
  Tensor images, offsets;
  std::optional<Tensor> flip;
  Tensor out;
  CropParams params;
};

template <typename Context>
CropCall make_crop(const Context& context, Tensor images, Tensor offsets, std::optional<Tensor> flip, int64_t height,
                   int64_t width, const std::vector<double>& center, const std::vector<double>& scale, ScalarType dtype) {
  check_dim("images", images, 4);
  const int64_t batch = images.size(0);
  check_places(offsets, flip, batch, "images", images);
  Patches patches = make_patches(context, images, batch, offsets.size(1), height, width, center, scale, dtype);
  set_places(patches.params.geometry, offsets, flip);
  return {patches.images, offsets, flip, patches.out, patches.params};
}

struct CropBackwardCall {
  Tensor grad_patches, offsets;
  std::optional<Tensor> flip;
  Tensor out;
  CropBackwardParams params;
};

template <typename Context>
CropBackwardCall make_crop_backward(const Context& context, Tensor grad_patches, Tensor offsets, std::optional<Tensor> flip,
                                    int64_t height, int64_t width, const std::vector<double>& scale) {
  check_dtype("grad_patches", grad_patches, kFloats);
  check_dim("grad_patches", grad_patches, 4);
  check_dim("offsets", offsets, 3);
  const int64_t batch = offsets.size(0), channels = grad_patches.size(1);
  check_places(offsets, flip, batch, "grad_patches", grad_patches);
  const int64_t patches = offsets.size(1);
  FASTKD_CHECK(grad_patches.size(0) == batch * patches, "grad_patches has shape ", shape_of(grad_patches), ", must have ",
               batch * patches, " patches, one for each of offsets ", shape_of(offsets));
  FASTKD_CHECK(height >= 0 && width >= 0, "size is (", height, ", ", width, "), must not be negative");
  check_channel_values("scale", scale, channels);
  check_elements("grad_images", {batch, channels, height, width});

  const bool channels_last = is_channels_last(grad_patches);
  if (!is_packed(grad_patches, channels_last)) {
    grad_patches = torch::stable::contiguous(grad_patches, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  Tensor out = empty_images(context, batch, channels, height, width, grad_patches.scalar_type(), channels_last);
  CropBackwardParams params{};
  params.geometry = geometry_of(patches, channels, channels_last, height, width, grad_patches.size(2), grad_patches.size(3));
  set_places(params.geometry, offsets, flip);
  params.dtype = kernel_dtype(grad_patches);
  params.size = static_cast<int64_t>(out.element_size());
  params.grad_patches = grad_patches.const_data_ptr();
  params.grad_images = out.mutable_data_ptr();
  return {grad_patches, offsets, flip, out, params};
}

inline void check_range(const char* low_name, int64_t low, const char* count_name, int64_t count) {
  FASTKD_CHECK(low >= -kMaxRange && low <= kMaxRange, low_name, " is ", low, ", must be within 2^62 of 0");
  FASTKD_CHECK(count >= 1 && count <= kMaxRange, count_name, " is ", count, ", must be in [1, 2^62]");
}

inline void check_seed(const char* name, const Tensor& seed) {
  check_dtype(name, seed, {ScalarType::Long});
  FASTKD_CHECK(seed.numel() == 1, name, " has shape ", shape_of(seed), ", must hold one number");
}

// Where random places lie. The seed is left to the caller: on a GPU, only the device may read it; and so is where they go.
inline PlacesParams places_within(int64_t y_low, int64_t y_count, int64_t x_low, int64_t x_count, double flip_probability) {
  check_range("y_low", y_low, "y_count", y_count);
  check_range("x_low", x_low, "x_count", x_count);
  FASTKD_CHECK(flip_probability >= 0 && flip_probability <= 1, "flip_probability is ", flip_probability, ", must be in [0, 1]");
  PlacesParams params{};
  params.y_low = y_low, params.y_count = static_cast<uint64_t>(y_count);
  params.x_low = x_low, params.x_count = static_cast<uint64_t>(x_count);
  params.flip_below = static_cast<uint64_t>(flip_probability * 0x1p32);
  return params;
}

struct PlacesCall {
  Tensor offsets, flip;
  PlacesParams params;
};

template <typename Context>
PlacesCall make_places(const Context& context, const Tensor& seed, int64_t batch, int64_t patches, int64_t y_low, int64_t y_count,
                       int64_t x_low, int64_t x_count, double flip_probability) {
  check_seed("seed", seed);
  FASTKD_CHECK(batch >= 0, "batch is ", batch, ", must not be negative");
  FASTKD_CHECK(patches >= 0, "patches is ", patches, ", must not be negative");
  PlacesParams params = places_within(y_low, y_count, x_low, x_count, flip_probability);
  check_elements("offsets", {batch, patches, 2});
  Tensor offsets = context.empty({batch, patches, 2}, ScalarType::Long), flip = context.empty({batch, patches}, ScalarType::Bool);
  params.offsets = static_cast<int64_t*>(offsets.mutable_data_ptr());
  params.flip = static_cast<bool*>(flip.mutable_data_ptr());
  return {offsets, flip, params};
}

}  // namespace fastkd::crop
