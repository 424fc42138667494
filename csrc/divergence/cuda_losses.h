// What the CUDA launchers of losses of rows share: parameters, outputs, and the reduction over rows.
#pragma once

#include "common/device.cuh"
#include "common/launch.cuh"
#include "divergence/cuda.h"
#include "divergence/operator.h"

namespace fastkd::divergence {

RowNumbers numbers_of(const std::optional<Tensor>& t);

// All but the outputs; the denominator is that of a sum.
DeviceParams device_params(const RowInputs& inputs, int64_t rows, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& temperatures, double kd_scale, double task_scale);

struct Losses {
  Tensor loss, terms;
  std::optional<Tensor> row_losses, valid;  // workspaces
};

// Makes the outputs and puts them and the reduction into the parameters, whose one_launch is set; with labels, and more
// launches, it launches the one that counts the valid rows.
Losses make_losses(const DeviceContext& context, DeviceParams& params, Reduction reduction, ScalarType type);

// After the launch for the rows: the one that adds up their losses in a fixed order, where that is wanted.
void reduce_losses(const DeviceContext& context, const DeviceParams& params);

}  // namespace fastkd::divergence
