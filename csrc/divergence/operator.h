// What the launchers of both sides share: checks of the arguments, dtypes and reductions.
#pragma once

#include "common/numbers.h"
#include "common/tensor.h"
#include "divergence/kernel.h"

namespace fastkd::divergence {

enum class Reduction : int64_t { kNone = 0, kSum = 1, kBatchMean = 2, kMean = 3 };

inline void check_logits(const char* name, const Tensor& logits) {
  check_dtype(name, logits, kFloats);
  check_dim(name, logits, 2);
  FASTKD_CHECK(logits.size(1) > 0, name, " has shape ", shape_of(logits), ", must have at least one class");
}

inline void check_temperature(double temperature) {
  FASTKD_CHECK(temperature > 0 && temperature <= std::numeric_limits<double>::max(), "temperature is ", temperature,
               ", must be positive and finite");
}

inline Tensor with_packed_rows(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

inline void check_row_values(const char* name, const std::optional<Tensor>& t, const Tensor& logits) {
  if (!t.has_value()) return;
  check_dtype(name, *t, {ScalarType::Float, ScalarType::Double});
  check_shape(name, *t, {logits.size(0)});
  check_device(name, *t, "student_logits", logits);
}

// float64 for float64 logits, else float32
inline ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks all of divergence's arguments that do not need their values; makes rows packed and target contiguous.
inline void check_arguments(Tensor& student, Tensor& teacher, std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& temperatures, double temperature, int64_t& kind, double beta,
                            double kd_scale, int64_t reduction) {
  check_logits("student_logits", student);
  check_logits("teacher_logits", teacher);
  FASTKD_CHECK(teacher.size(0) == student.size(0) && teacher.size(1) == student.size(1), "teacher_logits has shape ",
               shape_of(teacher), ", must be that of student_logits, ", shape_of(student));
  FASTKD_CHECK(teacher.scalar_type() == student.scalar_type(), "teacher_logits has dtype ", dtype_name(teacher.scalar_type()),
               ", must be that of student_logits, ", dtype_name(student.scalar_type()));
  check_device("teacher_logits", teacher, "student_logits", student);
  FASTKD_CHECK(kind >= 0 && kind <= 3, "kind is ", kind, ", must be 0 to 3");
  FASTKD_CHECK(reduction >= 0 && reduction <= 3, "reduction is ", reduction, ", must be 0 to 3");
  FASTKD_CHECK(beta >= 0 && beta <= 1, "beta is ", beta, ", must be in [0, 1]");
  if (static_cast<Kind>(kind) == Kind::kJensenShannon && (beta == 0 || beta == 1)) {  // as GKD has it
    kind = static_cast<int64_t>(beta == 0 ? Kind::kForward : Kind::kReverse);
  }
  check_row_values("weight", weight, student);
  check_row_values("temperature", temperatures, student);
  if (!temperatures.has_value()) check_temperature(temperature);
  student = with_packed_rows(student);
  teacher = kd_scale != 0 ? with_packed_rows(teacher) : student;  // of weight 0: not looked at, and exactly 0 from itself
  if (!target.has_value()) return;
  check_dtype("target", *target, {ScalarType::Long});
  check_shape("target", *target, {student.size(0)});
  check_device("target", *target, "student_logits", student);
  target = torch::stable::contiguous(*target);
}

// Of checked arguments, which must live as long as the result.
inline RowInputs row_inputs(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target, double temperature,
                            int64_t kind, double beta, double task_scale, int64_t ignore_index) {
  return {static_cast<Kind>(kind),
          student.size(1),
          student.const_data_ptr(),
          teacher.const_data_ptr(),
          student.stride(0),
          teacher.stride(0),
          data_or_null<int64_t>(target),
          ignore_index,
          target.has_value() && task_scale != 0,
          temperature,
          beta};
}

// Where divergence_ writes the gradient of a side: over its logits, or nowhere.
inline void* in_place(const char* name, const Tensor& logits, bool gradient) {
  if (!gradient) return nullptr;
  check_logits(name, logits);
  FASTKD_CHECK(logits.is_contiguous(), name, " has shape ", shape_of(logits),
               ", must be contiguous, as its gradient replaces it");
  return logits.mutable_data_ptr();
}

// Checks the arguments of divergence_backward_. False where there is nothing to scale.
inline bool check_scale(const Tensor& gradient, const Tensor& grad_loss) {
  check_dtype("gradient", gradient, kFloats);
  check_dim("gradient", gradient, 2);
  FASTKD_CHECK(gradient.is_contiguous(), "gradient has shape ", shape_of(gradient), ", must be contiguous");
  check_dtype("grad_loss", grad_loss, {ScalarType::Float, ScalarType::Double});
  check_device("grad_loss", grad_loss, "gradient", gradient);
  if (grad_loss.dim() != 0) check_shape("grad_loss", grad_loss, {gradient.size(0)});
  return gradient.numel() > 0;
}

// The outputs of logit_stats; empty(rows, dtype) makes one.
struct Stats {
  Tensor max, argmax, mean, logsumexp, entropy;

  template <typename Empty>
  Stats(const Tensor& logits, const Empty& empty)
      : max(empty(logits.size(0), loss_dtype(logits))),
        argmax(empty(logits.size(0), ScalarType::Long)),
        mean(empty(logits.size(0), loss_dtype(logits))),
        logsumexp(empty(logits.size(0), loss_dtype(logits))),
        entropy(empty(logits.size(0), loss_dtype(logits))) {}

  StatsParams params(const Tensor& logits, double temperature) const {
    return {kernel_dtype(logits),
            logits.size(1),
            logits.const_data_ptr(),
            logits.stride(0),
            temperature,
            max.mutable_data_ptr(),
            static_cast<int64_t*>(argmax.mutable_data_ptr()),
            mean.mutable_data_ptr(),
            logsumexp.mutable_data_ptr(),
            entropy.mutable_data_ptr()};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const { return {max, argmax, mean, logsumexp, entropy}; }
};

// The inputs of logit_stats_backward, checked; empty gradients stay so.
struct StatsGradients {
  Tensor logits, argmax, logsumexp, entropy;
  std::optional<Tensor> max, mean, of_logsumexp, of_entropy;

  void check(double temperature) {
    check_logits("logits", logits);
    check_temperature(temperature);
    logits = with_packed_rows(logits);
    const ScalarType type = loss_dtype(logits);
    row("argmax", argmax, ScalarType::Long);
    row("logsumexp", logsumexp, type);
    row("entropy", entropy, type);
    optional_row("grad_max", max, type);
    optional_row("grad_mean", mean, type);
    optional_row("grad_logsumexp", of_logsumexp, type);
    optional_row("grad_entropy", of_entropy, type);
  }

  StatsBackwardParams params(double temperature, const Tensor& gradient) const {
    return {kernel_dtype(logits),
            logits.size(1),
            logits.const_data_ptr(),
            logits.stride(0),
            temperature,
            static_cast<const int64_t*>(argmax.const_data_ptr()),
            logsumexp.const_data_ptr(),
            entropy.const_data_ptr(),
            data_or_null<void>(max),
            data_or_null<void>(mean),
            data_or_null<void>(of_logsumexp),
            data_or_null<void>(of_entropy),
            gradient.mutable_data_ptr()};
  }

 private:
  void row(const char* name, Tensor& t, ScalarType type) const {
    check_dtype(name, t, {type});
    check_shape(name, t, {logits.size(0)});
    check_device(name, t, "logits", logits);
    t = torch::stable::contiguous(t);
  }
  void optional_row(const char* name, std::optional<Tensor>& t, ScalarType type) const {
    if (t.has_value()) row(name, *t, type);
  }
};

}  // namespace fastkd::divergence
