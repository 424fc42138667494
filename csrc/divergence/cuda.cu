// Divergence on the GPU: checks, outputs, the choice of kernels; and the scaling of gradients.
//
// Launches: one where a cluster can take all rows, or where losses are wanted unreduced; else one for the rows and one that
// adds up their losses in a fixed order; with labels, one before that counts the valid rows.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/row.cuh"
#include "divergence/cuda.h"
#include "divergence/cuda_losses.h"
#include "divergence/cuda_rows.cuh"
#include "divergence/operator.h"

namespace fastkd::divergence {
namespace {

using namespace device;
using FASTKD_ISA::divergence::number_of;

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Launches what takes all rows; gradients may take the place of logits.
Losses launch_rows(const DeviceContext& context, const RowInputs& inputs, const Tensor& student,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& temperatures, double kd_scale,
                   double task_scale, Reduction reduce, void* student_gradient, void* teacher_gradient) {
  const int64_t rows = student.size(0), classes = student.size(1);
  const bool jensen_shannon = inputs.kind == Kind::kJensenShannon;
  const void* const gradient = student_gradient != nullptr ? student_gradient : teacher_gradient;
  const Dtype dtype = kernel_dtype(student);
  // Without gradients there is nothing to keep: one sweep will do, and is faster than a cluster of many blocks. Short rows are
  // faster on chip all the same, in a third to three quarters of the time.
  // Rows on chip read a label's logit late, where they have registers: not if a gradient may lie there by then.
  const bool late = inputs.task && student_gradient == student.const_data_ptr();
  const bool resident = !late && teacher_gradient == nullptr &&
                        (student_gradient != nullptr || jensen_shannon || classes <= tuned(Knob::kDivergenceForwardClasses));
  const Plan plan = plan_rows(rows, classes, static_cast<int>(student.element_size()), jensen_shannon, resident,
                              gradient != nullptr && is_aligned(gradient), reduce != Reduction::kNone, context.limits());
  DeviceParams params = device_params(inputs, rows, weight, temperatures, kd_scale, task_scale);
  params.student_gradient = student_gradient;
  params.teacher_gradient = teacher_gradient;
  params.one_launch = plan.one_launch;
  Losses losses = make_losses(context, params, reduce, loss_dtype(student));
  const bool plain = inputs.target == nullptr && !weight.has_value() && !temperatures.has_value();
  if (rows > 0 || plan.one_launch) {
    const RowKernel kernel = [&] {
      if (!plan.resident) return streaming_kernel(dtype, jensen_shannon, plan.team);
      if (jensen_shannon) return resident_jensen_shannon_kernel(dtype, plan.team, plain);
      return params.kind == Kind::kReverse ? resident_reverse_kernel(dtype, plan.team, plain)
                                           : resident_forward_kernel(dtype, plan.team, plain);
    }();
    context.launch("divergence", kernel, plan.geometry, params);
  }
  reduce_losses(context, params);
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
  const DeviceContext context(student);
  const ScalarType type = student.scalar_type();
  Tensor student_out = student_gradient ? context.empty({rows, classes}, type) : context.empty({0}, type);
  Tensor teacher_out = teacher_gradient ? context.empty({rows, classes}, type) : context.empty({0}, type);
  const Losses losses = launch_rows(
      context, row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student, weight,
      temperatures, kd_scale, task_scale, static_cast<Reduction>(reduction),
      student_gradient ? student_out.mutable_data_ptr() : nullptr, teacher_gradient ? teacher_out.mutable_data_ptr() : nullptr);
  return {losses.loss, losses.terms, student_out, teacher_out};
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
  const DeviceContext context(student);
  return launch_rows(context, row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index), student,
                     weight, temperatures, kd_scale, task_scale, Reduction::kNone, student_out, teacher_out)
      .terms;
}

// ---- divergence_backward_ ----------------------------------------------------------------------------

// Mapping: a warp takes pieces of rows; the factor is read on the device, and a piece whose factor is 1 (the usual
// loss.backward()) costs one load and no traffic. Bytes otherwise: 2 * rows * classes * size.
struct ScaleParams {
  void* gradient;  // [rows, length]
  RowNumbers factor;
  int64_t rows;
  int64_t length;
  int64_t pieces;  // of each row
};

constexpr int64_t kPieceBytes = 8192;

// inspect: streaming scale_pieces<*> loads=128 stores=128
template <typename T>
FASTKD_KERNEL(kThreads)
scale_pieces(const ScaleParams p) {
  if (p.factor.stride == 0 && number_of(p.factor, 0) == 1.0) return;
  constexpr int64_t kPiece = kPieceBytes / sizeof(T);
  const int64_t step = static_cast<int64_t>(block_count()) * (kThreads / kWarp);
  for (int64_t piece = static_cast<int64_t>(block_index()) * (kThreads / kWarp) + warp_index(); piece < p.rows * p.pieces;
       piece += step) {
    const int64_t row = piece / p.pieces, begin = (piece - row * p.pieces) * kPiece;
    const double factor = number_of(p.factor, row);
    if (factor == 1.0) continue;
    const int64_t count = p.length - begin < kPiece ? p.length - begin : kPiece;
    T* const data = static_cast<T*>(p.gradient) + row * p.length + begin;
    const RowView<T, int> view(data, static_cast<int>(count), shift_of(data));
    for (int part = static_cast<int>(lane_index()); part < view.parts(); part += kWarp) {
      Pack<T> pack = view.template load<true>(part);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        pack.value[k] = from_compute<T>(to_compute(pack.value[k]) * static_cast<Compute<T>>(factor));
      }
      view.store(part, pack);
    }
  }
}

void backward_(Tensor gradient, Tensor grad_loss) {
  if (!check_scale(gradient, grad_loss)) return;
  const bool scalar = grad_loss.dim() == 0;  // one row of all elements
  const int64_t rows = scalar ? 1 : gradient.size(0), length = scalar ? gradient.numel() : gradient.size(1);
  const int64_t piece = kPieceBytes / static_cast<int64_t>(gradient.element_size()), pieces = (length + piece - 1) / piece;
  const DeviceContext context(gradient);
  const ScaleParams params{gradient.mutable_data_ptr(), numbers_of(grad_loss), rows, length, pieces};
  const auto kernel = for_dtype(kernel_dtype(gradient), []<typename T>() { return scale_pieces<T>; });
  context.launch("divergence_backward_", kernel,
                 {grid_size(rows * pieces, 1, 16 * context.limits().multiprocessors, kThreads / kWarp), kThreads}, params);
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("divergence", TORCH_BOX(&divergence));
  m.impl("divergence_", TORCH_BOX(&divergence_));
  m.impl("divergence_backward_", TORCH_BOX(&backward_));
}

}  // namespace fastkd::divergence
