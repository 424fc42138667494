// The table over blocks on the GPU.
#pragma once

#include "common/launch.cuh"

namespace fastkd::alias {

// Fills top [blocks, 2] and scale[3] from the weights of the blocks [blocks]; scale[3] is NaN where scale[2] is, or where no
// weight is positive.
void pack_top(const DeviceContext& context, const uint64_t* block_weight, int64_t blocks, uint64_t* top, double* scale);

}  // namespace fastkd::alias
