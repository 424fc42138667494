// The table over blocks by itself, so that tests reach more blocks than they could hold items of.
#include "alias/cuda_top.cuh"
#include "alias/math.h"
#include "common/launch.cuh"

namespace fastkd::alias_test {
namespace {

std::tuple<Tensor, Tensor> alias_top(Tensor block_weight) {
  const DeviceContext context(block_weight);
  const int64_t blocks = block_weight.size(0);
  Tensor top = context.empty({blocks, 2}, ScalarType::Long), scale = context.empty({4}, ScalarType::Double);
  double* const numbers = static_cast<double*>(scale.mutable_data_ptr());
  numbers[2] = 1;
  alias::pack_top(context, static_cast<const uint64_t*>(block_weight.const_data_ptr()), blocks,
                  static_cast<uint64_t*>(top.mutable_data_ptr()), numbers);
  return {top, scale};
}

// Blocks, and items of the last one.
Tensor alias_blocks(Tensor items) {
  int64_t* const data = static_cast<int64_t*>(items.mutable_data_ptr());
  const int64_t n = data[0];
  data[0] = alias_math::block_count(n);
  data[1] = alias_math::block_items(n, data[0] - 1);
  return items;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def("alias_top(Tensor block_weight) -> (Tensor, Tensor)");
  m.def("alias_blocks(Tensor items) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CPU, m) {
  m.impl("alias_top", TORCH_BOX(&alias_top));
  m.impl("alias_blocks", TORCH_BOX(&alias_blocks));
}

}  // namespace fastkd::alias_test
