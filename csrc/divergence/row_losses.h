// What the CPU launchers of losses of rows share: the numbers of each row, and the reduction over rows in a fixed order.
#pragma once

#include <algorithm>

#include "divergence/operator.h"

namespace fastkd::divergence {

constexpr size_t kStreamBytes = size_t{24} << 20;  // gradients beyond this leave the caches before anyone reads them

// A [rows] tensor of any float dtype as doubles.
inline std::vector<double> row_values(const std::optional<Tensor>& t, int64_t rows) {
  if (!t.has_value()) return {};
  std::vector<double> values(rows);
  const int64_t stride = rows > 0 ? t->stride(0) : 1;
  for (int64_t r = 0; r < rows; ++r) {
    values[r] = t->scalar_type() == ScalarType::Float ? static_cast<const float*>(t->const_data_ptr())[r * stride]
                                                      : static_cast<const double*>(t->const_data_ptr())[r * stride];
  }
  return values;
}

// Labels, weights and temperatures, checked where a row takes part.
class CheckedRows {
 public:
  CheckedRows(int64_t rows, int64_t classes, const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& temperatures, int64_t ignore_index)
      : valid_(rows),
        labels_(data_or_null<int64_t>(target)),
        ignore_index_(ignore_index),
        weight_(row_values(weight, rows)),
        temperature_(row_values(temperatures, rows)) {
    for (int64_t r = 0; r < rows && (labels_ != nullptr || !temperature_.empty()); ++r) {
      if (ignored(r)) --valid_;
      if (left_out(r)) continue;
      if (labels_ != nullptr) {
        FASTKD_CHECK(labels_[r] >= 0 && labels_[r] < classes, "target[", r, "] is ", labels_[r], ", must be in [0, ", classes,
                     ") or ignore_index (", ignore_index, ")");
      }
      if (!temperature_.empty()) {
        FASTKD_CHECK(temperature_[r] > 0 && temperature_[r] <= std::numeric_limits<double>::max(), "temperature[", r, "] is ",
                     temperature_[r], ", must be positive and finite");
      }
    }
  }

  double denominator(Reduction reduction, int64_t classes) const {
    const bool mean = reduction == Reduction::kMean || reduction == Reduction::kBatchMean;
    const double rows = mean ? static_cast<double>(std::max<int64_t>(valid_, 1)) : 1.0;
    return reduction == Reduction::kMean ? rows * static_cast<double>(classes) : rows;
  }
  void give(RowParams& params) const {
    params.weight = weight_.empty() ? nullptr : weight_.data();
    params.temperature = temperature_.empty() ? nullptr : temperature_.data();
  }

 private:
  bool ignored(int64_t r) const { return labels_ != nullptr && labels_[r] == ignore_index_; }
  bool left_out(int64_t r) const { return ignored(r) || (!weight_.empty() && weight_[r] == 0); }  // not looked at

  int64_t valid_;
  const int64_t* labels_;
  int64_t ignore_index_;
  std::vector<double> weight_, temperature_;
};

// The two losses of each row, weighted, which the kernels write.
class RowLosses {
 public:
  explicit RowLosses(int64_t rows) : losses_(2 * rows) {}

  void give(RowParams& params, double kd_scale, double task_scale, double denominator) {
    params.kd_scale = kd_scale / denominator;
    params.task_scale = task_scale / denominator;
    params.kd_loss = losses_.data() + rows();
    params.task_loss = losses_.data();
  }

  // (loss, terms): in order, in fp64
  std::tuple<Tensor, Tensor> reduced(Reduction reduction, ScalarType type, double kd_scale, double task_scale,
                                     double denominator) const {
    const bool none = reduction == Reduction::kNone;
    Tensor loss = none ? empty_cpu({rows()}, type) : empty_cpu({}, type);
    Tensor terms = none ? empty_cpu({2, rows()}, type) : empty_cpu({2}, type);
    const auto total = [&](double task, double kd) { return (kd_scale != 0 ? kd_scale * kd : 0) + task_scale * task; };
    double task_sum = 0, kd_sum = 0;
    for (int64_t r = 0; r < rows(); ++r) {
      const double task = losses_[r], kd = losses_[rows() + r];
      task_sum += task;
      kd_sum += kd;
      if (!none) continue;
      write(terms, r, task);
      write(terms, rows() + r, kd);
      write(loss, r, total(task, kd));
    }
    if (!none) {
      write(terms, 0, task_sum / denominator);
      write(terms, 1, kd_sum / denominator);
      write(loss, 0, total(task_sum, kd_sum) / denominator);
    }
    return {loss, terms};
  }

 private:
  int64_t rows() const { return static_cast<int64_t>(losses_.size()) / 2; }
  // in the dtype of the losses: float64 for float64 logits, else float32
  static void write(const Tensor& out, int64_t index, double value) {
    if (out.scalar_type() == ScalarType::Double) {
      static_cast<double*>(out.mutable_data_ptr())[index] = value;
    } else {
      static_cast<float*>(out.mutable_data_ptr())[index] = static_cast<float>(value);
    }
  }

  std::vector<double> losses_;
};

}  // namespace fastkd::divergence
