// What draw_batch checks and returns, on any device.
#pragma once

#include "alias/operator.h"
#include "crop/operator.h"

namespace fastkd::batch {

constexpr int64_t kLargestSide = INT64_C(1) << 30;  // of a padded image: places fit 32 bits

// The numbers in stream, table_scale and crop_seed are left to the caller: on a GPU, only the device may read them.
struct DrawBatchCall {
  alias::TableView table;
  Tensor table_scale, stream, crop_seed, indices;
  crop::Patches patches;
  crop::PlacesParams places;
};

template <typename Context>
DrawBatchCall make_draw_batch(const Context& context, const Tensor& table, const Tensor& block_weight, const Tensor& top,
                              const Tensor& table_scale, Tensor stream, const Tensor& crop_seed, const Tensor& images,
                              int64_t count, int64_t height, int64_t width, int64_t padding, double flip_probability,
                              const std::vector<double>& center, const std::vector<double>& scale, ScalarType dtype) {
  const alias::TableView view = alias::Table(table, block_weight, &top, &table_scale, "table_scale").view();
  alias::check_stream(table, stream);
  crop::check_seed("crop_seed", crop_seed);
  check_device("crop_seed", crop_seed, "table", table);
  check_dtype("images", images, {ScalarType::Byte});
  check_dim("images", images, 4);
  check_device("images", images, "table", table);
  FASTKD_CHECK(images.size(0) == view.items, "images has shape ", shape_of(images), ", must have ", view.items,
               " images, one for each item of the table");
  FASTKD_CHECK(images.size(1) > 0, "images has shape ", shape_of(images), ", must have at least one channel");
  FASTKD_CHECK(count >= 0, "count is ", count, ", must be at least 0");
  FASTKD_CHECK(padding >= 0 && padding <= kLargestSide, "padding is ", padding, ", must be in [0, ", kLargestSide, "]");
  FASTKD_CHECK(crop::is_one_of(dtype, kFloats), "dtype is ", dtype_name(dtype),
               ", must be float32, float64, bfloat16 or float16");
  const int64_t padded_height = images.size(2) + 2 * padding, padded_width = images.size(3) + 2 * padding;
  FASTKD_CHECK(padded_height <= kLargestSide && padded_width <= kLargestSide, "images would be (", padded_height, ", ",
               padded_width, ") with their padding, must be at most ", kLargestSide, " pixels high and wide");
  FASTKD_CHECK(height <= padded_height && width <= padded_width, "size is (", height, ", ", width,
               "), must be at most that of an image and its padding, (", padded_height, ", ", padded_width, ")");
  crop::Patches patches = crop::make_patches(context, images, count, 1, height, width, center, scale, dtype);
  const crop::PlacesParams places =
      crop::places_within(-padding, padded_height - height + 1, -padding, padded_width - width + 1, flip_probability);
  return {view, table_scale, stream, crop_seed, context.empty({count}, ScalarType::Long), patches, places};
}

}  // namespace fastkd::batch
