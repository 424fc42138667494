// Prefix sums over the threads of a block, in their order. Integers: the same in any order of addition.
#pragma once

#include "common/device.cuh"
#include "common/host_device.h"

namespace fastkd::FASTKD_ISA::device {

// Bytes of shared memory that block_scan needs for N numbers.
FASTKD_HOST_DEVICE constexpr unsigned scan_bytes(unsigned threads, unsigned numbers) { return threads / kWarp * numbers * 8; }

// Replaces each number by the sum of those of the threads before; total: that of all threads. Takes scan_bytes of shared
// memory from byte `offset` on; between two scans of the same bytes there must be a barrier.
template <int N>
FASTKD_DEVICE void block_scan(uint64_t (&values)[N], uint64_t (&total)[N], unsigned offset) {
  const unsigned lane = lane_index(), warp = warp_index(), warps = thread_count() / kWarp;
  const Shared<uint64_t> sums(offset, N * warps);
  uint64_t own[N];
#pragma unroll
  for (int n = 0; n < N; ++n) own[n] = values[n];
#pragma unroll
  for (unsigned step = 1; step < kWarp; step *= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint64_t before = shuffle(values[n], lane - step);  // of another lane where there is none: not used
      if (lane >= step) values[n] += before;
    }
  }
  if (lane == kWarp - 1) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums.store(warp * N + n, values[n]);
  }
  block_barrier();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    total[n] = 0;
    values[n] -= own[n];
  }
  for (unsigned w = 0; w < warps; ++w) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint64_t sum = sums.load(w * N + n);
      if (w < warp) values[n] += sum;
      total[n] += sum;
    }
  }
}

}  // namespace fastkd::FASTKD_ISA::device
