// Sparse teachers on the GPU: checks, outputs, launches: one for the rows, and those of the reduction over rows.
#include "divergence/cuda_losses.h"
#include "sparse/cuda_rows.cuh"
#include "sparse/operator.h"

namespace fastkd::sparse {
namespace {

std::tuple<Tensor, Tensor, Tensor> sparse_divergence(Tensor student, Tensor indices, Tensor log_probs,
                                                     std::optional<Tensor> tail_log_prob, std::optional<Tensor> target,
                                                     std::optional<Tensor> weight, std::optional<Tensor> temperatures,
                                                     double temperature, int64_t kind, int64_t tail, double beta, double kd_scale,
                                                     double task_scale, int64_t ignore_index, int64_t reduction,
                                                     bool student_gradient, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature, beta, kd_scale, task_scale);
  check_arguments(student, indices, log_probs, tail_log_prob, target, weight, temperatures, temperature, kind, tail, beta,
                  reduction);
  const int64_t rows = student.size(0), classes = student.size(1);
  const DeviceContext context(student);
  const ScalarType type = student.scalar_type();
  Tensor gradient = student_gradient ? context.empty({rows, classes}, type) : context.empty({0}, type);
  const Geometry geometry = plan_rows(rows, classes, static_cast<int>(student.element_size()));
  DeviceParams params{
      dense::device_params(dense::row_inputs(student, student, target, temperature, kind, beta, task_scale, ignore_index), rows,
                           weight, temperatures, kd_scale, task_scale),
      teacher_of(tail, indices, log_probs, tail_log_prob), static_cast<unsigned>(reduction_bytes(geometry.threads))};
  params.student_gradient = student_gradient ? gradient.mutable_data_ptr() : nullptr;
  const auto losses = dense::make_losses(context, params, static_cast<Reduction>(reduction), dense::loss_dtype(student));
  if (rows > 0) {
    const RowKernel kernel =
        for_dtype(kernel_dtype(student), []<typename T>() -> RowKernel { return FASTKD_ISA::sparse::sparse_rows<T>; });
    context.launch("sparse_divergence", kernel, geometry, params);
  }
  dense::reduce_losses(context, params);
  return {losses.loss, losses.terms, gradient};
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("sparse_divergence", TORCH_BOX(&sparse_divergence)); }

}  // namespace fastkd::sparse
