// fastkd._C: loading it registers the operators and CPU kernels; its functions report what was built.
#include <pybind11/pybind11.h>

#include "common/architectures.h"
#include "common/isa.h"
#include "common/tuning.h"

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
  m.def(
      "cuda_refusal",
      [](const std::string& gpu, int major, int minor, const std::string& architectures) -> std::string {
        if (fastkd::any_architecture_fits(architectures, major, minor)) return "";
        return fastkd::no_architecture_fits(architectures, gpu, major, minor);
      },
      py::arg("gpu"), py::arg("major"), py::arg("minor"), py::arg("architectures") = FASTKD_CUDA_ARCHITECTURES,
      "What the CUDA kernels of a build say of a GPU of that compute capability; nothing where they run on it.");
  m.def(
      "tuning",
      [] {
        py::dict knobs;
        for (const fastkd::KnobInfo& info : fastkd::kKnobTable) {
          py::list values;
          for (const int64_t value : info.values) {
            if (value != 0) values.append(value);
          }
          knobs[py::str(std::string(info.name))] = py::make_tuple(fastkd::tuned(info.knob), info.usual, values);
        }
        return knobs;
      },
      "Name of each number of CUDA launches that FASTKD_TUNING sets: its value, the usual one, those allowed.");
  m.def("set_instruction_set", &fastkd::set_isa, py::arg("name"),
        "Use 'baseline', 'avx2' or 'avx512' CPU kernels in this process (tests and measurements).");
}
