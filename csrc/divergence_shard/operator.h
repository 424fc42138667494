// What the launchers of both sides share: checks of the arguments, and parameters.
#pragma once

#include "divergence/operator.h"
#include "divergence_shard/kernel.h"

namespace fastkd::divergence_shard {

namespace dense = ::fastkd::divergence;

// The arguments of all three operators; those that one of them does not have stay empty.
struct Arguments {
  Tensor student, teacher, weight, temperatures;
  int64_t kind;
  double beta = 0.5;
  std::optional<Tensor> label = {}, sums = {}, terms = {}, student_gradient = {}, teacher_gradient = {};

  // All that does not need their values; makes rows packed.
  void check() {
    dense::check_logits("student_logits", student);
    dense::check_logits("teacher_logits", teacher);
    check_shape("teacher_logits", teacher, {rows(), classes()});
    FASTKD_CHECK(teacher.scalar_type() == student.scalar_type(), "teacher_logits has dtype ", dtype_name(teacher.scalar_type()),
                 ", must be that of student_logits, ", dtype_name(student.scalar_type()));
    check_device("teacher_logits", teacher, "student_logits", student);
    FASTKD_CHECK(kind >= 0 && kind <= 3, "kind is ", kind, ", must be 0 to 3");
    check_values("weight", weight, ScalarType::Double, {rows()});
    check_values("temperatures", temperatures, ScalarType::Double, {rows()});
    if (label.has_value()) check_values("label", *label, ScalarType::Long, {rows()});
    if (sums.has_value()) check_values("sums", *sums, ScalarType::Double, {kSums, rows()});
    if (terms.has_value()) check_values("terms", *terms, ScalarType::Double, {kTerms, rows()});
    check_gradient("student_gradient", student_gradient);
    check_gradient("teacher_gradient", teacher_gradient);
    student = dense::with_packed_rows(student);
    teacher = dense::with_packed_rows(teacher);
  }
  int64_t rows() const { return student.size(0); }
  int64_t classes() const { return student.size(1); }

  dense::RowInputs inputs(bool task) const {
    dense::RowInputs made = dense::row_inputs(student, teacher, std::nullopt, 1.0, kind, beta, 0.0, 0);
    made.task = task;
    return made;
  }
  Exchanged exchanged() const {
    return {rows(), sums.has_value() ? static_cast<double*>(sums->mutable_data_ptr()) : nullptr,
            terms.has_value() ? static_cast<double*>(terms->mutable_data_ptr()) : nullptr, data_or_null<int64_t>(label)};
  }
  static void* data_of(const std::optional<Tensor>& gradient) {
    return gradient.has_value() ? gradient->mutable_data_ptr() : nullptr;
  }

 private:
  void check_values(const char* name, Tensor& t, ScalarType type, std::initializer_list<int64_t> shape) const {
    check_dtype(name, t, {type});
    check_shape(name, t, shape);
    check_device(name, t, "student_logits", student);
    t = torch::stable::contiguous(t);
  }
  void check_gradient(const char* name, const std::optional<Tensor>& t) const {
    if (!t.has_value()) return;
    check_dtype(name, *t, {student.scalar_type()});
    check_shape(name, *t, {rows(), classes()});
    check_device(name, *t, "student_logits", student);
    FASTKD_CHECK(t->is_contiguous(), name, " has shape ", shape_of(*t), ", must be contiguous");
  }
};

}  // namespace fastkd::divergence_shard
