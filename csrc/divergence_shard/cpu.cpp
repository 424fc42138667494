// Divergences over ranks on the CPU: checks, outputs, threads.
#include <algorithm>

#include "divergence_shard/operator.h"

namespace fastkd::divergence_shard {
namespace {

constexpr int64_t kGrainElements = 16384;  // work worth a thread

// Runs one of the kernels; its outputs are among the arguments.
template <typename Run>
void run(const Arguments& of, bool task, double kd_scale, double task_scale, const Run& rows) {
  RowParams params{{of.inputs(task)}};
  params.dtype = kernel_dtype(of.student);
  params.weight = static_cast<const double*>(of.weight.const_data_ptr());
  params.temperature = static_cast<const double*>(of.temperatures.const_data_ptr());
  params.kd_scale = kd_scale;
  params.task_scale = task_scale;
  params.student_gradient = Arguments::data_of(of.student_gradient);
  params.teacher_gradient = Arguments::data_of(of.teacher_gradient);
  params.exchanged = of.exchanged();
  parallel(of.rows(), std::max<int64_t>(1, kGrainElements / of.classes()),
           [&](int64_t begin, int64_t end) { rows(params, begin, end); });
}

Tensor sums(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, int64_t kind, bool task) {
  Arguments of{student, teacher, weight, temperatures, kind};
  of.check();
  of.sums = empty_cpu({kSums, of.rows()}, ScalarType::Double);
  run(of, task, 1, 0, kernels().sums);
  return *of.sums;
}

Tensor terms(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, Tensor sums, int64_t kind, double beta) {
  Arguments of{student, teacher, weight, temperatures, kind, beta, {}, sums};
  of.check();
  of.terms = empty_cpu({kTerms, of.rows()}, ScalarType::Double);
  run(of, false, 1, 0, kernels().terms);
  return *of.terms;
}

void gradients_(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, Tensor label, Tensor sums, Tensor terms,
                int64_t kind, double beta, double kd_scale, double task_scale, std::optional<Tensor> student_gradient,
                std::optional<Tensor> teacher_gradient) {
  Arguments of{student, teacher, weight, temperatures, kind, beta, label, sums, terms, student_gradient, teacher_gradient};
  of.check();
  run(of, task_scale != 0, kd_scale, task_scale, kernels().gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_shard_sums", FASTKD_CPU_BOX(sums));
  m.impl("divergence_shard_terms", FASTKD_CPU_BOX(terms));
  m.impl("divergence_shard_gradients_", FASTKD_CPU_BOX(gradients_));
}

}  // namespace fastkd::divergence_shard
