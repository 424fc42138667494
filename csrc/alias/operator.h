// The checks that both launchers share: shapes, dtypes, devices, numbers.
#pragma once

#include "alias/kernel.h"
#include "alias/math.h"
#include "common/numbers.h"
#include "common/tensor.h"

namespace fastkd::alias {

// The tensors of a table, checked, with their data.
struct Table {
  int64_t items;
  int64_t blocks;
  uint64_t* bins;          // [items]
  uint64_t* block_weight;  // [blocks]
  uint64_t* top;           // [blocks, 2]: threshold, alias; null where it is not needed
  double* scale;           // [4]: reference, kappa, exponent, total; null where it is not needed

  Table(const Tensor& table, const Tensor& weights, const Tensor* top_tensor = nullptr, const Tensor* scale_tensor = nullptr,
        const char* scale_name = "scale") {
    check_dtype("table", table, {ScalarType::Long});
    check_dim("table", table, 1);
    items = table.size(0);
    FASTKD_CHECK(items > 0, "table has shape ", shape_of(table), ", must hold at least one item");
    blocks = alias_math::block_count(items);
    bins = words("table", table, table);
    check_shape("block_weight", weights, {blocks});
    block_weight = words("block_weight", weights, table);
    top = nullptr;
    if (top_tensor != nullptr) {
      check_shape("top", *top_tensor, {blocks, 2});
      top = words("top", *top_tensor, table);
    }
    scale = nullptr;
    if (scale_tensor != nullptr) {
      check_dtype(scale_name, *scale_tensor, {ScalarType::Double});
      check_shape(scale_name, *scale_tensor, {4});
      check_device(scale_name, *scale_tensor, "table", table);
      FASTKD_CHECK(scale_tensor->is_contiguous(), scale_name, " must be contiguous");
      scale = static_cast<double*>(scale_tensor->mutable_data_ptr());
    }
  }

  // As draws see it; the total is left to the caller: on a GPU, only the device may read it.
  TableView view() const {
    FASTKD_CHECK(reinterpret_cast<uintptr_t>(top) % 16 == 0, "top must begin at a multiple of 16 bytes");
    return {bins, block_weight, top, items, blocks, 0};
  }

 private:
  static uint64_t* words(const char* name, const Tensor& t, const Tensor& table) {
    check_dtype(name, t, {ScalarType::Long});
    check_device(name, t, "table", table);
    FASTKD_CHECK(t.is_contiguous(), name, " must be contiguous");
    return static_cast<uint64_t*>(t.mutable_data_ptr());
  }
};

inline void check_scores(const char* name, const Tensor& scores) {
  check_dtype(name, scores, kFloats);
  check_dim(name, scores, 1);
}
inline void check_not_empty(const Tensor& scores) {
  FASTKD_CHECK(scores.size(0) > 0, "scores has shape ", shape_of(scores), ", must hold at least one item");
}

// Checks the arguments of alias_inverse_temperature and makes the scores contiguous.
inline void check_quartiles(Tensor& scores, double iqpr) {
  check_scores("scores", scores);
  FASTKD_CHECK(iqpr >= 1 && iqpr <= std::numeric_limits<double>::max(), "iqpr is ", iqpr, ", must be finite and at least 1");
  check_not_empty(scores);
  scores = torch::stable::contiguous(scores);
}

// Checks the arguments of alias_build but for the numbers in them, and makes the scores contiguous.
inline void check_build(Tensor& scores, const Tensor& inverse_temperature) {
  check_scores("scores", scores);
  check_not_empty(scores);
  check_dtype("inverse_temperature", inverse_temperature, {ScalarType::Double});
  FASTKD_CHECK(inverse_temperature.numel() == 1, "inverse_temperature has shape ", shape_of(inverse_temperature),
               ", must be a single number");
  check_device("inverse_temperature", inverse_temperature, "scores", scores);
  scores = torch::stable::contiguous(scores);
}

// Checks the new scores of alias_update_ but for the numbers in them, and makes them contiguous.
inline void check_changes(const Tensor& table, Tensor& indices, Tensor& scores) {
  check_dtype("indices", indices, {ScalarType::Long});
  check_dim("indices", indices, 1);
  check_device("indices", indices, "table", table);
  check_scores("scores", scores);
  check_shape("scores", scores, {indices.size(0)});
  check_device("scores", scores, "table", table);
  indices = torch::stable::contiguous(indices);
  scores = torch::stable::contiguous(scores);
}

// Checks seed and next index of draws, and makes them contiguous.
inline const int64_t* check_stream(const Tensor& table, Tensor& stream) {
  check_dtype("stream", stream, {ScalarType::Long});
  check_shape("stream", stream, {2});
  check_device("stream", stream, "table", table);
  stream = torch::stable::contiguous(stream);
  return static_cast<const int64_t*>(stream.const_data_ptr());
}
inline uint64_t check_total(const char* name, double total) {
  FASTKD_CHECK(alias_math::total_weight(total) > 0, name, "[3], the total weight, is ", total,
               ", must be that of a table from alias_build");
  return alias_math::total_weight(total);
}
inline void check_draws(int64_t count, int64_t stride) {
  FASTKD_CHECK(count >= 0, "count is ", count, ", must be at least 0");
  FASTKD_CHECK(stride >= 1, "stride is ", stride, ", must be at least 1");
}

}  // namespace fastkd::alias
