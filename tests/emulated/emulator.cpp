#include "emulator.h"

#include "context.h"

#include <sys/mman.h>

#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kLastFrames = 8 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

namespace fastkd::emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kMostSharedBytes = 99 << 10;  // of a block, on GPUs of 8.6, 8.9 and 12.0
constexpr unsigned kGranule = 2;                    // bytes of shared memory that are watched as one

// Fibers that meet: a warp, a block or a cluster. Its epoch counts the meetings, those of groups around it included.
struct Group {
  explicit Group(unsigned size = 0) : size(size) {}
  unsigned size;
  unsigned arrived = 0;
  uint64_t epoch = 0;
  Meeting meeting{};
  Site site{};
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  Position position{};
  Group* waits_for = nullptr;
  bool done = false;
  bool arrived = false;  // at a cluster barrier that it has yet to wait for
  unsigned shuffles = 0;
  unsigned index = 0;  // in its cluster
};

// Who accessed a granule last, in terms of what orders it before the next access.
enum class Scope : uint8_t { kThread, kWarp, kBlock, kCluster };
struct Trace {
  int fiber = -1;
  Scope scope = Scope::kThread;  // the smallest group that holds all of them
  uint64_t warp = 0, block = 0, cluster = 0;
};
struct Granule {
  uint64_t generation = 0;  // of the cluster that wrote the rest
  bool written = false;
  Trace store, loads, atomics;
};

struct Block {
  std::vector<char> bytes;
  std::vector<Granule> granules;
  unsigned done = 0;
  uint64_t stored = 0;  // epoch of the cluster, from 1 on, of the last store of another block
};

const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::kShuffle: return "a shuffle";
    case Meeting::kWarpBarrier: return "a warp barrier";
    case Meeting::kBlockBarrier: return "a block barrier";
    default: return "a cluster barrier";
  }
}

std::string text_of(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

class Machine {
 public:
  void run(const char* name, const Geometry& geometry, const std::function<void()>& body);

  Fiber& self() { return *self_; }
  void meet(Meeting meeting, const Site& site);
  void arrive(const Site& site);
  void wait(const Site& site);
  void exchange(void* value, unsigned size, unsigned source, const Site& site);
  void* shared_address(unsigned rank, Access access, unsigned offset, unsigned count, unsigned size, unsigned i, const Site&);

 private:
  static void enter();
  void run_cluster(unsigned first_block);
  void start(unsigned index, unsigned first_block);
  void switch_to(Fiber& next);
  void leave();  // the running fiber has ended or waits: somebody else goes on
  void release(Group& group);
  Group& group_of(const Fiber& fiber, Meeting meeting);
  Group& warp_of(const Fiber& fiber) { return warps_[fiber.index / kWarp]; }
  std::string where(const Fiber& fiber) const;
  std::string stuck() const;
  Scope relation(const Fiber& a, const Fiber& b) const;
  Trace trace(const Fiber& fiber, Scope scope);
  bool ordered(const Trace& earlier, const Fiber& now);

  const Geometry* geometry_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::minstd_rand random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  Fiber main_;
  Fiber* self_ = nullptr;
  Group cluster_;
  std::vector<Group> blocks_, warps_;
  std::vector<std::vector<uint64_t>> slots_;  // of each warp: 2 x 32 values in transit
  std::vector<Block> memory_;
  uint64_t generation_ = 0;
  bool started_ = false;  // all blocks of the cluster are known to run
  unsigned unfinished_ = 0;
  std::exception_ptr error_;
};

thread_local Machine machine;

void Machine::run(const char* name, const Geometry& geometry, const std::function<void()>& body) {
  const std::string prefix = std::string("emulated launch of ") + name + ": ";
  const auto limit = [&](bool holds, const char* what) {
    if (!holds) throw std::runtime_error("fastkd: " + prefix + what);
  };
  limit(geometry.threads > 0 && geometry.threads <= 1024 && geometry.threads % kWarp == 0,
        "threads must be whole warps, to 1024");
  limit(geometry.blocks > 0 && geometry.blocks <= kMaxBlocks, "a grid has 1 to 2^31 - 1 blocks");
  limit(geometry.cluster > 0 && geometry.cluster <= settings().max_cluster, "the device has no clusters of this size");
  limit((geometry.cluster & (geometry.cluster - 1)) == 0, "the size of a cluster must be a power of two");
  limit(geometry.blocks % geometry.cluster == 0, "a grid must be whole clusters");
  limit(geometry.shared_bytes <= kMostSharedBytes, "a block has at most 99 KiB of shared memory on some GPUs");
  geometry_ = &geometry;
  body_ = &body;
  random_.seed(static_cast<unsigned>(settings().seed * 2654435761u + 1));
  const unsigned count = geometry.cluster * geometry.threads;
  while (fibers_.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    limit(stack != MAP_FAILED, "no memory for the stacks of the threads");
    fiber->stack = static_cast<char*>(stack);
    fibers_.push_back(std::move(fiber));
  }
  std::vector<unsigned> order(geometry.blocks / geometry.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
  for (unsigned cluster : order) {
    try {
      run_cluster(cluster * geometry.cluster);
    } catch (const std::exception& error) {
      throw std::runtime_error("fastkd: " + prefix + error.what());
    }
  }
}

void Machine::start(unsigned index, unsigned first_block) {
  Fiber& fiber = *fibers_[index];
  const unsigned rank = index / geometry_->threads;
#if defined(__SANITIZE_ADDRESS__)
  // what was poisoned by functions that never returned: the last ones of a thread that ended, all of one that was given up
  const std::size_t stale = fiber.done ? kLastFrames : kStackBytes;
  __asan_unpoison_memory_region(fiber.stack + kStackBytes - stale, stale);
#endif
  fiber.position = {index % geometry_->threads, first_block + rank, rank, geometry_};
  fiber.waits_for = nullptr;
  fiber.done = false;
  fiber.arrived = false;
  fiber.shuffles = 0;
  fiber.index = index;
  fiber.fake_stack = nullptr;
  prepare(fiber.context, fiber.stack, kStackBytes, &Machine::enter);
  ready_.push_back(&fiber);
}

void Machine::run_cluster(unsigned first_block) {
  const unsigned threads = geometry_->threads, blocks = geometry_->cluster, count = blocks * threads;
  ++generation_;
  cluster_ = Group(count);
  blocks_.assign(blocks, Group(threads));
  warps_.assign(count / kWarp, Group(kWarp));
  slots_.assign(count / kWarp, std::vector<uint64_t>(2 * kWarp));
  if (memory_.size() < blocks) memory_.resize(blocks);
  for (unsigned b = 0; b < blocks; ++b) {
    if (memory_[b].bytes.size() < geometry_->shared_bytes) {
      memory_[b].bytes.resize(geometry_->shared_bytes + kGranule);
      memory_[b].granules.resize(geometry_->shared_bytes / kGranule + 1);
    }
    memory_[b].done = 0;
    memory_[b].stored = 0;
  }
  ready_.clear();
  for (unsigned i = 0; i < count; ++i) start(i, first_block);
  unfinished_ = count;
  started_ = false;
  error_ = nullptr;
  self_ = &main_;
  leave();
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Machine::enter() {
  Machine& m = machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  try {
    (*m.body_)();
    if (m.self().arrived) throw std::runtime_error(m.where(m.self()) + " ends without waiting where it arrived");
    if (m.memory_[m.self().position.rank].stored == m.cluster_.epoch + 1) {
      throw std::runtime_error(m.where(m.self()) +
                               " ends with no cluster barrier after another block's store into its shared memory");
    }
  } catch (...) {
    m.error_ = std::current_exception();
  }
  Fiber& self = m.self();
  self.done = true;
  ++m.memory_[self.position.rank].done;
  --m.unfinished_;
  m.leave();
}

void Machine::switch_to(Fiber& next) {
  Fiber& from = *self_;
  if (&next == &from) return;
  self_ = &next;
#if defined(__SANITIZE_ADDRESS__)
  static thread_local const void* main_bottom = nullptr;
  static thread_local std::size_t main_size = 0;
  const bool to_main = &next == &main_;
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, to_main ? main_bottom : next.stack,
                                 to_main ? main_size : kStackBytes);
  if (main_bottom == nullptr) {
    // the bounds of the thread's own stack, learnt on the first way out of it: glibc reads /proc/self/maps for them
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* bottom = nullptr;
    pthread_attr_getstack(&attributes, &bottom, &main_size);
    pthread_attr_destroy(&attributes);
    main_bottom = bottom;
  }
#endif
  change(from.context, next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void Machine::leave() {
  if (error_ == nullptr && ready_.empty() && unfinished_ > 0) error_ = std::make_exception_ptr(std::runtime_error(stuck()));
  if (error_ != nullptr || ready_.empty()) return switch_to(main_);  // fibers that wait are given up
  std::swap(ready_[random_() % ready_.size()], ready_.back());
  Fiber* const next = ready_.back();
  ready_.pop_back();
  switch_to(*next);
}

Group& Machine::group_of(const Fiber& fiber, Meeting meeting) {
  switch (meeting) {
    case Meeting::kBlockBarrier: return blocks_[fiber.position.rank];
    case Meeting::kClusterBarrier:
    case Meeting::kClusterStart: return cluster_;
    default: return warp_of(fiber);
  }
}

void Machine::arrive(const Site& site) {
  if (self_->arrived) throw std::runtime_error(where(*self_) + " arrives twice at a cluster barrier (" + text_of(site) + ")");
  self_->arrived = true;
}

void Machine::wait(const Site& site) {
  if (!self_->arrived) {
    throw std::runtime_error(where(*self_) + " waits at a cluster barrier where it has not arrived (" + text_of(site) + ")");
  }
  self_->arrived = false;
  meet(Meeting::kClusterStart, site);
}

void Machine::meet(Meeting meeting, const Site& site) {
  Fiber& fiber = *self_;
  if (fiber.arrived && meeting == Meeting::kClusterBarrier) {
    throw std::runtime_error(where(fiber) + " has arrived at a cluster barrier and comes to another one (" + text_of(site) + ")");
  }
  Group& group = group_of(fiber, meeting);
  if (group.arrived == 0) {
    group.meeting = meeting;
    group.site = site;
  } else if (group.meeting != meeting || group.site.line() != site.line() ||
             std::strcmp(group.site.file_name(), site.file_name()) != 0) {
    throw std::runtime_error("threads that must meet diverge: " + where(fiber) + " is at " + name_of(meeting) + " (" +
                             text_of(site) + "), another one at " + name_of(group.meeting) + " (" + text_of(group.site) + ")");
  }
  fiber.waits_for = &group;
  if (++group.arrived == group.size) release(group);
  leave();
}

void Machine::release(Group& group) {
  const unsigned threads = geometry_->threads;
  unsigned begin = 0, end = cluster_.size;  // its members
  if (group.meeting == Meeting::kBlockBarrier) {
    begin = static_cast<unsigned>(&group - blocks_.data()) * threads, end = begin + threads;
  } else if (group.meeting == Meeting::kShuffle || group.meeting == Meeting::kWarpBarrier) {
    begin = static_cast<unsigned>(&group - warps_.data()) * kWarp, end = begin + kWarp;
  }
  group.arrived = 0;
  if (&group == &cluster_) started_ = true;
  if (group.meeting != Meeting::kClusterStart) {
    if (&group == &cluster_) ++cluster_.epoch;
    if (group.size >= threads) {
      for (unsigned block = begin / threads; block < end / threads; ++block) ++blocks_[block].epoch;
    }
    for (unsigned warp = begin / kWarp; warp < end / kWarp; ++warp) ++warps_[warp].epoch;
  }
  for (unsigned i = begin; i < end; ++i) {
    fibers_[i]->waits_for = nullptr;
    ready_.push_back(fibers_[i].get());
  }
}

void Machine::exchange(void* value, unsigned size, unsigned source, const Site& site) {
  Fiber& fiber = *self_;
  uint64_t* const slots = slots_[fiber.index / kWarp].data() + fiber.shuffles++ % 2 * kWarp;
  std::memcpy(slots + fiber.index % kWarp, value, size);
  meet(Meeting::kShuffle, site);
  std::memcpy(value, slots + source % kWarp, size);
}

std::string Machine::where(const Fiber& fiber) const {
  return "thread " + std::to_string(fiber.position.thread) + " of block " + std::to_string(fiber.position.block);
}

std::string Machine::stuck() const {
  unsigned done = 0;
  std::string waiting;
  const Group* last = nullptr;
  for (unsigned i = 0; i < cluster_.size; ++i) {
    const Fiber& fiber = *fibers_[i];
    done += fiber.done;
    if (fiber.waits_for == nullptr || fiber.waits_for == last || waiting.size() > 300) continue;
    last = fiber.waits_for;
    waiting += where(fiber) + " waits at " + name_of(last->meeting) + " (" + text_of(last->site) + "); ";
  }
  return "threads wait for others that never come: " + waiting + std::to_string(done) + " of " + std::to_string(cluster_.size) +
         " threads have ended";
}

// ---- shared memory -------------------------------------------------------------------------------

Scope Machine::relation(const Fiber& a, const Fiber& b) const {
  if (&a == &b) return Scope::kThread;
  if (a.index / kWarp == b.index / kWarp) return Scope::kWarp;
  return a.position.rank == b.position.rank ? Scope::kBlock : Scope::kCluster;
}

Trace Machine::trace(const Fiber& fiber, Scope scope) {
  return {static_cast<int>(fiber.index), scope, warp_of(fiber).epoch, blocks_[fiber.position.rank].epoch, cluster_.epoch};
}

// Whether a barrier stands between what was done earlier and what the thread does now.
bool Machine::ordered(const Trace& earlier, const Fiber& now) {
  if (earlier.fiber < 0) return true;
  switch (std::max(earlier.scope, relation(*fibers_[earlier.fiber], now))) {
    case Scope::kThread: return true;
    case Scope::kWarp: return earlier.warp < warp_of(now).epoch;
    case Scope::kBlock: return earlier.block < blocks_[now.position.rank].epoch;
    default: return earlier.cluster < cluster_.epoch;
  }
}

void* Machine::shared_address(unsigned rank, Access access, unsigned offset, unsigned count, unsigned size, unsigned i,
                              const Site& site) {
  Fiber& fiber = *self_;
  const auto error = [&](const std::string& what) {
    throw std::runtime_error(where(fiber) + " at " + text_of(site) + ": " + what);
  };
  if (i >= count || offset + std::size_t{count} * size > geometry_->shared_bytes) {
    error("element " + std::to_string(i) + " of an array of " + std::to_string(count) + " in shared memory, bytes " +
          std::to_string(offset) + " to " + std::to_string(offset + std::size_t{count} * size) + " of " +
          std::to_string(geometry_->shared_bytes));
  }
  if (offset % size != 0) error("an array of " + std::to_string(size) + "-byte elements is not aligned in shared memory");
  if (rank >= geometry_->cluster) error("shared memory of block " + std::to_string(rank) + " of a smaller cluster");
  if (rank != fiber.position.rank) {
    if (!started_) error("shared memory of another block before a cluster barrier: it may not have started");
    if (memory_[rank].done > 0) error("shared memory of another block whose threads have ended");
    memory_[rank].stored = cluster_.epoch + 1;
  }
  const unsigned begin = offset + i * size;
  for (unsigned g = begin / kGranule; g <= (begin + size - 1) / kGranule; ++g) {
    Granule& granule = memory_[rank].granules[g];
    if (granule.generation != generation_) granule = {generation_, false, {}, {}, {}};
    // this access and those of the same kind that no barrier separates from it
    const auto joined = [&](const Trace& others) {
      const bool alone = ordered(others, fiber);
      return trace(fiber, alone ? Scope::kThread : std::max(others.scope, relation(*fibers_[others.fiber], fiber)));
    };
    if (access != Access::kStore && !granule.written) error("shared memory that nobody has written is read");
    if (access == Access::kLoad) {
      if (!ordered(granule.store, fiber) || !ordered(granule.atomics, fiber)) {
        error("a race: shared memory is read without a barrier after another thread's store");
      }
      granule.loads = joined(granule.loads);
    } else if (access == Access::kAtomic) {
      if (!ordered(granule.store, fiber) || !ordered(granule.loads, fiber)) {
        error("a race: an atomic operation without a barrier after another thread's load or store");
      }
      granule.atomics = joined(granule.atomics);
    } else {
      if (!ordered(granule.store, fiber) || !ordered(granule.atomics, fiber)) {
        error("a race: shared memory is written by two threads without a barrier between");
      }
      if (!ordered(granule.loads, fiber)) error("a race: shared memory is written without a barrier after another thread's load");
      granule.written = true;
      granule.store = trace(fiber, Scope::kThread);
      granule.loads = granule.atomics = {};
    }
  }
  return memory_[rank].bytes.data() + begin;
}

}  // namespace

Settings& settings() {
  static Settings value;
  return value;
}

void run(const char* name, const Geometry& geometry, const std::function<void()>& body) { machine.run(name, geometry, body); }

const Position& position() { return machine.self().position; }

void meet(Meeting meeting, const Site& site) { machine.meet(meeting, site); }
void arrive(const Site& site) { machine.arrive(site); }
void wait(const Site& site) { machine.wait(site); }

void exchange(void* value, unsigned size, unsigned source, const Site& site) { machine.exchange(value, size, source, site); }

void* shared_address(unsigned rank, Access access, unsigned offset, unsigned count, unsigned size, unsigned i, const Site& site) {
  return machine.shared_address(rank, access, offset, count, size, i, site);
}

void check_aligned(const void* address, const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw std::runtime_error("a 16-byte access at " + text_of(site) + " of an address that is not a multiple of 16");
}

}  // namespace fastkd::emulator
