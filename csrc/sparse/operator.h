// What the launchers of both sides share: checks of the arguments, and parameters.
#pragma once

#include "divergence/operator.h"
#include "sparse/kernel.h"

namespace fastkd::sparse {

namespace dense = ::fastkd::divergence;
using dense::Reduction;

// A tensor of the teacher's, [rows, entries], packed along its rows.
inline void check_entries(const char* name, Tensor& t, const Tensor& student, int64_t entries) {
  check_shape(name, t, {student.size(0), entries});
  check_device(name, t, "student_logits", student);
  t = dense::with_packed_rows(t);
}

// Checks all arguments that do not need their values; makes rows packed and target contiguous.
inline void check_arguments(Tensor& student, Tensor& indices, Tensor& log_probs, const std::optional<Tensor>& tail_log_prob,
                            std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& temperatures, double temperature, int64_t& kind, int64_t tail,
                            double beta, int64_t reduction) {
  dense::check_logits("student_logits", student);
  check_dtype("teacher_indices", indices, {ScalarType::Long, ScalarType::Int});
  check_dim("teacher_indices", indices, 2);
  const int64_t entries = indices.size(1);
  FASTKD_CHECK(entries > 0 && entries <= student.size(1), "teacher_indices has shape ", shape_of(indices), ", must have 1 to ",
               student.size(1), " classes for each row");
  check_entries("teacher_indices", indices, student, entries);
  check_dtype("teacher_log_probs", log_probs, kFloats);
  check_entries("teacher_log_probs", log_probs, student, entries);
  FASTKD_CHECK(tail >= 0 && tail <= 2, "tail is ", tail, ", must be 0 to 2");
  FASTKD_CHECK(kind != static_cast<int64_t>(Kind::kSoftCrossEntropy), "kind is ", kind, ", must be 0 to 2");
  dense::check_kind(kind, beta);
  if (tail_log_prob.has_value()) {
    FASTKD_CHECK(static_cast<Tail>(tail) == Tail::kBucket, "teacher_tail_log_prob is given, must not be where tail is ", tail);
    check_dtype("teacher_tail_log_prob", *tail_log_prob, kFloats);
    check_shape("teacher_tail_log_prob", *tail_log_prob, {student.size(0)});
    check_device("teacher_tail_log_prob", *tail_log_prob, "student_logits", student);
  }
  dense::check_rows(student, target, weight, temperatures, temperature, reduction);
}

// Checks the arguments of sample_teacher; makes the rows packed.
inline void check_draws(Tensor& teacher, const Tensor& seed, int64_t draws, double temperature) {
  dense::check_logits("teacher_logits", teacher);
  dense::check_temperature(temperature);
  FASTKD_CHECK(draws > 0, "k is ", draws, ", must be at least 1");
  check_dtype("seed", seed, {ScalarType::Long});
  FASTKD_CHECK(seed.numel() == 1, "seed has shape ", shape_of(seed), ", must hold one number");
  check_device("seed", seed, "teacher_logits", teacher);
  teacher = dense::with_packed_rows(teacher);
}

inline Floats floats_of(const Tensor& t) { return {t.const_data_ptr(), kernel_dtype(t), t.size(0) > 0 ? t.stride(0) : 0}; }

// Of checked arguments, which must live as long as the result.
inline Teacher teacher_of(int64_t tail, const Tensor& indices, const Tensor& log_probs,
                          const std::optional<Tensor>& tail_log_prob) {
  return {static_cast<Tail>(tail),
          indices.size(1),
          indices.const_data_ptr(),
          indices.scalar_type() == ScalarType::Int,
          indices.stride(0),
          floats_of(log_probs),
          tail_log_prob.has_value() ? floats_of(*tail_log_prob) : Floats{nullptr, Dtype::kFloat32, 0}};
}

}  // namespace fastkd::sparse
