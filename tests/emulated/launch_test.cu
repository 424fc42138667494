// csrc/common/launch.cuh itself, on a CUDA runtime of stubs: what it asks a device, and what it says of one that has no code.
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"
#include "cuda_runtime.h"

// a torch for CPUs has neither guards nor streams of such a device, nor tensors there
namespace torch::stable::accelerator {
struct GuardOfStub {
  explicit GuardOfStub(int device) { stub::current = device; }
};
}  // namespace torch::stable::accelerator
inline AOTITorchError aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
namespace fastkd {
struct TensorOfStub {
  explicit TensorOfStub(int32_t device) : device(device) {}
  TensorOfStub(const Tensor&) {}  // of an output, which is never made
  int32_t get_device() const { return device; }
  int32_t device = 0;
};
}  // namespace fastkd
#define DeviceGuard GuardOfStub
#define DeviceContext LaunchedContext
#define Tensor TensorOfStub
#define FASTKD_CUDA_ARCHITECTURES "8.0 9.0a 10.0+PTX"
#include "../../csrc/common/launch.cuh"
#undef FASTKD_CUDA_IMPL
#undef Tensor
#undef DeviceGuard
#undef DeviceContext

namespace fastkd {
namespace {

struct NoParams {};
void no_kernel(NoParams) {}

// (questions to the device, launches) of so many calls of an operator with one launch.
std::vector<int64_t> launch_on(int64_t device, int64_t major, int64_t minor, bool has_image, int64_t calls) {
  stub::Device& d = stub::devices[static_cast<int>(device)];
  d.major = static_cast<int>(major);
  d.minor = static_cast<int>(minor);
  d.launch = has_image ? cudaSuccess : cudaErrorNoKernelImageForDevice;
  for (int64_t i = 0; i < calls; ++i) {
    const LaunchedContext context(TensorOfStub(static_cast<int32_t>(device)));
    context.launch("stub", no_kernel, Geometry{1, 32}, NoParams{});
  }
  return {d.questions, d.launches};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def("launch_on(int device, int major, int minor, bool has_image, int calls) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) { m.impl("launch_on", TORCH_BOX(&launch_on)); }

}  // namespace fastkd
