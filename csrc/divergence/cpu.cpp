// Divergence on the CPU: checks, outputs, threads, and the reduction over rows in a fixed order.
#include "common/cache.h"
#include "divergence/row_losses.h"

namespace fastkd::divergence {
namespace {

constexpr int64_t kGrainElements = 16384;  // work worth a thread
constexpr size_t kRowsInCache = 16;        // two rows of both sides, their exponentials, a gradient, and as much left to others

// Who gets what of all rows; gradients may take the place of logits.
struct Outputs {
  RowLosses losses;
  double denominator;
  void* student_gradient;
  void* teacher_gradient;
  bool in_place;
};

void run_rows(const RowInputs& inputs, const Tensor& student, const CheckedRows& checked, double kd_scale, double task_scale,
              Outputs& out) {
  const int64_t rows = student.size(0), classes = student.size(1);
  RowParams params{inputs};
  params.dtype = kernel_dtype(student);
  checked.give(params);
  out.losses.give(params, kd_scale, task_scale, out.denominator);
  params.student_gradient = out.student_gradient;
  params.teacher_gradient = out.teacher_gradient;
  const size_t gradient_bytes = static_cast<size_t>(rows) * classes * student.element_size();
  params.stream = !out.in_place && gradient_bytes >= kStreamBytes;
  params.ahead = static_cast<size_t>(classes) * student.element_size() * kRowsInCache <= l2_cache_bytes();
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / classes);
  const int64_t bytes = scratch_bytes(classes, params.dtype);
  parallel(rows, grain, [&](int64_t begin, int64_t end) { k.rows(params, begin, end, scratch<char>(bytes)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence(Tensor student, Tensor teacher, std::optional<Tensor> target,
                                                      std::optional<Tensor> weight, std::optional<Tensor> temperatures,
                                                      double temperature, int64_t kind, double beta, double kd_scale,
                                                      double task_scale, int64_t ignore_index, int64_t reduction,
                                                      bool student_gradient, bool teacher_gradient,
                                                      std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature, beta, kd_scale, task_scale);
  check_arguments(student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale, reduction);
  const int64_t rows = student.size(0), classes = student.size(1);
  const CheckedRows checked(rows, classes, target, weight, temperatures, ignore_index);
  const Reduction reduce = static_cast<Reduction>(reduction);
  const ScalarType type = student.scalar_type();
  Tensor student_out = student_gradient ? empty_cpu({rows, classes}, type) : empty_cpu({0}, type);
  Tensor teacher_out = teacher_gradient ? empty_cpu({rows, classes}, type) : empty_cpu({0}, type);
  Outputs out{RowLosses(rows), checked.denominator(reduce, classes), student_gradient ? student_out.mutable_data_ptr() : nullptr,
              teacher_gradient ? teacher_out.mutable_data_ptr() : nullptr, false};
  run_rows(row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student, checked, kd_scale,
           task_scale, out);
  auto [loss, terms] = out.losses.reduced(reduce, loss_dtype(student), kd_scale, task_scale, out.denominator);
  return {loss, terms, student_out, teacher_out};
}

Tensor divergence_(Tensor student, Tensor teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
                   std::optional<Tensor> temperatures, double temperature, int64_t kind, double beta, double kd_scale,
                   double task_scale, int64_t ignore_index, bool student_gradient, bool teacher_gradient,
                   std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature, beta, kd_scale, task_scale);
  const int64_t rows = student.size(0), none = static_cast<int64_t>(Reduction::kNone);
  Outputs out{RowLosses(rows), 1, in_place("student_logits", student, student_gradient),
              in_place("teacher_logits", teacher, teacher_gradient), true};
  check_arguments(student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale, none);
  const CheckedRows checked(rows, student.size(1), target, weight, temperatures, ignore_index);
  run_rows(row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student, checked, kd_scale,
           task_scale, out);
  return std::get<1>(out.losses.reduced(Reduction::kNone, loss_dtype(student), kd_scale, task_scale, 1));
}

void divergence_backward_(Tensor gradient, Tensor grad_loss) {
  if (!check_scale(gradient, grad_loss)) return;
  const int64_t rows = gradient.size(0), classes = gradient.size(1);
  const bool scalar = grad_loss.dim() == 0;
  const int64_t stride = scalar ? 0 : grad_loss.stride(0);
  const bool wide = grad_loss.scalar_type() == ScalarType::Double;
  const void* factors = grad_loss.const_data_ptr();
  const auto factor = [&](int64_t r) {
    return wide ? static_cast<const double*>(factors)[r * stride] : static_cast<const float*>(factors)[r * stride];
  };
  if (scalar && factor(0) == 1.0) return;
  const Dtype dtype = kernel_dtype(gradient);
  const int64_t row_bytes = classes * static_cast<int64_t>(gradient.element_size());
  char* const data = static_cast<char*>(gradient.mutable_data_ptr());
  const Kernels& k = kernels();
  parallel(rows, std::max<int64_t>(1, kGrainElements / classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (factor(r) != 1.0) k.scale(dtype, data + r * row_bytes, classes, factor(r));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_stats(Tensor logits, double temperature, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  check_logits("logits", logits);
  check_temperature(temperature);
  logits = with_packed_rows(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const Stats out(logits, [](int64_t count, ScalarType type) { return empty_cpu({count}, type); });
  const StatsParams params = out.params(logits, temperature);
  const Kernels& k = kernels();
  parallel(rows, std::max<int64_t>(1, kGrainElements / classes),
           [&](int64_t begin, int64_t end) { k.stats(params, begin, end); });
  return out.outputs();
}

Tensor logit_stats_backward(Tensor logits, double temperature, Tensor argmax, Tensor logsumexp, Tensor entropy,
                            std::optional<Tensor> grad_max, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_logsumexp,
                            std::optional<Tensor> grad_entropy, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  StatsGradients in{logits, argmax, logsumexp, entropy, grad_max, grad_mean, grad_logsumexp, grad_entropy};
  in.check(temperature);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor gradient = empty_cpu({rows, classes}, logits.scalar_type());
  const StatsBackwardParams params = in.params(temperature, gradient);
  const Kernels& k = kernels();
  parallel(rows, std::max<int64_t>(1, kGrainElements / classes),
           [&](int64_t begin, int64_t end) { k.stats_backward(params, begin, end); });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence", FASTKD_CPU_BOX(divergence));
  m.impl("divergence_", FASTKD_CPU_BOX(divergence_));
  m.impl("divergence_backward_", FASTKD_CPU_BOX(divergence_backward_));
  m.impl("logit_stats", FASTKD_CPU_BOX(logit_stats));
  m.impl("logit_stats_backward", FASTKD_CPU_BOX(logit_stats_backward));
}

}  // namespace fastkd::divergence
