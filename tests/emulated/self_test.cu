// Kernels that break one rule each, to show that the emulator notices; and the same kernels unbroken.
//
// Each block writes the elements of its part of `data` in reverse order, through shared memory.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/tuning.h"

namespace fastkd::self_test {
namespace {

using namespace device;

enum class Flaw : int64_t {
  kNone,
  kNoBarrier,         // a load of shared memory right after the other threads' stores
  kNoBarrierBefore,   // a store right after the other threads' loads
  kSharedBounds,      // one element behind the array
  kGlobalBounds,      // one element behind the data
  kUninitialised,     // a byte that nobody wrote
  kDivergentShuffle,  // half of each warp does not come
  kOtherShuffle,      // half of each warp comes to another one
  kEarlyExit,         // a thread ends before a barrier
  kMisaligned,        // 16 bytes from an address between
  kEarlyRemoteStore,  // before the other block is known to run
  kNoClusterBarrier,  // a load right after another block's stores
  kAtomicThenLoad,    // a load right after the other threads' atomic operations
  kLoadThenAtomic,    // an atomic operation right after the other threads' loads
  kRelaxedBarrier,    // the barrier that only shows that all blocks run, after another block's stores
  kLeavesEarly,       // a block ends while another one stores into it
};

struct Params {
  Flaw flaw;
  int32_t* data;
  int64_t count;
};

FASTKD_KERNEL(64) reverse_kernel(const Params p) {
  const unsigned threads = thread_count(), i = thread_index();
  const Shared<int32_t> shared(0, threads);
  int32_t* const own = p.data + static_cast<int64_t>(block_index()) * threads;
  if (p.flaw == Flaw::kEarlyExit && i == 0) return;
  for (int round = 0; round < 3; ++round) {
    if (p.flaw != Flaw::kUninitialised || i != 5) shared.store(i, own[i]);
    if (p.flaw != Flaw::kNoBarrier) block_barrier();
    own[i] = shared.load(threads - 1 - i + (p.flaw == Flaw::kSharedBounds));
    if (p.flaw != Flaw::kNoBarrierBefore && p.flaw != Flaw::kLoadThenAtomic) block_barrier();
    if (p.flaw == Flaw::kNoBarrierBefore) continue;
    const Shared<uint32_t> counter(0, threads);
    counter.atomic_add(round, 1u);  // of all threads at once: fine
    counter.atomic_max(round, 1u);
    if (p.flaw == Flaw::kAtomicThenLoad) own[i] += static_cast<int32_t>(counter.load(round));
    block_barrier();
  }
  if (p.flaw == Flaw::kGlobalBounds && i == 0) own[i] += p.data[p.count];
  if (p.flaw == Flaw::kMisaligned) own[0] = load_pack(own + 1).value[0];
  if (p.flaw == Flaw::kOtherShuffle && i % 2 == 0) {
    own[i] = shuffle_xor(own[i], 0);
  } else if (p.flaw != Flaw::kDivergentShuffle || i % 2 == 0) {
    own[i] = shuffle_xor(own[i], 0);
  }
}

// The same across the blocks of a cluster.
FASTKD_KERNEL(64) reverse_cluster_kernel(const Params p) {
  const unsigned threads = thread_count(), i = thread_index(), rank = cluster_rank(), blocks = cluster_size();
  const Shared<int32_t> shared(0, threads);
  int32_t* const own = p.data + static_cast<int64_t>(block_index()) * threads;
  if (p.flaw != Flaw::kEarlyRemoteStore) cluster_barrier();
  if (p.flaw == Flaw::kLeavesEarly && rank == 0) return;
  shared.store_remote(blocks - 1 - rank, threads - 1 - i, own[i]);
  if (p.flaw == Flaw::kLeavesEarly) return;
  if (p.flaw == Flaw::kRelaxedBarrier) {
    cluster_arrive();
    cluster_wait();
  } else if (p.flaw != Flaw::kNoClusterBarrier) {
    cluster_barrier();
  }
  own[i] = shared.load(i);
}

void reverse(Tensor data, int64_t flaw, int64_t threads, int64_t cluster) {
  const DeviceContext context(data);
  const Geometry geometry{static_cast<unsigned>(data.numel() / threads), static_cast<unsigned>(threads),
                          static_cast<unsigned>(cluster), static_cast<std::size_t>(threads * 4)};
  const Params params{static_cast<Flaw>(flaw), static_cast<int32_t*>(data.mutable_data_ptr()), data.numel()};
  context.launch("reverse", cluster > 1 ? reverse_cluster_kernel : reverse_kernel, geometry, params);
}

void configure(int64_t seed, int64_t max_cluster) {
  emulator::settings() = {static_cast<uint64_t>(seed), static_cast<unsigned>(max_cluster)};
}

void tune(std::string settings) { tuning() = Tuning(settings.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(fastkd_emulated, m) {
  m.def("configure(int seed, int max_cluster) -> ()");
  m.def("tune(str settings) -> ()");
  m.def("self_test_reverse(Tensor(a!) data, int flaw, int threads, int cluster) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("tune", TORCH_BOX(&tune));
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CPU, m) { m.impl("self_test_reverse", TORCH_BOX(&reverse)); }

}  // namespace fastkd::self_test
