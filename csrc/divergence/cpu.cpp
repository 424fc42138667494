// Divergence on the CPU: checks, outputs, threads, and the reduction over rows in a fixed order.
#include "common/cache.h"
#include "divergence/operator.h"

namespace fastkd::divergence {
namespace {

constexpr int64_t kGrainElements = 16384;  // work worth a thread
constexpr size_t kRowsInCache = 16;        // two rows of both sides, their exponentials, a gradient, and as much left to others
constexpr size_t kStreamBytes = size_t{24} << 20;  // gradients beyond this leave the caches before anyone reads them

// A [rows] tensor of any float dtype as doubles.
std::vector<double> row_values(const std::optional<Tensor>& t, int64_t rows) {
  if (!t.has_value()) return {};
  std::vector<double> values(rows);
  const int64_t stride = rows > 0 ? t->stride(0) : 1;
  for (int64_t r = 0; r < rows; ++r) {
    values[r] = t->scalar_type() == ScalarType::Float ? static_cast<const float*>(t->const_data_ptr())[r * stride]
                                                      : static_cast<const double*>(t->const_data_ptr())[r * stride];
  }
  return values;
}

// Writes values in the dtype of the losses: float64 for float64 logits, else float32.
void write(const Tensor& out, int64_t index, double value) {
  if (out.scalar_type() == ScalarType::Double) {
    static_cast<double*>(out.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(out.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

// What a call says of each row, with the values that the rows in use have checked.
struct RowValues {
  std::vector<double> weight, temperature;
  int64_t valid;  // rows that are not ignored
};
RowValues row_values(const Tensor& student, const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& temperatures, int64_t ignore_index) {
  const int64_t rows = student.size(0), classes = student.size(1);
  RowValues of{row_values(weight, rows), row_values(temperatures, rows), rows};
  const int64_t* const labels = data_or_null<int64_t>(target);
  const auto ignored = [&](int64_t r) { return labels != nullptr && labels[r] == ignore_index; };
  for (int64_t r = 0; r < rows && (labels != nullptr || temperatures.has_value()); ++r) {
    if (ignored(r)) --of.valid;
    if (ignored(r) || (weight.has_value() && of.weight[r] == 0)) continue;  // left out: not looked at
    if (labels != nullptr) {
      FASTKD_CHECK(labels[r] >= 0 && labels[r] < classes, "target[", r, "] is ", labels[r], ", must be in [0, ", classes,
                   ") or ignore_index (", ignore_index, ")");
    }
    if (temperatures.has_value()) {
      FASTKD_CHECK(of.temperature[r] > 0 && of.temperature[r] <= std::numeric_limits<double>::max(), "temperature[", r, "] is ",
                   of.temperature[r], ", must be positive and finite");
    }
  }
  return of;
}

// All rows: gradients, of losses over the denominator, and the losses, [2, rows]: task, kd, not scaled.
std::vector<double> run_rows(const RowInputs& inputs, const Tensor& student, const RowValues& of, double kd_scale,
                             double task_scale, double denominator, void* student_gradient, void* teacher_gradient,
                             bool in_place) {
  const int64_t rows = student.size(0), classes = student.size(1);
  std::vector<double> losses(2 * rows);
  RowParams params{inputs};
  params.dtype = kernel_dtype(student);
  params.weight = of.weight.empty() ? nullptr : of.weight.data();
  params.temperature = of.temperature.empty() ? nullptr : of.temperature.data();
  params.kd_scale = kd_scale / denominator;
  params.task_scale = task_scale / denominator;
  params.kd_loss = losses.data() + rows;
  params.task_loss = losses.data();
  params.student_gradient = student_gradient;
  params.teacher_gradient = teacher_gradient;
  const size_t gradient_bytes = static_cast<size_t>(rows) * classes * student.element_size();
  params.stream = !in_place && gradient_bytes >= kStreamBytes;
  params.ahead = static_cast<size_t>(classes) * student.element_size() * kRowsInCache <= l2_cache_bytes();
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / classes);
  const int64_t bytes = scratch_bytes(classes, params.dtype);
  parallel(rows, grain, [&](int64_t begin, int64_t end) { k.rows(params, begin, end, scratch<char>(bytes)); });
  return losses;
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
  const RowValues of = row_values(student, target, weight, temperatures, ignore_index);
  const Reduction reduce = static_cast<Reduction>(reduction);
  double denominator = 1;
  if (reduce == Reduction::kBatchMean || reduce == Reduction::kMean)
    denominator = static_cast<double>(std::max<int64_t>(of.valid, 1));
  if (reduce == Reduction::kMean) denominator *= static_cast<double>(classes);

  const ScalarType type = student.scalar_type();
  Tensor student_out = student_gradient ? empty_cpu({rows, classes}, type) : empty_cpu({0}, type);
  Tensor teacher_out = teacher_gradient ? empty_cpu({rows, classes}, type) : empty_cpu({0}, type);
  const std::vector<double> losses =
      run_rows(row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student, of, kd_scale,
               task_scale, denominator, student_gradient ? student_out.mutable_data_ptr() : nullptr,
               teacher_gradient ? teacher_out.mutable_data_ptr() : nullptr, false);

  // reduction over rows, in order, in fp64
  const bool none = reduce == Reduction::kNone;
  Tensor loss = none ? empty_cpu({rows}, loss_dtype(student)) : empty_cpu({}, loss_dtype(student));
  Tensor terms = none ? empty_cpu({2, rows}, loss_dtype(student)) : empty_cpu({2}, loss_dtype(student));
  double task_sum = 0, kd_sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double task = losses[r], kd = losses[rows + r];
    task_sum += task;
    kd_sum += kd;
    if (none) {
      write(terms, r, task);
      write(terms, rows + r, kd);
      write(loss, r, (kd_scale != 0 ? kd_scale * kd : 0) + task_scale * task);
    }
  }
  if (!none) {
    write(terms, 0, task_sum / denominator);
    write(terms, 1, kd_sum / denominator);
    write(loss, 0, ((kd_scale != 0 ? kd_scale * kd_sum : 0) + task_scale * task_sum) / denominator);
  }
  return {loss, terms, student_out, teacher_out};
}

Tensor divergence_(Tensor student, Tensor teacher, std::optional<Tensor> target, std::optional<Tensor> weight,
                   std::optional<Tensor> temperatures, double temperature, int64_t kind, double beta, double kd_scale,
                   double task_scale, int64_t ignore_index, bool student_gradient, bool teacher_gradient,
                   std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature, beta, kd_scale, task_scale);
  void* const student_out = in_place("student_logits", student, student_gradient);
  void* const teacher_out = in_place("teacher_logits", teacher, teacher_gradient);
  check_arguments(student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale,
                  static_cast<int64_t>(Reduction::kNone));
  const int64_t rows = student.size(0);
  const std::vector<double> losses = run_rows(
      row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student,
      row_values(student, target, weight, temperatures, ignore_index), kd_scale, task_scale, 1, student_out, teacher_out, true);
  Tensor terms = empty_cpu({2, rows}, loss_dtype(student));
  for (int64_t i = 0; i < 2 * rows; ++i) write(terms, i, losses[i]);
  return terms;
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
