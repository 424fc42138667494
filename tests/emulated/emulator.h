// Runs CUDA kernels on the host, one fiber a thread, so that they can be tested where there is no GPU.
//
// The threads of a block, and the blocks of a cluster, live side by side; the others run one after the other in an order
// drawn from the schedule's seed. A fiber runs until it must wait for others (barrier, shuffle); who goes on is drawn from
// the same seed. What CUDA leaves undefined is an error here, whatever the schedule:
// - threads that wait for others which never come, or which came to another barrier or shuffle;
// - an access of shared memory outside an array, or of bytes that nobody wrote;
// - two accesses of the same byte of shared memory, one of them a store, with no barrier between them (atomic operations
//   may meet one another, but no load or store);
// - a store into another block before a cluster barrier has shown that it runs, or with none before that block ends;
// - more shared memory than the smallest GPU that we build for gives a block;
// - a 16-byte access of an address that is not a multiple of 16.
// Accesses of global memory are left to AddressSanitizer.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#include "common/geometry.h"

namespace fastkd::emulator {

using Site = std::source_location;

struct Settings {
  uint64_t seed = 0;          // of the schedule
  unsigned max_cluster = 16;  // blocks; 1: a device without clusters
};
Settings& settings();

// Runs body once for every thread of the grid. Throws std::runtime_error naming `name` where a rule is broken.
void run(const char* name, const Geometry& geometry, const std::function<void()>& body);

// ---- of the thread that runs ---------------------------------------------------------------------

struct Position {
  unsigned thread, block;  // index in its block, in the grid
  unsigned rank;           // of its block in its cluster
  const Geometry* geometry;
};
const Position& position();

enum class Meeting { kShuffle, kWarpBarrier, kBlockBarrier, kClusterBarrier, kClusterStart };
void meet(Meeting meeting, const Site& site);

// A cluster barrier in two, which publishes nothing: all blocks are known to run, no access is ordered by it. Who waits must have
// arrived; who arrived must wait before it ends or meets at another one.
void arrive(const Site& site);
void wait(const Site& site);

// Deposits this lane's value, waits for the warp, gives that of lane `source`.
void exchange(void* value, unsigned size, unsigned source, const Site& site);

enum class Access { kLoad, kStore, kAtomic };
// The address of shared memory [offset + i * size, + size) of the block of that rank, checked.
void* shared_address(unsigned rank, Access access, unsigned offset, unsigned count, unsigned size, unsigned i, const Site& site);

void check_aligned(const void* address, const Site& site);

}  // namespace fastkd::emulator
