// The table over blocks on the GPU.
#pragma once

#include "alias/operator.h"
#include "common/launch.cuh"

namespace fastkd::alias {

// Fills top and scale[3] from the weights of the blocks; scale[3] is NaN where scale[2] is, or where no weight is positive.
void pack_top(const DeviceContext& context, const Table& table);

}  // namespace fastkd::alias
