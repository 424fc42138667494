// fastkd._C: loading it registers the operators and CPU kernels; its functions report what was built.
#include <pybind11/pybind11.h>

#include "common/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators (torch.ops.fastkd), CPU kernels and build information of fastkd.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FASTKD_VERSION;
        info["compiler"] = __VERSION__;
        info["torch_target"] = "2.10";
        info["cpu_instruction_set"] = fastkd::isa_name(fastkd::current_isa());
        info["cpu_instruction_set_best"] = fastkd::isa_name(fastkd::best_isa());
        info["cuda_architectures"] = FASTKD_CUDA_ARCHITECTURES;
        return info;
      },
      "What this build holds and what is in use.");
  m.def("set_instruction_set", &fastkd::set_isa, py::arg("name"),
        "Use 'baseline', 'avx2' or 'avx512' CPU kernels in this process (tests and measurements).");
}
