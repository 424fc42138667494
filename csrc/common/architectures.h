// Which GPUs run the CUDA kernels of a build, and what is said where one does not.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace fastkd {

// Whether a GPU of this compute capability runs what was built for an entry of TORCH_CUDA_ARCH_LIST: 8.0, 9.0a, 10.0f, 10.0+PTX.
// Machine code runs on later minor versions, too; with the features of one GPU (a) on that one only, with those of a family (f)
// on later members of it. PTX runs on whatever is newer, unless it has such features.
inline bool architecture_fits(const std::string& architecture, int major, int minor) {
  char* rest = nullptr;
  const long built_major = std::strtol(architecture.c_str(), &rest, 10);
  if (*rest != '.') return false;
  const long built_minor = std::strtol(rest + 1, &rest, 10);
  if (*rest == 'a') return major == built_major && minor == built_minor;
  if (major == built_major) return minor >= built_minor;
  return std::string(rest) == "+PTX" && major > built_major;
}

// Whether one of them, separated by spaces, does.
inline bool any_architecture_fits(const std::string& architectures, int major, int minor) {
  std::istringstream names(architectures);
  for (std::string name; names >> name;) {
    if (architecture_fits(name, major, minor)) return true;
  }
  return false;
}

// For a GPU that none of them fits.
inline std::string no_architecture_fits(const std::string& architectures, const std::string& gpu, int major, int minor) {
  std::ostringstream message;
  message << "the CUDA kernels of this fastkd were built for " << architectures << ", which " << gpu << ", of compute capability "
          << major << "." << minor
          << ", does not run. Move the tensors to the CPU, or rebuild where nvcc and a CUDA build of torch "
          << "are installed: `TORCH_CUDA_ARCH_LIST=" << major << "." << minor << (major == 9 && minor == 0 ? "a" : "")
          << " pip install --force-reinstall --no-deps .`";
  return message.str();
}

}  // namespace fastkd
