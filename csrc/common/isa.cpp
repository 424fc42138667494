#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastkd {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa parse(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      if (i > static_cast<int>(best_isa())) {
        throw std::runtime_error(std::string("fastkd: instruction set '") + name +
                                 "' is not supported by this machine, which has up to '" + isa_name(best_isa()) + "'");
      }
      return static_cast<Isa>(i);
    }
  }
  throw std::runtime_error(std::string("fastkd: instruction set is '") + name + "', must be one of baseline, avx2, avx512");
}

std::atomic<int> g_isa{-1};

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    const char* wanted = std::getenv("FASTKD_ISA");
    isa = static_cast<int>(wanted != nullptr ? parse(wanted) : best_isa());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void set_isa(const char* name) { g_isa.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

}  // namespace fastkd
