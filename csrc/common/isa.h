// Instruction sets of the CPU kernels: compiled side by side, chosen at run time.
//
// Each csrc/<primitive>/cpu_kernel.cpp is compiled once for every set, with -DFASTKD_ISA=<set>, and
// defines fastkd::<set>::<primitive>::kernels, a table of plain functions. Everything such a file uses
// lives in namespace fastkd::FASTKD_ISA, so that the linker can never merge a function compiled for
// AVX-512 with its namesake for the baseline and run it on a machine that lacks AVX-512.
#pragma once

#ifndef FASTKD_ISA
#define FASTKD_ISA portable  // files that are compiled once: schemas, launchers, CUDA
#endif

namespace fastkd {

namespace FASTKD_ISA {}
using namespace FASTKD_ISA;

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The set in use: the best that this machine runs, or what $FASTKD_ISA or set_isa() says.
Isa current_isa();

// Names for build_info() and errors.
const char* isa_name(Isa isa);

// Switches the set for the whole process (tests run every set). Throws if unknown, or if the machine lacks it.
void set_isa(const char* name);

// The best set of this machine.
Isa best_isa();

}  // namespace fastkd

// Declares the tables of a primitive in every set, and kernels(), which picks the one in use.
#if defined(__x86_64__)
#define FASTKD_DECLARE_KERNELS(primitive)                             \
  namespace fastkd::baseline::primitive {                             \
  extern const ::fastkd::primitive::Kernels kernels;                  \
  }                                                                   \
  namespace fastkd::avx2::primitive {                                 \
  extern const ::fastkd::primitive::Kernels kernels;                  \
  }                                                                   \
  namespace fastkd::avx512::primitive {                               \
  extern const ::fastkd::primitive::Kernels kernels;                  \
  }                                                                   \
  namespace fastkd::primitive {                                       \
  inline const Kernels& kernels() {                                   \
    switch (current_isa()) {                                          \
      case Isa::kAvx512: return ::fastkd::avx512::primitive::kernels; \
      case Isa::kAvx2: return ::fastkd::avx2::primitive::kernels;     \
      default: return ::fastkd::baseline::primitive::kernels;         \
    }                                                                 \
  }                                                                   \
  }
#else
#define FASTKD_DECLARE_KERNELS(primitive)                                            \
  namespace fastkd::baseline::primitive {                                            \
  extern const ::fastkd::primitive::Kernels kernels;                                 \
  }                                                                                  \
  namespace fastkd::primitive {                                                      \
  inline const Kernels& kernels() { return ::fastkd::baseline::primitive::kernels; } \
  }
#endif
