// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), CPU and CUDA.
//
// Random words are a function of (seed, stream, index) alone: the counter is the global index of the item, so
// that results do not depend on threads, blocks, ranks or the device, and any item can be had without the others.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"

namespace fastkd::FASTKD_ISA {

// One stream for each use of a seed, so that crops and draws of the same seed are independent.
enum class Stream : uint32_t { kAlias = 1, kCrop = 2, kTeacher = 3 };

struct Words {
  uint32_t w[4];
};

FASTKD_HOST_DEVICE Words philox(uint64_t seed, Stream stream, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastkd::FASTKD_ISA
