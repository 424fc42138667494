// The reduction over rows of losses on the GPU: how many are valid, and the sums of their losses, by one cluster each.
#include "divergence/cuda_losses.h"

#include <algorithm>

#include "common/reduce.cuh"
#include "divergence/cuda_rows.cuh"

namespace fastkd::divergence {
namespace {

using namespace device;
using FASTKD_ISA::divergence::count_valid;
using FASTKD_ISA::divergence::write_reduced;

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

}  // namespace

RowNumbers numbers_of(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {nullptr, false, 0};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Double, t->numel() > 1 ? t->stride(0) : 0};
}

DeviceParams device_params(const RowInputs& inputs, int64_t rows, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& temperatures, double kd_scale, double task_scale) {
  DeviceParams params{inputs};
  params.rows = rows;
  params.weight = numbers_of(weight);
  params.temperature = numbers_of(temperatures);
  params.kd_scale = kd_scale;
  params.task_scale = task_scale;
  params.denominator = 1;
  params.inverse_temperature_all = 1.0 / std::clamp(inputs.temperature_all, 0x1p-100, 0x1p100);  // differences stay finite
  return params;
}

Losses make_losses(const DeviceContext& context, DeviceParams& params, Reduction reduction, ScalarType type) {
  const bool none = reduction == Reduction::kNone, mean = reduction == Reduction::kMean || reduction == Reduction::kBatchMean;
  const int64_t rows = params.rows;
  Losses made{none ? context.empty({rows}, type) : context.empty({}, type),
              none ? context.empty({2, rows}, type) : context.empty({2}, type),
              {},
              {}};
  params.each_row = none;
  params.wide_loss = type == ScalarType::Double;
  params.loss = made.loss.mutable_data_ptr();
  params.terms = made.terms.mutable_data_ptr();
  if (reduction == Reduction::kMean) params.denominator = static_cast<double>(params.classes);
  if (mean && params.target == nullptr) params.denominator *= static_cast<double>(std::max<int64_t>(rows, 1));
  params.gradient_scale_all = params.kd_scale / params.denominator * params.temperature_all;
  if (mean && params.target != nullptr) {
    made.valid = context.empty({params.one_launch ? int64_t{kMaxCluster} : 1}, ScalarType::Double);
    params.valid = static_cast<double*>(made.valid->mutable_data_ptr());
    if (!params.one_launch) {
      context.launch("divergence (valid rows)", count_rows, one_cluster(rows, 1, context.limits()),
                     CountParams{params.target, rows, params.ignore_index, params.valid});
    }
  }
  if (!none) {
    made.row_losses = context.empty({2, rows}, ScalarType::Double);
    params.row_losses = static_cast<double*>(made.row_losses->mutable_data_ptr());
  }
  return made;
}

void reduce_losses(const DeviceContext& context, const DeviceParams& params) {
  if (params.each_row || params.one_launch) return;
  context.launch("divergence (sum of losses)", sum_losses, one_cluster(params.rows, 2, context.limits()), params);
}

}  // namespace fastkd::divergence
