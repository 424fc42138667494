// Divergence on the GPU: checks, outputs, the choice of kernels, the reduction over rows; and the scaling of gradients.
//
// Launches: one where a cluster can take all rows, or where losses are wanted unreduced; else one for the rows and one that
// adds up their losses in a fixed order; with labels, one before that counts the valid rows.
#include <algorithm>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/row.cuh"
#include "divergence/cuda.h"
#include "divergence/cuda_rows.cuh"
#include "divergence/operator.h"

namespace fastkd::divergence {
namespace {

using namespace device;
using FASTKD_ISA::divergence::count_valid;
using FASTKD_ISA::divergence::number_of;
using FASTKD_ISA::divergence::write_reduced;

// ---- over all rows: one cluster --------------------------------------------------------------------

struct CountParams {
  const int64_t* target;
  int64_t rows;
  int64_t ignore_index;
  double* valid;
};

FASTKD_KERNEL(kMaxRowThreads) count_rows(const CountParams p) {
  ClusterGroup all;
  all.arrive();
  all.start();
  const double count = count_valid(p.target, p.rows, p.ignore_index, all);
  if (all.index() == 0) *p.valid = count;
}

FASTKD_KERNEL(kMaxRowThreads) sum_losses(const DeviceParams p) {
  ClusterGroup all;
  all.arrive();
  all.start();
  write_reduced(p, all);
}

Geometry one_cluster(int64_t rows, unsigned reductions, DeviceLimits limits) {
  const unsigned threads = static_cast<unsigned>(std::clamp<int64_t>((rows + 31) / 32 * 32, 32, kMaxRowThreads));
  unsigned cluster = 1;
  while (cluster < kPortableCluster && 2 * cluster <= limits.max_cluster && rows > 8 * kMaxRowThreads * cluster) cluster *= 2;
  return {cluster, threads, cluster, cluster_shared_bytes(threads, cluster, reductions)};
}

RowNumbers numbers_of(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {nullptr, false, 0};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Double, t->numel() > 1 ? t->stride(0) : 0};
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The launches of all rows: of checked arguments, into outputs that are there. Gradients may be the logits themselves.
struct Call {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& target;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& temperatures;
  double temperature;
  int64_t kind;
  double beta;
  double kd_scale;
  double task_scale;
  int64_t ignore_index;
  Reduction reduce;
  void* student_gradient;
  void* teacher_gradient;
  const Tensor& loss;
  const Tensor& terms;
};

void launch_rows(const DeviceContext& context, const Call& call) {
  const auto& [student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale, task_scale, ignore_index,
               reduce, student_gradient, teacher_gradient, loss, terms] = call;
  const int64_t rows = student.size(0), classes = student.size(1);
  const bool none = reduce == Reduction::kNone, mean = reduce == Reduction::kMean || reduce == Reduction::kBatchMean;
  const DeviceLimits limits = context.limits();
  const bool jensen_shannon = static_cast<Kind>(kind) == Kind::kJensenShannon;
  const void* const gradient = student_gradient != nullptr ? student_gradient : teacher_gradient;
  const Dtype dtype = kernel_dtype(student);
  // Without gradients there is nothing to keep: one sweep will do, and is faster than a cluster of many blocks. Short rows are
  // faster on chip all the same, in a third to three quarters of the time.
  const bool resident = teacher_gradient == nullptr &&
                        (student_gradient != nullptr || jensen_shannon || classes <= tuned(Knob::kDivergenceForwardClasses));
  const Plan plan = plan_rows(rows, classes, static_cast<int>(student.element_size()), jensen_shannon, resident,
                              gradient != nullptr && is_aligned(gradient), !none, limits);
  DeviceParams params{row_inputs(student, teacher, target, temperature, kind, beta, task_scale, ignore_index)};
  params.rows = rows;
  params.weight = numbers_of(weight);
  params.temperature = numbers_of(temperatures);
  params.kd_scale = kd_scale;
  params.task_scale = task_scale;
  params.denominator = reduce == Reduction::kMean ? static_cast<double>(classes) : 1.0;
  if (mean && !target.has_value()) params.denominator *= static_cast<double>(std::max<int64_t>(rows, 1));
  params.inverse_temperature_all = 1.0 / std::clamp(temperature, 0x1p-100, 0x1p100);  // differences of logits stay finite
  params.gradient_scale_all = kd_scale / params.denominator * temperature;
  params.student_gradient = student_gradient;
  params.teacher_gradient = teacher_gradient;
  params.each_row = none;
  params.wide_loss = loss.scalar_type() == ScalarType::Double;
  params.loss = loss.mutable_data_ptr();
  params.terms = terms.mutable_data_ptr();

  std::optional<Tensor> row_losses, valid;
  params.one_launch = plan.one_launch;
  if (mean && target.has_value()) {
    valid = context.empty({plan.one_launch ? int64_t{kMaxCluster} : 1}, ScalarType::Double);
    params.valid = static_cast<double*>(valid->mutable_data_ptr());
    if (!plan.one_launch) {
      context.launch("divergence (valid rows)", count_rows, one_cluster(rows, 1, limits),
                     CountParams{params.target, rows, ignore_index, params.valid});
    }
  }
  if (!none) {
    row_losses = context.empty({2, rows}, ScalarType::Double);
    params.row_losses = static_cast<double*>(row_losses->mutable_data_ptr());
  }
  const bool plain = !target.has_value() && !weight.has_value() && !temperatures.has_value();
  if (rows > 0 || plan.one_launch) {
    const RowKernel kernel = [&] {
      if (!plan.resident) return streaming_kernel(dtype, jensen_shannon, plan.team);
      if (jensen_shannon) return resident_jensen_shannon_kernel(dtype, plan.team, plain);
      return params.kind == Kind::kReverse ? resident_reverse_kernel(dtype, plan.team, plain)
                                           : resident_forward_kernel(dtype, plan.team, plain);
    }();
    context.launch("divergence", kernel, plan.geometry, params);
  }
  if (!none && !plan.one_launch) context.launch("divergence (sum of losses)", sum_losses, one_cluster(rows, 2, limits), params);
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
  const Reduction reduce = static_cast<Reduction>(reduction);
  const bool none = reduce == Reduction::kNone;
  const DeviceContext context(student);
  const ScalarType type = student.scalar_type(), loss_type = loss_dtype(student);
  Tensor student_out = student_gradient ? context.empty({rows, classes}, type) : context.empty({0}, type);
  Tensor teacher_out = teacher_gradient ? context.empty({rows, classes}, type) : context.empty({0}, type);
  Tensor loss = none ? context.empty({rows}, loss_type) : context.empty({}, loss_type);
  Tensor terms = none ? context.empty({2, rows}, loss_type) : context.empty({2}, loss_type);
  launch_rows(context, {student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale, task_scale,
                        ignore_index, reduce, student_gradient ? student_out.mutable_data_ptr() : nullptr,
                        teacher_gradient ? teacher_out.mutable_data_ptr() : nullptr, loss, terms});
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
  const DeviceContext context(student);
  const Tensor loss = context.empty({student.size(0)}, loss_dtype(student));
  Tensor terms = context.empty({2, student.size(0)}, loss_dtype(student));
  launch_rows(context, {student, teacher, target, weight, temperatures, temperature, kind, beta, kd_scale, task_scale,
                        ignore_index, Reduction::kNone, student_out, teacher_out, loss, terms});
  return terms;
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
