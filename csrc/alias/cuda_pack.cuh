// One block of 4096 items on the GPU: from weights to bins and back, by a block of threads in shared memory.
//
// The sequential sweep (math.h) is a merge of two sorted lists, the deficits D of the lights (before each) and the surpluses
// S of the heavies (up to each): light l is filled by heavy j while D_l < S_j, else heavy j closes its own bin, with
// C + S_j - D_l units left. So after prefix sums each thread takes 8 steps of the merge: it finds where they begin
// (merge path: Green, McColl & Bader, "GPU merge path", ICS 2012), and closes one bin a step.
#pragma once

#include "alias/math.h"
#include "common/scan.cuh"

namespace fastkd::alias {
namespace {

using namespace alias_math;
using namespace device;

constexpr unsigned kPackThreads = 512;
constexpr int kEach = kBlockSize / kPackThreads;  // items, and steps of the merge, of a thread

// One element more after each 16: threads that are some elements apart do not meet in a bank.
FASTKD_DEVICE unsigned spread(unsigned i) { return i + i / 16; }
constexpr unsigned kSpread = kBlockSize + kBlockSize / 16;

// Bytes of shared memory.
constexpr unsigned kSumBytes = scan_bytes(kPackThreads, 1), kScanBytes = scan_bytes(kPackThreads, 3);
constexpr unsigned kListOffset = kSumBytes + kScanBytes;
constexpr unsigned kItemOffset = kListOffset + kSpread * 8;
constexpr unsigned kBinOffset = kItemOffset + kBlockSize * 2;
constexpr unsigned kPackBytes = kBinOffset + kBlockSize * 8;

// Items [kEach t, kEach t + kEach) of thread t have these weights; those from n on do not exist. All threads of the block.
FASTKD_DEVICE void pack_block(const uint64_t (&weights)[kEach], unsigned n, uint64_t* bins, uint64_t* block_weight) {
  const unsigned first = thread_index() * kEach;
  const Shared<uint64_t> list(kListOffset, kSpread), bin(kBinOffset, kBlockSize);
  const Shared<uint16_t> item(kItemOffset, kBlockSize);

  uint64_t sum[1] = {0}, total[1];
#pragma unroll
  for (int k = 0; k < kEach; ++k) sum[0] += first + k < n ? weights[k] : 0;
  block_scan(sum, total, 0);
  const uint64_t capacity = total[0];
  if (thread_index() == 0) *block_weight = capacity;

  uint64_t before[3] = {0, 0, 0}, sums[3];  // lights, deficits, surpluses
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const uint64_t scaled = weights[k] * n;
    if (first + k >= n) continue;
    before[0] += scaled <= capacity;
    before[1] += scaled <= capacity ? capacity - scaled : 0;
    before[2] += scaled <= capacity ? 0 : scaled - capacity;
  }
  block_scan(before, sums, kSumBytes);
  const unsigned lights = static_cast<unsigned>(sums[0]), heavies = n - lights;
  {
    unsigned l = static_cast<unsigned>(before[0]);
    uint64_t deficit = before[1], surplus = before[2];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const unsigned i = first + k;
      const uint64_t scaled = weights[k] * n;
      if (i >= n) continue;
      const bool light = scaled <= capacity;
      const unsigned place = light ? l : lights + i - l;
      surplus += light ? 0 : scaled - capacity;
      list.store(spread(place), light ? deficit : surplus);
      item.store(place, static_cast<uint16_t>(i));
      deficit += light ? capacity - scaled : 0;
      l += light;
    }
  }
  block_barrier();
  if (first < n) {
    unsigned low = first > heavies ? first - heavies : 0, high = first < lights ? first : lights;
    while (low < high) {
      const unsigned middle = (low + high) / 2;
      if (list.load(spread(middle)) < list.load(spread(lights + first - 1 - middle))) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    unsigned l = low, h = first - low;  // the next light, the current heavy
    uint64_t deficit = l < lights ? list.load(spread(l)) : sums[1];
    uint64_t surplus = h < heavies ? list.load(spread(lights + h)) : 0;
#pragma unroll 1
    for (unsigned step = first; step < first + kEach && step < n; ++step) {
      const bool fill = l < lights && (h == heavies || deficit < surplus);
      const unsigned own = item.load(fill ? l : lights + h);
      const unsigned giver = fill ? h : h + 1;
      const unsigned alias = giver < heavies ? item.load(lights + giver) : own;
      l += fill;
      h += !fill;
      uint64_t threshold;
      if (fill) {
        const uint64_t next = l < lights ? list.load(spread(l)) : sums[1];
        threshold = capacity - (next - deficit);
        deficit = next;
      } else {
        threshold = capacity + surplus - deficit;
        surplus = h < heavies ? list.load(spread(lights + h)) : 0;
      }
      bin.store(own, pack(threshold, alias));
    }
  }
  block_barrier();
  for (unsigned i = thread_index(); i < n; i += kPackThreads) bins[i] = bin.load(i);
}

// The weights of a block from its bins: what each item keeps plus what others hand to it, over the number of items. Exact.
// A table that somebody tampered with gives some weights, never an access outside the block. Uses the shared memory of
// pack_block's bins: a barrier must stand between the two, as between two calls.
FASTKD_DEVICE void unpack_block(const uint64_t* bins, unsigned n, uint64_t capacity, uint64_t (&weights)[kEach]) {
  const Shared<uint64_t> owned(kBinOffset, kBlockSize);
  for (unsigned i = thread_index(); i < n; i += kPackThreads) owned.store(i, 0);
  block_barrier();
  for (unsigned i = thread_index(); i < n; i += kPackThreads) {
    const uint64_t word = bins[i], alias = alias_of(word);
    owned.atomic_add(i, threshold_of(word));
    owned.atomic_add(alias < n ? static_cast<unsigned>(alias) : i, capacity - threshold_of(word));
  }
  block_barrier();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const unsigned i = thread_index() * kEach + k;
    const uint64_t units = i < n ? owned.load(i) : 0;
    weights[k] = n == kBlockSize ? units >> kBlockBits : units / n;
  }
}

}  // namespace
}  // namespace fastkd::alias
