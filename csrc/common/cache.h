// Caches of the processor at hand.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fastkd {

// Of one core; where the system does not tell, what nearly all have.
inline size_t l2_cache_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return static_cast<size_t>(found);
#endif
  return size_t{1} << 20;
}

}  // namespace fastkd
